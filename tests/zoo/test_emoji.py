"""The embedded images: counts, splits, licences, export."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vislr import zoo
from vislr.core.errors import ConfigError, DataError
from vislr.zoo.build_emoji import plain_words, with_article
from vislr.zoo.emoji import ARCHIVE, PROCEDURAL_STYLES
from vislr.zoo.grounds import restyle
from vislr.zoo.vocabulary import MAX_TOKENS, build_tokenizer, check_words, words_of


def test_every_concept_exists_in_three_styles():
    pictures = zoo.images()
    by_style = Counter(p.style for p in pictures)
    assert set(by_style) == set(zoo.STYLES)
    assert len(set(by_style.values())) == 1
    assert len(pictures) == 4125
    assert ARCHIVE.stat().st_size < 6_000_000
    assert not {p.category for p in pictures} & {"Flags", "Symbols"}
    assert len({(p.style, p.name) for p in pictures}) == len(pictures)
    assert {p.licence for p in pictures} == {"Apache-2.0", "CC-BY-4.0", "MIT"}


def test_concepts_are_split_not_images():
    train = {p.codepoint for p in zoo.images(split="train")}
    held = {p.codepoint for p in zoo.images(split="held-out")}
    assert not train & held
    assert 0.08 < len(held) / (len(held) + len(train)) < 0.13


def test_pictures_are_64_px_on_white():
    for picture in zoo.images()[::97]:
        image = picture.image()
        assert (image.mode, image.size) == ("RGB", (64, 64))
        corners = np.asarray(image)[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert np.median(corners) >= 250


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("style", "fluent", "fluent3d"), ("category", "Animals", "Animals & Nature"), ("split", "test", "train")],
)
def test_unknown_selection_names_the_nearest(field, value, said):
    with pytest.raises(ConfigError, match=said):
        zoo.images(**{field: value})


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("MAN: BEARD", "a man beard"),
        ("CHERRIES", "cherries"),
        ("BUS", "a bus"),
        ("EGG", "an egg"),
        ("FACE WITH TEARS OF JOY", "a face with tears of joy"),
        ("PEOPLE HUGGING", "people hugging"),
        ("UNICORN FACE", "a unicorn face"),
        ("UMBRELLA", "an umbrella"),
    ],
)
def test_names_become_plain_words(name, phrase):
    assert with_article(plain_words(name)) == phrase


@pytest.mark.parametrize("style", PROCEDURAL_STYLES)
def test_procedural_styles_are_the_source_restyled(style):
    drawn, source = zoo.images(style=style), zoo.images(style="noto")
    assert [p.codepoint for p in drawn] == [p.codepoint for p in source]
    assert drawn[3].caption == source[3].caption.replace("noto", style)
    assert drawn[3].licence == "Apache-2.0"
    assert np.array_equal(np.asarray(drawn[3].image()), np.asarray(restyle(source[3].image(), style)))
    assert not np.array_equal(np.asarray(drawn[3].image()), np.asarray(source[3].image()))


@pytest.mark.parametrize("captions", ["txt", "jsonl"])
def test_export_writes_what_people_have(tmp_path, captions):
    chosen = zoo.images(style="fluent3d", split="held-out")[:5]
    assert zoo.export(tmp_path / "out", chosen, captions=captions) == 5
    files = sorted((tmp_path / "out").glob("*.png"))
    assert len(files) == 5
    if captions == "txt":
        found = {f.with_suffix(".txt").read_text().strip() for f in files}
    else:
        rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
        assert {row["file_name"] for row in rows} == {f.name for f in files}
        found = {row["text"] for row in rows}
    assert found == {p.caption for p in chosen}
    by_name = {p.name.replace(" ", "-"): p for p in chosen}
    for file in files:
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image), np.asarray(by_name[file.stem.removeprefix("fluent3d-")].image()))
    assert "Microsoft" in (tmp_path / "out" / "CREDITS.txt").read_text()
    with pytest.raises(DataError, match="not empty"):
        zoo.export(tmp_path / "out", chosen)


def test_every_caption_is_one_token_a_word():
    captions = [p.caption for p in zoo.images()]
    tokenizer = build_tokenizer(captions)
    for caption in captions:
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(words_of(caption)) + 2 <= MAX_TOKENS
        check_words(tokenizer, caption)
    with pytest.raises(DataError, match=r"'catt'.*'cat'"):
        check_words(tokenizer, "noto style, a catt face")
    with pytest.raises(DataError, match="15 words"):
        check_words(tokenizer, " ".join(["cat"] * 15))
