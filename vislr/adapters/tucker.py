"""An existing conv becomes three smaller ones: a Tucker-2 decomposition of its weight.

The algebra of FLoRA's chain, used to compress: the weight W (Co, Ci, kh, kw) is approximated by a core
C (r_out, r_in, kh, kw) and two orthonormal factors U (Co, r_out), V (Ci, r_in)::

    W[o, i, h, w] ~ sum_{b a} C[b, a, h, w] U[o, b] V[i, a]

which is a 1x1 conv with V^T, a kh x kw conv with C, and a 1x1 conv with U. Source: Kim et al., "Compression
of deep convolutional neural networks for fast and low power mobile applications" (arXiv 1511.06530);
factors by truncated higher-order SVD, refined by alternating least squares (HOOI, tensorly).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vislr.adapters.geometry import why_not
from vislr.core.errors import AdapterError

# HOOI stops when the relative error moves by less than this, or after so many rounds.
_TOLERANCE, _ROUNDS = 1e-5, 20
# Ranks by latency: shares of the conv's FLOPs of which the best ranks are timed; kernels like multiples of 8.
_SHARES, _STEP = (0.03, 0.06, 0.1, 0.15, 0.22, 0.3, 0.4, 0.55, 0.75), 8


@dataclass(frozen=True)
class Timed:
    """One pair of ranks that was timed against the conv.

    Attributes:
        ranks: (r_out, r_in).
        kept: share of the weight's squared norm that the truncated decomposition keeps.
        seconds: median time of the three convs on the sample.
        speedup: median over rounds of (the conv's time / theirs).
    """

    ranks: tuple[int, int]
    kept: float
    seconds: float
    speedup: float


@dataclass(frozen=True)
class TuckerReport:
    """What a decomposition kept and what it costs.

    Attributes:
        ranks: (r_out, r_in).
        error: |W - approximation| / |W|, Frobenius norms; what is kept of the energy is 1 - error^2.
        parameters: of the conv and of the three convs, bias included.
        flops_ratio: FLOPs of the three convs by those of the conv, on maps that the stride divides:
            (s Ci r_in + k r_in r_out + r_out Co) / (k Ci Co), k taps, s input positions for each output.
        seconds: median time of the conv on the sample, if ranks were chosen by latency.
        timed: all pairs of ranks that were timed for that choice, the cheapest first.
    """

    ranks: tuple[int, int]
    error: float
    parameters: tuple[int, int]
    flops_ratio: float
    seconds: float | None = None
    timed: tuple[Timed, ...] = ()


def tucker_from_weight(
    conv: nn.Conv2d,
    *,
    ranks: tuple[int, int] | None = None,
    energy: float | None = None,
    budget: int | float | None = None,
    speedup: float | None = None,
    sample: torch.Tensor | None = None,
) -> tuple[nn.Sequential, TuckerReport]:
    """Decompose a conv; exactly one of `ranks`, `energy`, `budget` and `speedup` says how far.

    Args:
        conv: a Conv2d without groups; any kernel, stride, padding, padding_mode, dilation, dtype. It is not
            changed.
        ranks: (r_out, r_in), at most (Co, Ci).
        energy: at least this share of the squared norm of the weight is kept, in (0, 1], with as few
            parameters as the truncated higher-order SVD allows.
        budget: at most this many parameters, bias included; or, a float in (0, 1], at most this share of the
            conv's own. Of all ranks within it, those that keep most energy.
        speedup: at least this many times as fast as the conv, measured here and now on `sample` (forward, without
            gradient; about 80 forwards of the conv's size). Of up to nine pairs of ranks, each the best for its
            FLOPs, the one that keeps most energy; the report holds what was timed.
        sample: (N, Ci, H, W), the input that `speedup` is measured on: batch and size decide what is fast.

    Returns:
        nn.Sequential of three Conv2d, (N, Ci, H, W) -> (N, Co, H', W') as the conv, same device, dtype,
        training flag and requires_grad; and a TuckerReport.

    Raises:
        AdapterError: no plain Conv2d, groups, a weight that is not finite; none or several of the three are
            given, or a value is impossible; or no ranks are as fast as `speedup` asks.
    """
    _check(conv)
    out, inside, *kernel = conv.weight.shape
    taps = math.prod(kernel)
    weight = conv.weight.detach().to("cpu", torch.float64).numpy()
    bias = 0 if conv.bias is None else out
    own = weight.size + bias
    core, factors = _higher_order_svd(weight)
    kept = _kept_energy(core)
    counts = _counts(out, inside, taps) + bias
    seconds: float | None = None
    timed: tuple[Timed, ...] = ()
    if speedup is None:
        chosen = _choose(ranks, energy, budget, kept, counts, own)
    else:
        if any(value is not None for value in (ranks, energy, budget)):
            raise AdapterError("speedup is given beside ranks, energy or budget; expected one of them")
        seconds, timed = _time(conv, core, factors, kept, speedup, sample)
        fast = [one for one in timed if one.speedup >= speedup]
        if not fast:
            best = max(timed, key=lambda one: one.speedup)
            raise AdapterError(
                f"no ranks are {speedup:g} times as fast here; the fastest of {len(timed)} that were timed, "
                f"{best.ranks}, is {best.speedup:.2f} times as fast and keeps {best.kept:.0%} of the energy"
            )
        chosen = max(fast, key=lambda one: one.kept).ranks
    core, factors, error = _refined(weight, core, factors, chosen)
    r_out, r_in = chosen
    report = TuckerReport(
        ranks=chosen,
        error=error,
        parameters=(own, int(counts[r_out - 1, r_in - 1])),
        flops_ratio=(math.prod(conv.stride) * inside * r_in + taps * r_in * r_out + r_out * out)
        / (taps * inside * out),
        seconds=seconds,
        timed=timed,
    )
    return _convs(conv, core, factors), report


def _check(conv: Any) -> None:
    if not isinstance(conv, nn.Conv2d):
        raise AdapterError(f"cannot decompose a {type(conv).__name__}; expected a Conv2d")
    reason = why_not(conv) or ("chooses its padding from the input" if type(conv).__name__ == "Conv2dSame" else "")
    if reason:
        raise AdapterError(f"cannot decompose this {type(conv).__name__}: it {reason}")
    if conv.groups != 1:
        raise AdapterError(f"cannot decompose a conv with {conv.groups} groups; expected groups=1")
    if conv.weight.is_meta:
        raise AdapterError("cannot decompose a conv on the meta device: its weight has no values")
    if not torch.isfinite(conv.weight).all():
        raise AdapterError("cannot decompose a conv whose weight has NaN or infinite values")


def _unfolded(weight: np.ndarray, mode: int) -> np.ndarray:
    return np.moveaxis(weight, mode, 0).reshape(weight.shape[mode], -1)


def _higher_order_svd(weight: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """All of it: core (Co, Ci, kh, kw) and square orthonormal factors, directions of most energy first."""
    factors = []
    for mode in (0, 1):
        matrix = _unfolded(weight, mode)
        _, vectors = np.linalg.eigh(matrix @ matrix.T)
        factors.append(vectors[:, ::-1])
    return np.einsum("oihw,ob,ia->bahw", weight, *factors, optimize=True), factors


def _kept_energy(core: np.ndarray) -> np.ndarray:
    """(Co, Ci): share of the energy that the truncation to ranks (row + 1, column + 1) keeps."""
    table = np.square(core).sum((2, 3)).cumsum(0).cumsum(1)
    return table / table[-1, -1] if table[-1, -1] > 0 else np.ones_like(table)


def _counts(out: int, inside: int, taps: int) -> np.ndarray:
    """(Co, Ci): parameters of the three convs at ranks (row + 1, column + 1), without bias."""
    r_out, r_in = np.arange(1, out + 1)[:, None], np.arange(1, inside + 1)[None]
    return inside * r_in + taps * r_in * r_out + out * r_out


def _choose(ranks: Any, energy: Any, budget: Any, kept: np.ndarray, counts: np.ndarray, own: int) -> tuple[int, int]:
    """(r_out, r_in) from the one of the three that is given."""
    given = [name for name, value in (("ranks", ranks), ("energy", energy), ("budget", budget)) if value is not None]
    if len(given) != 1:
        raise AdapterError(f"expected one of ranks, energy, budget, speedup; got {' and '.join(given) or 'none'}")
    if ranks is not None:
        pair = tuple(ranks) if isinstance(ranks, (tuple, list)) else ()
        fits = len(pair) == 2 and all(isinstance(r, int) and not isinstance(r, bool) for r in pair)
        if not fits or not all(1 <= rank <= size for rank, size in zip(pair, kept.shape, strict=True)):
            raise AdapterError(f"ranks are {ranks!r}; expected (r_out, r_in) from (1, 1) to {kept.shape}")
        return pair[0], pair[1]
    if energy is not None:
        if isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1:
            raise AdapterError(f"energy is {energy!r}; expected a share in (0, 1]")
        # Rounding must not cost the last direction: full rank keeps all.
        enough = kept >= energy - 1e-12
        return _at(np.where(enough, counts - kept, np.inf))
    share = isinstance(budget, float) and 0 < budget <= 1
    if not share and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise AdapterError(f"budget is {budget!r}; expected a number of parameters or a share in (0, 1]")
    limit = int(budget * own) if share else budget
    if limit < counts[0, 0]:
        raise AdapterError(f"a budget of {limit} parameters is below the {counts[0, 0]} of ranks (1, 1)")
    return _at(np.where(counts <= limit, -kept, np.inf))


def _time(
    conv: nn.Conv2d, core: np.ndarray, factors: list[np.ndarray], kept: np.ndarray, speedup: Any, sample: Any
) -> tuple[float, tuple[Timed, ...]]:
    """Median seconds of the conv on `sample`, and of the best ranks for several shares of its FLOPs."""
    from vislr.measure import interleaved

    if isinstance(speedup, bool) or not isinstance(speedup, (int, float)) or not 0 < speedup < math.inf:
        raise AdapterError(f"speedup is {speedup!r}; expected a number above 0")
    shape = tuple(sample.shape) if torch.is_tensor(sample) else ()
    if len(shape) != 4 or shape[1] != conv.in_channels:
        raise AdapterError(f"sample has shape {shape}; speedup is measured on (N, {conv.in_channels}, H, W)")
    out, inside, *kernel = conv.weight.shape
    taps = math.prod(kernel)
    r_out, r_in = np.arange(1, out + 1)[:, None], np.arange(1, inside + 1)[None]
    flops = math.prod(conv.stride) * inside * r_in + taps * r_in * r_out + out * r_out
    odd = [(r % min(_STEP, size) != 0) for r, size in ((r_out, out), (r_in, inside))]
    usable = np.where(odd[0] | odd[1], -1.0, kept)
    pairs = [_at(np.where(flops <= share * taps * inside * out, -usable, np.inf)) for share in _SHARES]
    cheapest = (min(_STEP, out), min(_STEP, inside))
    ranks = list(dict.fromkeys(pair for pair in pairs if usable[pair[0] - 1, pair[1] - 1] >= 0)) or [cheapest]
    convs = {pair: _convs(conv, core[: pair[0], : pair[1]], _cut(factors, pair)) for pair in ranks}
    given = sample.detach().to(conv.weight.device, conv.weight.dtype)

    def call(layer: nn.Module) -> Any:
        def forward() -> None:
            with torch.no_grad():
                layer(given)

        return forward

    calls = {"conv": call(conv)} | {str(pair): call(layers) for pair, layers in convs.items()}
    times = interleaved(calls, baseline="conv", rounds=7, warmup=2, device=given.device)
    timed = [
        Timed(
            pair, float(kept[pair[0] - 1, pair[1] - 1]), times[str(pair)].value, times[str(pair)].parts["speedup"].value
        )
        for pair in ranks
    ]
    return times["conv"].value, tuple(timed)


def _cut(factors: list[np.ndarray], ranks: tuple[int, int]) -> list[np.ndarray]:
    return [factor[:, :rank].copy() for factor, rank in zip(factors, ranks, strict=True)]


def _at(cost: np.ndarray) -> tuple[int, int]:
    row, column = np.unravel_index(np.argmin(cost), cost.shape)
    return int(row) + 1, int(column) + 1


def _refined(
    weight: np.ndarray, core: np.ndarray, factors: list[np.ndarray], ranks: tuple[int, int]
) -> tuple[np.ndarray, list[np.ndarray], float]:
    """Truncate to `ranks` and improve by HOOI: core, factors and relative error."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    start = _cut(factors, ranks)
    truncated = core[: ranks[0], : ranks[1]].copy()
    norm = np.linalg.norm(weight)
    if norm == 0 or ranks == weight.shape[:2]:
        return truncated, start, 0.0
    taps = math.prod(weight.shape[2:])
    if ranks[0] > taps * ranks[1] or ranks[1] > taps * ranks[0]:
        # One side has more directions than the other can feed; HOOI would fill them up at random.
        return truncated, start, _error(weight, truncated, start)
    # The backend is the user's choice elsewhere; here arrays are numpy's.
    with tensorly.backend_context("numpy", local_threadsafe=True):
        (core, factors), _ = partial_tucker(
            weight, rank=list(ranks), modes=[0, 1], init=(truncated, start), n_iter_max=_ROUNDS, tol=_TOLERANCE
        )
    return core, factors, _error(weight, core, factors)


def _error(weight: np.ndarray, core: np.ndarray, factors: list[np.ndarray]) -> float:
    approximation = np.einsum("bahw,ob,ia->oihw", core, *factors, optimize=True)
    return float(np.linalg.norm(weight - approximation) / np.linalg.norm(weight))


def _convs(conv: nn.Conv2d, core: np.ndarray, factors: list[np.ndarray]) -> nn.Sequential:
    u, v = factors
    layer: Any
    (out, r_out), (inside, r_in) = u.shape, v.shape
    kind: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    geometry: dict[str, Any] = {name: getattr(conv, name) for name in names}
    # Padding stands in the middle, before any bias: 1x1 convs without one commute with every mode of it.
    layers: Any = nn.Sequential(
        nn.Conv2d(inside, r_in, 1, bias=False, **kind),
        nn.Conv2d(r_in, r_out, **geometry, bias=False, **kind),
        nn.Conv2d(r_out, out, 1, bias=conv.bias is not None, **kind),
    )
    values = (v.T[..., None, None], core, u[..., None, None])
    with torch.no_grad():
        for layer, value in zip(layers, values, strict=True):
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(value)))
            layer.weight.requires_grad_(conv.weight.requires_grad)
        if conv.bias is not None:
            layers[2].bias.copy_(conv.bias)
            layers[2].bias.requires_grad_(conv.bias.requires_grad)
    layers.train(conv.training)
    return layers
