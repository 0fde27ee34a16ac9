"""Pictures with captions or classes: folders and shards, buckets, an exact order, caches, checks, labelled grids."""

from vislr.data.cache import TensorCache, cache_key
from vislr.data.check import DataReport, check_data
from vislr.data.config import DataConfig, FolderConfig
from vislr.data.draws import epoch_order, generator, key_seed, sample_at
from vislr.data.folder import ImageFolder, Sample
from vislr.data.grids import make_grid
from vislr.data.images import open_image, square, to_tensor
from vislr.data.pictures import Picture, Problem
from vislr.data.pool import Pool, as_pool, open_pool
from vislr.data.source import Item, Loaded, Source

__all__ = [
    "DataConfig",
    "DataReport",
    "FolderConfig",
    "ImageFolder",
    "Item",
    "Loaded",
    "Picture",
    "Pool",
    "Problem",
    "Sample",
    "Source",
    "TensorCache",
    "as_pool",
    "cache_key",
    "check_data",
    "epoch_order",
    "generator",
    "key_seed",
    "make_grid",
    "open_image",
    "open_pool",
    "sample_at",
    "square",
    "to_tensor",
]
