"""A folder with every kind of broken input that people have: each is named, none stops the others unless asked."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vislr import zoo
from vislr.core.errors import DataError
from vislr.data import DataConfig, check_data, open_pool
from vislr.data.images import decode

GOOD = 5


def bomb(path):
    """A PNG of a few hundred bytes that says it has 400 million pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def half(path, **options):
    zoo.images()[0].image().convert("RGB").save(path, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged_png(path):
    zoo.images()[0].image().save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    path.write_bytes(bytes(data))


# Name of the picture -> (what makes it, what is said about it). All have a caption unless it is made otherwise.
BROKEN = {
    "empty.png": (lambda p: p.write_bytes(b""), "is empty"),
    "text.png": (lambda p: p.write_text("<html>404 not found</html>"), "is no picture that can be read"),
    "cut.png": (half, "cannot be read: .*(truncated|broken)"),
    "cut.jpg": (half, "cannot be read: .*truncated"),
    "cut.webp": (half, "cannot be read|is no picture"),
    "cut.gif": (half, "cannot be read: .*truncated"),
    "damaged.png": (damaged_png, "cannot be read: .*"),
    "bomb.png": (bomb, "cannot be read: .*400000000 pixels.*bomb"),
    "float.tiff": (lambda p: Image.fromarray(np.zeros((8, 8), np.float32)).save(p), "has 32-bit pixels"),
    "folder.png": (lambda p: p.mkdir(), "is a folder"),
    "dangling.jpg": (lambda p: p.symlink_to("nowhere.jpg"), "is a link to nothing"),
    "phone.heic": (lambda p: p.write_bytes(b"\0\0\0\x18ftypheic"), ".heic is not read; expected .png"),
    "no-caption.png": (lambda p: plain(p, None), "has no caption: no .txt file with text"),
    "blank-caption.png": (lambda p: plain(p, b" \n\t"), "has no caption"),
    "latin-caption.png": (lambda p: plain(p, "une pêche".encode("latin-1")), r"'latin-caption.txt' that is not UTF-8"),
    "utf16-caption.png": (lambda p: plain(p, "a peach".encode("utf-16")), r"'utf16-caption.txt' that is not UTF-8"),
}  # fmt: skip
# Lines of metadata.jsonl -> what is said about them.
LINES = {
    "{broken": "is no JSON object with a 'file_name'",
    '["good0.png"]': "is no JSON object with a 'file_name'",
    '{"file_name": "good0.png", "words": "x"}': "has no text under 'text' or 'caption'",
    '{"file_name": "good0.png", "text": 7}': "has no text under 'text' or 'caption'",
    '{"file_name": "gone.png", "text": "x"}': "names 'gone.png', which is not there",
    '{"file_name": "bad\udcff.png", "text": "x"}': "is not UTF-8 text",
}


def plain(path, caption):
    Image.new("RGB", (32, 32), "red").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("broken")
    for i, picture in enumerate(zoo.images(style="noto")[:GOOD]):
        picture.image().save(root / f"good{i}.png")
        (root / f"good{i}.txt").write_text(picture.caption)
    for name, (make, _) in BROKEN.items():
        make(root / name)
        if "caption" not in name:
            (root / name).with_suffix(".txt").write_text("a thing")
    for stem in ("cut", "empty"):
        (root / f"{stem}.txt").write_text("a thing")
    lines = "\n".join(LINES).encode("utf-8", "surrogateescape")
    (root / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\n")
    return root


def reasons(pool):
    return {problem.path: problem.reason for problem in pool.problems if problem.fatal}


@pytest.mark.parametrize("decode_all", [True, False])
def test_each_is_named_and_the_others_are_used(folder, decode_all):
    pool = open_pool(DataConfig(folder=str(folder), decode_all=decode_all))
    found = reasons(pool)
    # Headers alone do not show that a file is cut off; that is found when its turn comes.
    late = set() if decode_all else {"cut.png", "cut.jpg", "cut.gif", "cut.webp", "damaged.png", "float.tiff"}
    for name, (_, reason) in BROKEN.items():
        if name not in late:
            matches(found[name], reason)
    for number, reason in enumerate(LINES.values(), 1):
        matches(found[f"metadata.jsonl line {number}"], reason)
    used = {picture.name for picture in pool.pictures()}
    assert used - late == {f"good{i}.png" for i in range(GOOD)}
    assert set(found) == {n for n in BROKEN if n not in used} | {
        f"metadata.jsonl line {i + 1}" for i in range(len(LINES))
    }
    assert f"left out {len(found)}: " in pool.summary()


def matches(text, pattern):
    assert re.search(pattern, text), f"{text!r} is not {pattern!r}"


@pytest.mark.filterwarnings("ignore:left out while training")
def test_what_shows_late_is_replaced_by_name_and_the_same_every_time(folder):
    config = DataConfig(folder=str(folder), decode_all=False)
    source = open_pool(config).at(16, seed=3)
    items = [item for batch in source.batches(0, 6, 4) for item in batch]
    with pytest.warns(UserWarning, match="left out while training: 'cut.jpg' cannot be read"):
        loaded = [source.read(item) for item in items]
    names = {source.picture(one.item.index).name for one in loaded}
    assert names <= {f"good{i}.png" for i in range(GOOD)}
    again = open_pool(config).at(16, seed=3)
    with pytest.warns(UserWarning, match="left out"):
        repeated = [again.read(item) for item in items]
    assert [one.item for one in loaded] == [one.item for one in repeated]
    assert all((a.pixels == b.pixels).all() for a, b in zip(loaded, repeated, strict=True))
    # Caption and pixels are of one picture.
    for one in loaded:
        assert one.item.caption == source.item(one.item.index).caption
        assert (one.pixels == source.read(source.item(one.item.index)).pixels).all()


def test_stop_names_the_first_and_counts_all(folder):
    config = DataConfig(folder=str(folder), broken="stop")
    count = len(BROKEN) + len(LINES)
    with pytest.raises(
        DataError, match=rf"{count} faults in the pictures \({GOOD} are fine\): blank-caption.png: .* and"
    ):
        open_pool(config)
    late = open_pool(dataclasses.replace(config, decode_all=False, broken="skip")).at(16)
    late.config = config
    broken = next(i for i in range(late.count) if late.picture(i).name == "cut.png")
    with pytest.raises(DataError, match=r"'cut.png' cannot be read"):
        late.read(late.item(broken))


def test_nothing_usable_says_why(tmp_path):
    bomb(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"no picture in .* can be used: a.png: cannot be read: .*bomb"):
        open_pool(DataConfig(folder=str(tmp_path)))


def test_the_report_lists_all_and_shows_them(folder, tmp_path):
    report = check_data(DataConfig(folder=str(folder), broken="stop"), tmp_path / "report", size=32)
    assert report.pictures == GOOD
    assert len(report.left_out) == len(BROKEN) + len(LINES)
    text = str(report)
    assert text.startswith(f"{GOOD} pictures can be used")
    for problem in report.left_out:
        assert f"  {problem.path}: {problem.reason}" in text
    stored = json.loads((tmp_path / "report" / "data_report.json").read_text())
    assert [problem["path"] for problem in stored["problems"]] == [problem.path for problem in report.problems]
    with Image.open(tmp_path / "report" / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    cells = GOOD + len(report.left_out)
    rows = -(-cells // 6)
    assert sheet.size == (6 * 166 + 6, rows * 218 + 6)
    # The first cell holds the first good picture, enlarged to no more than it is; the sixth begins in red.
    assert pixels[6:166, 6:166].std() > 10
    sixth = pixels[6:60, 5 * 166 + 6 :]
    assert ((sixth[..., 0] - sixth[..., 1]) > 100).any()


def test_captions_without_a_picture_are_noted_and_texts_about_the_folder_are_not(tmp_path):
    zoo.export(tmp_path, zoo.images(style="noto")[:2])
    assert (tmp_path / "CREDITS.txt").is_file()
    (tmp_path / "lost.txt").write_text("noto style, a lost one")
    problems = check_data(DataConfig(folder=str(tmp_path)), tmp_path / "report", size=32).problems
    assert [(one.path, one.reason) for one in problems] == [("lost.txt", "is a caption without a picture")]


ODD = {
    "cmyk.jpg": lambda p: Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(p, quality=100),
    "sixteen.png": lambda p: Image.fromarray(np.full((8, 8), 25700, np.uint16)).save(p),
    "rgba.png": lambda p: Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(p),
    "turned.jpg": lambda p: turned(p),
    "animated.gif": lambda p: animated(p),
    "animated.webp": lambda p: animated(p),
    "lab.tiff": lambda p: Image.new("LAB", (8, 8), (128, 128, 128)).save(p),
    "bilevel.png": lambda p: Image.new("1", (8, 8), 1).save(p),
    "UPPER.JPEG": lambda p: Image.new("RGB", (8, 8), "blue").save(p),
    "misnamed.png": lambda p: Image.new("RGB", (8, 8), "lime").save(p, format="jpeg", quality=100),
    "small.avif": lambda p: Image.new("RGB", (8, 8), "white").save(p, quality=100),
    "broken-exif.jpg": lambda p: Image.new("RGB", (8, 8), "white").save(p, exif=b"Exif\0\0garbage that is no TIFF"),
}


def turned(path):
    image = Image.new("RGB", (16, 8), "red")
    exif = Image.Exif()
    exif[0x0112] = 8
    image.save(path, exif=exif)


def animated(path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)


def test_odd_but_whole_pictures_are_used(tmp_path):
    for name, make in ODD.items():
        make(tmp_path / name)
    config = DataConfig(folder=str(tmp_path), caption="a thing")
    pool = open_pool(config)
    assert reasons(pool) == {}
    notes = {problem.path: problem.reason for problem in pool.problems if not problem.fatal}
    assert notes["animated.gif"] == notes["animated.webp"] == "has 3 frames; the first is used"
    source = pool.at(8)
    shown = {source.picture(i).name: source.read(source.item(i)) for i in range(source.count)}
    centre = {name: tuple(loaded.pixels[:, 4, 4].tolist()) for name, loaded in shown.items()}
    assert centre["sixteen.png"] == (100, 100, 100)
    assert centre["rgba.png"] == centre["bilevel.png"] == centre["small.avif"] == (255, 255, 255)
    assert centre["broken-exif.jpg"] == (255, 255, 255)
    # L* = 128 / 255 of 100 is sRGB 119.6 by CIE 15.
    assert all(abs(value - 119.6) < 2 for value in centre["lab.tiff"])
    assert all(abs(a - b) < 6 for a, b in zip(centre["cmyk.jpg"], (255, 0, 0), strict=True))
    assert centre["animated.gif"] == centre["animated.webp"] == (255, 0, 0)
    assert shown["turned.jpg"].original == (8, 16)
    assert shown["turned.jpg"].corner == (4, 0)


def test_what_the_walk_does_not_reach_is_named(tmp_path):
    root, outside = tmp_path / "in", tmp_path / "out"
    for folder in (root / "locked", root / "metadata.jsonl", outside):
        folder.mkdir(parents=True)
    for path in (root / "a.png", root / "locked" / "b.png", outside / "c.png"):
        Image.new("RGB", (8, 8)).save(path)
    (root / "linked").symlink_to(outside)
    (root / "locked" / "metadata.jsonl").write_text('{"file_name": "../../out/c.png", "text": "x"}')
    pool = open_pool(DataConfig(folder=str(root), caption="x"))
    assert sorted(str(problem) for problem in pool.problems) == [
        "linked: is a link to a folder, which is not followed; give it in data.folders",
        "metadata.jsonl: cannot be read: Is a directory",
        "metadata.jsonl: names 'c.png', which is none of the pictures",
    ]
    if os.geteuid():
        (root / "locked").chmod(0)
        pool = open_pool(DataConfig(folder=str(root), caption="x"))
        (root / "locked").chmod(0o700)
        assert "locked: is a folder that cannot be opened" in map(str, pool.problems)


def test_a_name_that_is_no_utf8_is_printed_and_used(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        (tmp_path / "a.png").rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    pool = open_pool(DataConfig(folder=str(tmp_path), caption="x"))
    assert [picture.name for picture in pool.pictures()] == ["caf\ufffd.png"]
    assert pool.fingerprint() == open_pool(DataConfig(folder=str(tmp_path), caption="x")).fingerprint()
    assert "caf" in str(check_data(DataConfig(folder=str(tmp_path)), tmp_path / "out"))


def test_decoder_errors_of_any_kind_are_named():
    rng = np.random.default_rng(0)
    picture = zoo.images()[0].image()
    for form in ("png", "jpeg", "gif", "webp", "tiff", "bmp"):
        stream = io.BytesIO()
        picture.convert("RGB").save(stream, form)
        whole = stream.getvalue()
        for _ in range(30):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 8):
                data[place] = rng.integers(0, 256)
            # Anything but a DataError fails the test.
            with contextlib.suppress(DataError):
                assert decode(bytes(data)).image.mode == "RGB"
