"""What a layer's inputs look like: a histogram that grows with what it sees, and ranges chosen from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from vislr.core.errors import DataError
from vislr.core.quantizing import affine_of, to_codes
from vislr.quantize.weights import INSIDE, POWER, SHARES

BINS = 2048
# Of a large input so many values enter the histogram, evenly spaced; lowest and highest are of all.
SEEN = 1 << 16


class RangeObserver:
    """Lowest and highest value, and a histogram between them: 16 KB, whatever it is shown.

    Attributes:
        low, high: of all values seen.
        counts: (BINS,) float64, over low ... high.
    """

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """Take in the values of a tensor.

        Raises:
            DataError: values that are not finite.
        """
        flat = x.detach().reshape(-1)
        low, high = (float(edge) for edge in flat.aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise DataError("an input has values that are not finite")
        self._grow(min(low, self.low), max(high, self.high))
        chosen = flat[:: max(1, flat.numel() // SEEN)].float()
        if self.high > self.low:
            self.counts += torch.histc(chosen, BINS, self.low, self.high).double().cpu()
        else:
            self.counts[0] += chosen.numel()

    def _grow(self, low: float, high: float) -> None:
        """Widen the range; what was counted moves to where its bins' centres lie now."""
        if (low, high) == (self.low, self.high):
            return
        if self.counts.sum() > 0 and high > low:
            place = ((self._centres() - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
            self.counts = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, self.counts)
        self.low, self.high = low, high

    def _centres(self) -> torch.Tensor:
        width = (self.high - self.low) / BINS
        return self.low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)

    def range(self, method: str, bits: int) -> tuple[float, float]:
        """The range that codes should cover.

        Args:
            method: "minmax": all that was seen. "percentile": .1 % may lie outside. "mse": the share of the whole
                range (80 of .21 to 1) with the least mean |x - x_hat|^2.4 at `bits` (EfficientDM's search).

        Raises:
            DataError: nothing was seen.
        """
        if not self.counts.sum() > 0:
            raise DataError("a layer was never called during calibration")
        if method == "minmax" or self.high <= self.low:
            return self.low, self.high
        if method == "percentile":
            held = self.counts.cumsum(0) / self.counts.sum()
            edge = (1 - INSIDE) / 2
            centres = self._centres()
            first, last = int((held < edge).sum()), int((held < 1 - edge).sum())
            return float(centres[min(first, BINS - 1)]), float(centres[min(last, BINS - 1)])
        x, shares = self._centres(), torch.tensor(SHARES, dtype=torch.float64)[:, None]
        scale, zero = affine_of(shares * self.low, shares * self.high, bits)
        back = (to_codes(x, scale, zero, bits) - zero) * scale
        errors = ((x - back).abs() ** POWER * self.counts).sum(1)
        best = SHARES[int(errors.argmin())]
        return best * self.low, best * self.high

    def state(self) -> torch.Tensor:
        """All of it as one tensor (BINS + 2,) float64."""
        return torch.cat([torch.tensor([self.low, self.high], dtype=torch.float64), self.counts])

    @classmethod
    def of(cls, state: torch.Tensor) -> RangeObserver:
        """The inverse of `state`."""
        made = cls()
        made.low, made.high, made.counts = float(state[0]), float(state[1]), state[2:].clone()
        return made


@contextlib.contextmanager
def observing(module: nn.Module, observers: Mapping[str, RangeObserver]) -> Iterator[None]:
    """While inside, every call of the named layers shows its input to their observers."""
    handles = []

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple) -> None:
            try:
                observers[name].update(args[0])
            except DataError as error:
                raise DataError(f"'{name}': {error}") from None

        return hook

    try:
        for name in observers:
            handles.append(module.get_submodule(name).register_forward_pre_hook(watch(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def fresh(names: Iterable[str]) -> dict[str, RangeObserver]:
    """An observer for each name."""
    return {name: RangeObserver() for name in names}
