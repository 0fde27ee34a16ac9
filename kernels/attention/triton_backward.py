"""Triton kernels of the attention's gradient, from the saved log-sum-exp.

With P the softmax map, dP = dO V^T and delta_i = dO_i . O_i::

    dV = P^T dO,   dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q
"""

from __future__ import annotations

import triton
import triton.language as tl

from vislr.kernels.attention.triton import LOG2E, load_rows, store_rows


@triton.jit
def keys_kernel(
    q, k, v, grad, lse, delta, dk, dv, scale, heads, queries, keys,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn, stride_ob, stride_oh, stride_on,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Gradients of one block of keys and values, over all queries. dk and dv have the same strides."""
    stride_qb, stride_qh, stride_qn = stride_qb * ALIGN, stride_qh * ALIGN, stride_qn * ALIGN
    stride_kb, stride_kh, stride_kn = stride_kb * ALIGN, stride_kh * ALIGN, stride_kn * ALIGN
    stride_vb, stride_vh, stride_vn = stride_vb * ALIGN, stride_vh * ALIGN, stride_vn * ALIGN
    stride_gb, stride_gh, stride_gn = stride_gb * ALIGN, stride_gh * ALIGN, stride_gn * ALIGN
    pair = tl.program_id(1)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    q += sample * stride_qb + head * stride_qh
    k += sample * stride_kb + head * stride_kh
    v += sample * stride_vb + head * stride_vh
    grad += sample * stride_gb + head * stride_gh
    lse += pair.to(tl.int64) * queries
    delta += pair.to(tl.int64) * queries
    rows = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    there = rows < keys
    k1 = load_rows(k, rows, there, stride_kn, 0, D1, D, True, UPCAST)
    v1 = load_rows(v, rows, there, stride_vn, 0, D1, D, True, UPCAST)
    k2, v2 = k1, v1
    if D2 > 0:
        k2 = load_rows(k, rows, there, stride_kn, D1, D2, D, True, UPCAST)
        v2 = load_rows(v, rows, there, stride_vn, D1, D2, D, True, UPCAST)
    dk1 = tl.zeros([BLOCK_K, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_K, D1], tl.float32)
    dk2 = tl.zeros([BLOCK_K, D2 if D2 > 0 else 16], tl.float32)
    dv2 = tl.zeros([BLOCK_K, D2 if D2 > 0 else 16], tl.float32)
    for start in range(0, queries, BLOCK_Q):
        columns = start + tl.arange(0, BLOCK_Q)
        valid = columns < queries
        q1 = load_rows(q, columns, valid, stride_qn, 0, D1, D, True, UPCAST)
        g1 = load_rows(grad, columns, valid, stride_gn, 0, D1, D, True, UPCAST)
        logits = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
        change = tl.dot(v1, tl.trans(g1), input_precision=PRECISION)
        if D2 > 0:
            q2 = load_rows(q, columns, valid, stride_qn, D1, D2, D, True, UPCAST)
            g2 = load_rows(grad, columns, valid, stride_gn, D1, D2, D, True, UPCAST)
            logits = tl.dot(k2, tl.trans(q2), logits, input_precision=PRECISION)
            change = tl.dot(v2, tl.trans(g2), change, input_precision=PRECISION)
        # Queries beyond the end have weight exp2(-inf) = 0.
        shift = tl.load(lse + columns, mask=valid, other=float("inf"))
        weights = tl.exp2((logits * scale - shift[None, :]) * LOG2E)
        mean = tl.load(delta + columns, mask=valid, other=0.0)
        change = (weights * (change - mean[None, :])).to(q1.dtype)
        weights = weights.to(g1.dtype)
        dv1 = tl.dot(weights, g1, dv1, input_precision=PRECISION)
        dk1 = tl.dot(change, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dv2 = tl.dot(weights, g2, dv2, input_precision=PRECISION)
            dk2 = tl.dot(change, q2, dk2, input_precision=PRECISION)
    dk += sample * stride_ob + head * stride_oh
    dv += sample * stride_ob + head * stride_oh
    store_rows(dk, rows, there, stride_on, dk1 * scale, 0, D1, D)
    store_rows(dv, rows, there, stride_on, dv1, 0, D1, D)
    if D2 > 0:
        store_rows(dk, rows, there, stride_on, dk2 * scale, D1, D2, D)
        store_rows(dv, rows, there, stride_on, dv2, D1, D2, D)


@triton.jit
def queries_kernel(
    q, k, v, grad, lse, delta, dq, scale, heads, queries, keys,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn, stride_ob, stride_oh, stride_on,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Gradient of one block of queries, over all keys."""
    stride_qb, stride_qh, stride_qn = stride_qb * ALIGN, stride_qh * ALIGN, stride_qn * ALIGN
    stride_kb, stride_kh, stride_kn = stride_kb * ALIGN, stride_kh * ALIGN, stride_kn * ALIGN
    stride_vb, stride_vh, stride_vn = stride_vb * ALIGN, stride_vh * ALIGN, stride_vn * ALIGN
    stride_gb, stride_gh, stride_gn = stride_gb * ALIGN, stride_gh * ALIGN, stride_gn * ALIGN
    pair = tl.program_id(1)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    q += sample * stride_qb + head * stride_qh
    k += sample * stride_kb + head * stride_kh
    v += sample * stride_vb + head * stride_vh
    grad += sample * stride_gb + head * stride_gh
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    there = rows < queries
    q1 = load_rows(q, rows, there, stride_qn, 0, D1, D, True, UPCAST)
    g1 = load_rows(grad, rows, there, stride_gn, 0, D1, D, True, UPCAST)
    q2, g2 = q1, g1
    if D2 > 0:
        q2 = load_rows(q, rows, there, stride_qn, D1, D2, D, True, UPCAST)
        g2 = load_rows(grad, rows, there, stride_gn, D1, D2, D, True, UPCAST)
    shift = tl.load(lse + pair.to(tl.int64) * queries + rows, mask=there, other=float("inf"))
    mean = tl.load(delta + pair.to(tl.int64) * queries + rows, mask=there, other=0.0)
    dq1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    dq2 = tl.zeros([BLOCK_Q, D2 if D2 > 0 else 16], tl.float32)
    for start in range(0, keys, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        valid = columns < keys
        k1 = load_rows(k, columns, valid, stride_kn, 0, D1, D, True, UPCAST)
        v1 = load_rows(v, columns, valid, stride_vn, 0, D1, D, True, UPCAST)
        logits = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        change = tl.dot(g1, tl.trans(v1), input_precision=PRECISION)
        if D2 > 0:
            k2 = load_rows(k, columns, valid, stride_kn, D1, D2, D, True, UPCAST)
            v2 = load_rows(v, columns, valid, stride_vn, D1, D2, D, True, UPCAST)
            logits = tl.dot(q2, tl.trans(k2), logits, input_precision=PRECISION)
            change = tl.dot(g2, tl.trans(v2), change, input_precision=PRECISION)
        # Keys beyond the end have logits 0, whose weight overflows where all true logits are very negative.
        weights = tl.exp2(tl.where(valid[None, :], (logits * scale - shift[:, None]) * LOG2E, float("-inf")))
        change = (weights * (change - mean[:, None])).to(k1.dtype)
        dq1 = tl.dot(change, k1, dq1, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(change, k2, dq2, input_precision=PRECISION)
    dq += sample * stride_ob + head * stride_oh
    store_rows(dq, rows, there, stride_on, dq1 * scale, 0, D1, D)
    if D2 > 0:
        store_rows(dq, rows, there, stride_on, dq2 * scale, D1, D2, D)
