"""Sizes for aspect-ratio buckets: about one area, many proportions, never larger than the picture itself."""

from __future__ import annotations

import functools
import math

Size = tuple[int, int]


@functools.lru_cache(maxsize=4096)
def sizes_of_area(side: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """Every (width, height) in multiples of `step`, of at most side x side pixels and as many as possible.

    For each width the largest height that fits, up to `max_aspect` either way.
    """
    found = set()
    for width in range(step, int(side * math.sqrt(max_aspect)) + step, step):
        height = side * side // width // step * step
        if height and max(width, height) <= max_aspect * min(width, height):
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def nearest_size(width: int, height: int, side: int, step: int, max_aspect: float) -> Size | None:
    """The bucket of a picture: of the nearest proportions, with as many pixels as it has, at most side x side.

    Smaller pictures get smaller buckets (the side falls in steps of `step`), so none is enlarged.

    Args:
        width, height: of the upright picture, in pixels.
        side: of the square whose area is the largest.
        step: sides of buckets are multiples of this.
        max_aspect: longest side of a bucket over its shortest.

    Returns:
        (width, height); None: a side is shorter than `step`.
    """
    proportions = math.log(width / height)
    for smaller in range(side // step * step, 0, -step):
        choices = sizes_of_area(smaller, step, max_aspect)
        if not choices:
            continue
        # Of equally near ones the larger, then the wider: the choice must not depend on the order.
        best = min(choices, key=lambda size: (abs(math.log(size[0] / size[1]) - proportions), -size[0] * size[1], size))
        if best[0] <= width and best[1] <= height:
            return best
    return None


def lost_share(picture: Size, size: Size) -> float:
    """Share of a picture's area that is cut off at this bucket, 0 to 1."""
    kept = min(picture[0], picture[1] * size[0] / size[1]) * min(picture[1], picture[0] * size[1] / size[0])
    return 1 - kept / (picture[0] * picture[1])
