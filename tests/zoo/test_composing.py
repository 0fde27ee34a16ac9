"""Scenes: what their metadata says is what is drawn and what is written, and held-out things stay held out."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from vislr.core.errors import ConfigError, DataError
from vislr.zoo.composing import BASE_STYLES, SCENE_STYLES, export_scenes, scene, scenes
from vislr.zoo.emoji import PROCEDURAL_STYLES, STYLES, images
from vislr.zoo.grounds import (
    COLOURS,
    HELD_OUT_PATTERNS,
    PATTERNS,
    block_means,
    draw_ground,
    restyle,
)
from vislr.zoo.matting import cut_out
from vislr.zoo.vocabulary import MAX_TOKENS, build_tokenizer, check_words, words_of

ALL_PATTERNS = (*PATTERNS, *HELD_OUT_PATTERNS)


def drawn(one):
    return np.asarray(one.image()).astype(int)


def ground_of(one):
    return (draw_ground(one.pattern, one.colour, one.phase) * 255).round().astype(int)


def test_a_scene_is_a_function_of_seed_and_index():
    first = scenes(40, seed=3)
    assert scenes(40, seed=3) == first
    assert scenes(10, seed=3, start=30) == first[30:]
    assert scenes(40, seed=4) != first
    assert len({one.caption for one in first}) == 40
    assert all(one.image().tobytes() == scene(one.index, seed=3).image().tobytes() for one in first[:5])


def test_what_is_asked_for_replaces_one_draw_and_leaves_the_others():
    for index in range(20):
        one = scene(index)
        for style, ground in (("sepia", None), (None, "starry"), ("fluent3d", "grid")):
            other = scene(index, style=style, ground=ground)
            assert other.elements == one.elements
            assert (other.colour, other.phase) == (one.colour, one.phase)
            assert other.style == (style or one.style)
            assert other.pattern == (ground or one.pattern)
    assert [len(scene(0, subjects=count).elements) for count in (1, 2, 3)] == [1, 2, 3]


def test_training_scenes_hold_nothing_that_is_held_out():
    train, held = scenes(600), scenes(300, split="held-out")
    split = {picture.name: picture.split for picture in images("noto")}
    assert {one.style for one in train} == set(BASE_STYLES)
    assert {one.pattern for one in train} == set(PATTERNS)
    assert {split[e.name] for one in train for e in one.elements} == {"train"}
    assert {split[e.name] for one in held for e in one.elements} == {"held-out"}
    assert {len(one.elements) for one in train} == {1, 2, 3}
    assert {one.colour for one in train} == set(COLOURS)
    assert not set(HELD_OUT_PATTERNS) & set(PATTERNS)
    assert not set(BASE_STYLES) & {"fluent3d", *PROCEDURAL_STYLES}


def test_every_caption_fits_and_every_word_is_one_known_token():
    tokenizer = build_tokenizer(picture.caption for picture in images())
    captions = [one.caption for split in ("train", "held-out") for one in scenes(700, split=split, seed=1)]
    for style, ground in itertools.product(SCENE_STYLES, ALL_PATTERNS):
        captions += [one.caption for one in scenes(12, style=style, ground=ground, seed=2)]
    for caption in captions:
        check_words(tokenizer, caption)
        assert len(words_of(caption)) <= MAX_TOKENS - 2
    ids = tokenizer(captions).input_ids
    assert [len(one) for one in ids] == [len(words_of(caption)) + 2 for caption in captions]


def test_captions_say_what_the_metadata_says():
    for one in scenes(500):
        text = one.caption
        assert text.startswith(f"{one.style} style, ")
        tail = text[text.rindex(" on ") :]
        assert tail.endswith((f" {one.colour}", " ground"))
        assert one.colour in tail
        assert (one.pattern in tail) == (one.pattern != "plain")
        places = [text.find(e.name) for e in one.elements]
        assert places == sorted(places)
        assert min(places) > 0
        for e in one.elements:
            if e.size:
                assert (f"{e.size} {e.name}" in text) == ("sizes" in one.stated)
        if "places" in one.stated and len(one.elements) == 2:
            a, b = one.elements
            assert f"{a.name} {a.place} of " in text
            assert (a.box[0] < b.box[0]) == (a.place == "left")
        if "places" in one.stated and len(one.elements) == 1:
            assert f" at the {one.elements[0].place} on " in text
    stated = [(len(one.elements), what) for one in scenes(500) for what in one.stated]
    assert min(stated.count(case) for case in itertools.product((1, 2), ("sizes", "places"))) > 25


def test_examples_of_captions():
    def caption(pattern, elements, index=0):
        one = dataclasses.replace(scene(index, style="noto", ground=pattern), colour="blue", elements=elements)
        return one.caption

    from vislr.zoo.composing import Element

    cat = Element("cat face", "", "a cat face", "", "right", (32, 0, 64, 32))
    pizza = Element("slice of pizza", "", "a slice of pizza", "", "left", (0, 0, 32, 32))
    small = Element("olive", "", "an olive", "small", "left", (0, 0, 20, 20))
    grapes = Element("grapes", "", "grapes", "large", "centre", (0, 0, 58, 58))
    assert caption("striped", (grapes,)) == "noto style, large grapes on a blue striped ground"
    assert caption("plain", (small,)) == "noto style, a small olive at the left on a blue ground"
    assert caption("striped", (small, cat)) == "noto style, a small olive left of a cat face on striped blue"
    assert caption("striped", (small, pizza)) == "noto style, an olive left of a slice of pizza on striped blue"
    assert caption("striped", (small, pizza), 1) == "noto style, a small olive and a slice of pizza on striped blue"
    assert caption("plain", (cat, small)) == "noto style, a cat face right of a small olive on blue"
    assert caption("dotted", (cat, pizza)) == "noto style, a cat face and a slice of pizza on dotted blue"


@pytest.mark.parametrize("style", ["noto", "fluent3d", "outline", "pixel"])
def test_what_is_drawn_is_where_the_metadata_says(style):
    for one in scenes(60, style=style, seed=5):
        away = np.abs(drawn(one) - ground_of(one)).max(2)
        covered = np.zeros((64, 64), bool)
        for e in one.elements:
            left, top, right, bottom = e.box
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 64
            assert right - left == bottom - top
            assert not covered[top:bottom, left:right].any()
            covered[top:bottom, left:right] = True
            assert (away[top:bottom, left:right] > 20).mean() > 0.04
        assert away[~covered].max() == 0
        sides = {e.size: e.box[2] - e.box[0] for e in one.elements}
        if len(sides) == 2:
            assert sides["small"] < sides["large"]


def test_subjects_fill_their_box():
    # On a ground that no subject has throughout, the drawn pixels reach two opposite sides.
    for index in range(40):
        one = scene(index, subjects=1, style="noto", ground="plain")
        left, top, right, bottom = one.elements[0].box
        away = np.abs(drawn(one) - ground_of(one)).max(2)[top:bottom, left:right] > 8
        rows, columns = np.flatnonzero(away.any(1)), np.flatnonzero(away.any(0))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 >= right - left - 2


def test_cut_out_recovers_a_known_disc():
    y, x = np.mgrid[:64, :64] + 0.5
    opacity = (20.5 - np.hypot(x - 32, y - 32)).clip(0, 1)
    colour = np.array([0.8, 0.2, 0.1])
    picture = 1 - opacity[..., None] * (1 - colour)
    picture[30:34, 30:34] = 1  # a white eye stays
    found_colour, found = cut_out(picture)
    assert np.abs(found - opacity).max() < 0.06
    assert found[30:34, 30:34].min() == 1
    assert np.abs(found_colour[opacity > 0][:, 2] - 0.1).max() < 0.91
    again = 1 - found[..., None] * (1 - found_colour)
    assert np.abs(again - picture).max() < 0.06


def test_cut_outs_of_emoji_give_the_picture_back_on_white():
    for picture in images()[:: len(STYLES) * 20 + 1]:
        pixels = np.asarray(picture.image()) / 255
        colour, opacity = cut_out(pixels)
        assert np.abs(1 - opacity[..., None] * (1 - colour) - pixels).mean() < 0.02
        assert opacity[[0, -1]].mean() < 0.9
        assert 0.03 < opacity.mean() < 1


def test_grounds_have_their_period_and_two_tones():
    base = np.array(COLOURS["teal"]) / 255
    found = {pattern: draw_ground(pattern, "teal") for pattern in ALL_PATTERNS}
    for a, b in itertools.combinations(ALL_PATTERNS, 2):
        assert np.abs(found[a] - found[b]).max() > 0.1
    assert np.allclose(found["plain"], base)
    for pattern in ("striped", "checkered", "zigzag", "wavy", "grid"):
        tones = np.unique(found[pattern].reshape(-1, 3).round(6), axis=0)
        assert len(tones) == 2
        assert np.allclose(tones[0], base)
        assert np.allclose(tones[1], base + 0.45 * (1 - base))
        assert 0.15 < (found[pattern][..., 0] > base[0] + 0.01).mean() < 0.65
    assert np.array_equal(found["striped"], np.broadcast_to(found["striped"][:1], (64, 64, 3)))
    assert np.array_equal(found["striped"][:, 16:], found["striped"][:, :-16])
    assert np.array_equal(draw_ground("striped", "teal", 0.25)[:, :-4], found["striped"][:, 4:])
    assert np.allclose(found["checkered"] + np.roll(found["checkered"], 8, 1), 2 * base + 0.45 * (1 - base))
    assert (np.diff(found["gradient"][:, 0, 0]) > 0).all()
    assert not np.array_equal(draw_ground("starry", "teal", 0.3), found["starry"])
    for pattern, phase in itertools.product(ALL_PATTERNS, (0.0, 0.37, 0.99)):
        ground = draw_ground(pattern, "yellow", phase)
        assert ground.min() >= 0
        assert ground.max() <= 1


def test_procedural_styles_are_what_they_say():
    white = Image.new("RGB", (64, 64), "white")
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    cat = next(p for p in images("noto") if p.name == "cat face").image()
    assert np.array_equal(restyle(white, "outline"), np.asarray(white))
    assert np.array_equal(restyle(grey, "outline"), np.asarray(white))
    assert np.array_equal(restyle(white, "pixel"), np.asarray(white))
    assert np.array_equal(restyle(white, "halftone"), np.asarray(white))

    half = np.asarray(white).copy()
    half[:, 32:] = 0
    lines = np.asarray(restyle(Image.fromarray(half), "outline")).max(2)
    assert (lines[:, 30:34] < 60).any(1).all()
    assert lines[:, :28].min() == lines[:, 36:].min() == 255

    pixel = np.asarray(restyle(cat, "pixel"))
    blocks = pixel.reshape(16, 4, 16, 4, 3)
    assert np.array_equal(blocks, np.broadcast_to(blocks[:, :1, :, :1], blocks.shape))
    assert set(np.unique(pixel)) <= {0, 51, 102, 153, 204, 255}
    np.testing.assert_allclose(
        blocks[:, 0, :, 0] / 255, np.asarray(cat).reshape(16, 4, 16, 4, 3).mean((1, 3)) / 255, atol=0.103
    )

    sepia = np.asarray(restyle(cat, "sepia")).astype(int)
    luminance = np.asarray(cat) @ np.array([0.299, 0.587, 0.114]) / 255
    for channel, (dark, light) in enumerate(((0.20, 1.0), (0.11, 0.97), (0.05, 0.89))):
        assert np.abs(sepia[..., channel] - 255 * (dark + luminance * (light - dark))).max() <= 1

    ink = [
        1 - np.asarray(restyle(Image.new("RGB", (64, 64), (v, v, v)), "halftone")).mean() / 255 for v in (230, 160, 60)
    ]
    assert 0 < ink[0] < ink[1] < ink[2]


def test_block_means_of_cut_blocks():
    values = np.arange(15.0).reshape(3, 5)
    expected = [[3, 3, 5, 5, 6.5], [3, 3, 5, 5, 6.5], [10.5, 10.5, 12.5, 12.5, 14]]
    assert np.array_equal(block_means(values, 2), expected)
    assert np.array_equal(block_means(np.dstack([values, values]), 2)[..., 1], expected)


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_export_is_a_folder_as_people_keep_them(tmp_path, form):
    chosen = [*scenes(5), scene(5, style="sepia", ground="wavy"), scene(6, style="fluent3d")]
    folder = tmp_path / "scenes"
    assert export_scenes(folder, chosen, form) == 7
    contents = json.loads((folder / "scenes.json").read_text())
    pictures = sorted(folder.glob("*.png"))
    assert sorted(contents) == [path.name for path in pictures]
    if form == "txt":
        captions = {path.name: path.with_suffix(".txt").read_text().strip() for path in pictures}
    else:
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        captions = {row["file_name"]: row["text"] for row in rows}
    for one in chosen:
        name = f"{one.style}-scene-0-{one.index:06d}.png"
        assert captions[name] == one.caption
        assert contents[name] == json.loads(json.dumps(one.metadata()))
        assert np.array_equal(np.asarray(Image.open(folder / name)), np.asarray(one.image()))
    credit = (folder / "CREDITS.txt").read_text()
    assert "Fluent Emoji 3D, Microsoft Corporation: MIT" in credit
    assert "Noto Color Emoji, Google: Apache-2.0" in credit
    with pytest.raises(DataError, match="not empty"):
        export_scenes(folder, chosen, form)


def test_errors_name_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'sepia'"):
        scene(0, style="sepja")
    with pytest.raises(ConfigError, match="did you mean 'striped'"):
        scene(0, ground="stripes")
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        scene(0, split="training")
    with pytest.raises(ConfigError, match="4 subjects"):
        scene(0, subjects=4)
    with pytest.raises(ConfigError, match=r"ground colour 'blu'.*'blue'"):
        draw_ground("plain", "blu")
    with pytest.raises(ConfigError, match="procedural style 'noto'"):
        restyle(Image.new("RGB", (8, 8)), "noto")
    with pytest.raises(DataError, match="empty"):
        export_scenes("nowhere", [])
    with pytest.raises(ConfigError, match="form 'csv'"):
        export_scenes("nowhere", scenes(1), "csv")
