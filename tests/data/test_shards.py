"""WebDataset shards: read where they lie, each picture as often and in the order that a position says."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter

import fsspec
import pytest
import torch
from PIL import Image

from vislr import zoo
from vislr.core.errors import DataError
from vislr.data import DataConfig, check_data, open_pool
from vislr.data.shards import find_shards

PICTURES = 24


def encoded(image, form="png", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def shard(members):
    """The bytes of a tar of (name, bytes)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@pytest.fixture(scope="module")
def pictures():
    return zoo.images(style="noto")[:PICTURES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures):
    """The same pictures as four shards and as files."""
    root = tmp_path_factory.mktemp("shards")
    (root / "files").mkdir()
    (root / "tars").mkdir()
    for number in range(4):
        members = []
        for i, picture in enumerate(pictures[number * 6 : number * 6 + 6]):
            key, data = f"{number}{i}", encoded(picture.image(), "png" if i % 2 else "webp")
            suffix = "png" if i % 2 else "webp"
            caption = (
                [("txt", picture.caption.encode())]
                if i % 3
                else [("json", json.dumps({"caption": picture.caption}).encode())]
            )
            members += [(f"{key}.{suffix}", data), *((f"{key}.{s}", d) for s, d in caption)]
            (root / "files" / f"{key}.{suffix}").write_bytes(data)
            (root / "files" / f"{key}.txt").write_text(picture.caption)
        (root / "tars" / f"part-{number:03d}.tar").write_bytes(shard(members))
    return root


@pytest.fixture
def remote(folder):
    files = fsspec.filesystem("memory")
    for path in (folder / "tars").iterdir():
        files.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def shown(source):
    return {source.picture(i).caption: source.read(source.item(i)).pixels for i in range(source.count)}


@pytest.mark.parametrize("form", ["folder", "range", "glob", "remote folder", "remote range"])
def test_shards_give_what_files_give(folder, remote, form):
    path = {
        "folder": str(folder / "tars"), "range": str(folder / "tars" / "part-{000..003}.tar"),
        "glob": str(folder / "tars" / "part-*.tar"), "remote folder": remote,
        "remote range": f"{remote}/part-{{000..003}}.tar",
    }[form]  # fmt: skip
    source = open_pool(DataConfig(folder=path)).at(32)
    expected = shown(open_pool(DataConfig(folder=str(folder / "files"))).at(32))
    found = shown(source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[caption], expected[caption]) for caption in found)
    assert source.streamed
    assert source.captions() is None
    assert source.pool.problems == ()


def test_processes_share_the_shards_and_any_step_can_be_gone_on_from(folder):
    config = DataConfig(folder=str(folder / "tars"), window=12)
    whole = [item for batch in open_pool(config).at(32, seed=2).batches(0, 12, 4) for item in batch]
    assert Counter(item.index for item in whole) == dict.fromkeys(range(PICTURES), 2)
    # Each window of twelve reads two shards.
    for start in range(0, PICTURES, 12):
        assert len({item.index // 6 for item in whole[start : start + 12]}) == 2
    ranks = [list(open_pool(config).at(32, seed=2).batches(0, 6, 4, 1, rank, 2)) for rank in range(2)]
    assert [item for step in range(6) for rank in ranks for item in rank[step]] == whole
    assert list(open_pool(config).at(32, seed=2).batches(4, 6, 4, 1, 1, 2)) == ranks[1][4:]
    epoch = [{item.index for batch in rank[:3] for item in batch} for rank in ranks]
    assert epoch[0] | epoch[1] == set(range(PICTURES))
    assert not epoch[0] & epoch[1]


def test_only_what_is_trained_on_is_read(folder, monkeypatch):
    from vislr.data.shards import ShardStore

    source = open_pool(DataConfig(folder=str(folder / "tars"))).at(32)
    read = []
    original = ShardStore._slice
    monkeypatch.setattr(ShardStore, "_slice", lambda self, i, o, s: read.append((i, s)) or original(self, i, o, s))
    items = next(source.batches(0, 1, 4, 1, 1, 2))
    for item in items:
        source.read(item)
    assert [index for index, _ in read] == [item.index for item in items]
    assert sum(size for _, size in read) < 4 * 12000


def test_buckets_and_splits_work_on_shards(folder):
    config = DataConfig(folder=str(folder / "tars"), buckets=True)
    train, held = open_pool(config).split(0.25)
    assert (len(train), len(held)) == (18, 6)
    assert {p.name for p in train.pictures()} & {p.name for p in held.pictures()} == set()
    source = train.at(48, 8)
    assert source.sizes == [(48, 48)]
    assert Counter(item.index for batch in source.batches(0, 9, 2) for item in batch) == dict.fromkeys(range(18), 1)
    assert train.fingerprint() != held.fingerprint()


def test_listings_are_kept_until_the_shard_changes(folder, tmp_path, pictures, monkeypatch):
    from vislr.data import shards

    path = tmp_path / "a.tar"
    path.write_bytes((folder / "tars" / "part-000.tar").read_bytes())
    config = DataConfig(folder=str(path), cache_folder=str(tmp_path / "cache"))
    first = shown(open_pool(config).at(16))
    (kept,) = (tmp_path / "cache" / "shards").iterdir()
    listed = []
    original = shards._samples
    monkeypatch.setattr(shards, "_samples", lambda *args: listed.append(1) or original(*args))
    again = shown(open_pool(config).at(16))
    assert not listed
    assert all(torch.equal(first[caption], again[caption]) for caption in first)
    kept.write_bytes(kept.read_bytes()[:50])
    assert shown(open_pool(config).at(16)).keys() == first.keys()
    assert len(listed) == 1
    path.write_bytes(shard([("0.png", encoded(pictures[9].image())), ("0.txt", b"new")]))
    assert shown(open_pool(config).at(16)).keys() == {"new"}
    assert len(listed) == 2


def test_classes_are_numbers_in_cls_files(tmp_path):
    red = encoded(Image.new("RGB", (16, 16), "red"))
    members = []
    for i in range(4):
        members += [(f"{i}.png", red), (f"{i}.cls", str(i % 3).encode())]
    members += [("x.png", red), ("y.png", red), ("y.cls", b"cat")]
    (tmp_path / "a.tar").write_bytes(shard(members))
    pool = open_pool(DataConfig(folder=str(tmp_path / "a.tar")), True)
    assert pool.classes == ("0", "1", "2")
    assert [picture.label for picture in pool.pictures()] == [0, 1, 2, 0]
    assert [str(problem) for problem in pool.problems] == [
        "a.tar/x: has no class: no .cls with a number from 0", "a.tar/y: has a .cls that is no number",
    ]  # fmt: skip
    with pytest.raises(DataError, match="has a class 2; training has 2 classes"):
        open_pool(DataConfig(folder=str(tmp_path / "a.tar")), ("a", "b"))


def test_every_fault_of_a_shard_is_named_and_the_others_are_used(tmp_path):
    red, grey = encoded(Image.new("RGB", (16, 16), "red")), encoded(Image.new("L", (16, 16), 9))
    good = [("d/good.png", red), ("d/good.txt", b"a good one"), ("d/good.mask.png", grey)]
    (tmp_path / "a.tar").write_bytes(
        shard(
            [
                *good,
                ("none.txt", b"no picture"),
                ("silent.png", red),
                ("latin.png", red), ("latin.txt", b"p\xeache"),
                ("empty.png", b""), ("empty.txt", b"x"),
                ("text.png", b"<html>"), ("text.txt", b"x"),
                ("twice.png", red), ("twice.png", red), ("twice.txt", b"x"),
                ("json.png", red), ("json.json", b"{broken"),
                ("README", b"no dot"),
            ]
        )
    )  # fmt: skip
    whole = shard([("0.png", red), ("0.txt", b"zero"), ("1.txt", b"one"), ("1.png", encoded(zoo.images()[0].image()))])
    (tmp_path / "cut.tar").write_bytes(whole[:3800])
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    pool = open_pool(DataConfig(folder=str(tmp_path), masks="files"))
    found = {problem.path: problem.reason for problem in pool.problems}
    assert found.pop("text.tar").startswith("is no whole tar file: ")
    assert found.pop("empty.tar").startswith("is no whole tar file: ")
    assert found.pop("cut.tar").startswith("is no whole tar file: ")
    assert found == {
        "a.tar/none": "has no picture, only .txt",
        "a.tar/silent": "has no caption: no .txt with text, no .json with a 'caption'",
        "a.tar/latin": "has a caption that is not UTF-8 text (byte 1)",
        "a.tar/empty": "is empty",
        "a.tar/text": "is no picture that can be read",
        "a.tar/twice": "has two members named .png",
        "a.tar/json": "has a .json that cannot be read",
        "cut.tar/1": "is cut off: the shard ends inside it",
    }
    assert [picture.name for picture in pool.pictures()] == ["a.tar/d/good.png", "cut.tar/0.png"]
    source = pool.at(16)
    assert torch.equal(source.read(source.item(0)).mask, torch.full((1, 16, 16), 9 / 255))
    assert torch.equal(source.read(source.item(1)).mask, torch.ones(1, 16, 16))
    report = check_data(DataConfig(folder=str(tmp_path)), tmp_path / "out")
    assert len(report.left_out) == 11


def test_paths_that_are_no_shards(folder, tmp_path):
    assert find_shards(str(folder / "files")) == []
    assert find_shards("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    with pytest.raises(DataError, match="empty range"):
        find_shards("a-{9..3}.tar")
    with pytest.raises(DataError, match=r"is compressed; expected a plain \.tar"):
        find_shards("a.tar.gz")
    with pytest.raises(DataError, match=r"holds no \.tar files"):
        find_shards(str(tmp_path / "*.tar"))
    with pytest.raises(DataError, match=r"'nowhere://x/a.tar' cannot be reached: .*[Pp]rotocol"):
        open_pool(DataConfig(folder="nowhere://x/a.tar"))
    with pytest.raises(DataError, match=r"no picture in '.*gone.tar' can be used: .*gone.tar: cannot be read"):
        open_pool(DataConfig(folder=str(tmp_path / "gone.tar")))
