"""The cache gives back what was put, by content; stays in its bounds; bears damage and company."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
import torch
from PIL import Image

from vislr.core.errors import OutputError
from vislr.data import DataConfig, TensorCache, cache_key, open_pool


def tensors(seed, count=1000):
    rng = torch.Generator().manual_seed(seed)
    return {
        "mean": torch.randn(count, generator=rng),
        "half": torch.randn(7, generator=rng).to(torch.bfloat16),
        "ids": torch.arange(seed, seed + 5),
        "one": torch.tensor(float(seed)),
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture(params=["memory", "folder"])
def cache(request, tmp_path):
    return TensorCache(None if request.param == "memory" else tmp_path / "cache", 10**6)


def test_gives_back_every_bit(cache):
    put = tensors(1)
    assert cache.get("0" * 64) is None
    cache.put("0" * 64, put)
    expected = {name: value.clone() for name, value in put.items()}
    put["mean"].zero_()
    assert same(cache.get("0" * 64), expected)
    cache.put("0" * 64, tensors(2))
    assert same(cache.get("0" * 64), tensors(2))
    assert (cache.hits, cache.misses) == (2, 1)


def test_what_was_not_used_for_longest_goes_first(cache):
    keys = [cache_key("latent", number=number) for number in range(300)]
    for number, key in enumerate(keys):
        cache.put(key, tensors(number))  # about 4.1 kB: 300 are over the limit of 1 MB
        if cache.folder is not None:
            # Time stamps of files may be coarser than this loop is fast.
            os.utime(cache._path(cache.folder, key), ns=(number * 10**9,) * 2)
        if number == 200:
            assert cache.get(keys[0]) is not None
    kept = [number for number, key in enumerate(keys) if cache.get(key) is not None]
    assert 0 in kept
    assert kept[1:] == list(range(kept[1], 300))
    assert 150 < len(kept) < 250
    if cache.folder is not None:
        assert sum(path.stat().st_size for path in cache.folder.rglob("*.tensors")) <= 10**6


def test_an_entry_larger_than_the_limit_is_not_kept(cache):
    cache.put("a" * 64, {"x": torch.zeros(10**6)})
    assert cache.get("a" * 64) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "zeros", "empty", "swapped"])
def test_a_damaged_entry_is_a_miss_and_is_made_again(tmp_path, damage):
    cache = TensorCache(tmp_path, 10**6)
    cache.put("ab" * 32, tensors(1))
    (path,) = tmp_path.rglob("*.tensors")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-1] ^= 1
    elif damage == "zeros":
        data[200:] = bytes(len(data) - 200)
    elif damage == "empty":
        data = bytearray()
    else:
        data[:64] = data[64:128]
    path.write_bytes(bytes(data))
    assert cache.get("ab" * 32) is None
    cache.put("ab" * 32, tensors(1))
    assert same(cache.get("ab" * 32), tensors(1))


def test_leftovers_of_killed_writes_are_removed_and_never_read(tmp_path):
    TensorCache(tmp_path, 10**6).put("ab" * 32, tensors(1))
    (path,) = tmp_path.rglob("*.tensors")
    old, new = path.with_name(".x.tmp-1"), path.with_name(".y.tmp-2")
    for leftover in (old, new):
        leftover.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache = TensorCache(tmp_path, 10**6)
    assert not old.exists()
    assert new.exists()  # perhaps being written by another run
    assert cache.get("ab" * 32) is not None


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="a part of the path is a regular file"):
        TensorCache(tmp_path / "file" / "cache", 10)


def use(folder, answers):
    """Ask for 120 entries three times, and make what is not there."""
    cache, wrong, found = TensorCache(folder, 400_000), 0, 0
    for number in [*range(120)] * 3:
        key, value = cache_key("latent", number=number), torch.full((1000,), float(number))
        got = cache.get(key)
        if got is None:
            cache.put(key, {"x": value, "y": value * 2})
        else:
            found += 1
            wrong += not same(got, {"x": value, "y": value * 2})
    answers.put((wrong, found))


def test_two_runs_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    runs = [context.Process(target=use, args=(tmp_path, answers)) for _ in range(2)]
    for run in runs:
        run.start()
    found = [answers.get(timeout=60) for _ in runs]
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert [wrong for wrong, _ in found] == [0, 0]
    # 120 entries are 1 MB: over the limit, in which the newest stay.
    assert 300_000 < sum(path.stat().st_size for path in tmp_path.rglob("*.tensors")) <= 400_000 * 1.2
    assert not list(tmp_path.rglob(".*tmp*"))


def test_keys_depend_on_every_part():
    base = {"content": "a", "weights": "b", "dtype": "float32", "length": 77}
    keys = {cache_key("text", **base), cache_key("latent", **base)}
    keys |= {cache_key("text", **{**base, name: "other"}) for name in base}
    assert len(keys) == 6
    assert cache_key("text", **dict(reversed(base.items()))) in keys
    assert cache_key("text", a="1") != cache_key("text", a=1)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / f"{i}.png")
        Image.new("L", (40, 30), 255).save(tmp_path / f"{i}-masklabel.png")
    return tmp_path


def key_of(folder, index=0, size=16, position=None, **options):
    source = open_pool(DataConfig(folder=str(folder), caption="x", masks="files", **options)).at(size)
    item = source.item(index)
    if position is not None:
        item = source._item(position, index, augment=True)
    return source.content_key(item)


def test_content_keys_are_of_the_content_alone(folder):
    key = key_of(folder)
    assert key_of(folder) == key
    (folder / "0.png").rename(folder / "00-renamed.png")
    (folder / "0-masklabel.png").rename(folder / "00-renamed-masklabel.png")
    (folder / "00-renamed.png").touch()
    assert key_of(folder) == key
    others = [
        key_of(folder, 1), key_of(folder, size=32), key_of(folder, buckets=True, bucket_step=4),
        key_of(folder, position=0, crop="random"), key_of(folder, position=1, crop="random"),
    ]  # fmt: skip
    assert len({key, *others}) == 6
    flips = {key_of(folder, position=number, flip=True) for number in range(8)}
    assert len(flips) == 2
    assert key in flips


def test_a_changed_file_has_another_key_even_within_a_run(folder):
    source = open_pool(DataConfig(folder=str(folder), caption="x", masks="files")).at(16)
    item = source.item(0)
    before = source.content_key(item)
    assert source.read(item, keyed=True).content == before
    stamp = (folder / "0.png").stat()
    data = bytearray((folder / "0.png").read_bytes())
    Image.new("RGB", (40, 30), (9, 9, 9)).save(folder / "0.png")
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes().ljust(len(data), b"\0")[: max(len(data), 1)])
    os.utime(folder / "0.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = source.content_key(item)
    assert after != before
    assert source.read(item, keyed=True).content == after
    Image.new("L", (40, 30), 0).save(folder / "0-masklabel.png")
    assert len({source.content_key(item), after, before}) == 3


def test_digests_are_trusted_only_while_the_file_is_the_same(folder):
    import hashlib

    path = folder / "1.png"
    os.utime(path, (time.time() - 100,) * 2)
    source = open_pool(DataConfig(folder=str(folder), caption="x", masks="files")).at(16)
    store = source._parts[0].store
    assert store.digest(1) == hashlib.sha256(path.read_bytes()).hexdigest()
    data = path.read_bytes()
    path.write_bytes(bytes(len(data)))
    os.utime(path, (time.time() - 100,) * 2)
    assert store.digest(1) == hashlib.sha256(bytes(len(data))).hexdigest()
