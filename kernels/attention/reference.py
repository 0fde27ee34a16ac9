"""Attention of token pruning in plain torch: the definition, and what runs on a CPU.

Shapes: B samples, H heads, Nq queries, Nk keys, D head size, C channels. Arithmetic is in float32, or
float64 for float64 input; no function makes an Nq x Nk tensor larger than `BLOCK_BYTES`.
"""

from __future__ import annotations

import torch

# A block of logits this large stays in the last-level cache of common CPUs: at N = 4096, D = 64 blocks of
# 1 to 8 MB ran alike, 64 MB and the full map slower.
BLOCK_BYTES = 4 << 20


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_per_block(heads: int, columns: int, itemsize: int) -> int:
    """Queries in a block whose logits for `heads` maps of `columns` keys fill `BLOCK_BYTES`; at least 16."""
    return max(16, BLOCK_BYTES // max(1, heads * columns * itemsize))


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
    acc = accumulator(q.dtype)
    keys, values = k.to(acc).mT, v.to(acc)
    outs, sums = [], []
    step = rows_per_block(q.shape[0] * q.shape[1], k.shape[2], 4)
    for rows in q.split(step, 2):
        logits = (rows.to(acc) @ keys) * scale
        lse = logits.logsumexp(-1)
        outs.append((logits - lse.detach().unsqueeze(-1)).softmax(-1) @ values)
        sums.append(lse.detach())
    return torch.cat(outs, 2).to(q.dtype), torch.cat(sums, 2)


@torch.no_grad()
def attention_column_sum(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, s: torch.Tensor, scale: float
) -> torch.Tensor:
    """sum_i exp(scale q_i . k_j - lse_i) s_i for every key j: (B, H, Nk), query block by query block."""
    acc = accumulator(q.dtype)
    batch, heads, queries, _ = q.shape
    keys = (k.to(acc) * scale).mT
    lse, s = lse.to(acc).unsqueeze(-1), s.to(acc).unsqueeze(2)
    total = torch.zeros(batch, heads, 1, k.shape[2], dtype=acc, device=q.device)
    step = rows_per_block(batch * heads, k.shape[2], 4)
    for start in range(0, queries, step):
        block = slice(start, start + step)
        weights = (q[:, :, block].to(acc) @ keys).sub_(lse[:, :, block]).exp_()
        total += s[..., block] @ weights
    return total.squeeze(2)


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
    lse = lse.to(acc).unsqueeze(-1)
    nearest = torch.empty(batch, tokens, dtype=torch.int64, device=q.device)
    step = rows_per_block(batch * heads, keep.shape[1], 4)
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        weights = (q[:, :, block].to(acc) @ keys).sub_(lse[:, :, block]).exp_()
        nearest[:, block] = weights.sum(1).argmax(-1)
    places = torch.arange(keep.shape[1], device=q.device).expand_as(keep)
    return nearest.scatter_(1, keep, places)


def recover(kept: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """kept (B, n, C) back to (B, N, C): every token takes the row of its nearest kept token."""
    return gather_tokens(kept, nearest)
