"""What a cache keeps between calls, and what the current pass may use again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

# A kept result: the tensors of one place, None where a block gives none.
Kept = tuple[torch.Tensor | None, ...]


class CacheState:
    """Kept tensors by region and key, shared by the hooks of one model.

    A pass works for one key, or for several in equal parts of the batch: a plain run has one key; a
    composition has one for each adapter, so that each finds its own features again.

    Args:
        regions: how many there are.

    Attributes:
        reused: regions (places in the plan) that the current pass takes from the store.
        keys: whom the current pass is for, one an equal part of the batch.
    """

    def __init__(self, regions: int = 1) -> None:
        # Places are there from the start and stay: compiled graphs are guarded by a dictionary's keys.
        self.store: dict[tuple[int, Hashable], Kept | None] = {(region, 0): None for region in range(regions)}
        self.reused: frozenset[int] = frozenset()
        self.keys: tuple[Hashable, ...] = (0,)

    def begin(self, keys: Sequence[Hashable], wanted: frozenset[int]) -> None:
        """A pass for these keys begins: it reuses what is wanted and there for all of them."""
        self.keys = tuple(keys)
        self.reused = frozenset(
            region for region in wanted if all(self.store.get((region, key)) is not None for key in self.keys)
        )

    def clear(self) -> None:
        """Forget everything: a new run begins."""
        self.store.update(dict.fromkeys(self.store))
        self.reused = frozenset()

    def put(self, region: int, tensors: Kept) -> None:
        """Keep the tensors of this pass, each key its part of the batch."""
        count = len(self.keys)
        if count == 1:
            self.store[region, self.keys[0]] = tensors
            return
        parts = [(None,) * count if tensor is None else tensor.chunk(count) for tensor in tensors]
        for place, key in enumerate(self.keys):
            self.store[region, key] = tuple(part[place] for part in parts)

    def get(self, region: int) -> Kept:
        """What is kept for the keys of this pass."""
        kept = [self._kept(region, key) for key in self.keys]
        if len(kept) == 1:
            return kept[0]
        return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*kept, strict=True))

    def _kept(self, region: int, key: Hashable) -> Kept:
        kept = self.store[region, key]
        assert kept is not None
        return kept
