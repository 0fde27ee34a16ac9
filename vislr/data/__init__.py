"""Folders of pictures with captions or classes, deterministic draws, and labelled grids."""

from vislr.data.draws import epoch_order, generator, key_seed, sample_at
from vislr.data.folder import ImageFolder, Sample
from vislr.data.grids import make_grid
from vislr.data.images import open_image, square, to_tensor

__all__ = [
    "ImageFolder",
    "Sample",
    "epoch_order",
    "generator",
    "key_seed",
    "make_grid",
    "open_image",
    "sample_at",
    "square",
    "to_tensor",
]
