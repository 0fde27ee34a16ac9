"""Picture files to square RGB: rotation by EXIF, alpha on white, 16-bit grey scaled, crop and resize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vislr.core.errors import DataError

if TYPE_CHECKING:
    import torch
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
Crop = Literal["center", "random"]


def open_image(path: str | Path) -> Image.Image:
    """The picture as RGB, upright, transparent parts white. Of an animation, the first frame.

    Raises:
        DataError: the file is no picture, is cut off, or has a pixel type that RGB cannot hold.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except Image.UnidentifiedImageError as error:
        raise DataError(f"'{path}' is no picture that can be read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"'{path}' cannot be read: {error}") from error
    if image.mode.startswith("I;16"):
        # PIL's own conversion clips 16-bit values at 255 instead of scaling them.
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode in ("I", "F"):
        raise DataError(f"'{path}' has 32-bit pixels (mode {image.mode}); save it with 8 or 16 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(
    image: Image.Image, size: int, *, crop: Crop = "center", flip: bool = False, rng: torch.Generator | None = None
) -> Image.Image:
    """Cut a square out of `image` and scale it to `size` x `size`.

    Args:
        image: RGB.
        size: pixels of a side.
        crop: "center": the largest square, in the middle. "random": a square of 75 to 100 % of that, anywhere.
        flip: mirror half of the pictures.
        rng: where "random" and `flip` draw from.
    """
    import torch
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    mirrored = False
    if crop == "random" or flip:
        scale, across, down, mirror = torch.rand(4, generator=rng).tolist()
        mirrored = flip and mirror < 0.5
        if crop == "random":
            side *= 0.75 + 0.25 * scale
            left, top = across * (image.width - side), down * (image.height - side)
    box = (left, top, left + side, top + side)
    if box != (0, 0, size, size) or image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8, (3, height, width)."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
