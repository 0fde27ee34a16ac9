"""Folders of captioned and classified pictures; every fault is named before anything starts."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vislr import zoo
from vislr.core.errors import DataError
from vislr.data import ImageFolder


def picture(path, colour="red", size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.mark.parametrize("captions", ["txt", "jsonl"])
def test_what_the_zoo_exports_is_read_back(tmp_path, captions):
    pictures = zoo.images(style="noto")[:7]
    zoo.export(tmp_path / "out", pictures, captions=captions)
    folder = ImageFolder.with_captions(tmp_path / "out")
    assert sorted(sample.caption for sample in folder.samples) == sorted(p.caption for p in pictures)
    assert folder.check() == 64
    assert folder.classes == ()


def test_nested_folders_txt_beside_jsonl_and_hidden_files(tmp_path):
    picture(tmp_path / "b.PNG")
    (tmp_path / "b.txt").write_text("  a b\n b  ", encoding="utf-8-sig")
    picture(tmp_path / "deep" / "a.jpg")
    (tmp_path / "deep" / "metadata.jsonl").write_text('{"file_name": "a.jpg", "caption": "an a"}\n\n')
    picture(tmp_path / ".thumbnails" / "c.png")
    picture(tmp_path / "__MACOSX" / "d.png")
    folder = ImageFolder.with_captions(tmp_path)
    assert [(s.path.name, s.caption) for s in folder.samples] == [("b.PNG", "a b b"), ("a.jpg", "an a")]


def test_missing_captions_are_counted_and_named(tmp_path):
    for i in range(9):
        picture(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("zero")
    (tmp_path / "1.txt").write_text("   \n")  # blank counts as missing
    with pytest.raises(DataError, match=r"8 of 9 pictures .* have no caption: 1.png, .*, 5.png and 3 more"):
        ImageFolder.with_captions(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2 is no JSON object"),
        ('["a.png"]', "line 2 is no JSON object"),
        ('{"file_name": "a.png", "txt": "x"}', "line 2 has no text under 'text' or 'caption'"),
        ('{"file_name": "b.png", "text": "x"}', "line 2 names 'b.png', which is not there"),
    ],
)
def test_damaged_metadata_is_named_by_line(tmp_path, line, message):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "an a"}) + f"\n{line}\n")
    with pytest.raises(DataError, match=message):
        ImageFolder.with_captions(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        ImageFolder.with_captions(tmp_path / "nowhere")
    file = tmp_path / "notes.md"
    file.write_text("x")
    with pytest.raises(DataError, match="is a file; expected a folder"):
        ImageFolder.with_captions(file)
    with pytest.raises(DataError, match=r"holds no pictures \(1 other files\)"):
        ImageFolder.with_captions(tmp_path)


def test_unreadable_pictures_are_all_named(tmp_path):
    whole = picture(tmp_path / "whole.png", size=(64, 64))
    noise = zoo.images()[0].image()
    noise.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.webp").write_bytes(b"")
    for path in tmp_path.iterdir():
        path.with_suffix(".txt").write_text("x")
    folder = ImageFolder.with_captions(tmp_path)
    with pytest.raises(DataError, match=r"3 of 4 pictures cannot be read: cut.png, empty.webp, text.jpg"):
        folder.check()
    for name in ("empty.webp", "text.jpg"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"cut.png' cannot be read: .*truncated"):
        ImageFolder.with_captions(tmp_path).check()
    assert whole.is_file()


def test_class_folders(tmp_path):
    for name in ("dog/1.png", "cat/2.png", "cat/more/3.png"):
        picture(tmp_path / "all" / name)
    folder = ImageFolder.with_classes(tmp_path / "all")
    assert folder.classes == ("cat", "dog")
    assert [(s.path.name, s.label) for s in folder.samples] == [("2.png", 0), ("3.png", 0), ("1.png", 1)]
    picture(tmp_path / "held" / "dgo" / "4.png")
    with pytest.raises(DataError, match="class 'dgo' that training has not; did you mean 'dog'"):
        ImageFolder.with_classes(tmp_path / "held", folder.classes)
    picture(tmp_path / "all" / "stray.png")
    with pytest.raises(DataError, match=r"1 of 4 pictures lie directly in .*: stray.png"):
        ImageFolder.with_classes(tmp_path / "all")
    with pytest.raises(DataError, match="one class folder, 'dgo'"):
        ImageFolder.with_classes(tmp_path / "held")


def test_held_out_share_depends_on_names_alone(tmp_path):
    zoo.export(tmp_path / "a", zoo.images(style="noto")[:30])
    folder = ImageFolder.with_captions(tmp_path / "a")
    train, held = folder.split(0.1)
    assert (len(train), len(held)) == (27, 3)
    assert set(train.samples) | set(held.samples) == set(folder.samples)
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = ImageFolder.with_captions(tmp_path / "moved").split(0.1)[1]
    assert [s.path.name for s in moved.samples] == [s.path.name for s in held.samples]
    assert folder.split(0.0) == (folder, ImageFolder(folder.root, ()))
    assert [len(part) for part in folder.split(0.001)] == [29, 1]
    assert [len(part) for part in folder.split(0.999)] == [1, 29]


def test_trigger_goes_before_captions_that_lack_it(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.txt").write_text("Fluent style, a dog")
    folder = ImageFolder.with_captions(tmp_path).triggered("fluent style")
    assert [s.caption for s in folder.samples] == ["fluent style, a cat", "Fluent style, a dog"]


def test_fingerprint_sees_bytes_and_captions(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    first = ImageFolder.with_captions(tmp_path).fingerprint()
    assert ImageFolder.with_captions(tmp_path).fingerprint() == first
    (tmp_path / "a.txt").write_text("a dog")
    second = ImageFolder.with_captions(tmp_path).fingerprint()
    picture(tmp_path / "a.png", "blue")
    third = ImageFolder.with_captions(tmp_path).fingerprint()
    assert len({first, second, third}) == 3
