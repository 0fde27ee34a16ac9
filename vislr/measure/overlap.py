"""How far two masks agree: Dice by volume, and surface Dice by boundary at a tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vislr.core.errors import DataError

if TYPE_CHECKING:
    import numpy as np


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape or not a.ndim:
        raise DataError(f"masks of shapes {a.shape} and {b.shape} cannot be compared; expected equal shapes")
    return a, b


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """2 |a and b| / (|a| + |b|) of two masks of any one shape; 1 if both are empty.

    Raises:
        DataError: shapes differ.
    """
    a, b = _checked(a, b)
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def surface_dice(a: np.ndarray, b: np.ndarray, *, spacing: Sequence[float] = (), tolerance: float = 1.0) -> float:
    """Share of both boundaries that lies within `tolerance` of the other one; 1 if both masks are empty.

    Nikolov et al., "Clinically applicable segmentation of head and neck anatomy" (arXiv 1809.04430), on
    boundary elements: the elements of a mask with a neighbour (along an axis) outside of it, each counted once.
    (Their implementation weighs them by the area of the surface in them; figures differ slightly.)

    Args:
        a, b: masks of one shape, of one or more dimensions.
        spacing: size of an element along each axis; (): 1.
        tolerance: distance in the unit of `spacing`.

    Raises:
        DataError: shapes differ, or as many spacings as axes are not given.
    """
    import numpy as np
    from scipy import ndimage

    a, b = _checked(a, b)
    sampling = tuple(spacing) or (1.0,) * a.ndim
    if len(sampling) != a.ndim or min(sampling) <= 0 or tolerance < 0:
        raise DataError(f"spacing {sampling}, tolerance {tolerance}: expected {a.ndim} sizes above 0, and 0 or more")
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    # Whatever lies outside of the array is outside of the mask.
    edges = [one & ~ndimage.binary_erosion(one, border_value=0) for one in (a, b)]
    away = [ndimage.distance_transform_edt(~edge, sampling=sampling) for edge in edges]
    near = np.count_nonzero(away[1][edges[0]] <= tolerance) + np.count_nonzero(away[0][edges[1]] <= tolerance)
    return near / (np.count_nonzero(edges[0]) + np.count_nonzero(edges[1]))
