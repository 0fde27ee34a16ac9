"""Readers in other processes change nothing; two processes see every picture once an epoch; older folders still fit."""

from __future__ import annotations

import multiprocessing
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vislr import zoo
from vislr.data import DataConfig, ImageFolder, as_pool, open_pool

PICTURES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loading") / "pictures"
    zoo.export(root, zoo.images(style="noto")[:PICTURES])
    return root


class Read(Dataset):
    def __init__(self, source):
        self.source = source

    def __getitem__(self, items):
        loaded = [self.source.read(item, keyed=True) for item in items]
        return torch.stack([one.pixels for one in loaded]), [(one.item.caption, one.content) for one in loaded]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(folder, workers):
    config = DataConfig(folder=str(folder), crop="random", flip=True, shuffle_tags=True, caption_dropout=0.2)

    def run(workers):
        source = open_pool(config).at(32, seed=4)
        loader = DataLoader(Read(source), batch_size=None, sampler=list(source.batches(0, 8, 4)), num_workers=workers)
        return list(loader)

    one, several = run(0), run(workers)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, several, strict=True))
    assert [texts for _, texts in one] == [texts for _, texts in several]
    assert len({key for _, texts in one for _, key in texts}) == 32  # no crop comes twice


def watch(folder, rank, world, answers):
    source = open_pool(DataConfig(folder=str(folder))).at(32, seed=9)
    items = [item for batch in source.batches(0, 3 * PICTURES // (4 * world), 4, 1, rank, world) for item in batch]
    sums = [int(source.read(item).pixels.sum()) for item in items]
    answers.put((rank, [(item.position, item.index) for item in items], sums))


def test_two_processes_see_every_picture_once_an_epoch(folder):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    runs = [context.Process(target=watch, args=(folder, rank, 2, answers)) for rank in range(2)]
    for run in runs:
        run.start()
    found = sorted(answers.get(timeout=60) for _ in runs)
    for run in runs:
        run.join()
    seen = sorted(place for _, places, _ in found for place in places)
    assert [position for position, _ in seen] == list(range(3 * PICTURES))
    for epoch in range(3):
        assert sorted(i for _, i in seen[epoch * PICTURES : (epoch + 1) * PICTURES]) == list(range(PICTURES))
    alone = multiprocessing.get_context("fork").Queue()
    watch(folder, 0, 1, alone)
    _, places, sums = alone.get(timeout=60)
    assert sorted(places) == seen
    assert Counter(sums) == Counter(value for _, _, values in found for value in values)


def test_an_image_folder_is_a_pool(folder):
    old = ImageFolder.with_captions(folder)
    config = DataConfig(folder=str(folder), trigger="tok")
    pool, read = as_pool(old, config), open_pool(config)
    assert pool.pictures() == read.pictures()
    assert pool.captions() == read.captions() == list(dict.fromkeys(s.caption for s in old.triggered("tok").samples))
    assert pool.fingerprint() == read.fingerprint()
    one, other = pool.at(32, seed=1), read.at(32, seed=1)
    assert list(one.batches(0, 3, 4)) == list(other.batches(0, 3, 4))
    held = [p.name for p in pool.split(0.25)[1].pictures()]
    assert held == [sample.path.name for sample in old.split(0.25)[1].samples]
    nothing = as_pool(ImageFolder(folder, ()), config)
    assert len(nothing) == len(nothing.at(32)) == nothing.at(32).count == 0


def test_classes(tmp_path):
    for number, picture in enumerate(zoo.images(style="noto")[:6]):
        path = tmp_path / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        picture.image().save(path)
    zoo.images()[0].image().save(tmp_path / "stray.png")
    pool = open_pool(DataConfig(folder=str(tmp_path)), True)
    assert pool.classes == ("cat", "dog")
    assert [str(problem) for problem in pool.problems] == ["stray.png: lies outside of the class folders"]
    source = pool.at(16)
    assert Counter(item.label for batch in source.batches(0, 6, 1) for item in batch) == {0: 3, 1: 3}
    held = open_pool(DataConfig(folder=str(tmp_path)), ("dog", "bird"))
    assert [picture.label for picture in held.pictures()] == [0, 0, 0]
    assert "is of a class 'cat' that training has not" in " ".join(map(str, held.problems))
