"""Tucker convolution in plain torch: the definition, and what runs on a CPU.

Shapes: x (N, C, H, W); down (R, C); core (S, R, kh, kw); up (Co, S); base (N, Co, H', W') or (Co,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vislr.kernels.dispatch import HALVES, cpu_has


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a 4-D tensor lies in memory as (N, H, W, C) and not as (N, C, H, W)."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def pointwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """1x1 convolution, x (N, C, H, W) and weight (O, C) -> (N, O, H, W)."""
    return F.conv2d(x, weight[:, :, None, None])


def tucker_conv(
    x: torch.Tensor,
    base: torch.Tensor | None,
    down: torch.Tensor | None,
    core: torch.Tensor,
    up: torch.Tensor,
    scale: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """base + scale up (core * (down x)): three convolutions and one fused add, or matrix products for the 1x1."""
    if x.device.type == "cpu" and x.dtype in HALVES and not cpu_has(str(x.dtype).removeprefix("torch.")):
        # Emulated half floats take 8 times as long as float32.
        base, down = (None if tensor is None else tensor.float() for tensor in (base, down))
        wide = tucker_conv(x.float(), base, down, core.float(), up.float(), scale, stride, padding, dilation)
        return wide.to(x.dtype)
    if x.device.type == "cpu" and base is not None and base.dim() == 4 and is_channels_last(x):
        return _products(x, base, down, core, up, scale, stride, padding, dilation)
    narrow = x if down is None else pointwise(x, down)
    narrow = F.conv2d(narrow, core, None, stride, padding, dilation)
    if base is None:
        return pointwise(narrow, up * scale)
    if base.dim() == 1:
        return F.conv2d(narrow, (up * scale)[:, :, None, None], base)
    return torch.add(base, pointwise(narrow, up), alpha=scale)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) as rows of pixels (N H W, C); a view of a tensor in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _maps(rows: torch.Tensor, batch: int, height: int) -> torch.Tensor:
    """The inverse of `_rows`, in channels_last."""
    return rows.unflatten(0, (batch, height, -1)).permute(0, 3, 1, 2)


def _products(
    x: torch.Tensor,
    base: torch.Tensor,
    down: torch.Tensor | None,
    core: torch.Tensor,
    up: torch.Tensor,
    scale: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """In channels_last both 1x1 are plain matrix products, and the last adds into the base: a tenth faster."""
    narrow = x if down is None else _maps(_rows(x) @ down.mT, x.shape[0], x.shape[2])
    narrow = F.conv2d(narrow, core, None, stride, padding, dilation)
    wide = torch.addmm(_rows(base), _rows(narrow), up.mT, alpha=scale)
    return _maps(wide, base.shape[0], base.shape[2])
