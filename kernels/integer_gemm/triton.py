"""Triton kernels of integer products: int8 by int8, four bits by half floats and by int8, and the convolution."""

from __future__ import annotations

import triton
import triton.language as tl

# Added to and taken from a float32 below 2^22 it rounds to whole numbers, halves to even.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def _block_of(program, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Blocks of the output in an order in which neighbours share rows and columns: fewer misses of the L2 cache."""
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    first = program // (GROUP_M * blocks_n) * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    return first + within % height, within // height


@triton.jit
def _finish(total, out, x_scale, weight_scale, bias, rows, columns, mask, stride_m, stride_n, HAS_BIAS: tl.constexpr):
    """out = total x_scale weight_scale + bias."""
    result = total * x_scale[:, None] * weight_scale[None, :]
    if HAS_BIAS:
        result += bias[None, :]
    tl.store(out + rows[:, None] * stride_m + columns[None, :] * stride_n, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def quantize_kernel(x, codes, scales, size, stride, BLOCK: tl.constexpr):
    """One row: its largest magnitude, then its codes."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride + columns, mask=columns < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    scale = tl.maximum(tl.div_rn(tl.max(largest, 0), 127.0), 1.1754943508222875e-38)
    tl.store(scales + row, scale)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride + columns, mask=columns < size, other=0.0).to(tl.float32)
        code = tl.div_rn(value, tl.zeros([BLOCK], tl.float32) + scale) + ROUND - ROUND
        code = tl.minimum(tl.maximum(code, -127.0), 127.0)
        tl.store(codes + row * size + columns, code.to(tl.int8), mask=columns < size)


@triton.jit
def w8a8_kernel(
    x, weight, x_scale, weight_scale, bias, x_zero, weight_zero, out, rows, columns, depth,
    stride_xm, stride_wn, HAS_BIAS: tl.constexpr, X_ZERO: tl.constexpr, W_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """One block of x weight^T, x (M, K) and weight (N, K) dense along K, out (M, N) contiguous."""
    block_m, block_n = _block_of(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = m < rows, n < columns
    # Rows beyond the end read row 0: loads without a mask copy in wide pieces, and nothing of it is stored.
    at_m = tl.where(inside_m, m, 0).to(tl.int64)
    at_n = tl.where(inside_n, n, 0).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    x_sum = tl.zeros([BLOCK_M], tl.int32)
    w_sum = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + at_m[:, None] * stride_xm + k[None, :], mask=(k < depth)[None, :], other=0)
        b = tl.load(weight + at_n[None, :] * stride_wn + k[:, None], mask=(k < depth)[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        if W_ZERO:
            x_sum += tl.sum(a.to(tl.int32), 1)
        if X_ZERO:
            w_sum += tl.sum(b.to(tl.int32), 0)
    if X_ZERO:
        zero_x = tl.load(x_zero + m, mask=inside_m, other=0)
        total -= zero_x[:, None] * w_sum[None, :]
    if W_ZERO:
        zero_w = tl.load(weight_zero + n, mask=inside_n, other=0)
        total -= x_sum[:, None] * zero_w[None, :]
        if X_ZERO:
            total += depth * zero_x[:, None] * zero_w[None, :]
    scale_m = tl.load(x_scale + m, mask=inside_m, other=0.0)
    scale_n = tl.load(weight_scale + n, mask=inside_n, other=0.0)
    added = scale_n
    if HAS_BIAS:
        added = tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)
    mask = inside_m[:, None] & inside_n[None, :]
    _finish(total.to(tl.float32), out, scale_m, scale_n, added, m.to(tl.int64), n, mask, columns, 1, HAS_BIAS)


@triton.jit
def w4_kernel(
    x, packed, x_scale, scale, bias, zero, out, rows, columns, depth, groups, stride_xm,
    HAS_BIAS: tl.constexpr, HAS_ZERO: tl.constexpr, INTEGER: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """One block of x weight^T with four-bit weights, group by group: 2 HALF codes share a scale.

    INTEGER: x is int8, products are exact and scaled afterwards; else weights are scaled, then rounded to
    x's dtype.
    """
    block_m, block_n = _block_of(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = m < rows, n < columns
    at_m = tl.where(inside_m, m, 0).to(tl.int64)
    at_n = tl.where(inside_n, n, 0).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(groups):
        j = tl.arange(0, HALF)
        codes = tl.load(packed + at_n[None, :] * (groups * HALF) + (group * HALF + j)[:, None])
        shared = tl.load(scale + at_n * groups + group).to(tl.float32)
        centre = tl.full([BLOCK_N], 8, tl.int32)
        if HAS_ZERO:
            centre = tl.load(zero + at_n * groups + group).to(tl.int32)
        low = (codes & 15).to(tl.int32) - centre[None, :]
        high = (codes >> 4).to(tl.int32) - centre[None, :]
        k = group * (2 * HALF) + j
        first = tl.load(x + at_m[:, None] * stride_xm + k[None, :], mask=(k < depth)[None, :], other=0)
        second = tl.load(x + at_m[:, None] * stride_xm + (k + HALF)[None, :], mask=(k + HALF < depth)[None, :], other=0)
        if INTEGER:
            part = tl.dot(first, low.to(tl.int8), out_dtype=tl.int32)
            part = tl.dot(second, high.to(tl.int8), part, out_dtype=tl.int32)
            total += part.to(tl.float32) * shared[None, :]
        else:
            weight1 = (low.to(tl.float32) * shared[None, :]).to(x.dtype.element_ty)
            weight2 = (high.to(tl.float32) * shared[None, :]).to(x.dtype.element_ty)
            if UPCAST:
                # The interpreter multiplies bf16 blocks wrongly.
                weight1, weight2 = weight1.to(tl.float32), weight2.to(tl.float32)
                first, second = first.to(tl.float32), second.to(tl.float32)
            total = tl.dot(first, weight1, total, input_precision=PRECISION)
            total = tl.dot(second, weight2, total, input_precision=PRECISION)
    scale_m = tl.full([BLOCK_M], 1.0, tl.float32)
    if INTEGER:
        scale_m = tl.load(x_scale + m, mask=inside_m, other=0.0)
    added = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)
    mask = inside_m[:, None] & inside_n[None, :]
    ones = tl.full([BLOCK_N], 1.0, tl.float32)
    _finish(total, out, scale_m, ones, added, m.to(tl.int64), n, mask, columns, 1, HAS_BIAS)


@triton.jit
def conv_kernel(
    x, weight, x_scale, weight_scale, bias, x_zero, weight_zero, out,
    pixels, channels, channels_in, height_in, width_in, height, width,
    stride_xn, stride_xc, stride_xy, stride_xx, stride_on, stride_oc, stride_oy, stride_ox,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr, PAD_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    HAS_BIAS: tl.constexpr, X_ZERO: tl.constexpr, W_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """Implicit GEMM: rows are output pixels, the depth is taps times channels. weight lies as (Co, kh, kw, C).

    Outside of the picture x has the code of its zero.
    """
    block_m, block_n = _block_of(tl.program_id(0), pixels, channels, BLOCK_M, BLOCK_N, GROUP_M)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = m < pixels, n < channels
    sample = m // (height * width)
    row = m // width % height
    column = m % width
    at_n = tl.where(inside_n, n, 0).to(tl.int64)
    zero_x = tl.zeros([BLOCK_M], tl.int32)
    if X_ZERO:
        zero_x = tl.load(x_zero + sample, mask=inside_m, other=0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    x_sum = tl.zeros([BLOCK_M], tl.int32)
    w_sum = tl.zeros([BLOCK_N], tl.int32)
    pieces = tl.cdiv(channels_in, BLOCK_K)
    for step in range(KH * KW * pieces):
        tap = step // pieces
        c = step % pieces * BLOCK_K + tl.arange(0, BLOCK_K)
        at_y = row * STRIDE_Y - PAD_Y + tap // KW * STEP_Y
        at_x = column * STRIDE_X - PAD_X + tap % KW * STEP_X
        inside = inside_m & (at_y >= 0) & (at_y < height_in) & (at_x >= 0) & (at_x < width_in)
        places = sample.to(tl.int64) * stride_xn + at_y * stride_xy + at_x * stride_xx
        there = c < channels_in
        mask = inside[:, None] & there[None, :]
        a = tl.load(x + places[:, None] + c[None, :] * stride_xc, mask=mask, other=0)
        if X_ZERO:
            a = tl.where(inside[:, None], a, zero_x.to(tl.int8)[:, None])
            # Channels beyond the end must not count in the sums.
            a = tl.where(there[None, :], a, 0)
        b = tl.load(
            weight + at_n[None, :] * (KH * KW * channels_in) + (tap * channels_in + c)[:, None],
            mask=there[:, None], other=0
        )  # fmt: skip
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        if W_ZERO:
            x_sum += tl.sum(a.to(tl.int32), 1)
        if X_ZERO:
            w_sum += tl.sum(b.to(tl.int32), 0)
    if X_ZERO:
        total -= zero_x[:, None] * w_sum[None, :]
    if W_ZERO:
        # Without a zero of x, pixels outside count 0 in x_sum, as they must.
        zero_w = tl.load(weight_zero + n, mask=inside_n, other=0)
        total -= x_sum[:, None] * zero_w[None, :]
        total += KH * KW * channels_in * zero_x[:, None] * zero_w[None, :]
    scale_m = tl.load(x_scale + sample, mask=inside_m, other=0.0)
    scale_n = tl.load(weight_scale + n, mask=inside_n, other=0.0)
    added = scale_n
    if HAS_BIAS:
        added = tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)
    base = sample.to(tl.int64) * stride_on + row * stride_oy + column * stride_ox
    mask = inside_m[:, None] & inside_n[None, :]
    _finish(total.to(tl.float32), out, scale_m, scale_n, added, base, n, mask, 1, stride_oc, HAS_BIAS)
