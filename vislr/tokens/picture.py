"""Which tokens were kept, drawn over the picture that was made: a column a call, a row a level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vislr.core.errors import DataError
from vislr.data import make_grid
from vislr.tokens.routes import Kept

if TYPE_CHECKING:
    from PIL import Image


def kept_shares(seen: Sequence[Kept], sample: int) -> dict[float, dict[tuple[int, int], torch.Tensor]]:
    """How often each token was kept: timestep -> (rows, columns) -> (rows, columns) float, the mean over the spans.

    Args:
        seen: what `watching` noted.
        sample: which of the batch. Under classifier-free guidance the conditional half comes second: picture i of n
            is sample n + i.

    Raises:
        DataError: nothing was kept, or on models that hide the image's rows and columns (FLUX).
    """
    masks: dict[float, dict[tuple[int, int], list[torch.Tensor]]] = {}
    for one in seen:
        if one.grid is None or one.timestep is None or one.tokens != one.grid[0] * one.grid[1]:
            continue
        if not 0 <= sample < len(one.keep):
            raise DataError(f"sample {sample} of a batch of {len(one.keep)}; expected 0 to {len(one.keep) - 1}")
        mask = torch.zeros(one.tokens).index_fill(0, one.keep[sample], 1.0).view(one.grid)
        masks.setdefault(one.timestep, {}).setdefault(one.grid, []).append(mask)
    if not masks:
        raise DataError("no choice of tokens was seen on a grid; watch a run of a UNet, SD3, PixArt or DiT")
    return {
        time: {grid: torch.stack(some).mean(0) for grid, some in sorted(levels.items(), reverse=True)}
        for time, levels in masks.items()
    }


def kept_picture(image: Image.Image, seen: Sequence[Kept], sample: int, *, columns: int = 6) -> Image.Image:
    """A grid: the picture with every token as dark as it was rarely kept, per level (rows) and step (columns).

    Args:
        image: what the run made.
        seen: what `watching` noted during it.
        sample: as in `kept_shares`.
        columns: at most this many calls, evenly chosen.
    """
    from PIL import Image

    shares = kept_shares(seen, sample)
    times = list(shares)
    step = max(1, (len(times) - 1) / max(1, columns - 1))
    chosen = [times[round(i * step)] for i in range(columns) if round(i * step) < len(times)]
    grids = sorted({grid for levels in shares.values() for grid in levels}, reverse=True)
    cell = 160
    picture = image.convert("RGB").resize((cell, cell))
    black = Image.new("RGB", picture.size)
    rows: list[list[Image.Image | None]] = []
    for grid in grids:
        row: list[Image.Image | None] = []
        for time in chosen:
            share = shares[time].get(grid)
            if share is None:
                row.append(None)  # the level is whole at this step
                continue
            shade = Image.fromarray((share * 200 + 55).byte().numpy()).resize(picture.size, Image.Resampling.NEAREST)
            row.append(Image.composite(picture, black, shade))
        rows.append(row)
    return make_grid(
        rows,
        row_labels=[f"{height} x {width} tokens" for height, width in grids],
        column_labels=[f"t = {time:.3g}" for time in chosen],
        cell=cell,
    )
