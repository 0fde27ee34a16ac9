"""The operators `vislr::quantize_rows`, `linear_w8a8`, `linear_w4a16`, `linear_w4a8`, `conv_w8a8`."""

from __future__ import annotations

from typing import Any

import torch

from vislr.kernels.dispatch import INTERPRETED, tuned
from vislr.kernels.integer_gemm import reference
from vislr.kernels.library import dot_precision, launcher, operator

FOLDER = "integer_gemm"
# Starting points for Hopper until `python -m vislr.kernels.tune` has run: {kernel: (most rows M, configuration)}.
_MANY = 1 << 62
DEFAULTS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "w8a8": [
        (64, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 8, "num_warps": 4, "num_stages": 4}),
        (_MANY, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8, "num_warps": 8, "num_stages": 4}),
    ],
    "conv": [
        (_MANY, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 4}),
    ],
    "w4a16": [
        (64, {"BLOCK_M": 16, "BLOCK_N": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 4}),
        (_MANY, {"BLOCK_M": 128, "BLOCK_N": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}),
    ],
    "w4a8": [
        (64, {"BLOCK_M": 16, "BLOCK_N": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 4}),
        (_MANY, {"BLOCK_M": 128, "BLOCK_N": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}),
    ],
}


def key(rows: int, columns: int, depth: int) -> str:
    """A shape's row in the table: M rounded up to a power of two."""
    return f"M={1 << max(0, rows - 1).bit_length()} N={columns} K={depth}"


def config_of(kernel: str, rows: int, columns: int, depth: int) -> dict[str, Any]:
    """Block sizes, warps and stages of a kernel for a shape."""
    config = next(config for most, config in DEFAULTS[kernel] if rows <= most)
    return config | tuned(FOLDER, kernel, key(rows, columns, depth))


def _grid(rows: int, columns: int, config: dict[str, Any]) -> tuple[int]:
    return (-(-rows // config["BLOCK_M"]) * -(-columns // config["BLOCK_N"]),)


def _given(tensor: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    return placeholder if tensor is None else tensor.contiguous()


def _quantize(x: Any) -> Any:
    from vislr.kernels.integer_gemm.triton import quantize_kernel

    codes, scales = _quantize_fake(x)
    if codes.shape[0] == 0:
        return codes, scales
    x = x if x.stride(1) == 1 else x.contiguous()
    block = min(4096, max(16, 1 << (x.shape[1] - 1).bit_length()))
    launcher(quantize_kernel)[(x.shape[0],)](x, codes, scales, x.shape[1], x.stride(0), BLOCK=block, num_warps=4)
    return codes, scales


def _quantize_fake(x: Any) -> Any:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _contiguous_reference(x: Any) -> Any:
    codes, scales = reference.quantize_rows(x)
    return codes.contiguous(), scales


quantize = operator("quantize_rows", "(Tensor x) -> (Tensor, Tensor)", _quantize, _contiguous_reference, _quantize_fake)


def _w8a8(x: Any, weight: Any, xs: Any, ws: Any, bias: Any, xz: Any, wz: Any, dtype: torch.dtype) -> Any:
    from vislr.kernels.integer_gemm.triton import w8a8_kernel

    out = _w8a8_fake(x, weight, xs, ws, bias, xz, wz, dtype)
    if out.numel() == 0:
        return out
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (x, weight))
    rows, columns, depth = x.shape[0], weight.shape[0], x.shape[1]
    config = config_of("w8a8", rows, columns, depth)
    launcher(w8a8_kernel)[_grid(rows, columns, config)](
        x, weight, xs.contiguous(), ws.contiguous(), _given(bias, ws), _given(xz, xs), _given(wz, ws), out,
        rows, columns, depth, x.stride(0), weight.stride(0),
        HAS_BIAS=bias is not None, X_ZERO=xz is not None, W_ZERO=wz is not None, **config,
    )  # fmt: skip
    return out


def _w8a8_fake(x: Any, weight: Any, xs: Any, ws: Any, bias: Any, xz: Any, wz: Any, dtype: torch.dtype) -> Any:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def _linear_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


linear_w8a8 = operator(
    "linear_w8a8",
    "(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, Tensor? x_zero, "
    "Tensor? weight_zero, ScalarType dtype) -> Tensor",
    _w8a8,
    reference.linear_w8a8,
    _w8a8_fake,
    _linear_flops,
)


def _w4(x: Any, packed: Any, xs: Any, scale: Any, bias: Any, zero: Any, group: int, out: Any) -> Any:
    from vislr.kernels.integer_gemm.triton import w4_kernel

    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns, depth = x.shape[0], packed.shape[0], x.shape[1]
    config = config_of("w4a16" if xs is None else "w4a8", rows, columns, depth)
    launcher(w4_kernel)[_grid(rows, columns, config)](
        x, packed.contiguous(), _given(xs, scale), scale.contiguous(), _given(bias, scale), _given(zero, packed), out,
        rows, columns, depth, 2 * packed.shape[1] // group, x.stride(0),
        HAS_BIAS=bias is not None, HAS_ZERO=zero is not None, INTEGER=xs is not None,
        UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
        PRECISION=dot_precision(x.dtype, torch.backends.cuda.matmul.allow_tf32), HALF=group // 2, **config,
    )  # fmt: skip
    return out


def _w4a16(x: Any, packed: Any, scale: Any, bias: Any, zero: Any, group: int) -> Any:
    return _w4(x, packed, None, scale, bias, zero, group, _w4a16_fake(x, packed, scale, bias, zero, group))


def _w4a16_fake(x: Any, packed: Any, scale: Any, bias: Any, zero: Any, group: int) -> Any:
    return x.new_empty(x.shape[0], packed.shape[0])


linear_w4a16 = operator(
    "linear_w4a16",
    "(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor? zero, int group) -> Tensor",
    _w4a16,
    reference.linear_w4a16,
    _w4a16_fake,
    _linear_flops,
)


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    x, packed, scale, _, zero, ctx.group = inputs
    ctx.depth = x.shape[1]
    ctx.save_for_backward(packed, scale, zero)


def _differentiate(ctx: Any, grad: Any) -> tuple:
    packed, scale, zero = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = reference.dequantize_int4(packed, scale, zero, ctx.group, grad.dtype)
        grad_x = (grad @ weight)[:, : ctx.depth]
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum(0)
    return grad_x, None, None, grad_bias, None, None


linear_w4a16.register_autograd(_differentiate, setup_context=_save)


def _w4a8(x: Any, packed: Any, xs: Any, scale: Any, bias: Any, zero: Any, group: int, dtype: torch.dtype) -> Any:
    out = _w4a8_fake(x, packed, xs, scale, bias, zero, group, dtype)
    return _w4(x, packed, xs.contiguous(), scale, bias, zero, group, out)


def _w4a8_fake(x: Any, packed: Any, xs: Any, scale: Any, bias: Any, zero: Any, group: int, dtype: torch.dtype) -> Any:
    return x.new_empty(x.shape[0], packed.shape[0], dtype=dtype)


linear_w4a8 = operator(
    "linear_w4a8",
    "(Tensor x, Tensor packed, Tensor x_scale, Tensor scale, Tensor? bias, Tensor? zero, int group, "
    "ScalarType dtype) -> Tensor",
    _w4a8,
    reference.linear_w4a8,
    _w4a8_fake,
    _linear_flops,
)


def _conv(
    x: Any, weight: Any, xs: Any, ws: Any, bias: Any, xz: Any, wz: Any, s: Any, p: Any, d: Any, dtype: Any
) -> Any:
    from vislr.kernels.integer_gemm.triton import conv_kernel

    out = _conv_fake(x, weight, xs, ws, bias, xz, wz, s, p, d, dtype)
    if out.numel() == 0:
        return out
    weight = weight.contiguous(memory_format=torch.channels_last)
    channels, inside, high, wide = weight.shape
    pixels = out.shape[0] * out.shape[2] * out.shape[3]
    config = config_of("conv", pixels, channels, inside * high * wide)
    launcher(conv_kernel)[_grid(pixels, channels, config)](
        x, weight, xs.contiguous(), ws.contiguous(), _given(bias, ws), _given(xz, xs), _given(wz, ws), out,
        pixels, channels, inside, x.shape[2], x.shape[3], out.shape[2], out.shape[3], *x.stride(), *out.stride(),
        KH=high, KW=wide, STRIDE_Y=s[0], STRIDE_X=s[1], PAD_Y=p[0], PAD_X=p[1], STEP_Y=d[0], STEP_X=d[1],
        HAS_BIAS=bias is not None, X_ZERO=xz is not None, W_ZERO=wz is not None, **config,
    )  # fmt: skip
    return out


def out_shape(x: Any, weight: Any, s: Any, p: Any, d: Any) -> tuple[int, int, int, int]:
    """(N, Co, H', W') of a convolution from the shapes of its input and weight."""
    size = [(x[2 + i] + 2 * p[i] - d[i] * (weight[2 + i] - 1) - 1) // s[i] + 1 for i in range(2)]
    return x[0], weight[0], size[0], size[1]


def _conv_fake(
    x: Any, weight: Any, xs: Any, ws: Any, bias: Any, xz: Any, wz: Any, s: Any, p: Any, d: Any, dtype: Any
) -> Any:
    dense = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.contiguous_format if dense else torch.channels_last
    shape = out_shape(x.shape, weight.shape, s, p, d)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


def _conv_reference(x: Any, *args: Any) -> Any:
    return _conv_fake(x, *args).copy_(reference.conv_w8a8(x, *args))


def _conv_flops(
    x: Any, weight: Any, xs: Any, ws: Any, bias: Any, xz: Any, wz: Any, s: Any, p: Any, d: Any, *a: Any, **k: Any
) -> int:
    batch, channels, height, width = out_shape(x, weight, s, p, d)
    return 2 * batch * channels * height * width * weight[1] * weight[2] * weight[3]


conv_w8a8 = operator(
    "conv_w8a8",
    "(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, Tensor? x_zero, "
    "Tensor? weight_zero, int[] stride, int[] padding, int[] dilation, ScalarType dtype) -> Tensor",
    _conv,
    _conv_reference,
    _conv_fake,
    _conv_flops,
)
