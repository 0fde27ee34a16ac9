"""Scenes composed on the fly: one to three embedded subjects on a named ground, with their ground truth.

A scene is a function of (seed, index) and of what is asked for; nothing is stored. The same seed and
index give the same subjects in the same places in every style and on every ground.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vislr.core.errors import ConfigError, DataError, hint
from vislr.zoo.emoji import (
    LICENCES,
    PROCEDURAL_SOURCE,
    PROCEDURAL_STYLES,
    SPLITS,
    STYLE_WORDS,
    STYLES,
    Picture,
    images,
    source_of,
    write_folder,
)
from vislr.zoo.grounds import (
    COLOURS,
    HELD_OUT_PATTERNS,
    PATTERNS,
    block_means,
    cell_of,
    draw_ground,
    restyle,
)
from vislr.zoo.matting import cut_out
from vislr.zoo.vocabulary import MAX_TOKENS, words_of

if TYPE_CHECKING:
    from PIL import Image

SIZE = 64
MARGIN = 2
# What the base models are trained on; the others are for adapters.
BASE_STYLES = ("noto", "twemoji")
SCENE_STYLES = (*STYLES, *PROCEDURAL_STYLES)
# Sides in pixels of a lone subject, and of two side by side.
LONE = {"small": 26, "": 40, "large": 58}
PAIR = {"small": 22, "": 29, "large": 36}
TRIO = 28
# Words of a phrase that leave room for the rest of a caption: by number of subjects.
LONGEST_PHRASE = {1: 7, 2: 3, 3: 2}


@dataclass(frozen=True)
class Element:
    """A subject of a scene.

    Attributes:
        name: its concept. codepoint: the concept's key. phrase: with its article.
        size: "small", "large", or "" for neither.
        place: "left", "right", "centre" or "top", as drawn.
        box: (left, top, right, bottom) in pixels; the subject touches two opposite sides, nothing
            of it is outside.
    """

    name: str
    codepoint: str
    phrase: str
    size: str
    place: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A scene and all that is known of it.

    Attributes:
        seed, index: what it is a function of.
        style: one of `SCENE_STYLES`. split: of its concepts.
        pattern, colour, phase: of its ground.
        elements: its subjects in the order of their mention in the caption.
    """

    seed: int
    index: int
    style: str
    split: str
    pattern: str
    colour: str
    phase: float
    elements: tuple[Element, ...]

    @property
    def caption(self) -> str:
        """`"noto style, a cat face and a pizza on a blue striped ground"`: at most 14 words and marks."""
        return _caption(self)[0]

    @property
    def stated(self) -> tuple[str, ...]:
        """What the caption says beyond subjects and ground: "sizes", "places", both or neither."""
        return _caption(self)[1]

    @property
    def credits(self) -> str:
        """Whom to name, and the licence."""
        licence, credit = LICENCES[source_of(self.style)]
        return f"{credit}: {licence}"

    def metadata(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {**dataclasses.asdict(self), "caption": self.caption, "stated": list(self.stated)}

    def image(self) -> Image.Image:
        """The picture, RGB, 64 x 64."""
        from PIL import Image

        canvas = draw_ground(self.pattern, self.colour, self.phase, SIZE)
        for element in self.elements:
            left, top, right, bottom = element.box
            colour, opacity = _subject(element.codepoint, self.style, right - left)
            height, width = opacity.shape
            y, x = top + (bottom - top - height) // 2, left + (right - left - width) // 2
            part = canvas[y : y + height, x : x + width]
            part += opacity[..., None] * (colour - part)
        return Image.fromarray((canvas * 255).round().astype(np.uint8))


def scene(
    index: int,
    *,
    seed: int = 0,
    split: str = "train",
    style: str | None = None,
    ground: str | None = None,
    subjects: int | None = None,
) -> Scene:
    """The scene of this index.

    Args:
        index: from 0. seed: another one gives other scenes.
        split: concepts of the base models' training, or "held-out".
        style: one of `SCENE_STYLES`; default: drawn from the two that the base models know.
        ground: a pattern; default: drawn from those that the base models know.
        subjects: 1, 2 or 3; default: drawn.

    Raises:
        ConfigError: an unknown split, style or ground, or another number of subjects.
    """
    for kind, given, choices in (
        ("split", split, SPLITS),
        ("style", style, SCENE_STYLES),
        ("ground", ground, (*PATTERNS, *HELD_OUT_PATTERNS)),
    ):
        if given is not None and given not in choices:
            raise ConfigError(f"no {kind} '{given}' of scenes{hint(given, choices)}")
    if subjects not in (None, 1, 2, 3):
        raise ConfigError(f"{subjects} subjects in a scene; expected 1, 2 or 3")
    rng = np.random.default_rng((seed, index))

    def pick(choices: Sequence[Any], shares: Sequence[float] | None = None) -> Any:
        return choices[int(rng.choice(len(choices), p=shares))]

    # Everything is drawn, then what was asked for replaces it: other draws stay what they were.
    drawn_style, drawn_pattern, colour = pick(BASE_STYLES), pick(PATTERNS), pick(list(COLOURS))
    phase, count = float(rng.random()), subjects or pick((1, 2, 3), (0.4, 0.4, 0.2))
    elements = _arrange(rng, _concepts(split, count), count)
    return Scene(seed, index, style or drawn_style, split, ground or drawn_pattern, colour, phase, elements)


def scenes(count: int, *, start: int = 0, **asked: Any) -> list[Scene]:
    """`count` scenes from index `start` on; `asked` as in `scene`."""
    return [scene(index, **asked) for index in range(start, start + count)]


@functools.cache
def _concepts(split: str, count: int) -> tuple[Picture, ...]:
    """Concepts whose phrases are short enough for so many in one caption; "and" joins subjects only."""
    return tuple(
        picture
        for picture in images(PROCEDURAL_SOURCE, split=split)
        if len(words_of(picture.phrase)) <= LONGEST_PHRASE[count]
        and (count == 1 or "and" not in words_of(picture.phrase))
    )


def _arrange(rng: np.random.Generator, concepts: Sequence[Picture], count: int) -> tuple[Element, ...]:
    """So many different subjects in boxes that do not overlap, in a random order of mention."""
    chosen = [concepts[int(i)] for i in rng.choice(len(concepts), count, replace=False)]
    if count == 1:
        size = ("small", "", "large")[int(rng.choice(3, p=(0.3, 0.4, 0.3)))]
        place = ("left", "centre", "right")[int(rng.choice(3, p=(0.25, 0.5, 0.25)))]
        place = "centre" if size == "large" else place
        layout = [(size, place, LONE[size])]
    elif count == 2:
        sizes = (("", ""), ("large", "small"), ("small", "large"))[int(rng.choice(3, p=(0.5, 0.25, 0.25)))]
        layout = [(size, place, PAIR[size]) for size, place in zip(sizes, ("left", "right"), strict=True)]
    else:
        layout = [("", place, TRIO) for place in ("left", "top", "right")]
    elements = []
    for picture, (size, place, side) in zip(chosen, layout, strict=True):
        free = SIZE - 2 * MARGIN - side
        left = {"left": 0, "centre": free // 2, "top": free // 2, "right": free}[place] + MARGIN
        if count == 3:
            top = MARGIN if place == "top" else SIZE - MARGIN - side
        else:
            # Up or down by a few pixels, so that no row of pixels is special.
            top = MARGIN + free // 2 + int(rng.integers(-min(4, free // 2), min(4, free // 2) + 1))
        box = (left, top, left + side, top + side)
        elements.append(Element(picture.name, picture.codepoint, picture.phrase, size, place, box))
    return tuple(elements[int(i)] for i in rng.permutation(count))


def _caption(scene: Scene) -> tuple[str, tuple[str, ...]]:
    """The caption, and what it states of sizes and places: as much as fits.

    Both; else one of them, places first in scenes of even index, sizes first in odd ones; else
    neither. Each with the long name of the ground if it fits, else with the short one.
    """
    word = STYLE_WORDS.get(scene.style, scene.style)
    pattern = "" if scene.pattern == "plain" else f" {scene.pattern}"
    article = "an" if scene.colour[0] in "aeio" else "a"
    grounds = (f"on {article} {scene.colour}{pattern} ground", f"on{pattern} {scene.colour}")
    lone, pair = len(scene.elements) == 1, len(scene.elements) == 2
    placed = pair or (lone and scene.elements[0].place != "centre")
    there = ["places"] * placed + ["sizes"] * any(element.size for element in scene.elements)
    there = there[::-1] if scene.index % 2 else there
    text = ""
    for stated in dict.fromkeys((tuple(there), *((one,) for one in there), ())):
        for ground in grounds:
            text = f"{word} style, {_subjects(scene.elements, stated)} {ground}"
            if len(words_of(text)) <= MAX_TOKENS - 2:
                return text, tuple(sorted(stated))
    raise DataError(f"no caption of {MAX_TOKENS - 2} words for '{text}'")


def _subjects(elements: tuple[Element, ...], stated: tuple[str, ...]) -> str:
    phrases = [_sized(e.phrase, e.size) if "sizes" in stated else e.phrase for e in elements]
    places = "places" in stated
    if len(elements) == 1:
        return f"{phrases[0]} at the {elements[0].place}" if places and elements[0].place != "centre" else phrases[0]
    if len(elements) == 2 and places:
        return f"{phrases[0]} {elements[0].place} of {phrases[1]}"
    return ", ".join(phrases[:-1]) + f" and {phrases[-1]}"


def _sized(phrase: str, size: str) -> str:
    """`"an apple"`, "small" -> `"a small apple"`; without an article `"small cherries"`."""
    if not size:
        return phrase
    first, _, rest = phrase.partition(" ")
    return f"a {size} {rest}" if first in ("a", "an") else f"{size} {phrase}"


@functools.cache
def _picture(codepoint: str, style: str) -> Image.Image:
    """The subject alone, RGBA, cropped to what is visible."""
    from PIL import Image

    image = _by_codepoint(style)[codepoint].image()
    colour, opacity = cut_out(np.asarray(image) / 255)
    rows, columns = np.flatnonzero((opacity > 0.5).any(1)), np.flatnonzero((opacity > 0.5).any(0))
    area = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    return Image.fromarray((np.dstack([colour, opacity])[area] * 255).round().astype(np.uint8), "RGBA")


@functools.cache
def _by_codepoint(style: str) -> dict[str, Picture]:
    return {picture.codepoint: picture for picture in images(style)}


def _subject(codepoint: str, style: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour and opacity of a subject whose longer side is `side` pixels."""
    from PIL import Image

    source = _picture(codepoint, source_of(style))
    scale = side / max(source.size)
    size = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
    colour, opacity = _resized(source, size)
    if style in PROCEDURAL_STYLES:
        # Lines have a fixed width and would fill a small subject: they are drawn larger, then reduced.
        enlarged = 2 if style == "outline" else 1
        colour_there, opacity_there = _resized(source, (enlarged * size[0], enlarged * size[1]))
        on_white = 1 - opacity_there[..., None] * (1 - colour_there)
        drawn = restyle(Image.fromarray((on_white * 255).round().astype(np.uint8)), style)
        colour = np.asarray(drawn.resize(size, Image.Resampling.BOX)) / 255
        if style == "pixel":
            opacity = (block_means(opacity, cell_of(opacity)) >= 0.5).astype(float)
    return colour, opacity


def _resized(source: Image.Image, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    # Premultiplied, so that the colour of transparent pixels does not bleed into the edge.
    scaled = source.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    pixels = np.asarray(scaled) / 255
    return pixels[..., :3], pixels[..., 3]


def export_scenes(folder: str | Path, chosen: Sequence[Scene], captions: str = "txt") -> int:
    """Write scenes as `vislr.zoo.export` writes pictures, and their contents as `scenes.json`.

    Args:
        folder: one that does not exist yet or is empty.
        captions: `"txt"` for a sidecar per image, `"jsonl"` for one `metadata.jsonl`.

    Returns:
        the number of scenes written.

    Raises:
        ConfigError: another form of captions.
        DataError: no scenes, or the folder holds files already.
        OutputError: the folder cannot be written.
    """
    rows = [(f"{one.style}-scene-{one.seed}-{one.index:06d}", one.image, one.caption) for one in chosen]
    contents = {f"{stem}.png": one.metadata() for (stem, _, _), one in zip(rows, chosen, strict=True)}
    extra = {"scenes.json": json.dumps(contents, indent=1) + "\n"}
    return write_folder(folder, rows, captions, sorted({one.credits for one in chosen}), extra)
