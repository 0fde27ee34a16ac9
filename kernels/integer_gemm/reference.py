"""Integer products in plain torch: the definition, and what runs on a CPU.

Codes are integers q with value (q - zero) * scale. Shapes: x (M, K), weight (N, K); G codes share a scale in
the four-bit forms, groups along K.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vislr.kernels.dispatch import cpu_has

# Sums of this many products of two int8 codes are exact in float32.
EXACT_IN_FLOAT32 = 1024
LEVELS = 127
# The zero of four-bit codes when none is given.
MIDDLE = 8


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of x (M, K) with a scale for each row (M,), largest magnitude at 127, halves to even."""
    scale = (x.abs().amax(-1).float() / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (x.float() / scale.unsqueeze(-1)).round().clamp(-LEVELS, LEVELS)
    return codes.to(torch.int8), scale


def int_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (M, K) weight (N, K)^T in exact int32."""
    # Without instructions for it torch's integer product takes 30 times as long as one of float32.
    if x.device.type == "cpu" and min(*x.shape, *weight.shape) > 0 and cpu_has("int8"):
        return torch._int_mm(x, weight.mT)
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for a, b in zip(x.split(EXACT_IN_FLOAT32, 1), weight.split(EXACT_IN_FLOAT32, 1), strict=True):
        total += (a.float() @ b.float().mT).to(torch.int32)
    return total


def linear_w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    weight_zero: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x_scale_m weight_scale_n sum_k (x - x_zero_m) (weight - weight_zero_n) + bias_n."""
    total = int_product(x, weight)
    if x_zero is not None:
        total -= x_zero[:, None] * weight.sum(1, dtype=torch.int32)
    if weight_zero is not None:
        total -= weight_zero * x.sum(1, dtype=torch.int32)[:, None]
    if x_zero is not None and weight_zero is not None:
        total += x.shape[1] * x_zero[:, None] * weight_zero
    out = total.float() * x_scale[:, None] * weight_scale
    return (out if bias is None else out + bias.float()).to(dtype)


def pack_int4(codes: torch.Tensor, group: int) -> torch.Tensor:
    """Codes 0 ... 15 (N, K), K a multiple of `group` -> (N, K / 2) bytes.

    Byte j of a group holds its code j in the low half and its code j + group / 2 in the high half, so both
    halves meet inputs that lie side by side.
    """
    low, high = codes.unflatten(1, (-1, 2, group // 2)).unbind(2)
    return (low | high << 4).to(torch.uint8).flatten(1)


def unpack_int4(packed: torch.Tensor, group: int) -> torch.Tensor:
    """The codes (N, K) uint8 of `pack_int4`."""
    halves = packed.unflatten(1, (-1, group // 2))
    return torch.stack((halves & 15, halves >> 4), 2).flatten(1)


def _centred(packed: torch.Tensor, zero: torch.Tensor | None, group: int) -> torch.Tensor:
    """codes - zero, (N, K / G, G) int8."""
    codes = unpack_int4(packed, group).to(torch.int8).unflatten(1, (-1, group))
    return codes - (MIDDLE if zero is None else zero.to(torch.int8).unsqueeze(-1))


def dequantize_int4(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight (N, K) = (codes - zero) * scale, rounded once to `dtype`."""
    return (_centred(packed, zero, group).float() * scale.float().unsqueeze(-1)).to(dtype).flatten(1)


def linear_w4a16(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    """x (M, K) times the dequantised weight: beyond a few rows the fastest way on a CPU too."""
    padded = F.pad(x, (0, 2 * packed.shape[1] - x.shape[1]))
    return F.linear(padded, dequantize_int4(packed, scale, zero, group, x.dtype), bias)


def linear_w4a8(
    x: torch.Tensor,
    packed: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero: torch.Tensor | None,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x_scale_m sum_g scale_ng (sum of x (codes - zero) in group g, exact) + bias_n."""
    weight = _centred(packed, zero, group)
    padded = F.pad(x, (0, 2 * packed.shape[1] - x.shape[1])).unflatten(1, (-1, group))
    total = torch.zeros(x.shape[0], packed.shape[0], device=x.device)
    for index in range(weight.shape[1]):
        part = int_product(padded[:, index].contiguous(), weight[:, index].contiguous())
        total += part.float() * scale[:, index].float()
    out = total * x_scale[:, None]
    return (out if bias is None else out + bias.float()).to(dtype)


def conv_w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    weight_zero: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The convolution of the values, zeros around; sums are exact (float64 holds them)."""
    pixels, taps = x.double(), weight.double()
    if x_zero is not None:
        pixels = pixels - x_zero[:, None, None, None]
    if weight_zero is not None:
        taps = taps - weight_zero[:, None, None, None]
    total = F.conv2d(pixels, taps, None, stride, padding, dilation).float()
    out = total * x_scale[:, None, None, None] * weight_scale[:, None, None]
    return (out if bias is None else out + bias.float()[:, None, None]).to(dtype)
