"""Picture files to upright RGB of one size: EXIF rotation, alpha on white, CMYK, 16-bit grey, crop and resize."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from vislr.core.errors import DataError

if TYPE_CHECKING:
    import torch
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
Crop = Literal["center", "random"]
# left, top, right, bottom in the pixels of the upright picture.
Box = tuple[float, float, float, float]

_ORIENTATION = 0x0112
# Orientations that lay a picture on its side.
_TURNED = (5, 6, 7, 8)


@dataclass
class Decoded:
    """A picture that was read.

    Attributes:
        image: RGB, upright, transparent parts white.
        alpha: L, upright; None if the file has no transparency.
        frames: of an animation, whose first one `image` is; 1 for a still picture.
    """

    image: Image.Image
    alpha: Image.Image | None = None
    frames: int = 1


def decode(data: bytes) -> Decoded:
    """Read a picture file's bytes.

    Raises:
        DataError: why it is not usable, without a name: "is empty", "is no picture that can be read", ...
    """
    from PIL import Image, ImageOps

    if not data:
        raise DataError("is empty")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            frames = getattr(opened, "n_frames", 1)
            opened.load()
            image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):
            # PIL's own conversion clips 16-bit values at 255 instead of scaling them.
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        if image.mode in ("I", "F"):
            raise DataError(f"has 32-bit pixels (mode {image.mode}); save it with 8 or 16 bit")
        alpha = None
        if image.has_transparency_data:
            image = image.convert("RGBA")
            alpha = image.getchannel("A")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return Decoded(image.convert("RGB"), alpha, frames)
    except DataError:
        raise
    except Image.UnidentifiedImageError as error:
        raise DataError("is no picture that can be read") from error
    except Exception as error:
        # Decoders of damaged files raise whatever their parsers meet: struct.error, IndexError, EOFError, ...
        raise DataError(f"cannot be read: {error}") from error


def measure(file: IO[bytes]) -> tuple[int, int]:
    """Width and height of a picture when upright, from its header alone.

    Raises:
        DataError: as `decode`, as far as the header tells.
    """
    from PIL import Image

    try:
        with Image.open(file) as opened:
            width, height = opened.size
            exif = opened.getexif() if opened.format != "PNG" else Image.Exif()
            if opened.format == "PNG" and "exif" in opened.info:
                # PNG's own `getexif` decodes the pixels, in case that more follows behind them.
                exif.load(opened.info["exif"])
            turned = exif.get(_ORIENTATION) in _TURNED
    except Image.UnidentifiedImageError as error:
        raise DataError("is no picture that can be read") from error
    except Exception as error:
        raise DataError(f"cannot be read: {error}") from error
    return (height, width) if turned else (width, height)


def open_image(path: str | Path) -> Image.Image:
    """The picture as RGB, upright, transparent parts white. Of an animation, the first frame.

    Raises:
        DataError: the file is no picture, is cut off, or has a pixel type that RGB cannot hold.
    """
    try:
        return decode(Path(path).read_bytes()).image
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"'{path}' {error}") from error


def cut(
    picture: tuple[int, int],
    size: tuple[int, int],
    *,
    crop: Crop = "center",
    flip: bool = False,
    enlarge: bool = True,
    rng: torch.Generator | None = None,
) -> tuple[Box, bool]:
    """Which part of a picture is shown at `size`, and whether it is mirrored.

    Args:
        picture: width and height of the upright picture.
        size: width and height of the result.
        crop: "center": the largest part of the proportions of `size`, in the middle. "random": 75 to 100 % of
            its sides, anywhere.
        flip: mirror half of the pictures.
        enlarge: whether a random part may have fewer pixels than the result.
        rng: where "random" and `flip` draw from; None: the centre, not mirrored.
    """
    import torch

    width = min(picture[0], picture[1] * size[0] / size[1])
    height = min(picture[1], picture[0] * size[1] / size[0])
    left, top = (picture[0] - width) / 2, (picture[1] - height) / 2
    mirrored = False
    if rng is not None and (crop == "random" or flip):
        scale, across, down, mirror = torch.rand(4, generator=rng).tolist()
        mirrored = flip and mirror < 0.5
        if crop == "random":
            low = 0.75 if enlarge else min(1.0, max(0.75, size[0] / width))
            share = low + (1 - low) * scale
            width, height = width * share, height * share
            left, top = across * (picture[0] - width), down * (picture[1] - height)
    return (left, top, left + width, top + height), mirrored


def place(image: Image.Image, box: Box, size: tuple[int, int], mirrored: bool = False) -> Image.Image:
    """The part `box` of `image` at `size`, mirrored or not. Lanczos; exact pixels where nothing is scaled."""
    from PIL import Image

    if box != (0, 0, *size) or image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def square(
    image: Image.Image, size: int, *, crop: Crop = "center", flip: bool = False, rng: torch.Generator | None = None
) -> Image.Image:
    """Cut a square out of `image` and scale it to `size` x `size`; see `cut`.

    Without `rng`, "random" and `flip` draw from the global stream.
    """
    import torch

    if rng is None and (crop == "random" or flip):
        rng = torch.default_generator
    box, mirrored = cut(image.size, (size, size), crop=crop, flip=flip, rng=rng)
    return place(image, box, (size, size), mirrored)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8, (3, height, width); (1, height, width) for one channel."""
    import numpy as np
    import torch

    array = torch.from_numpy(np.array(image, dtype=np.uint8))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)
