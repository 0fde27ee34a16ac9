"""Tucker convolution in plain torch: the definition, and what runs on a CPU.

Shapes: x (N, C, H, W); down (R, C); core (S, R, kh, kw); up (Co, S); base (N, Co, H', W') or (Co,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    """base + scale up (core * (down x)), three convolutions and one fused add."""
    narrow = x if down is None else pointwise(x, down)
    narrow = F.conv2d(narrow, core, None, stride, padding, dilation)
    if base is None:
        return pointwise(narrow, up * scale)
    if base.dim() == 1:
        return F.conv2d(narrow, (up * scale)[:, :, None, None], base)
    # One pass over the wide result for scale and add. A matrix product that adds into the base (addmm,
    # baddbmm) copies the base first and was no faster.
    return torch.add(base, pointwise(narrow, up), alpha=scale)
