"""The embedded images: about 1,370 concepts in three emoji styles, 64 x 64 on white.

Noto and Twemoji are what the embedded models are trained on; Fluent 3D and a tenth of the
concepts are held out, so that an adapter has something new to learn.
"""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vislr.core.errors import ConfigError, DataError, hint
from vislr.core.files import atomic_path, check_output

if TYPE_CHECKING:
    from PIL import Image

ARCHIVE = Path(__file__).with_name("emoji.zip")
STYLES = ("noto", "twemoji", "fluent3d")
SPLITS = ("train", "held-out")
LICENCES = {
    "noto": ("Apache-2.0", "Noto Color Emoji, Google"),
    "twemoji": ("CC-BY-4.0", "Twemoji, Twitter, Inc and other contributors"),
    "fluent3d": ("MIT", "Fluent Emoji 3D, Microsoft Corporation"),
}
# Styles computed from the pictures of PROCEDURAL_SOURCE (vislr.zoo.grounds.restyle).
PROCEDURAL_STYLES = ("outline", "pixel", "sepia", "halftone")
PROCEDURAL_SOURCE = "noto"
# The word of each style in captions; one token each.
STYLE_WORDS = {"noto": "noto", "twemoji": "twemoji", "fluent3d": "fluent"} | {s: s for s in PROCEDURAL_STYLES}


def source_of(style: str) -> str:
    """The embedded style that pictures of `style` are drawn from: itself, unless it is a procedural one."""
    return PROCEDURAL_SOURCE if style in PROCEDURAL_STYLES else style


@dataclass(frozen=True)
class Picture:
    """One embedded image and what is known of it."""

    codepoint: str
    name: str  # plain words: "cat face"
    phrase: str  # with its article: "a cat face"
    style: str
    category: str
    subcategory: str
    split: str

    @property
    def caption(self) -> str:
        """`"noto style, a cat face"`."""
        return f"{STYLE_WORDS[self.style]} style, {self.phrase}"

    @property
    def licence(self) -> str:
        """SPDX name of the image's licence."""
        return LICENCES[source_of(self.style)][0]

    @property
    def credit(self) -> str:
        """Whom to name."""
        return LICENCES[source_of(self.style)][1]

    def encoded(self) -> bytes:
        """The WebP file; of a procedural style that of its source."""
        return _archive().read(f"{source_of(self.style)}/{self.codepoint}.webp")

    def image(self) -> Image.Image:
        """The picture, RGB, 64 x 64."""
        from PIL import Image

        picture = Image.open(io.BytesIO(self.encoded())).convert("RGB")
        if self.style not in PROCEDURAL_STYLES:
            return picture
        from vislr.zoo.grounds import restyle

        return restyle(picture, self.style)


@functools.cache
def _archive() -> zipfile.ZipFile:
    return zipfile.ZipFile(ARCHIVE)


@functools.cache
def _concepts() -> tuple[dict, ...]:
    return tuple(json.loads(_archive().read("index.json"))["concepts"])


def _checked(kind: str, given: str | None, choices: Iterable[str]) -> None:
    choices = list(choices)
    if given is not None and given not in choices:
        raise ConfigError(f"no embedded images of {kind} '{given}'{hint(given, choices)}")


def images(style: str | None = None, category: str | None = None, split: str | None = None) -> list[Picture]:
    """The embedded images, in a fixed order, optionally of one style, category or split only.

    Without a style: the three embedded ones. The procedural styles are given when asked for.

    Raises:
        ConfigError: an unknown style, category or split.
    """
    _checked("style", style, (*STYLES, *PROCEDURAL_STYLES))
    _checked("split", split, SPLITS)
    _checked("category", category, sorted({c["category"] for c in _concepts()}))
    return [
        Picture(style=one, **concept)
        for concept in _concepts()
        for one in (STYLES if style is None else (style,))
        if category in (None, concept["category"]) and split in (None, concept["split"])
    ]


def export(folder: str | Path, pictures: list[Picture], captions: str = "txt") -> int:
    """Write pictures into `folder` as people keep them: PNG files with captions beside them.

    Args:
        folder: a folder that does not exist yet or is empty.
        pictures: what `images` gave.
        captions: `"txt"` for a sidecar per image, `"jsonl"` for one `metadata.jsonl`.

    Returns:
        the number of pictures written. A `CREDITS.txt` names sources and licences.

    Raises:
        DataError: nothing to write, or the folder holds files already.
        OutputError: the folder cannot be written.
    """
    rows = [(f"{one.style}-{one.name.replace(' ', '-')}", one.image, one.caption) for one in pictures]
    credits = sorted({f"{one.credit}: {one.licence}" for one in pictures})
    return write_folder(folder, rows, captions, credits)


def write_folder(
    folder: str | Path,
    rows: Sequence[tuple[str, Callable[[], Image.Image], str]],
    captions: str,
    credits: Sequence[str],
    extra: Mapping[str, str] | None = None,
) -> int:
    """Write (stem, picture, caption) rows into a new folder as PNG files and captions; returns their number.

    Args:
        folder: a folder that does not exist yet or is empty.
        captions: `"txt"` for a sidecar per image, `"jsonl"` for one `metadata.jsonl`.
        credits: lines of `CREDITS.txt`.
        extra: further text files, name to content.

    Raises:
        ConfigError: another form of captions.
        DataError: nothing to write, or the folder holds files already.
        OutputError: the folder cannot be written.
    """
    _checked("caption form", captions, ("txt", "jsonl"))
    if not rows:
        raise DataError("the selection of pictures is empty")
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"'{folder}' is not empty; export into a new folder")
    check_output(folder.parent, needed=len(rows) * 14_000)
    texts = {"CREDITS.txt": "".join(f"{line}\n" for line in credits)} | dict(extra or {})
    if captions == "txt":
        texts |= {f"{stem}.txt": f"{caption}\n" for stem, _, caption in rows}
    else:
        lines = [json.dumps({"file_name": f"{stem}.png", "text": caption}) for stem, _, caption in rows]
        texts["metadata.jsonl"] = "\n".join(lines) + "\n"
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for stem, picture, _ in rows:
            picture().save(temporary / f"{stem}.png")
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
    return len(rows)
