"""Folders of real pictures and saved tiny pipelines, made once."""

from __future__ import annotations

import pytest
import tiny

from vislr import zoo


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """24 captioned pictures."""
    folder = tmp_path_factory.mktemp("data") / "captioned"
    zoo.export(folder, zoo.images(style="fluent3d", category="Smileys & Emotion")[:24])
    return folder


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """Two classes that a tiny random model can tell apart: 20 faces as they are, 20 others in grey."""
    folder = tmp_path_factory.mktemp("data") / "classes"
    faces = zoo.images(style="noto", category="Smileys & Emotion")
    for name in ("colour", "grey"):
        (folder / name).mkdir(parents=True)
        for i, picture in enumerate(faces[:20] if name == "colour" else faces[20:40]):
            image = picture.image()
            (image if name == "colour" else image.convert("L")).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A tiny StableDiffusionPipeline, saved."""
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    tiny.tiny_sd_pipeline().save_pretrained(folder)
    return folder
