"""Subjects cut out of pictures with a white background baked in."""

from __future__ import annotations

import numpy as np

# Compression leaves the white background within a few levels of 255.
NEAR_WHITE = 0.94
# How far from the background, in pixels, a pixel may still be a mixture with it.
EDGE = 2.0


def cut_out(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour and opacity of the subject of a picture on white.

    The background is every near-white region that touches the border; white inside of the subject
    stays. At the edge a pixel p is taken as a f + (1 - a) white, with f the colour of the nearest
    pixel farther in; a is the least-squares solution.

    Args:
        picture: (h, w, 3) in [0, 1].

    Returns:
        colour (h, w, 3) and opacity (h, w), both float32 in [0, 1]; colour * opacity over white is
        the picture again, up to the noise of its background.
    """
    from scipy import ndimage

    regions, _ = ndimage.label(picture.min(2) >= NEAR_WHITE)
    border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    outside = np.isin(regions, np.setdiff1d(border, [0]))
    depth = ndimage.distance_transform_edt(~outside) if outside.any() else np.full(outside.shape, np.inf)
    core = depth > EDGE
    if not core.any():
        return picture.astype(np.float32), (~outside).astype(np.float32)
    row, column = ndimage.distance_transform_edt(~core, return_distances=False, return_indices=True)
    inner = picture[row, column]
    distance = ((1 - inner) ** 2).sum(2)
    opacity = ((1 - picture) * (1 - inner)).sum(2) / np.maximum(distance, 1e-6)
    # A white core says nothing about the mixture; then the edge is the subject's own.
    opacity = np.where(distance > 0.02, opacity.clip(0, 1), 1.0)
    opacity = np.where(outside, 0.0, np.where(core, 1.0, opacity))
    colour = np.where(core[..., None], picture, inner)
    return colour.astype(np.float32), opacity.astype(np.float32)
