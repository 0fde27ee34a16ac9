"""Captions: read from files beside the pictures, and changed from one time to the next."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vislr.core.errors import DataError
from vislr.data.pictures import Problem, clean_name

if TYPE_CHECKING:
    import torch

METADATA = "metadata.jsonl"
_CAPTION_KEYS = ("text", "caption")
_REPEATS = re.compile(r"(\d+)_(.+)")


def one_line(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def decode_text(data: bytes) -> str:
    """UTF-8 text, with or without a byte order mark, as one line.

    Raises:
        DataError: not UTF-8; without a name.
    """
    try:
        return one_line(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text (byte {error.start})") from error


def caption_of(row: object) -> str | None:
    """The caption in a JSON object, under "text" or "caption"; None: there is none."""
    if not isinstance(row, dict):
        return None
    found = next((row[key] for key in _CAPTION_KEYS if key in row), None)
    return one_line(found) if isinstance(found, str) else None


def read_metadata(root: Path) -> tuple[dict[Path, str], list[Problem]]:
    """Captions of every `metadata.jsonl` under `root`, by picture; lines that are of no use, by number."""
    captions: dict[Path, str] = {}
    problems = []
    for file in sorted(root.rglob(METADATA)):
        name = clean_name(file.relative_to(root).as_posix())
        try:
            lines = file.read_bytes().split(b"\n")
        except OSError as error:
            problems.append(Problem(name, f"cannot be read: {error.strerror}"))
            continue
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                path, caption = _read_line(file.parent, line)
            except DataError as error:
                problems.append(Problem(f"{name} line {number}", str(error)))
                continue
            if captions.get(path, caption) != caption:
                problems.append(Problem(f"{name} line {number}", f"'{path.name}' had another caption above", False))
            captions[path] = caption
    return captions, problems


def _read_line(folder: Path, line: bytes) -> tuple[Path, str]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        name = row["file_name"]
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8 text") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError("is no JSON object with a 'file_name'") from error
    caption = caption_of(row)
    if caption is None or not isinstance(name, str):
        raise DataError(f"has no text under {' or '.join(map(repr, _CAPTION_KEYS))}")
    path = Path(os.path.normpath(folder / name))
    if "\0" in name or not path.is_file():
        raise DataError(f"names '{name}', which is not there")
    return path, caption


def repeats_of(folder: str) -> tuple[int, str] | None:
    """(10, "cat") of a folder named "10_cat"; None for any other name."""
    found = _REPEATS.fullmatch(folder)
    return (int(found[1]), found[2]) if found and int(found[1]) > 0 else None


def with_trigger(caption: str, words: str) -> str:
    """The caption with `words` before it, unless it holds them."""
    if not words or words.lower() in caption.lower():
        return caption
    return f"{words}, {caption}" if caption else words


def vary(
    caption: str,
    rng: Callable[[], torch.Generator],
    *,
    shuffle: bool = False,
    keep: int = 0,
    tag_dropout: float = 0.0,
    dropout: float = 0.0,
    trigger: str = "",
) -> str:
    """The caption as it stands at one place of training.

    Args:
        caption: as written.
        rng: makes the generator that everything is drawn from; not called if nothing is drawn.
        shuffle: put the comma-separated parts into a new order.
        keep: so many parts at the front stay, and are never dropped.
        tag_dropout: share of parts dropped.
        dropout: share of captions that become empty, trigger and all (for classifier-free guidance).
        trigger: put before what is left, if that lacks it.
    """
    if not (shuffle or tag_dropout or dropout):
        return with_trigger(caption, trigger)
    import torch

    drawn = rng()
    if float(torch.rand((), generator=drawn)) < dropout:
        return ""
    if shuffle or tag_dropout:
        parts = [part.strip() for part in caption.split(",") if part.strip()]
        fixed, rest = parts[:keep], parts[keep:]
        stays = (torch.rand(len(rest), generator=drawn) >= tag_dropout).tolist()
        order = torch.randperm(len(rest), generator=drawn).tolist() if shuffle else range(len(rest))
        caption = ", ".join(fixed + [rest[i] for i in order if stays[i]])
    return with_trigger(caption, trigger)
