"""Buckets: one area, many proportions, nothing enlarged; what is cut is what is said."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from vislr.core.errors import ConfigError, DataError
from vislr.data import DataConfig, generator, open_pool
from vislr.data.buckets import lost_share, nearest_size, sizes_of_area
from vislr.data.images import cut, place, to_tensor


def test_the_sizes_of_sdxl():
    sizes = sizes_of_area(1024, 64, 2.0)
    # The SDXL report's table (appendix I) up to a ratio of 2; there 1408 x 704 is the last.
    known = {(1024, 1024), (1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704)}
    assert known <= set(sizes)
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert all(w * h <= 1024 * 1024 and w % 64 == h % 64 == 0 and max(w, h) <= 2 * min(w, h) for w, h in sizes)


@pytest.mark.parametrize("step", [8, 32, 64])
def test_nothing_is_enlarged_and_little_is_lost(step):
    rng = np.random.default_rng(0)
    for width, height in rng.integers(step, 3000, (300, 2)).tolist():
        bucket = nearest_size(width, height, 512, step, 2.0)
        assert bucket is not None
        assert bucket[0] <= width
        assert bucket[1] <= height
        assert bucket[0] * bucket[1] <= 512 * 512
        if max(width, height) <= 2 * min(width, height) and min(width, height) >= 8 * step:
            # The nearest proportions may be a step away: at eight steps a side, about an eighth either way.
            assert lost_share((width, height), bucket) < 0.2


def test_a_picture_of_a_bucket_s_size_gets_it_and_tiny_ones_none():
    for size in sizes_of_area(512, 64, 2.0):
        assert nearest_size(*size, 512, 64, 2.0) == size
    assert nearest_size(64, 64, 512, 64, 2.0) == (64, 64)
    assert nearest_size(63, 900, 512, 64, 2.0) is None
    # A strip of ten to one keeps the proportions of the longest bucket.
    assert nearest_size(1280, 128, 512, 64, 2.0) == (256, 128)
    assert lost_share((1280, 128), (256, 128)) == pytest.approx(0.8)


def stripes(width, height):
    """Every column and row has a colour of its own."""
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1), rows * 0], -1).astype(np.uint8)
    )


def test_cuts_keep_proportions_and_stay_inside():
    for picture, size, crop in itertools.product(
        [(300, 100), (90, 400), (64, 64)], [(32, 32), (64, 32), (24, 48)], ["center", "random"]
    ):
        for number in range(10):
            box, _ = cut(picture, size, crop=crop, flip=True, enlarge=False, rng=generator("c", number))
            width, height = box[2] - box[0], box[3] - box[1]
            assert width / height == pytest.approx(size[0] / size[1])
            assert min(box) >= 0
            assert box[2] <= picture[0] + 1e-6
            assert box[3] <= picture[1] + 1e-6
            if size[0] <= min(picture[0], picture[1] * size[0] / size[1]):
                assert width >= size[0] - 1e-6  # no random part is enlarged


def test_place_shows_the_box():
    image = stripes(64, 32)
    part = to_tensor(place(image, (16, 8, 48, 24), (32, 16)))
    assert torch.equal(part, to_tensor(image)[:, 8:24, 16:48])
    assert torch.equal(to_tensor(place(image, (16, 8, 48, 24), (32, 16), True)), part.flip(2))


@pytest.fixture
def folder(tmp_path):
    for name, size in {
        "wide": (300, 150),
        "tall": (150, 300),
        "even": (256, 256),
        "small": (70, 70),
        "dot": (20, 20),
    }.items():
        stripes(*size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    return tmp_path


def test_a_source_gives_every_picture_its_size(folder):
    pool = open_pool(DataConfig(folder=str(folder), buckets=True))
    source = pool.at(128, 8)
    shown = {source.picture(i).name: source.size_of(i) for i in range(source.count)}
    assert shown == {
        "wide.png": (176, 88),
        "tall.png": (88, 176),
        "even.png": (128, 128),
        "small.png": (64, 64),
        "dot.png": (16, 16),
    }
    assert source.sizes == sorted(shown.values())
    assert source.table() == dict.fromkeys(source.sizes, 1)
    for i in range(source.count):
        loaded = source.read(source.item(i))
        width, height = source.size_of(i)
        assert loaded.pixels.shape == (3, height, width)
        assert loaded.original == (source.picture(i).width, source.picture(i).height)
        # The whole width is seen: the stripes run from 0 to 255 (edges are averaged).
        assert loaded.pixels[0].min() < 8
        assert loaded.pixels[0].max() > 247


def test_steps_and_pictures_that_do_not_fit(folder):
    pool = open_pool(DataConfig(folder=str(folder), buckets=True, bucket_step=32))
    source = pool.at(128, 16)
    assert [str(problem) for problem in source.problems if problem.fatal] == [
        "dot.png: is 20 x 20 pixels; the smallest size is 32 x 32"
    ]
    assert source.count == 4
    assert {item.index for batch in source.batches(0, 4, 1) for item in batch} == {0, 1, 2, 3}
    with pytest.raises(ConfigError, match="bucket_step is 32; expected a multiple of 24"):
        pool.at(144, 24)
    with pytest.raises(ConfigError, match="size is 100; expected a multiple of 16"):
        pool.at(100, 16)
    with pytest.raises(DataError, match=r"1 faults in the pictures \(4 are fine\): dot.png: is 20 x 20"):
        open_pool(DataConfig(folder=str(folder), buckets=True, bucket_step=32, broken="stop")).at(128, 16)
    with pytest.raises(DataError, match="no picture is large enough: "):
        open_pool(DataConfig(folder=str(folder), buckets=True, bucket_step=512)).at(512, 64)


def test_squares_are_those_of_the_older_face(folder):
    from vislr.data import ImageFolder, open_image, square

    source = open_pool(DataConfig(folder=str(folder), crop="random", flip=True)).at(48, seed=5)
    samples = ImageFolder.with_captions(folder).samples
    for items in source.batches(0, 3, 4):
        for item in items:
            image = open_image(samples[item.index].path)
            old = square(image, 48, crop="random", flip=True, rng=generator(5, "augment", item.position))
            assert torch.equal(source.read(item).pixels, to_tensor(old))
