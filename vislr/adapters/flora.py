"""FLoRA: a Tucker decomposition of the weight's change, of any order.

Source: FLoRA, low-rank core space (arXiv 2405.14739). A weight of shape (d_1, ..., d_M) = (Co, Cg, k1,
..., kd), Cg = Ci / groups (M = 2 for a linear), core G (r_1, ..., r_M), factors F_n (d_n, r_n)::

    delta[o, i, h, w] = scale * sum_{b a c d} G[b, a, c, d] F_1[o, b] F_2[i, a] F_3[h, c] F_4[w, d]

`scale` is a plain multiplier. The modes stand in the weight's own order (out, in, kernel axes); the
paper writes in before out. Parameters: prod r_n + sum d_n r_n. The core starts at 0, so the first step
moves the core alone.

In files: `.flora_core`, `.flora_out`, `.flora_in`, `.flora_k1` ... `.flora_k3`, `.alpha` (= scale).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import nn

from vislr.adapters.geometry import Geometry, cut
from vislr.adapters.layer import DeltaLayer, DeltaTuner
from vislr.core.errors import AdapterError
from vislr.kernels.dispatch import use_kernel

PEFT_TYPE = "FLORA"
FACTORS = ("flora_out", "flora_in", "flora_k1", "flora_k2", "flora_k3")
_INITS = ("kaiming_normal", "kaiming_uniform", "normal")


@dataclass
class FloraConfig(PeftConfig):
    """Config of a FLoRA adapter.

    Attributes:
        ranks: one rank for every mode, cut to the size of kernel axes and of the input mode of grouped
            convs; or a fraction in (0, 1] of every mode; or a list with one entry per mode in the order
            out, in, kernel axes, each a rank or a fraction (layers with fewer modes use the first ones).
        scale: what the delta is multiplied with.
        target_modules: list of names or their endings, or a regular expression over whole names, or
            "all-linear"; None: every conv and linear of the backbone that the ranks suit.
        exclude_modules: list or expression of names to leave alone.
        init: of the factors. "kaiming_normal": variance 1 / (2 r_n), as the authors' vision code;
            "kaiming_uniform": bound 1 / sqrt(r_n); "normal": standard deviation 0.02. The core is 0.
        dropout: probability with which entries of the adapter's input are dropped in training.
        sites: exact names of the layers; filled in when the adapter goes on.

    Raises:
        AdapterError: a rank is below 1, a fraction outside (0, 1], or another field is impossible.
    """

    ranks: int | float | list[int | float] = 8
    scale: float = 1.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init: Literal["kaiming_normal", "kaiming_uniform", "normal"] = "kaiming_normal"
    dropout: float = 0.0
    sites: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        several = list(self.ranks) if isinstance(self.ranks, (list, tuple)) else None
        for rank in [self.ranks] if several is None else several:
            if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
                continue
            if isinstance(rank, float) and 0 < rank <= 1:
                continue
            raise AdapterError(f"rank {rank!r}: expected a whole number of at least 1 or a fraction in (0, 1]")
        if several is not None and len(several) < 2:
            raise AdapterError(f"ranks {several}: a list needs an entry for out, in and each kernel axis")
        if not math.isfinite(self.scale):
            raise AdapterError(f"scale is {self.scale!r}; expected a finite number")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout is {self.dropout!r}; expected at least 0 and below 1")
        if self.init not in _INITS:
            raise AdapterError(f"init is {self.init!r}; choose from {', '.join(_INITS)}")

    def ranks_of(self, geometry: Geometry) -> tuple[int, ...]:
        """The rank of every mode of a layer.

        Raises:
            AdapterError: a rank is larger than its mode, or the list is too short.
        """
        shape = geometry.shape
        if isinstance(self.ranks, (list, tuple)):
            if len(self.ranks) < len(shape):
                raise AdapterError(f"ranks {list(self.ranks)} for {len(shape)} modes of a weight {tuple(shape)}")
            asked = list(self.ranks[: len(shape)])
        else:
            asked = [self.ranks] * len(shape)
            if isinstance(self.ranks, int):
                # One number cannot fit every mode: small modes by nature are taken whole.
                small = (1 if geometry.groups > 1 else 2, len(shape))
                asked[slice(*small)] = [min(self.ranks, size) for size in shape[slice(*small)]]
        ranks = []
        for size, rank, mode in zip(shape, asked, ("out", "in", "k1", "k2", "k3"), strict=False):
            if isinstance(rank, float):
                rank = max(1, round(rank * size))
            if rank > size:
                raise AdapterError(f"rank {rank} is larger than mode '{mode}' of size {size}")
            ranks.append(rank)
        return tuple(ranks)

    def count(self, geometry: Geometry) -> int:
        """Parameters on a layer.

        Raises:
            AdapterError: a rank does not fit.
        """
        ranks = self.ranks_of(geometry)
        return math.prod(ranks) + sum(d * r for d, r in zip(geometry.shape, ranks, strict=True))


def mode_product(tensor: torch.Tensor, factor: torch.Tensor, mode: int) -> torch.Tensor:
    """Multiply axis `mode` of `tensor` (size r) with `factor` (d, r): that axis becomes size d."""
    return torch.tensordot(tensor, factor, dims=([mode], [1])).movedim(-1, mode)


def delta_weight(core: torch.Tensor, factors: Sequence[torch.Tensor], scale: float = 1.0) -> torch.Tensor:
    """`scale` times the Tucker product: core (r_1, ..., r_M), factors (d_n, r_n) -> (d_1, ..., d_M)."""
    for mode, factor in enumerate(factors):
        core = mode_product(core, factor, mode)
    return scale * core


def chain_forward(
    x: torch.Tensor, core: torch.Tensor, factors: Sequence[torch.Tensor], scale: float, geometry: Geometry
) -> torch.Tensor:
    """The conv with `delta_weight`, in three small ones: x (N, Ci, *S) -> (N, Co, *S').

    1x1 from Cg to r_in in each group, then the core with its kernel axes expanded and the layer's stride,
    padding and dilation (any padding mode commutes with a 1x1 without bias), then r_out to Co.
    For a linear: x (..., Ci) -> (..., Co), three products.
    """
    if not geometry.dims:
        return F.linear(F.linear(F.linear(x, factors[1].T), core) * scale, factors[0])
    # All kernel axes in one product: their factors are small, and so is the Kronecker product of them.
    spatial = factors[2] if scale == 1 else factors[2] * scale
    for factor in factors[3:]:
        spatial = (spatial[:, None, :, None] * factor[None, :, None, :]).flatten(2).flatten(0, 1)
    kernel = (core.flatten(2).flatten(0, 1) @ spatial.T).reshape(*core.shape[:2], *geometry.shape[2:])
    narrow = geometry.pointwise(cut(x, geometry.groups), factors[1].T)  # (N g, r_in, *S)
    h = geometry.convolve(narrow, kernel)  # (N g, r_out, *S')
    return geometry.mix(h, factors[0])


def use_chain(geometry: Geometry, ranks: tuple[int, ...], positions: int) -> bool:
    """Whether the chain takes fewer multiply-adds than making the delta and using it.

    Args:
        positions: output positions over the batch.
    """
    (out, inside), (r_out, r_in) = geometry.shape[:2], ranks[:2]
    entering = positions * math.prod(geometry.stride) * geometry.groups * inside * r_in
    chain = entering + positions * (geometry.groups * r_in * r_out * geometry.kernel + out * r_out)
    compose, sizes = 0, list(ranks)
    for mode, size in enumerate(geometry.shape):
        sizes[mode] = size
        compose += math.prod(sizes) * ranks[mode]
    return chain <= positions * out * inside * geometry.kernel + compose


class FloraLayer(DeltaLayer):
    """A linear or conv with FLoRA adapters."""

    adapter_layer_names = ("flora_core", *FACTORS)
    flora_core: nn.ParameterDict

    def create(self, name: str, config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        ranks = config.ranks_of(self.geometry)
        self.r[name], self.alpha[name] = ranks, float(config.scale)
        tensors = {"flora_core": torch.zeros(ranks, dtype=dtype)}
        for factor, size, rank in zip(FACTORS, self.geometry.shape, ranks, strict=False):
            tensors[factor] = torch.empty(size, rank, dtype=dtype)
            if config.init == "kaiming_normal":
                torch.nn.init.kaiming_normal_(tensors[factor], a=math.sqrt(3))
            elif config.init == "kaiming_uniform":
                torch.nn.init.kaiming_uniform_(tensors[factor], a=math.sqrt(5))
            else:
                torch.nn.init.normal_(tensors[factor], std=0.02)
        return tensors

    def unit_scale(self, name: str) -> float:
        return self.alpha[name]

    def _parts(self, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
        factors = [getattr(self, factor)[name].to(dtype) for factor in FACTORS[: len(self.geometry.shape)]]
        return self.flora_core[name].to(dtype), factors

    def _delta(self, name: str, scale: float, dtype: torch.dtype) -> torch.Tensor:
        return delta_weight(*self._parts(name, dtype), scale)

    def activation(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if use_chain(self.geometry, self.r[name], self.geometry.positions(x)):
            return chain_forward(x, *self._parts(name, x.dtype), self.scaling[name], self.geometry)
        return self.geometry.convolve(x, self.delta(name).to(x.dtype), self.geometry.groups)

    def added(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        g = self.geometry
        if not self._fuses(x, result) or not use_chain(g, self.r[name], g.positions(x)):
            return super().added(name, x, result)
        from vislr.kernels.tucker_conv import tucker_convolution

        core, (up, down, *rest) = self._parts(name, x.dtype)
        for mode, factor in enumerate(rest, start=2):
            core = mode_product(core, factor, mode)
        padding = [before for before, _ in g.padding or ()]
        return tucker_convolution(x, down.T, core, up, result, self.scaling[name], g.stride, padding, g.dilation)

    def _fuses(self, x: torch.Tensor, result: torch.Tensor) -> bool:
        """Whether the fused kernel of `vislr.kernels` runs here and takes this layer: a GPU, an ordinary 2-D conv."""
        g = self.geometry
        return (
            g.dims == 2 and g.groups == 1 and g.padding_mode == "zeros" and g.padding is not None
            and all(before == after for before, after in g.padding) and x.dtype == result.dtype and use_kernel(x)
        )  # fmt: skip


class FloraModel(DeltaTuner):
    """peft's tuner of FLoRA."""

    prefix: str = "flora_"
    tuner_layer_cls = FloraLayer
