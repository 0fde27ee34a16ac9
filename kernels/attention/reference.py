"""Attention of token pruning in plain torch: the definition, and what runs on a CPU.

Shapes: B samples, H heads, Nq queries, Nk keys, D head size, C channels. Arithmetic is in float32, or
float64 for float64 input; no function makes an Nq x Nk tensor larger than `BLOCK_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Logits are made in blocks of this size, of at most BLOCK_ROWS queries and as many heads as fit: at N = 1024 and
# 4096 on one core 1 and 4 MB ran alike, 16 MB up to 1.4 times slower, the whole map 3 to 6 times.
BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 512


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def blocks(maps: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """(maps, rows) of every block of `maps` maps of rows x columns logits."""
    height = min(rows, BLOCK_ROWS, max(16, BLOCK_BYTES // (4 * max(1, columns))))
    depth = max(1, BLOCK_BYTES // (4 * max(1, height * columns)))
    for first in range(0, maps, depth):
        for start in range(0, rows, max(1, height)):
            yield slice(first, first + depth), slice(start, start + height)


def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens `index` (B, n) of x (B, N, C) or (B, H, N, D): (B, n, C) or (B, H, n, D)."""
    if x.dim() == 3:
        return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))


def attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention and the natural log of each row's sum of exponentials."""
    if k.shape[2] == 0:
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        return out, torch.full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype), device=q.device)
    if q.device.type == "cpu" and q.numel() and q.shape[-1] == v.shape[-1]:
        rows = [t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v)]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, scale=scale)
        return out, lse.detach()
    return plain_attention(q, k, v, scale)


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_with_lse` by the formula, query block by query block, on any device."""
    acc = accumulator(q.dtype)
    keys, values = k.to(acc).mT, v.to(acc)
    outs, sums = [], []
    for rows in q.split(max(16, BLOCK_BYTES // (4 * max(1, q.shape[0] * q.shape[1] * k.shape[2]))), 2):
        logits = (rows.to(acc) @ keys) * scale
        lse = logits.detach().logsumexp(-1)
        outs.append(logits.softmax(-1) @ values)
        sums.append(lse)
    return torch.cat(outs, 2).to(q.dtype), torch.cat(sums, 2)


@torch.no_grad()
def attention_column_sum(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, s: torch.Tensor, scale: float
) -> torch.Tensor:
    """sum_i exp(scale q_i . k_j - lse_i) s_i for every key j: (B, H, Nk), block by block."""
    acc = accumulator(q.dtype)
    queries, keys = q.to(acc).flatten(0, 1), (k.to(acc) * scale).flatten(0, 1).mT
    shift, s = -lse.to(acc).flatten(0, 1).unsqueeze(-1), s.to(acc).flatten(0, 1).unsqueeze(1)
    total = torch.zeros(queries.shape[0], 1, k.shape[2], dtype=acc, device=q.device)
    for maps, rows in blocks(queries.shape[0], q.shape[2], k.shape[2]):
        weights = torch.baddbmm(shift[maps, rows], queries[maps, rows], keys[maps]).exp_()
        total[maps] += s[maps, :, rows] @ weights
    return total.view(k.shape[:3])


def gathered_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_index: torch.Tensor | None,
    key_index: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_with_lse` of the tokens at the given places."""
    if query_index is not None:
        q = gather_tokens(q, query_index)
    if key_index is not None:
        k, v = gather_tokens(k, key_index), gather_tokens(v, key_index)
    return attention_with_lse(q, k, v, scale)


@torch.no_grad()
def nearest_kept(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
    """For every token the place in `keep` of the kept token that it attends to most: (B, N) int64."""
    acc = accumulator(q.dtype)
    batch, heads, tokens, _ = q.shape
    keys = (gather_tokens(k, keep).to(acc) * scale).mT
    shift = -lse.to(acc).unsqueeze(-1)
    nearest = torch.empty(batch, tokens, dtype=torch.int64, device=q.device)
    height = max(64, BLOCK_BYTES // (4 * heads * keep.shape[1]))
    for sample in range(batch):
        for start in range(0, tokens, height):
            rows = slice(start, start + height)
            weights = torch.baddbmm(shift[sample, :, rows], q[sample, :, rows].to(acc), keys[sample]).exp_()
            nearest[sample, rows] = weights.sum(0).argmax(-1)
    places = torch.arange(keep.shape[1], device=q.device).expand_as(keep)
    return nearest.scatter_(1, keep, places)


def recover(kept: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """kept (B, n, C) back to (B, N, C): every token takes the row of its nearest kept token."""
    return gather_tokens(kept, nearest)
