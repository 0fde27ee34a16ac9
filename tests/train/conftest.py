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
    """Two classes, 20 pictures each: yellow faces, and plants and animals."""
    folder = tmp_path_factory.mktemp("data") / "classes"
    for name, category in (("face", "Smileys & Emotion"), ("nature", "Animals & Nature")):
        (folder / name).mkdir(parents=True)
        for i, picture in enumerate(zoo.images(style="noto", category=category)[:20]):
            picture.image().save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A tiny StableDiffusionPipeline, saved."""
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    tiny.tiny_sd_pipeline().save_pretrained(folder)
    return folder
