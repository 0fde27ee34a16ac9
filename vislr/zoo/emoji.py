"""The embedded images: about 1,370 concepts in three emoji styles, 64 x 64 on white.

Noto and Twemoji are what the embedded models are trained on; Fluent 3D and a tenth of the
concepts are held out, so that an adapter has something new to learn.
"""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections.abc import Iterable
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
# The word of each style in captions; one token each.
STYLE_WORDS = {"noto": "noto", "twemoji": "twemoji", "fluent3d": "fluent"}


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
        return LICENCES[self.style][0]

    @property
    def credit(self) -> str:
        """Whom to name."""
        return LICENCES[self.style][1]

    def encoded(self) -> bytes:
        """The WebP file."""
        return _archive().read(f"{self.style}/{self.codepoint}.webp")

    def image(self) -> Image.Image:
        """The picture, RGB, 64 x 64."""
        from PIL import Image

        return Image.open(io.BytesIO(self.encoded())).convert("RGB")


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

    Raises:
        ConfigError: an unknown style, category or split.
    """
    _checked("style", style, STYLES)
    _checked("split", split, SPLITS)
    _checked("category", category, sorted({c["category"] for c in _concepts()}))
    return [
        Picture(style=one, **concept)
        for concept in _concepts()
        for one in STYLES
        if style in (None, one) and category in (None, concept["category"]) and split in (None, concept["split"])
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
    _checked("caption form", captions, ("txt", "jsonl"))
    if not pictures:
        raise DataError("the selection of embedded images is empty")
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"'{folder}' is not empty; export into a new folder")
    check_output(folder.parent, needed=len(pictures) * 12_000)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        rows = []
        for picture in pictures:
            stem = f"{picture.style}-{picture.name.replace(' ', '-')}"
            picture.image().save(temporary / f"{stem}.png")
            if captions == "txt":
                (temporary / f"{stem}.txt").write_text(picture.caption + "\n", encoding="utf-8")
            rows.append({"file_name": f"{stem}.png", "text": picture.caption})
        if captions == "jsonl":
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (temporary / "metadata.jsonl").write_text(lines, encoding="utf-8")
        used = sorted({picture.style for picture in pictures})
        credit = "".join(f"{LICENCES[style][1]}: {LICENCES[style][0]}\n" for style in used)
        (temporary / "CREDITS.txt").write_text(credit, encoding="utf-8")
    return len(pictures)
