"""Integer products in plain torch: the definition, and what runs on a CPU.

Codes are integers q with value (q - zero) * scale. Shapes: x (M, K), weight (N, K); G codes share a scale in
the four-bit forms, groups along K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from vislr.kernels.dispatch import cpu_has

# Whole numbers below 2^24 are exact in float32; a little less, since the bounds of sums are rounded.
EXACT_IN_FLOAT32 = 0.999 * (1 << 24)
LEVELS = 127
# The zero of four-bit codes when none is given.
MIDDLE = 8


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of x (M, K) with a scale for each row (M,), largest magnitude at 127, halves to even."""
    scale = (x.abs().amax(-1).float() / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (x.float() / scale.unsqueeze(-1)).round().clamp(-LEVELS, LEVELS)
    return codes.to(torch.int8), scale


def exact(product: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """product(x, weight) of whole numbers in float32, summed without rounding.

    By Cauchy and Schwarz no partial sum, in any order, is larger than the norm of the inputs that meet in it times that
    of a row of the weight. Where that could leave what float32 holds exactly, the channels, dimension 1 of both, are
    taken in pieces, whose sums are added as integers.
    """
    if x.numel() == 0 or weight.numel() == 0:
        return product(x, weight)
    taps = weight.shape[2:].numel()

    def fits(a: torch.Tensor, b: torch.Tensor) -> bool:
        inputs = torch.linalg.vector_norm(a, dim=1).max().item() * taps**0.5
        return inputs * torch.linalg.vector_norm(b.flatten(1), dim=1).max().item() < EXACT_IN_FLOAT32

    size = weight.shape[1]
    while not all(map(fits, x.split(size, 1), weight.split(size, 1))):
        if size == 1:
            return product(x.double(), weight.double()).float()
        size = -(-size // 2)
    if size == weight.shape[1]:
        return product(x, weight)
    total = torch.zeros((), dtype=torch.int32, device=x.device)
    for a, b in zip(x.split(size, 1), weight.split(size, 1), strict=True):
        total = total + product(a, b).to(torch.int32)
    return total.float()


# Operators, since the choice of pieces depends on the numbers, which neither torch.compile nor an export can follow;
# exports, which shall run without vislr, sum in float64.
@torch.library.custom_op("vislr::exact_linear", mutates_args=())
def _exact_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return exact(F.linear, x, weight)


@_exact_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _laid_out_like(x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return result.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@torch.library.custom_op("vislr::exact_conv2d", mutates_args=())
def _exact_conv2d(
    x: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> torch.Tensor:
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.conv2d(a, b, None, stride, padding, dilation)

    # Other backends' float32 convolutions may transform their inputs (Winograd), which rounds.
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return _laid_out_like(x, exact(product, x, weight))
    return _laid_out_like(x, product(x.double(), weight.double()).float())


@_exact_conv2d.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> torch.Tensor:
    return _laid_out_like(x, F.conv2d(x, weight, None, stride, padding, dilation))


register_flop_formula(torch.ops.vislr.exact_linear)(lambda x, weight, **_: 2 * x[0] * x[1] * weight[0])
register_flop_formula(torch.ops.vislr.exact_conv2d)(
    lambda x, weight, *_, out_shape, **__: conv_flop_count(list(x), list(weight), list(out_shape))
)


def _values(codes: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """codes - zero in float32; a zero for each of dimension 0."""
    values = codes.float()
    return values if zero is None else values.sub_(zero.view(-1, *(1,) * (codes.dim() - 1)))


def _scaled(
    total: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """total x_scale_m weight_scale_n + bias_n; total (M, N, *S) is overwritten."""
    ones = (1,) * (total.dim() - 2)
    total.mul_(x_scale.view(-1, 1, *ones)).mul_(weight_scale.view(-1, *ones))
    if bias is not None:
        total.add_(bias.float().view(-1, *ones))
    return total.to(dtype)


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weight^T of whole numbers in float32."""
    if torch.compiler.is_exporting():
        return F.linear(x.double(), weight.double()).float()
    return _exact_linear(x, weight)


def _conv2d(
    x: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> torch.Tensor:
    """The convolution of whole numbers in float32."""
    if torch.compiler.is_exporting():
        return F.conv2d(x.double(), weight.double(), None, stride, padding, dilation).float()
    return _exact_conv2d(x, weight, stride, padding, dilation)


def _multiplies(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether to take torch's product of int8: without instructions for it it takes 30 times as long as float32's."""
    return x.device.type == "cpu" and min(*x.shape, *weight.shape) > 0 and cpu_has("int8")


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
    if not _multiplies(x, weight):
        total = _linear(_values(x, x_zero), _values(weight, weight_zero))
        return _scaled(total, x_scale, weight_scale, bias, dtype)
    products = torch._int_mm(x, weight.mT)
    if x_zero is not None:
        products -= x_zero[:, None] * weight.sum(1, dtype=torch.int32)
    if weight_zero is not None:
        products -= weight_zero * x.sum(1, dtype=torch.int32)[:, None]
    if x_zero is not None and weight_zero is not None:
        products += x.shape[1] * x_zero[:, None] * weight_zero
    return _scaled(products.float(), x_scale, weight_scale, bias, dtype)


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
        a, b = padded[:, index].contiguous(), weight[:, index].contiguous()
        part = torch._int_mm(a, b.mT).float() if _multiplies(a, b) else _linear(a.float(), b.float())
        total.addcmul_(part, scale[:, index].float())
    return _scaled(total, x_scale, total.new_ones(1), bias, dtype)


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
    """The convolution of the values, zeros around; its sums are exact."""
    pixels, taps = _values(x, x_zero), _values(weight, weight_zero)
    return _scaled(_conv2d(pixels, taps, stride, padding, dilation), x_scale, weight_scale, bias, dtype)
