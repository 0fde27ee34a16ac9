"""Which picture stands at which place of training: a pure function of (seed, batch number).

Pictures arrive one by one in an endless order: every lane (a folder, a set of shards) brings its pictures in a new
permutation for every pass over them, and an epoch mixes the lanes in fixed shares. Arrivals wait, size by size, until
as many of one size are there as a batch holds; that is the next batch. So every batch is full and of one size, and
every picture comes up exactly as often as its lane says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vislr.data.draws import epoch_order, generator, key_seed


@dataclass
class Lane:
    """Pictures that come up equally often.

    Attributes:
        pictures: (n,) numbers of the pictures; a number twice comes up twice in a pass.
        count: arrivals in an epoch.
        groups: (n,) number of the shard of each; None: no shards, any order is as fast.
        window: with shards, so many neighbours are shuffled among themselves.
    """

    pictures: np.ndarray
    count: int
    groups: np.ndarray | None = None
    window: int = 1

    def order(self, seed: int, round_: int) -> np.ndarray:
        """The numbers of the pictures in this pass over the lane."""
        if self.groups is None:
            return self.pictures[list(epoch_order(seed, round_, len(self.pictures)))]
        import torch

        # Shards as wholes in a new order, then windows of neighbours in a new order.
        names, group = np.unique(self.groups, return_inverse=True)
        place = torch.randperm(len(names), generator=generator(seed, "shards", round_)).numpy()[group]
        sequence = np.argsort(place, kind="stable")
        keys = torch.rand(len(sequence), generator=generator(seed, "window", round_), dtype=torch.float64).numpy()
        return self.pictures[sequence[np.lexsort((keys, np.arange(len(sequence)) // self.window))]]


class Order:
    """Batches of one size, by number.

    Args:
        lanes: at least one, each with arrivals.
        sizes: (n,) number of the size of every picture.
        seed: of the run.
        batch: pictures of a batch.
    """

    def __init__(self, lanes: Sequence[Lane], sizes: np.ndarray, seed: int, batch: int) -> None:
        self.lanes, self.sizes, self.seed, self.batch = list(lanes), sizes, seed, batch
        self.arrivals = sum(lane.count for lane in lanes)
        self._one_size = len(np.unique(np.concatenate([sizes[lane.pictures] for lane in self.lanes]))) == 1
        self._rounds: dict[int, tuple[int, np.ndarray]] = {}
        self._drawn: dict[int, np.ndarray] = {}
        self._restart()

    def _restart(self) -> None:
        self._epoch, self._first = -1, 0
        self._batches = np.empty((0, self.batch), dtype=np.int64)
        self._waiting = np.empty(0, dtype=np.int64)

    def _arriving(self, epoch: int) -> np.ndarray:
        """Pictures in the order of their arrival in this epoch."""
        if epoch not in self._drawn:
            # Batches reach from one epoch into the next.
            self._drawn = {key: value for key, value in self._drawn.items() if key == epoch - 1}
            self._drawn[epoch] = self._draw(epoch)
        return self._drawn[epoch]

    def _draw(self, epoch: int) -> np.ndarray:
        streams = [self._stream(number, epoch) for number in range(len(self.lanes))]
        if len(streams) == 1:
            return streams[0]
        import torch

        owner = np.repeat(np.arange(len(streams)), [len(stream) for stream in streams])
        mixed = owner[torch.randperm(self.arrivals, generator=generator(self.seed, "mix", epoch)).numpy()]
        result = np.empty(self.arrivals, dtype=np.int64)
        for number, stream in enumerate(streams):
            result[mixed == number] = stream
        return result

    def _stream(self, number: int, epoch: int) -> np.ndarray:
        lane = self.lanes[number]
        seed = self.seed if number == 0 else key_seed(self.seed, "lane", number)
        start, stop, length = epoch * lane.count, (epoch + 1) * lane.count, len(lane.pictures)
        parts = []
        for round_ in range(start // length, -(-stop // length)):
            known = self._rounds.get(number)
            # A pass over a large lane spans several epochs: it is drawn once.
            if known is None or known[0] != round_:
                known = self._rounds[number] = round_, lane.order(seed, round_)
            low = round_ * length
            parts.append(known[1][max(start - low, 0) : stop - low])
        return np.concatenate(parts)

    def _advance(self) -> None:
        """The batches of the next epoch."""
        self._first += len(self._batches)
        self._epoch += 1
        arrived = np.concatenate([self._waiting, self._arriving(self._epoch)])
        kinds = self.sizes[arrived]
        by_size = np.argsort(kinds, kind="stable")
        batches, left = [], []
        for members in np.split(by_size, np.flatnonzero(np.diff(kinds[by_size])) + 1):
            whole = len(members) // self.batch * self.batch
            batches.append(members[:whole].reshape(-1, self.batch))
            left.append(members[whole:])
        places = np.concatenate(batches)
        # A batch goes when its last picture arrives.
        self._batches = arrived[places[np.argsort(places[:, -1])]]
        self._waiting = arrived[np.sort(np.concatenate(left))]

    def pictures(self, number: int) -> list[int]:
        """The pictures of batch `number`."""
        if self._one_size:
            # No picture waits, so every batch is found at once, however late it is.
            places = range(number * self.batch, (number + 1) * self.batch)
            return [int(self._arriving(place // self.arrivals)[place % self.arrivals]) for place in places]
        if number < self._first:
            self._restart()
        while number >= self._first + len(self._batches):
            self._advance()
        return self._batches[number - self._first].tolist()
