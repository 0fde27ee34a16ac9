"""Products of quantised tensors: W8A8, W4A16 and W4A8 linears, and the W8A8 convolution.

A code q stands for (q - zero) * scale. int8 codes of inputs have a scale (and a zero) for each row or sample,
int8 weights one for each output channel; four-bit weights one for each group of G inputs and output channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vislr.kernels.dispatch import FLOATS, use_kernel
from vislr.kernels.errors import KernelError
from vislr.kernels.integer_gemm import ops, reference

CODES = (torch.int8,)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of every row, its largest magnitude at 127; halves are rounded to even.

    Args:
        x: (..., K), floating.

    Returns:
        codes (..., K) int8 and scale (...) float32, x about codes * scale. Without gradient.

    Raises:
        KernelError: x is not floating or has no columns.
    """
    if not x.dtype.is_floating_point or x.dim() == 0 or x.shape[-1] == 0:
        raise KernelError(f"x {tuple(x.shape)} of {x.dtype}; expected floating (..., K) with K at least 1")
    rows = x.detach().reshape(-1, x.shape[-1])
    codes, scale = ops.quantize(rows) if use_kernel(x) else reference.quantize_rows(rows)
    return codes.view(x.shape), scale.view(x.shape[:-1])


def linear_w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    weight_zero: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """A linear layer on int8 codes, sums exact in int32. Without gradient.

    Args:
        x: (..., K) int8.
        weight: (N, K) int8.
        x_scale: (...) float32, one for each row.
        weight_scale: (N,) float32.
        bias: (N,).
        x_zero: (...) int32, one for each row; None: 0.
        weight_zero: (N,) int32; None: 0.
        dtype: of the result.

    Returns:
        (..., N).

    Raises:
        KernelError: the shapes or dtypes do not fit.
    """
    _expect("x", x, (*x.shape[:-1], weight.shape[-1]), torch.int8)
    _expect("weight", weight, (weight.shape[0], x.shape[-1]), torch.int8)
    _expect("x_scale", x_scale, x.shape[:-1], torch.float32)
    _expect("weight_scale", weight_scale, weight.shape[:1], torch.float32)
    _expect("x_zero", x_zero, x.shape[:-1], torch.int32)
    _expect("weight_zero", weight_zero, weight.shape[:1], torch.int32)
    _expect("bias", bias, weight.shape[:1])
    run = ops.linear_w8a8 if use_kernel(x, CODES) else reference.linear_w8a8
    rows = x.reshape(-1, x.shape[-1])
    out = run(rows, weight, _flat(x_scale), _plain(weight_scale), _plain(bias), _flat(x_zero), weight_zero, dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


def pack_int4(codes: torch.Tensor, group: int = 128, fill: int | torch.Tensor = reference.MIDDLE) -> torch.Tensor:
    """Two four-bit codes a byte, in the order that the kernels read.

    Args:
        codes: (N, K), whole numbers 0 ... 15.
        group: codes that share a scale: an even number, 64 and 128 fit all kernels.
        fill: code that completes the last group, its zero: one for all, or (N,).

    Returns:
        (N, ceil(K / group) * group / 2) uint8.

    Raises:
        KernelError: a code is outside of 0 ... 15, or group is odd.
    """
    if codes.dim() != 2 or codes.dtype.is_floating_point or group < 2 or group % 2:
        raise KernelError(
            f"codes {tuple(codes.shape)} of {codes.dtype}, group {group}; expected integer (N, K), even group"
        )
    if codes.numel() and (codes.min() < 0 or codes.max() > 15):
        raise KernelError(f"codes from {int(codes.min())} to {int(codes.max())}; expected 0 to 15")
    missing = -codes.shape[1] % group
    rest = torch.as_tensor(fill, device=codes.device).to(torch.uint8).reshape(-1, 1).expand(codes.shape[0], missing)
    return reference.pack_int4(torch.cat((codes.to(torch.uint8), rest), 1), group)


def unpack_int4(packed: torch.Tensor, group: int = 128) -> torch.Tensor:
    """The codes (N, K) uint8 of `pack_int4`, K rounded up to whole groups.

    Raises:
        KernelError: packed does not hold whole groups.
    """
    if packed.dim() != 2 or packed.dtype != torch.uint8 or group < 2 or group % 2 or packed.shape[1] % (group // 2):
        raise KernelError(f"packed {tuple(packed.shape)} of {packed.dtype}; expected uint8 (N, groups * {group // 2})")
    return reference.unpack_int4(packed, group)


def linear_w4a16(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    group: int = 128,
) -> torch.Tensor:
    """A linear layer with four-bit weights; differentiable in x and bias.

    Args:
        x: (..., K), floating.
        packed: (N, groups * group / 2) uint8 of `pack_int4`.
        scale: (N, groups), floating.
        bias: (N,), dtype of x.
        zero: (N, groups) uint8; None: 8.
        group: as in `pack_int4`.

    Returns:
        (..., N) in x's dtype.

    Raises:
        KernelError: the shapes or dtypes do not fit.
    """
    _check_int4(x, packed, scale, bias, zero, group)
    if not x.dtype.is_floating_point:
        raise KernelError(f"x is {x.dtype}; expected a floating dtype")
    fits = group >= 32 and group & (group - 1) == 0
    run = ops.linear_w4a16 if fits and use_kernel(x, FLOATS) else reference.linear_w4a16
    out = run(x.reshape(-1, x.shape[-1]), packed, _plain(scale), bias, zero, group)
    return out.view(*x.shape[:-1], packed.shape[0])


def linear_w4a8(
    x: torch.Tensor,
    packed: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    group: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """A linear layer with four-bit weights on int8 codes, exact inside a group. Without gradient.

    Args:
        x: (..., K) int8.
        packed, scale, bias, zero, group: as in `linear_w4a16`.
        x_scale: (...) float32, one for each row.
        dtype: of the result.

    Returns:
        (..., N).

    Raises:
        KernelError: the shapes or dtypes do not fit.
    """
    _check_int4(x, packed, scale, bias, zero, group)
    _expect("x", x, x.shape, torch.int8)
    _expect("x_scale", x_scale, x.shape[:-1], torch.float32)
    # Int8 products of tensor cores take 32 codes at once.
    fits = group >= 64 and group & (group - 1) == 0
    run = ops.linear_w4a8 if fits and use_kernel(x, CODES) else reference.linear_w4a8
    rows = x.reshape(-1, x.shape[-1])
    out = run(rows, packed, _flat(x_scale), _plain(scale), _plain(bias), zero, group, dtype)
    return out.view(*x.shape[:-1], packed.shape[0])


def conv_w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    weight_zero: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """A 2-D convolution of int8 codes as one implicit GEMM, sums exact. Around x lies the value 0. No gradient.

    Args:
        x: (N, C, H, W) int8, any memory format; the result has the same.
        weight: (Co, C, kh, kw) int8. Fastest in torch.channels_last.
        x_scale: (N,) float32, one for each sample.
        weight_scale: (Co,) float32.
        bias: (Co,).
        x_zero: (N,) int32 from -128 to 127; None: 0.
        weight_zero: (Co,) int32; None: 0.
        stride, padding, dilation: one number or (vertical, horizontal).
        dtype: of the result.

    Returns:
        (N, Co, H', W').

    Raises:
        KernelError: the shapes or dtypes do not fit, or there is no output position.
    """
    s, p, d = ([v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    if x.dim() != 4 or weight.dim() != 4:
        raise KernelError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}; expected (N, C, H, W) and (Co, C, kh, kw)"
        )
    _expect("x", x, (x.shape[0], weight.shape[1], *x.shape[2:]), torch.int8)
    _expect("weight", weight, weight.shape, torch.int8)
    _expect("x_scale", x_scale, x.shape[:1], torch.float32)
    _expect("weight_scale", weight_scale, weight.shape[:1], torch.float32)
    _expect("x_zero", x_zero, x.shape[:1], torch.int32)
    _expect("weight_zero", weight_zero, weight.shape[:1], torch.int32)
    _expect("bias", bias, weight.shape[:1])
    if min(s) < 1 or min(p) < 0 or min(d) < 1 or min(ops.out_shape(x.shape, weight.shape, s, p, d)[2:]) < 1:
        raise KernelError(f"x {tuple(x.shape)}, stride {s}, padding {p}, dilation {d}: no output position")
    run = ops.conv_w8a8 if use_kernel(x, CODES) else reference.conv_w8a8
    return run(x, weight, _plain(x_scale), _plain(weight_scale), _plain(bias), x_zero, weight_zero, s, p, d, dtype)


def _expect(name: str, tensor: torch.Tensor | None, shape: Any, dtype: torch.dtype | None = None) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != tuple(shape) or (dtype is not None and tensor.dtype != dtype):
        wanted = f"{tuple(shape)}" + ("" if dtype is None else f" of {dtype}")
        raise KernelError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}; expected {wanted}")


def _check_int4(x: Any, packed: Any, scale: Any, bias: Any, zero: Any, group: int) -> None:
    if group < 2 or group % 2:
        raise KernelError(f"group is {group}; expected an even number")
    groups = -(-x.shape[-1] // group)
    _expect("packed", packed, (packed.shape[0], groups * group // 2), torch.uint8)
    _expect("scale", scale, (packed.shape[0], groups))
    _expect("zero", zero, (packed.shape[0], groups), torch.uint8)
    _expect("bias", bias, packed.shape[:1])


def _plain(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach()


def _flat(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().reshape(-1)


__all__ = ["conv_w8a8", "linear_w4a16", "linear_w4a8", "linear_w8a8", "pack_int4", "quantize_rows", "unpack_int4"]
