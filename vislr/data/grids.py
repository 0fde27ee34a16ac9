"""Pictures in rows and columns with labels: sample grids, before and after."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_GAP = 4
_FONT = 13


def make_grid(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    cell: int = 128,
) -> Image.Image:
    """One picture of all pictures.

    Args:
        rows: pictures, row by row; rows may differ in length, None leaves a cell empty.
        row_labels: a text left of each row.
        column_labels: a text above each column.
        title: a line above everything.
        cell: side of a cell in pixels; smaller pictures are enlarged, larger ones reduced.

    Returns:
        RGB, on white.

    Raises:
        ValueError: more labels than rows or columns, or no picture at all.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("a grid needs at least one picture")
    if len(row_labels) > len(rows) or len(column_labels) > columns:
        raise ValueError(f"{len(row_labels)} x {len(column_labels)} labels for {len(rows)} x {columns} cells")
    font = ImageFont.load_default(_FONT)
    line = _FONT + 3
    per_line = max(4, int(cell / (0.54 * _FONT)))
    above = [_lines(label, per_line) for label in column_labels]
    beside = [_lines(label, 18) for label in row_labels]
    left = _GAP + max((int(font.getlength(text)) + 2 * _GAP for lines in beside for text in lines), default=0)
    title_height = line + _GAP if title else 0
    top = _GAP + title_height + max((len(lines) * line + _GAP for lines in above), default=0)
    width, height = left + columns * (cell + _GAP), top + len(rows) * (cell + _GAP)
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    if title:
        draw.text((_GAP, _GAP), title, fill="black", font=font)
    for column, lines in enumerate(above):
        x = left + column * (cell + _GAP)
        draw.multiline_text((x, _GAP + title_height), "\n".join(lines), fill="black", font=font, spacing=2)
    for number, row in enumerate(rows):
        y = top + number * (cell + _GAP)
        if number < len(beside):
            draw.multiline_text((_GAP, y + _GAP), "\n".join(beside[number]), fill="black", font=font, spacing=2)
        for column, image in enumerate(row):
            if image is not None:
                # Whole multiples keep the pixels of small pictures sharp.
                kind = Image.Resampling.NEAREST if cell % image.width == 0 else Image.Resampling.LANCZOS
                scaled = image.convert("RGB").resize((cell, max(1, round(cell * image.height / image.width))), kind)
                grid.paste(scaled.crop((0, 0, cell, cell)), (left + column * (cell + _GAP), y))
    return grid


def _lines(label: str, width: int) -> list[str]:
    return [line for part in label.splitlines() for line in textwrap.wrap(part, width)] or [""]
