"""A look at the data before training: what is there, what is wrong, and a contact sheet."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vislr.core.errors import DataError
from vislr.core.files import atomic_path, write_json
from vislr.data.config import DataConfig
from vislr.data.images import SUFFIXES
from vislr.data.pictures import Problem, clean_name
from vislr.data.pool import Pool, gather
from vislr.data.source import Source

if TYPE_CHECKING:
    from PIL import Image

REPORT, SHEET = "data_report.json", "contact_sheet.png"
_SHOWN = 60
# Texts about a folder as a whole: no captions.
_ABOUT = ("credits", "license", "licence", "notice", "readme")
_CELL, _TEXT, _FONT, _COLUMNS = 160, 52, 12, 6
# What stands in for the size of a model that is not known yet.
_SIZE = 512


@dataclass
class DataReport:
    """What `check_data` found.

    Attributes:
        pictures: that can be used.
        examples: in an epoch, with repeats, weights and regularisation sets.
        problems: fatal ones are left out of training.
        sizes: (shortest, longest) side of all pictures in pixels.
        buckets: "WIDTHxHEIGHT" -> pictures.
        labels: number of pictures of each class.
        tags: the most frequent comma-separated parts of captions, and how many captions hold them.
        files: what was written.
    """

    pictures: int
    examples: int
    problems: list[Problem]
    sizes: tuple[int, int]
    buckets: dict[str, int]
    labels: dict[str, int]
    tags: dict[str, int]
    files: list[str]

    @property
    def left_out(self) -> list[Problem]:
        """What training does not use."""
        return [problem for problem in self.problems if problem.fatal]

    def __str__(self) -> str:
        notes = [problem for problem in self.problems if not problem.fatal]
        lines = [f"{self.pictures} pictures can be used, {self.examples} examples an epoch"]
        if self.pictures:
            lines.append(f"sides     {self.sizes[0]} to {self.sizes[1]} pixels")
        for title, counts in (("sizes", self.buckets), ("classes", self.labels), ("tags", self.tags)):
            if counts:
                lines.append(f"{title:<9} " + ", ".join(f"{name}: {count}" for name, count in counts.items()))
        if self.left_out:
            lines += [f"left out  {len(self.left_out)}", *(f"  {problem}" for problem in self.left_out)]
        if notes:
            lines += [f"noted     {len(notes)}", *(f"  {problem}" for problem in notes)]
        return "\n".join(lines + [f"wrote     {file}" for file in self.files])


def check_data(
    config: DataConfig, out: str | Path | None = None, *, size: int | None = None, multiple: int = 8,
    classes: bool | Sequence[str] = False, quiet: bool = True,
) -> DataReport:  # fmt: skip
    """Look at everything and stop at nothing.

    Args:
        config: the section `data` of a training config.
        out: folder for data_report.json and contact_sheet.png; None: write nothing.
        size, multiple: as for `Pool.at`; default `config.size`, else 512.
        classes: as for `open_pool`.
        quiet: no progress bars.

    Raises:
        DataError: a folder is not there or holds no pictures at all.
        OutputError: `out` cannot be written.
    """
    config = dataclasses.replace(config, broken="skip")
    pool = gather(config, classes, quiet=quiet)
    problems = [*pool.problems, *_duplicates(pool), *_orphans(pool)]
    source = None
    if len(pool):
        try:
            side = size or config.size or _SIZE
            source = pool.at(side - side % multiple, multiple)
            problems += source.problems
            problems += _enlarged(source) if size or config.size else []
        except DataError as error:
            problems.append(Problem("all pictures", str(error)))
    pictures = pool.pictures()
    sides = [side for picture in pictures for side in (picture.width, picture.height)]
    tags = Counter(tag for picture in pictures for tag in {part.strip() for part in picture.caption.split(",")} if tag)
    report = DataReport(
        pictures=source.count if source else 0,
        examples=len(source) if source else 0,
        problems=problems,
        sizes=(min(sides), max(sides)) if sides else (0, 0),
        buckets={f"{w}x{h}": count for (w, h), count in source.table().items()} if source and config.buckets else {},
        labels=dict(Counter(pool.classes[picture.label] for picture in pictures)) if classes is not False else {},
        tags={tag: count for tag, count in tags.most_common(10) if count > 1},
        files=[],
    )
    if out is not None:
        out = Path(out)
        with atomic_path(out / SHEET) as temporary:
            contact_sheet(source, problems).save(temporary, format="png")
        report.files = [str(out / REPORT), str(out / SHEET)]
        write_json(out / REPORT, dataclasses.asdict(report))
    return report


def _duplicates(pool: Pool) -> list[Problem]:
    """Pictures with the same bytes; not for shards, which are not read as wholes."""
    first: dict[str, tuple[str, str]] = {}
    notes = []
    for part in pool.parts:
        if part.store.streamed:
            continue
        for i in part.chosen.tolist():
            picture = part.store.picture(i)
            name, caption = first.setdefault(part.store.digest(i), (picture.name, picture.caption))
            if name != picture.name:
                other = "" if caption == picture.caption else ", with another caption"
                notes.append(Problem(picture.name, f"is the same picture as '{name}'{other}", False))
    return notes


def _orphans(pool: Pool) -> list[Problem]:
    """Caption files without a picture."""
    notes = []
    for part in pool.parts:
        if part.store.streamed or part.store.classes:
            continue
        root = Path(part.store.root).expanduser()
        for path in sorted(root.rglob(f"*{pool.config.caption_suffix}")):
            if path.stem.lower() in _ABOUT:
                continue
            if not any(path.with_suffix(end).exists() for suffix in SUFFIXES for end in (suffix, suffix.upper())):
                name = clean_name(path.relative_to(root).as_posix())
                notes.append(Problem(name, "is a caption without a picture", False))
    return notes


def _enlarged(source: Source) -> list[Problem]:
    notes = []
    for index in range(source.count):
        picture, (width, height) = source.picture(index), source.size_of(index)
        if min(picture.width, picture.height) < min(width, height):
            text = f"is {picture.width} x {picture.height} pixels; enlarged to {width} x {height}"
            notes.append(Problem(picture.name, text, False))
    return notes


def contact_sheet(source: Source | None, problems: Sequence[Problem]) -> Image.Image:
    """Pictures as training sees them with captions, bucket by bucket, then what is left out, with reasons.

    Args:
        source: up to 60 pictures of it, evenly spread; None: none.
        problems: fatal ones get a cell each, up to 60.
    """
    from PIL import Image, ImageOps

    cells: list[tuple[Image.Image | None, str, str]] = []
    if source is not None:
        order = sorted(range(source.count), key=source.size_of)
        shown = min(_SHOWN, len(order))
        for i in range(shown):
            item = source.item(order[i * len(order) // shown])
            try:
                loaded = source.read(item)
            except DataError as error:
                cells.append((None, str(error), "red"))
                continue
            image = Image.fromarray(loaded.pixels.permute(1, 2, 0).numpy())
            text = item.caption or source.pool.classes[item.label]
            text = f"{item.width}x{item.height} {text}" if source.config.buckets else text
            cells.append((ImageOps.contain(image, (_CELL, _CELL)), text, "black"))
    fatal = [problem for problem in problems if problem.fatal]
    cells += [(None, str(problem), "red") for problem in fatal[:_SHOWN]]
    return _sheet(cells)


def _sheet(cells: Sequence[tuple[Image.Image | None, str, str]]) -> Image.Image:
    from PIL import Image, ImageDraw, ImageFont

    rows = max(1, -(-len(cells) // _COLUMNS))
    gap = 6
    sheet = Image.new("RGB", (_COLUMNS * (_CELL + gap) + gap, rows * (_CELL + _TEXT + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    per_line = int(_CELL / (0.54 * _FONT))
    for number, (image, text, colour) in enumerate(cells):
        left = gap + number % _COLUMNS * (_CELL + gap)
        top = gap + number // _COLUMNS * (_CELL + _TEXT + gap)
        if image is not None:
            sheet.paste(image, (left + (_CELL - image.width) // 2, top + _CELL - image.height))
        else:
            draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), fill="#f4f4f4")
        lines = textwrap.wrap(text, per_line - 1)[: 3 if image is not None else 10]
        place = (left, top + _CELL + 2) if image is not None else (left + 4, top + 4)
        draw.multiline_text(place, "\n".join(lines), fill=colour, font=font, spacing=2)
    return sheet
