"""Triton kernels of the Tucker convolution.

`tail_kernel` is core, up and add in one implicit GEMM: the S channels between core and up stay in registers.
`full_kernel` is everything: a program owns a tile of the output, puts the R channels of the tile and its
border into a strip of memory of its own, small enough to stay in the L2 cache, and reads the k x k taps from
there. Both hold S as two blocks of columns, S1 + S2 >= S.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_block(pointers, mask, UPCAST: tl.constexpr):
    block = tl.load(pointers, mask=mask, other=0.0)
    if UPCAST:
        # The interpreter multiplies bf16 blocks wrongly.
        block = block.to(tl.float32)
    return block


@triton.jit
def _up(
    mid1, mid2, base, up, y, scale, sample, rows, columns, valid, channels,
    stride_bn, stride_bc, stride_by, stride_bx, stride_yn, stride_yc, stride_yy, stride_yx,
    S: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, HAS_BASE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_CO: tl.constexpr
):  # fmt: skip
    """y = base + scale mid up^T at the pixels (rows, columns), a block of channels at a time."""
    base_rows = base + sample * stride_bn + rows * stride_by + columns * stride_bx
    y_rows = y + sample * stride_yn + rows * stride_yy + columns * stride_yx
    ranks1 = tl.arange(0, S1)
    for first in range(0, channels, BLOCK_CO):
        chosen = first + tl.arange(0, BLOCK_CO)
        there = chosen < channels
        up1 = load_block(up + chosen[None, :] * S + ranks1[:, None], (ranks1 < S)[:, None] & there[None, :], UPCAST)
        wide = tl.dot(mid1, up1, input_precision=PRECISION)
        if S2 > 0:
            ranks2 = S1 + tl.arange(0, S2)
            up2 = load_block(up + chosen[None, :] * S + ranks2[:, None], (ranks2 < S)[:, None] & there[None, :], UPCAST)
            wide = tl.dot(mid2, up2, wide, input_precision=PRECISION)
        wide = wide * scale
        mask = valid[:, None] & there[None, :]
        if HAS_BASE:
            wide += tl.load(base_rows[:, None] + chosen[None, :] * stride_bc, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_rows[:, None] + chosen[None, :] * stride_yc, wide.to(y.dtype.element_ty), mask=mask)


@triton.jit
def tail_kernel(
    h, base, core, up, y, mid, scale, height_in, width_in, height, width, channels, tiles_x,
    stride_hn, stride_hc, stride_hy, stride_hx, stride_bn, stride_bc, stride_by, stride_bx,
    stride_yn, stride_yc, stride_yy, stride_yx,
    R: tl.constexpr, S: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, HAS_BASE: tl.constexpr, KEEP: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_CO: tl.constexpr
):  # fmt: skip
    """One tile of output pixels: y = base + scale up (core * h), and the S channels to `mid` if KEEP.

    h (N, R, H, W); core lies as (S, kh, kw, R), up as (Co, S), mid as (N, H', W', S).
    """
    tile = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    pixel = tl.arange(0, TILE_Y * TILE_X)
    rows = tile // tiles_x * TILE_Y + pixel // TILE_X
    columns = tile % tiles_x * TILE_X + pixel % TILE_X
    valid = (rows < height) & (columns < width)
    h += sample * stride_hn
    ranks1 = tl.arange(0, S1)
    mid1 = tl.zeros([TILE_Y * TILE_X, S1], tl.float32)
    mid2 = tl.zeros([TILE_Y * TILE_X, S2 if S2 > 0 else 16], tl.float32)
    pieces: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    # One loop over taps and pieces of R, so that loads run ahead across taps.
    for step in range(KH * KW * pieces):
        tap = step // pieces
        ranks = step % pieces * BLOCK_R + tl.arange(0, BLOCK_R)
        at_y = rows * STRIDE_Y - PAD_Y + tap // KW * STEP_Y
        at_x = columns * STRIDE_X - PAD_X + tap % KW * STEP_X
        inside = valid & (at_y >= 0) & (at_y < height_in) & (at_x >= 0) & (at_x < width_in)
        narrow = load_block(
            h + (at_y * stride_hy + at_x * stride_hx)[:, None] + ranks[None, :] * stride_hc,
            inside[:, None] & (ranks < R)[None, :], UPCAST
        )  # fmt: skip
        taps = core + tap * R + ranks
        taps1 = load_block(
            taps[:, None] + ranks1[None, :] * (KH * KW * R), (ranks < R)[:, None] & (ranks1 < S)[None, :], UPCAST
        )
        mid1 = tl.dot(narrow, taps1, mid1, input_precision=PRECISION)
        if S2 > 0:
            ranks2 = S1 + tl.arange(0, S2)
            taps2 = load_block(
                taps[:, None] + ranks2[None, :] * (KH * KW * R), (ranks < R)[:, None] & (ranks2 < S)[None, :], UPCAST
            )
            mid2 = tl.dot(narrow, taps2, mid2, input_precision=PRECISION)
    narrow1 = mid1.to(y.dtype.element_ty)
    narrow2 = mid2.to(y.dtype.element_ty)
    if KEEP:
        place = mid + ((sample * height + rows) * width + columns) * S
        tl.store(place[:, None] + ranks1[None, :], narrow1, mask=valid[:, None] & (ranks1 < S)[None, :])
        if S2 > 0:
            ranks2 = S1 + tl.arange(0, S2)
            tl.store(place[:, None] + ranks2[None, :], narrow2, mask=valid[:, None] & (ranks2 < S)[None, :])
    if UPCAST:
        narrow1, narrow2 = narrow1.to(tl.float32), narrow2.to(tl.float32)
    _up(
        narrow1, narrow2, base, up, y, scale, sample, rows, columns, valid, channels,
        stride_bn, stride_bc, stride_by, stride_bx, stride_yn, stride_yc, stride_yy, stride_yx,
        S, S1, S2, HAS_BASE, UPCAST, PRECISION, BLOCK_CO
    )  # fmt: skip


@triton.jit
def full_kernel(
    x, base, down, core, up, y, strip, scale, channels_in, height_in, width_in, height, width, channels,
    tiles, tiles_y, tiles_x,
    stride_xn, stride_xc, stride_xy, stride_xx, stride_bn, stride_bc, stride_by, stride_bx,
    stride_yn, stride_yc, stride_yy, stride_yx,
    R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, S: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr, PAD_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    HAS_BASE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_CO: tl.constexpr
):  # fmt: skip
    """Tiles of output pixels, one after the other: y = base + scale up (core * (down x)).

    strip: (programs, border tile rounded up to BLOCK_P, R1 + R2), written and read by its own program alone.
    """
    wide_y: tl.constexpr = (TILE_Y - 1) * STRIDE_Y + (KH - 1) * STEP_Y + 1
    wide_x: tl.constexpr = (TILE_X - 1) * STRIDE_X + (KW - 1) * STEP_X + 1
    points: tl.constexpr = wide_y * wide_x
    room: tl.constexpr = (points + BLOCK_P - 1) // BLOCK_P * BLOCK_P
    width_r: tl.constexpr = R1 + R2
    pieces: tl.constexpr = (width_r + BLOCK_R - 1) // BLOCK_R
    strip += tl.program_id(0).to(tl.int64) * (room * width_r)
    ranks1 = tl.arange(0, S1)
    in1 = tl.arange(0, R1)
    pixel = tl.arange(0, TILE_Y * TILE_X)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        sample = (tile // (tiles_y * tiles_x)).to(tl.int64)
        first_y = tile // tiles_x % tiles_y * TILE_Y
        first_x = tile % tiles_x * TILE_X
        source = x + sample * stride_xn
        for start in range(0, room, BLOCK_P):
            point = start + tl.arange(0, BLOCK_P)
            at_y = first_y * STRIDE_Y - PAD_Y + point // wide_x
            at_x = first_x * STRIDE_X - PAD_X + point % wide_x
            inside = (point < points) & (at_y >= 0) & (at_y < height_in) & (at_x >= 0) & (at_x < width_in)
            places = source + at_y * stride_xy + at_x * stride_xx
            low1 = tl.zeros([BLOCK_P, R1], tl.float32)
            low2 = tl.zeros([BLOCK_P, R2 if R2 > 0 else 16], tl.float32)
            for first in range(0, channels_in, BLOCK_C):
                chosen = first + tl.arange(0, BLOCK_C)
                there = chosen < channels_in
                block = load_block(
                    places[:, None] + chosen[None, :] * stride_xc, inside[:, None] & there[None, :], UPCAST
                )
                down1 = load_block(
                    down + in1[None, :] * channels_in + chosen[:, None], there[:, None] & (in1 < R)[None, :], UPCAST
                )
                low1 = tl.dot(block, down1, low1, input_precision=PRECISION)
                if R2 > 0:
                    in2 = R1 + tl.arange(0, R2)
                    down2 = load_block(
                        down + in2[None, :] * channels_in + chosen[:, None], there[:, None] & (in2 < R)[None, :], UPCAST
                    )
                    low2 = tl.dot(block, down2, low2, input_precision=PRECISION)
            # Points outside of the picture are zeros of x, so zeros here: the 1x1 has no bias.
            row = strip + point[:, None] * width_r
            tl.store(row + in1[None, :], low1.to(strip.dtype.element_ty))
            if R2 > 0:
                tl.store(row + R1 + tl.arange(0, R2)[None, :], low2.to(strip.dtype.element_ty))
        tl.debug_barrier()
        mid1 = tl.zeros([TILE_Y * TILE_X, S1], tl.float32)
        mid2 = tl.zeros([TILE_Y * TILE_X, S2 if S2 > 0 else 16], tl.float32)
        corner = pixel // TILE_X * STRIDE_Y * wide_x + pixel % TILE_X * STRIDE_X
        for step in range(KH * KW * pieces):
            tap = step // pieces
            ranks = step % pieces * BLOCK_R + tl.arange(0, BLOCK_R)
            shift = tap // KW * STEP_Y * wide_x + tap % KW * STEP_X
            narrow = load_block(
                strip + (corner + shift)[:, None] * width_r + ranks[None, :], (ranks < width_r)[None, :], UPCAST
            )
            taps = core + tap * R + ranks
            taps1 = load_block(
                taps[:, None] + ranks1[None, :] * (KH * KW * R), (ranks < R)[:, None] & (ranks1 < S)[None, :], UPCAST
            )
            mid1 = tl.dot(narrow, taps1, mid1, input_precision=PRECISION)
            if S2 > 0:
                ranks2 = S1 + tl.arange(0, S2)
                taps2 = load_block(
                    taps[:, None] + ranks2[None, :] * (KH * KW * R),
                    (ranks < R)[:, None] & (ranks2 < S)[None, :],
                    UPCAST,
                )
                mid2 = tl.dot(narrow, taps2, mid2, input_precision=PRECISION)
        narrow1 = mid1.to(y.dtype.element_ty)
        narrow2 = mid2.to(y.dtype.element_ty)
        if UPCAST:
            narrow1, narrow2 = narrow1.to(tl.float32), narrow2.to(tl.float32)
        rows = first_y + pixel // TILE_X
        columns = first_x + pixel % TILE_X
        _up(
            narrow1, narrow2, base, up, y, scale, sample, rows, columns, (rows < height) & (columns < width), channels,
            stride_bn, stride_bc, stride_by, stride_bx, stride_yn, stride_yc, stride_yy, stride_yx,
            S, S1, S2, HAS_BASE, UPCAST, PRECISION, BLOCK_CO
        )  # fmt: skip
        # The strip is written anew for the next tile.
        tl.debug_barrier()
