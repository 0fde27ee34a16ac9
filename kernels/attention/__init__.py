"""Attention for token pruning: with its log-sum-exp, its column sums, over kept tokens, and back.

Ranking a token by the attention that it receives needs A^T s, A the softmax map. `attention_column_sum`
recomputes A block by block from the log-sum-exp of `attention_with_lse`: no N x N map, half the
operations of the attention itself.

Shapes: B samples, H heads, Nq queries, Nk keys, D head size.
"""

from __future__ import annotations

import torch

from vislr.kernels.attention import ops, reference
from vislr.kernels.dispatch import use_kernel
from vislr.kernels.errors import KernelError

# Accumulators of wider heads do not fit into the registers of a block.
WIDEST_HEAD = 160


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
    given = f"q {tuple(q.shape)}, k {tuple(k.shape)}" + ("" if v is None else f", v {tuple(v.shape)}")
    if q.dim() != 4 or k.dim() != 4 or (v is not None and v.dim() != 4):
        raise KernelError(f"{given}; expected (B, H, N, D)")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or (v is not None and v.shape != k.shape):
        raise KernelError(f"{given}; expected the same B, H and D, and v of k's shape")
    if not q.dtype.is_floating_point or q.dtype != k.dtype or (v is not None and v.dtype != k.dtype):
        raise KernelError(f"q {q.dtype}, k {k.dtype}; expected one floating dtype")


def _check_rows(q: torch.Tensor, name: str, rows: torch.Tensor) -> None:
    if rows.shape != q.shape[:3]:
        raise KernelError(f"{name} {tuple(rows.shape)} for q {tuple(q.shape)}; expected (B, H, Nq)")


def _check_index(x: torch.Tensor, name: str, index: torch.Tensor) -> None:
    if index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise KernelError(f"{name} {tuple(index.shape)} for {x.shape[0]} samples; expected (B, n)")
    if index.dtype != torch.int64:
        raise KernelError(f"{name} is {index.dtype}; expected int64")


def _check_tokens(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, keep: torch.Tensor) -> None:
    _check(q, k)
    _check_rows(q, "lse", lse)
    _check_index(k, "keep", keep)
    if keep.shape[1] == 0:
        raise KernelError("keep holds no token; expected at least one in each sample")
    if q.shape != k.shape:
        raise KernelError(f"q {tuple(q.shape)}, k {tuple(k.shape)}; expected all tokens in both")


def _fits(q: torch.Tensor) -> bool:
    return q.shape[-1] <= WIDEST_HEAD and use_kernel(q)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_index: torch.Tensor | None,
    key_index: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    run = ops.forward if _fits(q) else reference.gathered_attention
    return run(q, k, v, query_index, key_index, _scale(q, scale))


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without mask, and the log-sum-exp of its rows.

    Args:
        q: (B, H, Nq, D).
        k, v: (B, H, Nk, D), dtype of q.
        scale: what q . k is multiplied with; None: D ** -0.5.

    Returns:
        out (B, H, Nq, D) in q's dtype; lse (B, H, Nq), natural log, float32 (float64 for float64), without
        gradient. Without keys out is 0 and lse -inf.

    Raises:
        KernelError: the shapes or dtypes do not fit.
    """
    _check(q, k, v)
    return _attention(q, k, v, None, None, scale)


def attention_column_sum(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, s: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """A^T s of each head: what every key receives when query i gives s_i. Without gradient.

    Args:
        q: (B, H, Nq, D).
        k: (B, H, Nk, D).
        lse: (B, H, Nq), of `attention_with_lse(q, k, ...)` with the same scale.
        s: (B, H, Nq), weight of every query, e.g. 1 / Nq.
        scale: as in `attention_with_lse`.

    Returns:
        (B, H, Nk), float32 (float64 for float64): sum_i exp(scale q_i . k_j - lse_i) s_i. The sum over the
        keys of a head is the sum of its s.

    Raises:
        KernelError: the shapes or dtypes do not fit.
    """
    _check(q, k)
    _check_rows(q, "lse", lse)
    _check_rows(q, "s", s)
    run = ops.column_sum if _fits(q) else reference.attention_column_sum
    return run(q.detach(), k.detach(), lse.detach(), s.detach(), _scale(q, scale))


def gathered_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_index: torch.Tensor | None = None,
    key_index: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention among chosen tokens of each sample, read in place.

    Args:
        q: (B, H, Nq, D).
        k, v: (B, H, Nk, D).
        query_index: (B, n) int64, the queries to compute, one choice for all heads; None: all.
        key_index: (B, m) int64, the keys and values to attend to; None: all.
        scale: as in `attention_with_lse`.

    Returns:
        out (B, H, n, D) and lse (B, H, n) as `attention_with_lse` of the gathered tokens.

    Raises:
        KernelError: the shapes or dtypes do not fit.
    """
    _check(q, k, v)
    if query_index is not None:
        _check_index(q, "query_index", query_index)
    if key_index is not None:
        _check_index(k, "key_index", key_index)
    return _attention(q, k, v, query_index, key_index, scale)


def nearest_kept(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, keep: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """The kept token that each token attends to most, by the mean of the attention maps over heads.

    For similarity of features h instead, give q = k = the normalised features as one head, lse = 0, scale 1.

    Args:
        q, k: (B, H, N, D) of all tokens.
        lse: (B, H, N).
        keep: (B, n) int64, distinct tokens of each sample, n at least 1.
        scale: as in `attention_with_lse`.

    Returns:
        (B, N) int64, places in `keep`; a kept token has its own place.

    Raises:
        KernelError: the shapes or dtypes do not fit, or nothing is kept.
    """
    _check_tokens(q, k, lse, keep)
    q, k, lse = q.detach(), k.detach(), lse.detach()
    if _fits(q):
        nothing = q.new_empty(*keep.shape, 0)
        return ops.nearest(nothing, keep, q, k, lse, _scale(q, scale))[1]
    return reference.nearest_kept(q, k, lse, keep, _scale(q, scale))


def recover(kept: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """Back to full length: every token takes the value of its nearest kept token.

    Args:
        kept: (B, n, C), values of the kept tokens.
        nearest: (B, N) int64 of `nearest_kept`.

    Returns:
        (B, N, C), dtype of kept, with a gradient to kept.

    Raises:
        KernelError: the shapes or dtypes do not fit.
    """
    if kept.dim() != 3:
        raise KernelError(f"kept {tuple(kept.shape)}; expected (B, n, C)")
    _check_index(kept, "nearest", nearest)
    return reference.recover(kept, nearest)


def recover_by_attention(
    kept: torch.Tensor,
    keep: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`nearest_kept` and `recover` in one pass.

    Args:
        kept: (B, n, C), values of the tokens `keep`.
        keep: (B, n) int64.
        q, k: (B, H, N, D) of all tokens.
        lse: (B, H, N).
        scale: as in `attention_with_lse`.

    Returns:
        (B, N, C) in kept's dtype, with a gradient to kept; and nearest (B, N) int64.

    Raises:
        KernelError: as `nearest_kept`.
    """
    if kept.dim() != 3 or kept.shape[:2] != keep.shape:
        raise KernelError(f"kept {tuple(kept.shape)} with keep {tuple(keep.shape)}; expected (B, n, C) and (B, n)")
    if not _fits(q):
        nearest = nearest_kept(q, k, lse, keep, scale)
        return recover(kept, nearest), nearest
    _check_tokens(q, k, lse, keep)
    return ops.nearest(kept, keep, q.detach(), k.detach(), lse.detach(), _scale(q, scale))


__all__ = [
    "attention_column_sum",
    "attention_with_lse",
    "gathered_attention",
    "nearest_kept",
    "recover",
    "recover_by_attention",
]
