"""ConvLoRA: a low-rank product, reshaped into the weight of a conv or linear.

Source: ConvLoRA (arXiv 2402.04964), the layer of section "ConvLoRA" for square 2-D kernels without
groups; extended here to any kernel, groups and to linears. Shapes: weight (Co, Cg, k1, ..., kd) with
Cg = Ci / groups and K' = k2 * ... * kd (k1 = K' = 1 for a linear), rank r::

    A  (r k1, Cg K')      B  (Co k1, r k1)      delta = (alpha / r) * reshape(B A, weight's shape)

The reshape reads the product in row-major order. Parameters: r k1 (Cg K' + Co k1), which is
r k^2 (Ci + Co) for a square 2-D kernel and plain LoRA for k = 1. Over the unfolded input the delta has
rank up to min(Co, r k1^2), so r is a budget and no bound on that rank.

In files: `.convlora_A`, `.convlora_B`, `.alpha`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import nn

from vislr.adapters.geometry import Geometry, cut, glue
from vislr.adapters.layer import DeltaLayer, DeltaTuner
from vislr.core.errors import AdapterError

PEFT_TYPE = "CONVLORA"


@dataclass
class ConvLoraConfig(PeftConfig):
    """Config of a ConvLoRA adapter.

    Attributes:
        r: rank, at least 1, at most min(Co, Cg k1 ... kd) of every target.
        alpha: the delta is scaled by alpha / r; None: alpha = r, scale 1, as in the paper.
        target_modules: list of names or their endings, or a regular expression over whole names, or
            "all-linear"; None: every conv and linear of the backbone that the rank suits.
        exclude_modules: list or expression of names to leave alone.
        init: of A. "kaiming_uniform": bound 1 / sqrt(Cg K'); "gaussian": standard deviation 1 / r. B is 0.
        sites: exact names of the layers; filled in when the adapter goes on.

    Raises:
        AdapterError: the rank is no whole number of at least 1, or another field is impossible.
    """

    r: int = 2
    alpha: float | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init: Literal["kaiming_uniform", "gaussian"] = "kaiming_uniform"
    sites: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise AdapterError(f"rank r is {self.r!r}; expected a whole number of at least 1")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise AdapterError(f"alpha is {self.alpha!r}; expected a finite number")
        if self.init not in ("kaiming_uniform", "gaussian"):
            raise AdapterError(f"init is {self.init!r}; choose 'kaiming_uniform' or 'gaussian'")

    def count(self, geometry: Geometry) -> int:
        """Parameters on a layer.

        Raises:
            AdapterError: the rank is larger than the weight allows.
        """
        shape = geometry.shape
        largest = min(shape[0], math.prod(shape[1:]))
        if self.r > largest:
            raise AdapterError(f"rank {self.r} is larger than a weight of shape {tuple(shape)} allows ({largest})")
        a, b = factor_shapes(shape, self.r)
        return math.prod(a) + math.prod(b)


def factor_shapes(shape: tuple[int, ...], r: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A (r k1, Cg K') and B (Co k1, r k1) for a weight of `shape` (Co, Cg, k1, ..., kd)."""
    k1 = shape[2] if len(shape) > 2 else 1
    return (r * k1, math.prod(shape[1:]) // k1), (shape[0] * k1, r * k1)


def delta_weight(A: torch.Tensor, B: torch.Tensor, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    """`scale * reshape(B A, shape)`: A (r k1, Cg K'), B (Co k1, r k1) -> `shape` (Co, Cg, k1, ..., kd)."""
    return (scale * (B @ A)).reshape(shape)


def chain_forward(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, geometry: Geometry) -> torch.Tensor:
    """The conv with `delta_weight(A, B)`, without making it: x (N, Ci, *S) -> (N, Co, *S').

    Row-major order gives row o k1 + p of B A to the p-th of k1 equal pieces of output o's weight, each Cg / k1
    channels long. Where k1 divides Cg, all pieces of each group go as further samples through one small conv
    with kernel A (r k1, Cg / k1, *K). Elsewhere a piece begins and ends inside of a channel's kernel: each goes
    through a conv of its own, with A shifted to where it begins. Then B (Co, k1 r k1) mixes the maps of all pieces.
    For a linear: x (..., Ci) -> (..., Co), two products.
    """
    if not geometry.dims:
        return F.linear(F.linear(x, A) * scale, B)
    out, inside, k1, *rest = geometry.shape
    if inside % k1 == 0:
        pieces = cut(x, geometry.groups * k1)  # (N g k1, Cg / k1, *S)
        h = geometry.convolve(pieces, A.reshape(-1, inside // k1, k1, *rest))  # (N g k1, r k1, *S')
        h = glue(h, k1)  # (N g, k1 r k1, *S')
    else:
        grouped = cut(x, geometry.groups)  # (N g, Cg, *S)
        runs, kernels = zip(*_shifted(A, geometry.shape), strict=True)
        maps = [geometry.convolve(run, kernel) for run, kernel in zip(_copies(grouped, runs), kernels, strict=True)]
        h = torch.cat(maps, 1)  # (N g, k1 r k1, *S')
    matrix = B.reshape(out, -1)
    return geometry.mix(h, matrix if scale == 1 else matrix * scale)


def _shifted(A: torch.Tensor, shape: tuple[int, ...]) -> list[tuple[tuple[int, int], torch.Tensor]]:
    """For each of k1 pieces: its first channel and the one after its last, and its kernel (r k1, channels, *K)."""
    _, inside, k1, *rest = shape
    rows = A.reshape(len(A), inside, -1)
    found = []
    for piece in range(k1):
        first, before = divmod(piece * inside, k1)
        channels = -(-(before + inside) // k1)
        after = channels * k1 - before - inside
        kernel = F.pad(rows, (0, 0, before, after)).reshape(len(A), channels, k1, *rest)
        found.append(((first, first + channels), kernel))
    return found


def _copies(x: torch.Tensor, runs: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Runs of channels (first, after last) of x that share their ends and together cover it.

    Joined from parts that do not overlap: the backward of overlapping slices fills a gradient of all of x with
    zeros for each, which takes longer than the copies (record convlora-ways).
    """
    bounds = sorted({end for run in runs for end in run})
    parts = dict(zip(bounds, x.split([b - a for a, b in pairwise(bounds)], 1), strict=False))
    return [torch.cat([part for at, part in parts.items() if first <= at < last], 1) for first, last in runs]


def use_chain(geometry: Geometry, r: int, positions: int) -> bool:
    """Whether the chain takes fewer multiply-adds than making the delta and using it.

    Args:
        positions: output positions over the batch.
    """
    out, inside = geometry.shape[:2]
    k1 = geometry.shape[2] if geometry.dims else 1
    # Where k1 does not divide the channels, pieces overlap by up to one.
    channels = inside if inside % k1 == 0 else inside + k1
    chain = positions * r * k1 * (geometry.groups * channels * geometry.kernel + out * k1)
    dense = out * inside * geometry.kernel * (positions + r * k1)
    return chain <= dense


class ConvLoraLayer(DeltaLayer):
    """A linear or conv with ConvLoRA adapters."""

    adapter_layer_names = ("convlora_A", "convlora_B")
    convlora_A: nn.ParameterDict
    convlora_B: nn.ParameterDict

    def create(self, name: str, config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        self.r[name] = config.r
        self.alpha[name] = float(config.r if config.alpha is None else config.alpha)
        shape_a, shape_b = factor_shapes(self.geometry.shape, config.r)
        A = torch.empty(shape_a, dtype=dtype)
        if config.init == "gaussian":
            torch.nn.init.normal_(A, std=1 / config.r)
        else:
            torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return {"convlora_A": A, "convlora_B": torch.zeros(shape_b, dtype=dtype)}

    def unit_scale(self, name: str) -> float:
        return self.alpha[name] / self.r[name]

    def _delta(self, name: str, scale: float, dtype: torch.dtype) -> torch.Tensor:
        A, B = self.convlora_A[name].to(dtype), self.convlora_B[name].to(dtype)
        return delta_weight(A, B, self.geometry.shape, scale)

    def activation(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale = self.scaling[name]
        if use_chain(self.geometry, self.r[name], self.geometry.positions(x)):
            A, B = self.convlora_A[name].to(x.dtype), self.convlora_B[name].to(x.dtype)
            return chain_forward(x, A, B, scale, self.geometry)
        return self.geometry.convolve(x, self.delta(name).to(x.dtype), self.geometry.groups)


class ConvLoraModel(DeltaTuner):
    """peft's tuner of ConvLoRA."""

    prefix: str = "convlora_"
    tuner_layer_cls = ConvLoraLayer
