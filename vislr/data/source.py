"""Pictures at the sizes of a model, by their place in training: what a place shows is a function of (seed, place)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vislr.core.errors import ConfigError, DataError
from vislr.data.buckets import Size, lost_share, nearest_size
from vislr.data.cache import cache_key
from vislr.data.captions import vary, with_trigger
from vislr.data.draws import generator
from vislr.data.images import Box, cut, decode, place, to_tensor
from vislr.data.order import Lane, Order
from vislr.data.pictures import Picture, Problem, refuse

if TYPE_CHECKING:
    import torch

    from vislr.data.pool import Part, Pool

# More of a picture than this is cut off: worth a note.
_MUCH = 0.25


@dataclass(frozen=True, slots=True)
class Item:
    """One picture at one place of training.

    Attributes:
        position: running number over all batches, the key of every draw.
        index: number of the picture in its source.
        caption: as the model is told: tags shuffled, trigger put in, dropped.
        label: number of the class; -1 for none.
        width, height: of its bucket, in pixels.
        prior: of a regularisation set.
        weight: factor of its loss.
        mask: a loss mask comes with its pixels.
        augment: cropped and mirrored by chance, as the config says.
    """

    position: int
    index: int
    caption: str
    label: int
    width: int
    height: int
    prior: bool
    weight: float
    mask: bool
    augment: bool


@dataclass
class Loaded:
    """The pixels of an item.

    Attributes:
        item: the item; another picture's if the one asked for turned out to be broken.
        pixels: uint8, (3, height, width).
        mask: float32, (1, height, width), 1 where the loss counts; None without masks.
        original: width and height of the upright picture.
        corner: top and left of the cut, in pixels of the picture scaled to the bucket.
        content: `Source.content_key` of the bytes that were read; empty unless asked for.
    """

    item: Item
    pixels: torch.Tensor
    mask: torch.Tensor | None
    original: Size
    corner: tuple[int, int]
    content: str = ""


class Source:
    """Pictures of a pool, cut to size; made by `Pool.at`.

    Attributes:
        count: number of pictures; they are numbered 0 to count - 1.
        sizes: (width, height) of every bucket in use.
        problems: pictures that are too small for every bucket (fatal), or lose much of their area.
        random: whether a picture's pixels differ from one epoch to the next.
        streamed: whether pictures come from shards.
    """

    def __init__(self, pool: Pool, size: int, multiple: int, seed: int) -> None:
        if size % multiple:
            raise ConfigError(f"data.size is {size}; expected a multiple of {multiple} for this model")
        self.pool, self.config, self.seed = pool, pool.config, seed
        self.random = self.config.crop == "random" or self.config.flip
        self.streamed = pool.streamed
        self.problems: list[Problem] = []
        self._parts = [part for part in pool.parts if len(part)]
        self._owner = np.repeat(np.arange(len(self._parts)), [len(part) for part in self._parts])
        self._local = np.concatenate([part.chosen for part in self._parts] or [np.empty(0, dtype=np.int64)])
        shapes = [part.store.sizes()[part.chosen] for part in self._parts]
        found = self._sort(np.concatenate(shapes or [np.empty((0, 2), dtype=np.int64)]), size, multiple)
        fitting = found >= 0
        self._owner, self._local, self._size = self._owner[fitting], self._local[fitting], found[fitting]
        self.count = len(self._local)
        self._lanes = self._make_lanes()
        self._order: Order | None = None
        self._named: set[int] = set()

    def __len__(self) -> int:
        """Examples in an epoch: repeats, weights and regularisation sets counted."""
        return sum(lane.count for lane in self._lanes)

    def _sort(self, shapes: np.ndarray, size: int, multiple: int) -> np.ndarray:
        """Number of the size of every picture, -1 where none fits."""
        if not self.config.buckets:
            self.sizes: list[Size] = [(size, size)]
            return np.zeros(len(shapes), dtype=np.int64)
        step = self.config.bucket_step or max(1, size // 16 // multiple) * multiple
        if step % multiple or step > size:
            raise ConfigError(
                f"data.bucket_step is {step}; expected a multiple of {multiple} for this model, at most {size}"
            )
        if not len(shapes):
            self.sizes = []
            return np.empty(0, dtype=np.int64)
        found, kind = np.unique(shapes, axis=0, return_inverse=True)
        kind = kind.reshape(-1)
        chosen = [nearest_size(int(w), int(h), size, step, self.config.max_aspect) for w, h in found]
        self.sizes = sorted({bucket for bucket in chosen if bucket is not None})
        number = {bucket: i for i, bucket in enumerate(self.sizes)}
        numbers = np.array([-1 if bucket is None else number[bucket] for bucket in chosen], dtype=np.int64)[kind]
        for shape, bucket, which in zip(found.tolist(), chosen, range(len(found)), strict=True):
            width, height = shape
            if bucket is None:
                text, fatal = f"is {width} x {height} pixels; the smallest size is {step} x {step}", True
            elif lost_share((width, height), bucket) > _MUCH:
                lost = lost_share((width, height), bucket)
                text, fatal = f"is {width} x {height} pixels; {lost:.0%} of it are cut off for {bucket}", False
            else:
                continue
            for index in np.flatnonzero(kind == which).tolist():
                name = self._parts[self._owner[index]].store.picture(int(self._local[index])).name
                self.problems.append(Problem(name, text, fatal))
        usable = int((numbers >= 0).sum())
        if self.config.broken == "stop":
            refuse(self.problems, usable)
        if not usable:
            raise DataError(f"no picture is large enough: {self.problems[0]}")
        return numbers

    def _make_lanes(self) -> list[Lane]:
        numbers = np.arange(self.count)
        made: list[tuple[Part, np.ndarray, np.ndarray | None, int]] = []
        for which, part in enumerate(self._parts):
            mine = numbers[self._owner == which]
            if not len(mine):
                continue
            kept = np.isin(part.chosen, self._local[mine], assume_unique=True)
            repeated = np.repeat(mine, part.repeats()[kept])
            groups = None if part.store.groups is None else part.store.groups[self._local[mine]]
            made.append((part, repeated, groups, len(repeated) * part.settings.repeats))
        counts = [0 if part.settings.prior else count for part, _, _, count in made]
        total = sum(counts)
        weights = [part.settings.weight for part, _, _, _ in made]
        if any(weight is not None and count for weight, count in zip(weights, counts, strict=True)):
            shares = [(weight or 0.0) if count else 0.0 for weight, count in zip(weights, counts, strict=True)]
            counts = _divide(total, shares)
        # As many regularisation pictures as others, however many there are.
        prior = [count if part.settings.prior else 0 for part, _, _, count in made]
        counts = [a + b for a, b in zip(counts, _divide(total, prior), strict=True)]
        return [
            Lane(pictures, count, groups, self.config.window)
            for (_, pictures, groups, _), count in zip(made, counts, strict=True)
            if count
        ]

    def _part(self, index: int) -> Part:
        return self._parts[self._owner[index]]

    def picture(self, index: int) -> Picture:
        """What is known of picture `index`."""
        return self._part(index).store.picture(int(self._local[index]))

    def size_of(self, index: int) -> Size:
        """Width and height of the bucket of picture `index`."""
        return self.sizes[int(self._size[index])]

    def item(self, index: int) -> Item:
        """Picture `index` as it is: cut in the middle, not mirrored, caption unchanged but for the trigger."""
        return self._item(index, index, augment=False)

    def _item(self, position: int, index: int, *, augment: bool) -> Item:
        config, part = self.config, self._part(index)
        picture, (width, height) = part.store.picture(int(self._local[index])), self.size_of(index)
        if augment:
            caption = vary(
                picture.caption, lambda: generator(self.seed, "caption", position), shuffle=config.shuffle_tags,
                keep=config.keep_tags, tag_dropout=config.tag_dropout, dropout=config.caption_dropout,
                trigger=self.pool.trigger(part),
            )  # fmt: skip
        else:
            caption = with_trigger(picture.caption, self.pool.trigger(part))
        prior = part.settings.prior
        weight = config.prior_weight if prior else 1.0
        masked = config.masks != "none"
        return Item(position, index, caption, picture.label, width, height, prior, weight, masked, augment)

    def batches(
        self, first_step: int, steps: int, batch: int, accumulation: int = 1, rank: int = 0, world: int = 1
    ) -> Iterator[list[Item]]:
        """The batches of one process, `accumulation` for each step from `first_step` to before `steps`.

        A step takes the next accumulation x world batches of the run, in the same order whatever the number of
        processes. All items of a batch have one size.

        Raises:
            DataError: there are no pictures.
        """
        if not self.count:
            raise DataError("there are no pictures to train on")
        if self._order is None or self._order.batch != batch:
            self._order = Order(self._lanes, self._size, self.seed, batch)
        for step in range(first_step, steps):
            for micro in range(accumulation):
                number = (step * accumulation + micro) * world + rank
                pictures = self._order.pictures(number)
                yield [self._item(number * batch + i, index, augment=True) for i, index in enumerate(pictures)]

    def _cut(self, item: Item, picture: Size) -> tuple[Box, bool]:
        config = self.config
        rng = generator(self.seed, "augment", item.position) if item.augment and self.random else None
        return cut(
            picture, (item.width, item.height), crop=config.crop, flip=config.flip, enlarge=not config.buckets, rng=rng
        )

    def content_key(self, item: Item) -> str:
        """What an item's pixels and mask depend on, as 64 hex digits.

        The bytes of the files, the cut, the size, mirroring and the decoder: equal keys are equal pixels, whatever
        the files are called and whenever they were changed.
        """
        store, local = self._part(item.index).store, int(self._local[item.index])
        picture = store.picture(local)
        return self._key(item, store.digest(local), self._mask_bytes(item), (picture.width, picture.height))

    def _mask_bytes(self, item: Item) -> bytes | None:
        if self.config.masks != "files":
            return None
        return self._part(item.index).store.mask(int(self._local[item.index]))

    def _key(self, item: Item, digest: str, mask: bytes | None, picture: Size) -> str:
        import PIL

        box, mirrored = self._cut(item, picture)
        return cache_key(
            "pixels", content=digest, mask=hashlib.sha256(mask).hexdigest() if mask is not None else None,
            masks=self.config.masks, box=repr(box), size=f"{item.width}x{item.height}", mirrored=mirrored,
            pillow=PIL.__version__,
        )  # fmt: skip

    def read(self, item: Item, *, keyed: bool = False) -> Loaded:
        """The pixels of an item.

        A picture that turns out to be broken is named in a warning and replaced by the next one of its bucket,
        unless `broken` is stop.

        Args:
            item: of this source.
            keyed: fill `Loaded.content`, from the very bytes that are shown.

        Raises:
            DataError: it cannot be read and `broken` is stop, or no picture of its bucket can.
        """
        members: np.ndarray | None = None
        index = item.index
        while True:
            try:
                return self._read(item, keyed)
            except DataError as error:
                reason = f"'{self.picture(item.index).name}' {error}" if str(error)[:1] != "'" else str(error)
                if self.config.broken == "stop":
                    raise DataError(reason) from error
                if item.index not in self._named:
                    self._named.add(item.index)
                    warnings.warn(f"left out while training: {reason}", stacklevel=2)
                if members is None:
                    members = np.flatnonzero(self._size == self._size[index])
                following = members[(np.searchsorted(members, item.index) + 1) % len(members)]
                if following == index:
                    raise DataError(f"no picture of {item.width} x {item.height} can be read: {reason}") from error
                item = self._item(item.position, int(following), augment=item.augment)

    def _read(self, item: Item, keyed: bool) -> Loaded:
        store, local = self._part(item.index).store, int(self._local[item.index])
        data = store.read(local)
        decoded = decode(data)
        box, mirrored = self._cut(item, decoded.image.size)
        size = (item.width, item.height)
        pixels = to_tensor(place(decoded.image, box, size, mirrored))
        mask, stored = None, self._mask_bytes(item)
        if item.mask:
            import torch
            from PIL import Image

            shown = decoded.alpha
            if self.config.masks == "files":
                shown = decode(stored).image.convert("L") if stored is not None else None
            if shown is None:
                shown = Image.new("L", decoded.image.size, 255)
            if shown.size != decoded.image.size:
                raise DataError(f"has a mask of {shown.width} x {shown.height} pixels")
            mask = to_tensor(place(shown, box, size, mirrored)).to(torch.float32) / 255
        scale = item.width / (box[2] - box[0])
        content = self._key(item, hashlib.sha256(data).hexdigest(), stored, decoded.image.size) if keyed else ""
        corner = (round(box[1] * scale), round(box[0] * scale))
        return Loaded(item, pixels, mask, decoded.image.size, corner, content)

    def captions(self) -> list[str] | None:
        """Every caption that can come up; None: too many to count. See `Pool.captions`."""
        return self.pool.captions()

    def fingerprint(self) -> str:
        """Of the pictures; see `Pool.fingerprint`."""
        return self.pool.fingerprint()

    def table(self) -> dict[Size, int]:
        """Bucket -> number of pictures."""
        counts = np.bincount(self._size, minlength=len(self.sizes))
        return dict(zip(self.sizes, counts.tolist(), strict=True))


def _divide(total: int, shares: Sequence[float]) -> list[int]:
    """`total` in whole numbers, in proportion to `shares`; every share above 0 gets at least 1."""
    whole = sum(shares)
    if not whole:
        return [0] * len(shares)
    exact = [total * share / whole for share in shares]
    counts = [int(value) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return [max(count, 1) if share else 0 for count, share in zip(counts, shares, strict=True)]
