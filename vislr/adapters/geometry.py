"""What a linear or a conv does with its weight, for any adapter: pad, convolve, mix groups.

A linear is a conv without spatial axes, so every adapter is written once for Linear and Conv1d/2d/3d.
Shapes: N batch, C channels, S the spatial axes (none, 1, 2 or 3), g groups, Cg = Ci / g, K the kernel's axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vislr.core.errors import AdapterError
from vislr.core.quantizing import holds_codes

_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_PLAIN = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Geometry:
    """How a layer applies a weight of shape (Co, Cg, *K).

    Attributes:
        shape: the weight's shape.
        stride, dilation: one number per spatial axis.
        padding: (before, after) per spatial axis; None: as much as keeps ceil(size / stride), chosen
            from the input at each call (timm's Conv2dSame).
        groups: g.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] | None = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def dims(self) -> int:
        """Number of spatial axes: 0 for a linear."""
        return len(self.shape) - 2

    @property
    def kernel(self) -> int:
        """Number of taps: the product of the kernel's axes."""
        return math.prod(self.shape[2:])

    def positions(self, x: torch.Tensor) -> int:
        """Output positions of input `x`, over the batch (strides taken as dividing evenly)."""
        if not self.dims:
            return x.numel() // x.shape[-1]
        return math.ceil(x.numel() / x.shape[1] / math.prod(self.stride))

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, groups: int = 1) -> torch.Tensor:
        """`x` (N, C, *S) and a kernel (O, C / groups, *K) -> (N, O, *S'), with this layer's stride,
        padding and dilation, without bias. For a linear: (..., C) and (O, C) -> (..., O).
        """
        if not self.dims:
            return F.linear(x, weight)
        padding: Sequence[tuple[int, int]]
        if self.padding is None:
            padding = [
                _same(size, k, s, d)
                for size, k, s, d in zip(x.shape[2:], self.shape[2:], self.stride, self.dilation, strict=True)
            ]
        else:
            padding = self.padding
        if self.padding_mode == "zeros" and all(before == after for before, after in padding):
            inside = tuple(before for before, _ in padding)
        else:
            # torch's convs do the same: other modes and lopsided zeros are padded before.
            inside = (0,) * self.dims
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            if any(before or after for before, after in padding):
                x = F.pad(x, [n for pair in reversed(padding) for n in pair], mode=mode)
        return _CONV[self.dims](x, weight, None, self.stride, inside, self.dilation, groups)

    def pointwise(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """(N, C, *S) and (O, C) -> (N, O, *S): a matrix at every position."""
        if not self.dims:
            return F.linear(x, matrix)
        return _CONV[self.dims](x, matrix.reshape(*matrix.shape, *(1,) * self.dims))

    def mix(self, h: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """(N * g, q, *S) and (Co, q) -> (N, Co, *S): the rows of group i see the maps of group i.

        A batched product and no grouped conv, whose backward is slow.
        """
        g, q = self.groups, matrix.shape[1]
        batch, spatial = h.shape[0] // g, h.shape[2:]
        if g == 1:
            return self.pointwise(h.reshape(batch, q, *spatial), matrix)
        out = torch.matmul(matrix.reshape(g, -1, q), h.reshape(batch, g, q, -1))
        return out.reshape(batch, -1, *spatial)


def cut(x: torch.Tensor, pieces: int) -> torch.Tensor:
    """(N, C, *S) -> (N * pieces, C / pieces, *S): equal runs of channels as further samples.

    Channels-last input stays channels-last: a plain reshape would copy it into the other format,
    which costs a conv of few maps as much as its arithmetic.
    """
    if pieces == 1:
        return x
    if _is_channels_last(x):
        return x.movedim(1, -1).unflatten(-1, (pieces, -1)).movedim(-2, 1).flatten(0, 1).movedim(-1, 1)
    return x.reshape(-1, x.shape[1] // pieces, *x.shape[2:])


def glue(h: torch.Tensor, pieces: int) -> torch.Tensor:
    """(N * pieces, q, *S) -> (N, pieces * q, *S): the inverse of `cut`."""
    if pieces == 1:
        return h
    if _is_channels_last(h):
        return h.movedim(1, -1).unflatten(0, (-1, pieces)).movedim(1, -2).flatten(-2).movedim(-1, 1)
    return h.reshape(-1, pieces * h.shape[1], *h.shape[2:])


def _is_channels_last(x: torch.Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.dim()])


def _same(size: int, k: int, s: int, d: int) -> tuple[int, int]:
    total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
    return total // 2, total - total // 2


def why_not(layer: Any) -> str:
    """Why a layer cannot carry an adapter, or "" if it can."""
    kind: Any = next((cls for cls in _PLAIN.values() if isinstance(layer, cls)), None)
    if kind is None:
        return "is no Linear, Conv1d, Conv2d or Conv3d"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "is used by its attention module without its forward"
    if holds_codes(layer):
        return ""
    weight = layer._parameters.get("weight")
    if weight is None:
        return "has a weight that is computed (parametrised), so merging would change nothing"
    if not weight.is_floating_point():
        return f"holds {weight.dtype} codes, not floating-point weights"
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (layer.out_features, layer.in_features)
    else:
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    if tuple(weight.shape) != shape:
        return f"packs its weight as {tuple(weight.shape)} where {shape} is expected"
    if _is_same(layer):
        return ""
    own = getattr(type(layer), "_conv_forward", None)
    if (type(layer).forward is not kind.forward and not _casts_only(layer)) or own is not getattr(
        kind, "_conv_forward", None
    ):
        return "computes something else than its weight says"
    return ""


def _is_same(layer: nn.Module) -> bool:
    return type(layer).__name__ in ("Conv2dSame", "Conv2dSameExport") and type(layer).__module__.startswith("timm.")


def _casts_only(layer: nn.Module) -> bool:
    # timm's Linear differs from torch's under TorchScript only.
    return type(layer).__name__ == "Linear" and type(layer).__module__ == "timm.layers.linear"


def geometry_of(layer: nn.Module) -> Geometry:
    """The geometry of a Linear, Conv1d, Conv2d or Conv3d (or timm's Conv2dSame).

    Raises:
        AdapterError: any other layer, or one whose weight is not applied as it stands; says why.
    """
    reason = why_not(layer)
    if reason:
        raise AdapterError(f"cannot adapt a {type(layer).__name__}: it {reason}")
    weight: Any = layer.weight
    if isinstance(layer, nn.Linear):
        return Geometry(tuple(weight.shape))
    conv: Any = layer
    padding: tuple[tuple[int, int], ...] | None
    if _is_same(layer):
        padding = None
    elif conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    elif conv.padding == "valid":
        padding = ((0, 0),) * len(conv.kernel_size)
    else:
        padding = tuple((p, p) for p in conv.padding)
    return Geometry(tuple(weight.shape), conv.stride, conv.dilation, padding, conv.groups, conv.padding_mode)
