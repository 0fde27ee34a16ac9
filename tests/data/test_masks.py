"""Loss masks: from the picture's own transparency, from files beside it, from a folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vislr.data import DataConfig, FolderConfig, open_pool


def halves(size=(32, 16), left=255, right=0):
    array = np.full((size[1], size[0]), left, dtype=np.uint8)
    array[:, size[0] // 2 :] = right
    return Image.fromarray(array)


def read(config, name="a.png", **options):
    source = open_pool(config).at(16, seed=1)
    index = next(i for i in range(source.count) if source.picture(i).name == name)
    if options.get("position") is not None:
        return source.read(source._item(options["position"], index, augment=True))
    return source.read(source.item(index))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    Image.new("RGB", (32, 16), "red").save(root / "a.png")
    Image.new("RGB", (32, 16), "red").save(root / "b.png")
    return root


def test_alpha(folder):
    image = Image.new("RGB", (32, 16), "red")
    image.putalpha(halves())
    image.save(folder / "a.png")
    config = DataConfig(folder=str(folder), caption="x", masks="alpha")
    loaded = read(config)
    assert loaded.item.mask
    assert loaded.mask.shape == (1, 16, 16)
    assert loaded.mask.dtype == torch.float32
    # The middle square holds the edge between what counts and what does not.
    assert torch.equal(loaded.mask[0, :, :8], torch.ones(16, 8))
    assert torch.equal(loaded.mask[0, :, 8:], torch.zeros(16, 8))
    assert loaded.pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert loaded.pixels[:, 0, 15].tolist() == [255, 255, 255]
    # Without transparency all of it counts.
    assert torch.equal(read(config, "b.png").mask, torch.ones(1, 16, 16))
    assert read(DataConfig(folder=str(folder), caption="x")).mask is None


@pytest.mark.parametrize("where", ["beside", "folder"])
def test_files(folder, tmp_path, where):
    masks = tmp_path / "masks"
    masks.mkdir()
    halves().save(folder / "a-masklabel.png" if where == "beside" else masks / "a.png")
    given = str(masks) if where == "folder" else None
    config = DataConfig(folders=[FolderConfig(str(folder), caption="x", masks=given)], masks="files")
    pool = open_pool(config)
    assert [picture.name for picture in pool.pictures()] == ["a.png", "b.png"]
    assert [str(problem) for problem in pool.problems] == ["b.png: has no mask; all of it counts"]
    assert torch.equal(read(config).mask[0, 0], torch.tensor([1.0] * 8 + [0.0] * 8))
    assert torch.equal(read(config, "b.png").mask, torch.ones(1, 16, 16))


def test_a_mask_moves_with_its_picture(folder):
    picture = np.zeros((16, 32, 3), dtype=np.uint8)
    picture[..., 0] = np.asarray(halves())
    Image.fromarray(picture).save(folder / "a.png")
    halves().save(folder / "a-masklabel.png")
    config = DataConfig(folder=str(folder), caption="x", masks="files", crop="random", flip=True)
    seen = set()
    for position in range(12):
        loaded = read(config, position=position)
        assert torch.equal((loaded.mask[0] * 255).round().to(torch.uint8), loaded.pixels[0])
        seen.add(int(loaded.pixels[0, 0, 0]) > 127)
    assert seen == {True, False}


def test_masks_that_do_not_fit_or_cannot_be_read_are_named(folder, tmp_path):
    halves((30, 16)).save(folder / "a-masklabel.png")
    (folder / "b-masklabel.png").write_bytes(b"")
    Image.new("RGB", (32, 16)).save(folder / "c.png")
    pool = open_pool(DataConfig(folder=str(folder), caption="x", masks="files"))
    assert [str(problem) for problem in pool.problems if problem.fatal] == [
        "a.png: is 32 x 16 and its mask 'a-masklabel.png' 30 x 16 pixels",
        "b.png: has a mask 'b-masklabel.png' that is empty",
    ]
    assert [picture.name for picture in pool.pictures()] == ["c.png"]
