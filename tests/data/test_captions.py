"""Captions: where they come from, and how they change from one time to the next."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from vislr.data import DataConfig, FolderConfig, generator, open_pool
from vislr.data.captions import repeats_of, vary, with_trigger

TAGS = "1girl, solo, red hair, smile, outdoors, sky"


def many(count=400, caption=TAGS, **options):
    return [vary(caption, lambda number=number: generator("t", number), **options) for number in range(count)]


def test_nothing_is_drawn_where_nothing_changes():
    def never():
        raise AssertionError("drawn")

    assert vary("a  ,b", never, keep=3, trigger="tok") == "tok, a  ,b"


def test_tags_are_shuffled_and_the_first_stay():
    shuffled = many(shuffle=True, keep=2, trigger="tok")
    assert all(text.startswith("tok, 1girl, solo, ") for text in shuffled)
    assert all(sorted(text.split(", ")) == sorted(["tok", *TAGS.split(", ")]) for text in shuffled)
    third = Counter(text.split(", ")[3] for text in shuffled)
    assert set(third) == {"red hair", "smile", "outdoors", "sky"}
    assert min(third.values()) > 60  # 100 expected, deviation 8.7


def test_tags_are_dropped_and_order_and_trigger_stay():
    dropped = many(tag_dropout=0.25, keep=1, trigger="sky")
    lengths = [text.split(", ") for text in dropped]
    assert all(parts[0] == "1girl" or parts[:2] == ["sky", "1girl"] for parts in lengths)
    # The trigger is one of the tags: where it was dropped, it is put before.
    assert all("sky" in parts for parts in lengths)
    kept = sum("smile" in parts for parts in lengths) / len(lengths)
    assert abs(kept - 0.75) < 0.08
    order = TAGS.split(", ")
    for parts in lengths:
        inside = [part for part in parts if part != "sky"]
        assert inside == sorted(inside, key=order.index)


def test_whole_captions_are_dropped_with_their_trigger():
    texts = many(dropout=0.3, trigger="tok")
    assert set(texts) == {"", f"tok, {TAGS}"}
    assert abs(texts.count("") / len(texts) - 0.3) < 0.08
    assert many(dropout=0.3, shuffle=True) == many(dropout=0.3, shuffle=True)


def test_trigger():
    assert with_trigger("a Cat", "cat") == "a Cat"
    assert with_trigger("", "cat") == "cat"
    assert with_trigger("a dog", "") == "a dog"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("10_cat", (10, "cat")), ("3_a_b c", (3, "a_b c")), ("cat", None), ("0_cat", None), ("_x", None), ("7_", None)],
)
def test_names_with_repeats(name, expected):
    assert repeats_of(name) == expected


def test_sources_of_captions_in_their_order(tmp_path):
    for name in ("both", "line", "text", "none"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    (tmp_path / "both.caption").write_text("from the file")
    (tmp_path / "text.caption").write_text("from the file")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "both.png", "text": "from  the\\nline"}\n{"file_name": "line.png", "caption": "from the line"}\n'
    )
    config = DataConfig(folder=str(tmp_path), caption_suffix=".caption", caption="from the config")
    found = {picture.name: picture.caption for picture in open_pool(config).pictures()}
    assert found == {
        "both.png": "from the line", "line.png": "from the line", "text.png": "from the file",
        "none.png": "from the config",
    }  # fmt: skip
    own = DataConfig(folders=[FolderConfig(str(tmp_path), caption="from the folder")], caption_suffix=".caption")
    assert {p.name: p.caption for p in open_pool(own).pictures()}["none.png"] == "from the folder"


def test_two_pictures_with_one_caption_file_and_doubled_lines_are_noted(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("an a")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "b.png", "text": "one"}\n{"file_name": "b.png", "text": "two"}\n'
    )
    pool = open_pool(DataConfig(folder=str(tmp_path)))
    assert [str(problem) for problem in pool.problems] == [
        "a.png: shares its caption file with 'a.jpg'",
        "metadata.jsonl line 2: 'b.png' had another caption above",
    ]
    assert [picture.caption for picture in pool.pictures()] == ["an a", "an a", "two"]


def test_captions_of_items_follow_position_and_are_listed(tmp_path):
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"x{i}, a, b, c, d")
    config = DataConfig(folder=str(tmp_path), trigger="tok", caption_dropout=0.5)
    source = open_pool(config).at(16, seed=1)
    assert source.captions() == ["tok, x0, a, b, c, d", "tok, x1, a, b, c, d", "tok, x2, a, b, c, d", ""]
    items = [item for batch in source.batches(0, 20, 3) for item in batch]
    assert {item.caption for item in items} == set(source.captions())
    shuffled = open_pool(DataConfig(folder=str(tmp_path), shuffle_tags=True, keep_tags=1)).at(16, seed=1)
    assert shuffled.captions() is None
    first = [item.caption for batch in shuffled.batches(0, 20, 3) for item in batch]
    assert len(set(first)) > 20
    assert first[30:] == [item.caption for batch in shuffled.batches(10, 20, 3) for item in batch]
    # What is held out or shown is never varied.
    assert shuffled.item(0).caption == "x0, a, b, c, d"
