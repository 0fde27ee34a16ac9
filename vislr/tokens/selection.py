"""Who stays and where the others' values come from: short sequences and the way back, for whole batches.

Shapes: B samples, N image tokens, n of them kept, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vislr.kernels.attention import nearest_kept
from vislr.tokens.ranking import _call_number


@dataclass
class Selection:
    """One choice of tokens.

    Attributes:
        keep: (B, n) int64, ascending: the tokens that stay.
        source: (B, N) int64, place in `keep` that a token's value comes from; a kept token's own. None
            where no value is ever taken back.
        merged: whether those that leave are averaged into their source (ToMe) instead of dropped.
    """

    keep: torch.Tensor
    source: torch.Tensor | None
    merged: bool = False


def kept_count(keep: float, tokens: int) -> int:
    """How many of `tokens` a share of `keep` is: rounded, at least one."""
    return min(tokens, max(1, round(keep * tokens)))


def pick(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Tokens `places` (B, n) of x (B, N, C): (B, n, C)."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def shorten(x: torch.Tensor, chosen: Selection) -> torch.Tensor:
    """x (B, N, C) to (B, n, C): the kept tokens, or the means of what was merged into them."""
    if not chosen.merged:
        return pick(x, chosen.keep)
    assert chosen.source is not None
    wide = chosen.source.unsqueeze(-1)
    shape = (x.shape[0], chosen.keep.shape[1])
    sums = x.new_zeros(*shape, x.shape[2]).scatter_add(1, wide.expand_as(x), x)
    counts = x.new_zeros(*shape, 1).scatter_add(1, wide, x.new_ones(*x.shape[:2], 1))
    return sums / counts


def similar(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    keep: torch.Tensor,
    scale: float | None = None,
    symmetric: bool = False,
) -> torch.Tensor:
    """For every token the most similar kept one, by the mean over heads of the attention map: (B, N) places in `keep`.

    Args:
        q, k: (B, H, N, D).
        lse: (B, H, N).
        symmetric: judge by A_ij + A_ji instead of A_ij.
    """
    if not symmetric:
        return nearest_kept(q, k, lse, keep, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = keep[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1])
    keys, queries = k.gather(2, wide).float(), q.gather(2, wide).float()
    norms = lse.gather(2, keep[:, None].expand(-1, q.shape[1], -1)).unsqueeze(2)
    rows = max(16, (1 << 22) // max(1, q.shape[0] * q.shape[1] * keep.shape[1]))
    found = []
    for block in range(0, q.shape[2], rows):
        part = slice(block, block + rows)
        out = (q[:, :, part].float() @ keys.mT * scale - lse[:, :, part].unsqueeze(-1)).exp()
        back = (k[:, :, part].float() @ queries.mT * scale - norms).exp()
        found.append((out + back).sum(1).argmax(-1))
    own = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    return torch.cat(found, 1).scatter(1, keep, own)


def place_in(keep: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, N): the place of each kept token in `keep`; 0 for the others."""
    own = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    return torch.zeros(keep.shape[0], tokens, dtype=torch.int64, device=keep.device).scatter(1, keep, own)


def merge_similar(
    x: torch.Tensor, count: int, grid: tuple[int, int] | None, seed: int, timestep: torch.Tensor | None
) -> Selection:
    """Bipartite soft matching (ToMe for Stable Diffusion, arXiv 2303.17604, section 4).

    One token of every 2 x 2 cell is a destination, drawn from seed, timestep and cell; of the others, those most
    similar (cosine) to a destination are merged into it.

    Args:
        x: (B, N, C).
        count: tokens that remain; at least the number of cells.
        grid: (rows, columns), rows * columns = N; None: cells of 4 consecutive tokens.
    """
    batch, tokens, _ = x.shape
    destinations = _destinations(tokens, grid, seed, timestep, x.device)
    left = torch.ones(tokens, device=x.device, dtype=torch.bool).scatter(0, destinations, False)
    # A stable sort of a mask lists its True places first, in order, with a static length.
    sources = left.to(torch.int8).argsort(descending=True, stable=True)[: tokens - len(destinations)]
    features = torch.nn.functional.normalize(x.detach().float(), dim=-1)
    scores = features[:, sources] @ features[:, destinations].mT
    best, nearest = scores.max(-1)
    gone = best.topk(tokens - count, dim=-1).indices
    leaving = sources.expand(batch, -1).gather(1, gone)
    into = destinations.expand(batch, -1).gather(1, nearest.gather(1, gone))
    stays = torch.ones(batch, tokens, device=x.device, dtype=torch.bool).scatter(1, leaving, False)
    keep = stays.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :count]
    places = place_in(keep, tokens)
    return Selection(keep, places.scatter(1, leaving, places.gather(1, into)), merged=True)


def cells(tokens: int, grid: tuple[int, int] | None) -> int:
    """How many destinations `merge_similar` has: tokens that cannot leave."""
    return max(1, tokens // 4 if grid is None else (grid[0] // 2) * (grid[1] // 2))


def _destinations(
    tokens: int, grid: tuple[int, int] | None, seed: int, timestep: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """(cells,) int64: one token of each whole cell."""
    if grid is None or min(grid) < 2:
        first = torch.arange(cells(tokens, None), device=device) * 4
        offsets = torch.arange(min(4, tokens), device=device)
    else:
        rows, columns = grid[0] // 2, grid[1] // 2
        row = torch.arange(rows, device=device).unsqueeze(-1) * 2 * grid[1]
        first = (row + torch.arange(columns, device=device) * 2).flatten()
        offsets = torch.tensor((0, 1, grid[1], grid[1] + 1), device=device)
    cell = torch.arange(len(first), device=device, dtype=torch.float64)
    call = _call_number(timestep, device)
    drawn = (torch.sin(cell * 12.9898 + call * 37.719 + (seed % 9973) * 4.1414) * 43758.5453) % 1
    return first + offsets[(drawn * len(offsets)).long()]


def interpolated(short: torch.Tensor, keep: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, n, C) to (B, N, C): pruned tokens take the inverse-square-distance mean of their four nearest kept ones."""
    rows, columns = grid
    y, x = torch.meshgrid(
        torch.arange(rows, device=keep.device), torch.arange(columns, device=keep.device), indexing="ij"
    )
    points = torch.stack([y.flatten(), x.flatten()], -1).to(short.dtype)
    distance = (points[None, :, None] - points[keep][:, None]).square().sum(-1)
    near, places = distance.topk(min(4, keep.shape[1]), dim=-1, largest=False)
    weights = 1 / near.clamp(min=1e-6)
    weights = weights / weights.sum(-1, keepdim=True)
    values = pick(short, places.flatten(1)).unflatten(1, places.shape[1:])
    return put_back((values * weights.unsqueeze(-1)).sum(2), short, keep)


def put_back(full: torch.Tensor, short: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """full (B, N, C) with the rows `keep` replaced by short (B, n, C), exactly."""
    return full.scatter(1, keep.unsqueeze(-1).expand_as(short), short)
