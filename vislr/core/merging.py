"""Merge several updates of one weight, tensor in, tensor out: sum, TIES, DARE, magnitude; low-rank forms.

A delta is what an adapter adds to a weight, its scale included: (out, in) or (out, in, *kernel). Every
function computes in float32 at least and returns that; arguments are not changed. With weights w_i and
deltas D_i::

    sum         sum_i w_i D_i
    magnitude   sum_i w_i trim(D_i)                       trim keeps the largest entries of each delta
    dare        sum_i w_i drop(D_i)                       drop zeroes entries at random, the rest / density
    ties        elect(w_1 trim(D_1), ...)                 elect: mean of what agrees with the elected sign
    dare_ties   elect(w_1 drop(D_1), ...)

TIES: arXiv 2306.01708; its trim is per task vector, here per layer, as adapters are. DARE: arXiv 2311.03099.
Weights multiply before signs are elected, so a delta of weight 0 has no say (peft elects without them).

A low-rank delta is a pair `up` (out, r), `down` (r, n) with delta = up @ down, n = in times the kernel's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from vislr.core.errors import AdapterError, ConfigError, hint

METHODS = ("sum", "magnitude", "dare", "ties", "dare_ties")
Factors = tuple[torch.Tensor, torch.Tensor]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_density(density: float) -> None:
    """Refuse an impossible density.

    Raises:
        ConfigError: outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ConfigError(f"density is {density}; expected above 0 and at most 1 (the share of entries that stay)")


def keep_largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Zero all but the round(density * n) entries (at least one) of largest magnitude.

    Raises:
        ConfigError: density outside (0, 1].
    """
    check_density(density)
    flat = wide(delta).reshape(-1)
    count = max(1, round(density * flat.numel()))
    if count >= flat.numel():
        return flat.reshape(delta.shape).clone()
    places = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, places, flat[places]).reshape(delta.shape)


def drop_randomly(delta: torch.Tensor, density: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Keep each entry with probability `density`, divided by it: the expected value is the delta.

    Raises:
        ConfigError: density outside (0, 1].
    """
    check_density(density)
    kept = torch.rand(delta.shape, generator=generator, device=delta.device) < density
    return wide(delta) * kept / density


def elected_mean(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Per entry, the mean of those non-zero deltas whose sign is the sign of the sum of all (TIES, section 3).

    Where the sum is 0 the result is 0.
    """
    stacked = torch.stack([wide(delta) for delta in deltas])
    agree = stacked.sign() == stacked.sum(0).sign()
    agree &= stacked != 0
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def merge_deltas(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    method: str = "sum",
    density: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One delta out of several of the same shape.

    Args:
        deltas: scale included.
        weights: one a delta; any sign.
        method: one of `METHODS`.
        density: share of entries that stay, in (0, 1]; not used by "sum".
        generator: of the entries that "dare" and "dare_ties" drop.

    Raises:
        ConfigError: an unknown method, a density outside (0, 1], no deltas, or counts or shapes that differ.
    """
    if method not in METHODS:
        raise ConfigError(f"no way of merging is called '{method}'{hint(method, METHODS)}")
    if not deltas or len(deltas) != len(weights):
        raise ConfigError(f"{len(deltas)} deltas and {len(weights)} weights; expected as many, at least one")
    shapes = {tuple(delta.shape) for delta in deltas}
    if len(shapes) > 1:
        raise ConfigError(f"deltas of one weight have different shapes: {', '.join(map(str, sorted(shapes)))}")
    if method in ("magnitude", "ties"):
        deltas = [keep_largest(delta, density) for delta in deltas]
    elif method in ("dare", "dare_ties"):
        deltas = [drop_randomly(delta, density, generator) for delta in deltas]
    scaled = [wide(delta) * weight for delta, weight in zip(deltas, weights, strict=True)]
    return elected_mean(scaled) if method in ("ties", "dare_ties") else torch.stack(scaled).sum(0)


def low_rank_sum(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Exact sum of low-rank deltas, ranks may differ: up (out, sum r_i), down (sum r_i, n)."""
    up = torch.cat([wide(up) * weight for (up, _), weight in zip(factors, weights, strict=True)], 1)
    return up, torch.cat([wide(down) for _, down in factors])


def svd_of_factors(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD of up @ down without the product: u (out, k), s (k,) falling, vh (k, n), k = min(r, out, n), float64.

    QR of both factors leaves an SVD of at most r x r: O((out + n) r^2) in place of O(out n min(out, n)).
    """
    left, small_left = torch.linalg.qr(up.double())
    right, small_right = torch.linalg.qr(down.double().T)
    u, s, vh = _svd(small_left @ small_right.T)
    return left @ u, s, vh @ right.T


def _svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not bool(torch.isfinite(matrix).all()):
        raise AdapterError("is changed by values that are not finite, or too large to be decomposed")
    return torch.linalg.svd(matrix, full_matrices=False)


def check_cut(rank: int | None, energy: float | None) -> None:
    """Refuse an impossible rank or energy.

    Raises:
        ConfigError: rank below 1 or energy outside (0, 1].
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy is {energy}; expected above 0 and at most 1 (share of the squared norm that stays)")


def rank_for(singular: torch.Tensor, rank: int | None = None, energy: float | None = None) -> int:
    """How many singular values to keep: at most `rank`, and the fewest that hold `energy` of the sum of squares.

    Zeros at rounding level are never kept; the result is at least 1.

    Raises:
        ConfigError: rank below 1 or energy outside (0, 1].
    """
    check_cut(rank, energy)
    noise = singular[0] * torch.finfo(singular.dtype).eps * len(singular)
    keep = int((singular > noise).sum())
    if energy is not None and energy < 1:
        held = singular.double().square().cumsum(0)
        keep = min(keep, int((held < energy * held[-1]).sum()) + 1)
    return max(1, keep if rank is None else min(keep, rank))


class LowRank(NamedTuple):
    """A truncated delta: the best pair of its rank, and what the truncation cost.

    Attributes:
        up, down: (out, r) and (r, n); each carries the root of the singular values, so that both fit half
            precision alike.
        error: relative Frobenius error, sqrt(sum of squares beyond r / sum of all squares of singular values).
    """

    up: torch.Tensor
    down: torch.Tensor
    error: float

    @property
    def norm(self) -> float:
        """Frobenius norm of the delta before it was truncated."""
        # The factors are orthogonal up to the roots: a column's squared length is a singular value that stayed.
        return float(self.up.double().square().sum(0).norm()) / math.sqrt(1 - self.error**2)


def truncated(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int) -> LowRank:
    """The first `rank` terms of an SVD."""
    root, squares = s[:rank].sqrt(), s.double().square()
    total = float(squares.sum())
    error = math.sqrt(float(squares[rank:].sum()) / total) if total else 0.0
    return LowRank(u[:, :rank] * root, root[:, None] * vh[:rank], error)


def low_rank_of(delta: torch.Tensor, rank: int | None = None, energy: float | None = None) -> LowRank:
    """Best low-rank pair of a dense delta (out, ...), kernel axes counted with the input.

    Raises:
        ConfigError: rank below 1 or energy outside (0, 1].
        AdapterError: values that are not finite, or overflow.
    """
    u, s, vh = _svd(wide(delta).flatten(1))
    return truncated(u, s, vh, rank_for(s, rank, energy))


def resized(up: torch.Tensor, down: torch.Tensor, rank: int | None = None, energy: float | None = None) -> LowRank:
    """A low-rank pair of another rank; the product is never formed. In float64.

    Raises:
        ConfigError: rank below 1 or energy outside (0, 1].
        AdapterError: values that are not finite, or overflow.
    """
    u, s, vh = svd_of_factors(up, down)
    return truncated(u, s, vh, rank_for(s, rank, energy))
