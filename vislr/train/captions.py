"""Conditions of captions: encoded once, kept and looked up; or anew in every step while encoders are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from vislr.data import TensorCache
from vislr.train.families import Conditions

# Captions kept in memory while they are made up on the way (shuffled tags, shards).
_KEPT = 4096


class Captions:
    """Rows of conditions by caption.

    Captions are encoded one by one: a row depends on its caption alone, whatever stood beside it.

    Args:
        encode: texts -> conditions, a row each.
        known: all captions that can come up, encoded at once; None: they are encoded when they come up.
        trained: the encoders are trained: encode every time, with gradients.
        cache, key: where rows are kept on disk, and a caption's key there.
    """

    def __init__(
        self, encode: Callable[[list[str]], Conditions], known: Iterable[str] | None, *, trained: bool = False,
        cache: TensorCache | None = None, key: Callable[[str], str] | None = None,
    ) -> None:  # fmt: skip
        self._encode, self.trained = encode, trained
        self._cache, self._key = cache, key
        self._rows: dict[str, Conditions] = {}
        self._bounded = known is not None
        if not trained:
            for caption in dict.fromkeys(known or ()):
                self._row(caption)

    @property
    def bounded(self) -> bool:
        """Whether no encoder is needed any more."""
        return self._bounded and not self.trained

    def rows(self, captions: list[str], device: torch.device) -> Conditions:
        """Conditions of these captions, on `device`."""
        if self.trained:
            return self._encode(captions)
        found = [self._row(caption) for caption in captions]
        return {name: torch.cat([row[name] for row in found]).to(device, non_blocking=True) for name in found[0]}

    def _row(self, caption: str) -> Conditions:
        row = self._rows.get(caption)
        if row is not None:
            return row
        if self._cache is not None and self._key is not None:
            row = self._cache.get(self._key(caption))
        if row is None:
            with torch.no_grad():
                row = self._encode([caption])
            if self._cache is not None and self._key is not None:
                self._cache.put(self._key(caption), {name: value.cpu() for name, value in row.items()})
        if not self._bounded and len(self._rows) >= _KEPT:
            self._rows.pop(next(iter(self._rows)))
        self._rows[caption] = row
        return row
