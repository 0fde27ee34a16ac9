"""Named grounds of scenes, and image styles that are computed: pure functions of their arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vislr.core.errors import ConfigError, hint
from vislr.zoo.emoji import PROCEDURAL_STYLES

if TYPE_CHECKING:
    from PIL import Image

COLOURS = {
    "red": (203, 52, 48),
    "orange": (238, 134, 38),
    "yellow": (246, 209, 62),
    "green": (62, 153, 74),
    "blue": (52, 96, 199),
    "purple": (128, 68, 173),
    "pink": (240, 136, 178),
    "brown": (128, 84, 52),
    "grey": (128, 132, 138),
    "teal": (28, 138, 140),
}
PATTERNS = ("plain", "gradient", "striped", "dotted", "checkered")
# Never behind a training scene of the base models: for adapters to learn.
HELD_OUT_PATTERNS = ("zigzag", "starry", "wavy", "grid")
# Styles that are a function of a picture; also held out. Their own name is their word in captions.
LIGHT = 0.45


def draw_ground(pattern: str, colour: str, phase: float = 0.0, size: int = 64) -> np.ndarray:
    """A ground of one colour and its lighter tone.

    Args:
        pattern: one of `PATTERNS` or `HELD_OUT_PATTERNS`.
        colour: one of `COLOURS`.
        phase: where in its period the pattern starts, in [0, 1); the stars of "starry" follow it too.
        size: side in pixels.

    Returns:
        (size, size, 3) float in [0, 1].

    Raises:
        ConfigError: an unknown pattern or colour.
    """
    _known("ground pattern", pattern, (*PATTERNS, *HELD_OUT_PATTERNS))
    _known("ground colour", colour, COLOURS)
    y, x = np.mgrid[:size, :size] + 0.5
    base = np.array(COLOURS[colour]) / 255
    light = _amount(pattern, x, y, phase, size)[..., None] * LIGHT
    return base + light * (1 - base)


def _amount(pattern: str, x: np.ndarray, y: np.ndarray, phase: float, size: int) -> np.ndarray:
    """How much of the lighter tone a pixel has, in [0, 1]."""

    def bands(along: np.ndarray, period: float) -> np.ndarray:
        return ((along / period + phase) % 1 < 0.5).astype(float)

    if pattern == "gradient":
        return 2 * y / size
    if pattern == "striped":
        return bands(x, 16)
    if pattern == "dotted":
        u, v = (x + 12 * phase) % 12 - 6, (y + 12 * phase) % 12 - 6
        return (3.5 - np.hypot(u, v)).clip(0, 1)
    if pattern == "checkered":
        return np.abs(bands(x, 16) - bands(y, 16))
    if pattern == "zigzag":
        return bands(y + np.abs(x % 16 - 8), 14)
    if pattern == "wavy":
        return bands(y + 4 * np.sin(x * 2 * np.pi / 32), 14)
    if pattern == "grid":
        return 1 - np.minimum(bands(x, 10) + bands(x + 3, 10), bands(y, 10) + bands(y + 3, 10)).clip(0, 1)
    if pattern == "starry":
        sky = np.zeros((size, size))
        for cx, cy, reach in np.random.default_rng(int(phase * 2**32)).uniform((0, 0, 2), (size, size, 4.5), (18, 3)):
            u, v = np.abs(x - cx), np.abs(y - cy)
            sky = np.maximum(sky, (reach - (np.sqrt(u) + np.sqrt(v)) ** 2).clip(0, 1))
        return 2 * sky
    return np.zeros((size, size))


def restyle(image: Image.Image, style: str) -> Image.Image:
    """A picture on white in a procedural style; the same size.

    - outline: dark lines where the picture changes, white elsewhere;
    - pixel: 16 blocks along the longer side, each its mean in 6 levels a channel;
    - sepia: luminance in brown tones;
    - halftone: a round dot a cell, its area the cell's darkness, its colour the cell's mean, darkened.

    Args:
        image: RGB.
        style: one of `PROCEDURAL_STYLES`.

    Raises:
        ConfigError: an unknown style.
    """
    from PIL import Image

    _known("procedural style", style, PROCEDURAL_STYLES)
    pixels = np.asarray(image.convert("RGB")) / 255
    drawn = {"outline": _outline, "pixel": _pixel, "sepia": _sepia, "halftone": _halftone}[style](pixels)
    return Image.fromarray((drawn.clip(0, 1) * 255).round().astype(np.uint8))


def _luminance(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array([0.299, 0.587, 0.114])


def _outline(pixels: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    smooth = ndimage.gaussian_filter(pixels, (0.5, 0.5, 0), mode="nearest")
    slope = np.hypot(ndimage.sobel(smooth, 0, mode="nearest"), ndimage.sobel(smooth, 1, mode="nearest")).max(2)
    ink = ((slope - 0.9) / 0.6).clip(0, 1)[..., None]
    return 1 - ink * (1 - np.array([0.10, 0.10, 0.18]))


def _pixel(pixels: np.ndarray) -> np.ndarray:
    return np.round(block_means(pixels, cell_of(pixels)) * 5) / 5


def _sepia(pixels: np.ndarray) -> np.ndarray:
    dark, light = np.array([0.20, 0.11, 0.05]), np.array([1.0, 0.97, 0.89])
    return dark + _luminance(pixels)[..., None] * (light - dark)


def _halftone(pixels: np.ndarray) -> np.ndarray:
    cell = max(3, cell_of(pixels))
    mean = block_means(pixels, cell)
    darkness = 1 - _luminance(mean)
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]] % cell + 0.5 - cell / 2
    # A dot of the cell's darkness in area: pi r^2 = darkness cell^2.
    radius = cell * np.sqrt(1.6 * darkness / np.pi)
    ink = (radius - np.hypot(x, y) + 0.5).clip(0, 1)[..., None]
    return 1 - ink * (1 - 0.8 * mean)


def cell_of(pixels: np.ndarray) -> int:
    """Side of a block when the longer side has 16 of them; at least 2."""
    return max(2, round(max(pixels.shape[:2]) / 16))


def block_means(pixels: np.ndarray, cell: int) -> np.ndarray:
    """Every pixel replaced by the mean of its cell x cell block; blocks at the far edges may be cut.

    Args:
        pixels: (h, w) or (h, w, c).
    """
    rows, columns = np.arange(0, pixels.shape[0], cell), np.arange(0, pixels.shape[1], cell)
    sums = np.add.reduceat(np.add.reduceat(pixels, rows, 0), columns, 1)
    heights, widths = np.diff([*rows, pixels.shape[0]]), np.diff([*columns, pixels.shape[1]])
    areas = np.outer(heights, widths).reshape(sums.shape[:2] + (1,) * (pixels.ndim - 2))
    return (sums / areas).repeat(heights, 0).repeat(widths, 1)


def _known(kind: str, given: str, choices: object) -> None:
    names = list(choices)  # type: ignore[call-overload]
    if given not in names:
        raise ConfigError(f"no {kind} '{given}'{hint(given, names)}")
