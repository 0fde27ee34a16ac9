"""Triton kernels of attention: forward with log-sum-exp, column sums, nearest kept token.

Logits are kept in units of log 2 (exp2 is one instruction). A head of size D is read as two blocks of
columns, D1 + D2 >= D, because blocks are powers of two and 40, 80 and 160 are not. Strides of q, k, v come
divided by ALIGN (8 or 1): Triton must know that rows begin at multiples of 16 bytes to copy them in wide pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    base, rows, valid, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr
):  # fmt: skip
    """Columns FIRST ... FIRST + WIDTH of rows of a matrix; 0 beyond SIZE columns, and where not valid."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if FIRST + WIDTH > SIZE:
        if MASKED:
            block = tl.load(pointers, mask=valid[:, None] & (columns < SIZE)[None, :], other=0.0)
        else:
            block = tl.load(pointers, mask=(columns < SIZE)[None, :], other=0.0)
    elif MASKED:
        block = tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        block = tl.load(pointers)
    if UPCAST:
        # The interpreter multiplies bf16 blocks wrongly.
        block = block.to(tl.float32)
    return block


@triton.jit
def store_rows(base, rows, valid, stride, block, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Put a block at columns FIRST ... FIRST + WIDTH of the valid rows of a matrix of SIZE columns."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, block.to(base.dtype.element_ty), mask=valid[:, None] & (columns < SIZE)[None, :])


@triton.jit
def _attend(
    q1, q2, k, v, rows, valid, stride_k, stride_v, top, total, out1, out2, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """One block of keys: running maximum, sum and output of the online softmax."""
    k1 = load_rows(k, rows, valid, stride_k, 0, D1, D, MASKED, UPCAST)
    logits = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if D2 > 0:
        k2 = load_rows(k, rows, valid, stride_k, D1, D2, D, MASKED, UPCAST)
        logits = tl.dot(q2, tl.trans(k2), logits, input_precision=PRECISION)
    logits = logits * scale
    if MASKED:
        logits = tl.where(valid[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 1)
    v1 = load_rows(v, rows, valid, stride_v, 0, D1, D, MASKED, UPCAST)
    weights = weights.to(v1.dtype)
    out1 = tl.dot(weights, v1, out1 * fade[:, None], input_precision=PRECISION)
    if D2 > 0:
        v2 = load_rows(v, rows, valid, stride_v, D1, D2, D, MASKED, UPCAST)
        out2 = tl.dot(weights, v2, out2 * fade[:, None], input_precision=PRECISION)
    return new_top, total, out1, out2


@triton.jit
def forward_kernel(
    q, k, v, out, lse, query_index, key_index, scale, heads, queries, keys, stride_index_q, stride_index_k,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr,
    GATHER_Q: tl.constexpr, GATHER_K: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """One block of queries of one head against all keys; rows are read through indices where asked."""
    stride_qb, stride_qh, stride_qn = stride_qb * ALIGN, stride_qh * ALIGN, stride_qn * ALIGN
    stride_kb, stride_kh, stride_kn = stride_kb * ALIGN, stride_kh * ALIGN, stride_kn * ALIGN
    stride_vb, stride_vh, stride_vn = stride_vb * ALIGN, stride_vh * ALIGN, stride_vn * ALIGN
    pair = tl.program_id(1)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    q += sample * stride_qb + head * stride_qh
    k += sample * stride_kb + head * stride_kh
    v += sample * stride_vb + head * stride_vh
    places = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    there = places < queries
    rows = places
    if GATHER_Q:
        rows = tl.load(query_index + sample * stride_index_q + places, mask=there, other=0)
    q1 = load_rows(q, rows, there, stride_qn, 0, D1, D, True, UPCAST)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(q, rows, there, stride_qn, D1, D2, D, True, UPCAST)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    out2 = tl.zeros([BLOCK_Q, D2 if D2 > 0 else 16], tl.float32)
    scale = scale * LOG2E
    whole = keys // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        if GATHER_K:
            columns = tl.load(key_index + sample * stride_index_k + columns)
        top, total, out1, out2 = _attend(
            q1, q2, k, v, columns, there, stride_kn, stride_vn, top, total, out1, out2, scale,
            D, D1, D2, False, UPCAST, PRECISION
        )  # fmt: skip
    if whole < keys:
        columns = whole + tl.arange(0, BLOCK_K)
        valid = columns < keys
        if GATHER_K:
            columns = tl.load(key_index + sample * stride_index_k + columns, mask=valid, other=0)
        top, total, out1, out2 = _attend(
            q1, q2, k, v, columns, valid, stride_kn, stride_vn, top, total, out1, out2, scale,
            D, D1, D2, True, UPCAST, PRECISION
        )  # fmt: skip
    share = 1.0 / total
    out += sample * stride_ob + head * stride_oh
    store_rows(out, places, there, stride_on, out1 * share[:, None], 0, D1, D)
    if D2 > 0:
        store_rows(out, places, there, stride_on, out2 * share[:, None], D1, D2, D)
    tl.store(lse + pair.to(tl.int64) * queries + places, (top + tl.log2(total)) * LN2, mask=there)


@triton.jit
def _exp2_pairs(x):
    """exp2 of x in float16, two values an instruction: relative error 1e-3, half the time of float32."""
    return tl.inline_asm_elementwise(
        "ex2.approx.f16x2 $0, $1;", "=r,r", [x.to(tl.float16)], dtype=tl.float16, is_pure=True, pack=2
    ).to(tl.float32)


@triton.jit
def column_sum_kernel(
    q, k, lse, s, out, scale, heads, queries, keys, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    HALF_EXP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """One block of keys of one head against all queries: sum over i of exp(q_i . k_j - lse_i) s_i.

    The block of logits is transposed, keys along its rows, so that the sum stays inside a warp.
    """
    stride_qb, stride_qh, stride_qn = stride_qb * ALIGN, stride_qh * ALIGN, stride_qn * ALIGN
    stride_kb, stride_kh, stride_kn = stride_kb * ALIGN, stride_kh * ALIGN, stride_kn * ALIGN
    pair = tl.program_id(1)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    q += sample * stride_qb + head * stride_qh
    k += sample * stride_kb + head * stride_kh
    lse += pair.to(tl.int64) * queries
    s += pair.to(tl.int64) * queries
    rows = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    there = rows < keys
    k1 = load_rows(k, rows, there, stride_kn, 0, D1, D, True, UPCAST)
    k2 = k1
    if D2 > 0:
        k2 = load_rows(k, rows, there, stride_kn, D1, D2, D, True, UPCAST)
    total = tl.zeros([BLOCK_K], tl.float32)
    scale = scale * LOG2E
    for start in range(0, queries, BLOCK_Q):
        columns = start + tl.arange(0, BLOCK_Q)
        valid = columns < queries
        q1 = load_rows(q, columns, valid, stride_qn, 0, D1, D, True, UPCAST)
        logits = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
        if D2 > 0:
            q2 = load_rows(q, columns, valid, stride_qn, D1, D2, D, True, UPCAST)
            logits = tl.dot(k2, tl.trans(q2), logits, input_precision=PRECISION)
        shift = tl.load(lse + columns, mask=valid, other=0.0) * LOG2E
        share = tl.load(s + columns, mask=valid, other=0.0)
        logits = logits * scale - shift[None, :]
        if HALF_EXP:
            weights = _exp2_pairs(logits)
        else:
            weights = tl.exp2(logits)
        total += tl.sum(weights * share[None, :], 1)
    tl.store(out + pair.to(tl.int64) * keys + rows, total, mask=there)


@triton.jit
def nearest_kernel(
    q, k, lse, keep, place, kept, nearest, out, scale, heads, tokens, count, channels,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_cb, stride_cn,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr,
    COPY: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """One block of tokens against all kept ones, all heads; then the rows of the nearest are copied.

    `place` (B, N) is a kept token's own place in `keep`, and -1 for the others.
    """
    stride_qb, stride_qh, stride_qn = stride_qb * ALIGN, stride_qh * ALIGN, stride_qn * ALIGN
    stride_kb, stride_kh, stride_kn = stride_kb * ALIGN, stride_kh * ALIGN, stride_kn * ALIGN
    sample = tl.program_id(1).to(tl.int64)
    q += sample * stride_qb
    k += sample * stride_kb
    lse += sample * heads * tokens
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    there = rows < tokens
    best = tl.full([BLOCK_Q], -1.0, tl.float32)
    found = tl.zeros([BLOCK_Q], tl.int32)
    scale = scale * LOG2E
    for start in range(0, count, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        valid = columns < count
        chosen = tl.load(keep + sample * count + columns, mask=valid, other=0)
        weights = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for head in range(heads):
            head_q = q + head * stride_qh
            head_k = k + head * stride_kh
            q1 = load_rows(head_q, rows, there, stride_qn, 0, D1, D, True, UPCAST)
            k1 = load_rows(head_k, chosen, valid, stride_kn, 0, D1, D, True, UPCAST)
            logits = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
            if D2 > 0:
                q2 = load_rows(head_q, rows, there, stride_qn, D1, D2, D, True, UPCAST)
                k2 = load_rows(head_k, chosen, valid, stride_kn, D1, D2, D, True, UPCAST)
                logits = tl.dot(q2, tl.trans(k2), logits, input_precision=PRECISION)
            shift = tl.load(lse + head * tokens + rows, mask=there, other=0.0) * LOG2E
            weights += tl.exp2(logits * scale - shift[:, None])
        weights = tl.where(valid[None, :], weights, -1.0)
        value = tl.max(weights, 1)
        where = tl.argmax(weights, 1) + start
        found = tl.where(value > best, where, found)
        best = tl.maximum(value, best)
    own = tl.load(place + sample * tokens + rows, mask=there, other=0)
    found = tl.where(own >= 0, own, found.to(tl.int64))
    tl.store(nearest + sample * tokens + rows, found, mask=there)
    if COPY:
        kept += sample * stride_cb
        out += sample * tokens * channels
        for start in range(0, channels, BLOCK_C):
            columns = start + tl.arange(0, BLOCK_C)
            mask = there[:, None] & (columns < channels)[None, :]
            block = tl.load(kept + found[:, None] * stride_cn + columns[None, :], mask=mask, other=0.0)
            tl.store(out + rows.to(tl.int64)[:, None] * channels + columns[None, :], block, mask=mask)
