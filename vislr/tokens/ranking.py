"""How important a token is: weighted page rank of attention maps (G-WPR), and choices to compare it with.

The maps A (queries x keys, rows sum to 1) come as explicit tensors in `g_wpr` and `g_wpr_cross`, which are
the definition, or as queries, keys and the log-sum-exp of the rows, from which A^T s is computed without A.

Source: AT-EDM (arXiv 2405.05252), section 3.2; Zero-TPrune for the mean over heads.
"""

from __future__ import annotations

import torch

from vislr.kernels.attention import attention_column_sum

# Added to a row's entropy: a row that attends to one key has entropy 0.
EPSILON = 1e-6


def combine_heads(scores: torch.Tensor) -> torch.Tensor:
    """Scores of each head (B, H, N) to one score a token (B, N): root of the mean square, each row summing to 1."""
    return _normalised(scores.square().mean(1).sqrt())


def _normalised(s: torch.Tensor) -> torch.Tensor:
    return s / s.sum(-1, keepdim=True)


def g_wpr(maps: torch.Tensor, iterations: int = 1, tolerance: float | None = None) -> torch.Tensor:
    """Page rank of each map: s <- A^T s from the uniform s.

    Args:
        maps: (..., N, N) self-attention, rows sum to 1.
        iterations: at most this many.
        tolerance: stop when s moves by less (L1); None: all iterations are made.

    Returns:
        (..., N), positive where a key receives attention, sum 1. The fixed point is the left Perron vector.
    """
    s = torch.full_like(maps[..., 0, :], 1 / maps.shape[-2])
    for _ in range(iterations):
        after = _normalised((s.unsqueeze(-2) @ maps).squeeze(-2))
        moved = (after - s).abs().sum(-1)
        s = after
        if tolerance is not None and bool((moved < tolerance).all()):
            break
    return s


def g_wpr_cross(maps: torch.Tensor, iterations: int = 1) -> torch.Tensor:
    """Page rank by attention from image to text.

    s_K <- A^T s_Q; s_Q,i <- (A s_K)_i / (entropy of row i + 1e-6), normalised: attention on important words
    counts, spread attention counts less.

    Args:
        maps: (..., N, T), N image queries and T words; rows sum to 1 (or to the image's share of a joint
            attention).

    Returns:
        (..., N), sum 1.
    """
    entropy = -torch.special.xlogy(maps, maps).sum(-1)
    s = torch.full_like(maps[..., 0], 1 / maps.shape[-2])
    for _ in range(iterations):
        words = s.unsqueeze(-2) @ maps
        s = _normalised((maps @ words.mT).squeeze(-1) / (entropy + EPSILON))
    return s


def g_wpr_scores(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, iterations: int = 1, scale: float | None = None
) -> torch.Tensor:
    """`g_wpr` of the maps of queries and keys, heads combined, without an N x N tensor.

    Args:
        q, k: (B, H, N, D) of the image tokens.
        lse: (B, H, N), log-sum-exp of the rows over all keys of the attention; where text is among the
            keys, the image's part of the map is renormalised.
        iterations: each is one pass over the blocks of the map; 1 is the fast path.
        scale: what q . k is multiplied with; None: D ** -0.5.

    Returns:
        (B, N) float32 (float64 for float64), sum 1.
    """
    s = torch.full(lse.shape, 1 / lse.shape[-1], dtype=lse.dtype, device=lse.device)
    for _ in range(iterations):
        s = _normalised(attention_column_sum(q, k, lse, s, scale))
    return combine_heads(s)


def cross_maps(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention maps (B, H, N, T) of image queries on text keys: few enough to hold.

    Args:
        q: (B, H, N, D). k: (B, H, T, D).
        lse: (B, H, N) of a joint attention, whose part on the text is wanted; None: softmax over the text.
        mask: what was added to the logits, or True where a key counts; broadcasts to (B, H, N, T).
    """
    logits = (q.float() @ k.float().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1) if lse is None else (logits - lse.unsqueeze(-1)).exp()


def random_scores(
    batch: int, tokens: int, seed: int, timestep: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """(B, N) numbers in [0, 1): a function of seed, timestep, sample and token, without a generator's state."""
    token = torch.arange(tokens, device=device, dtype=torch.float64)
    sample = torch.arange(batch, device=device, dtype=torch.float64).unsqueeze(-1)
    call = _call_number(timestep, device)
    return (torch.sin(token * 12.9898 + sample * 78.233 + call * 37.719 + (seed % 9973) * 4.1414) * 43758.5453) % 1


def _call_number(timestep: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """One number a call, the same for all samples."""
    if timestep is None:
        return torch.zeros((), dtype=torch.float64, device=device)
    return timestep.to(device=device, dtype=torch.float64).reshape(-1)[0]


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Places (B, count) int64 of the highest scores (B, N), ascending: exactly `count` in each sample."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def evenly(batch: int, tokens: int, count: int, device: torch.device) -> torch.Tensor:
    """Places (B, count) int64 at an even distance, ascending."""
    places = (torch.arange(count, device=device) * 2 + 1) * tokens // (2 * count)
    return places.expand(batch, -1)
