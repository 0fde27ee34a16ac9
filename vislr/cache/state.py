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

    Attributes:
        reused: regions (places in the plan) that the current pass takes from the store.
        keys: whom the current pass is for, one an equal part of the batch.
    """

    def __init__(self) -> None:
        self.store: dict[tuple[int, Hashable], Kept] = {}
        self.reused: frozenset[int] = frozenset()
        self.keys: tuple[Hashable, ...] = (0,)

    def begin(self, keys: Sequence[Hashable], wanted: frozenset[int]) -> None:
        """A pass for these keys begins: it reuses what is wanted and there for all of them."""
        self.keys = tuple(keys)
        self.reused = frozenset(region for region in wanted if all((region, key) in self.store for key in self.keys))

    def clear(self) -> None:
        """Forget everything: a new run begins."""
        self.store.clear()
        self.reused = frozenset()

    def forget(self, key: Hashable) -> None:
        """Forget what is kept for one key."""
        for place in [place for place in self.store if place[1] == key]:
            del self.store[place]

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
        kept = [self.store[region, key] for key in self.keys]
        if len(kept) == 1:
            return kept[0]
        return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*kept, strict=True))
