"""A run that finds its latents in the cache equals one that made them, bit for bit; a changed picture is made anew."""

from __future__ import annotations

import pytest
import tiny
import torch
from PIL import Image

import vislr
from vislr import zoo
from vislr.data import DataConfig, open_pool
from vislr.train import AdapterSection, HeldOutConfig, OptimConfig, OutputConfig, SampleConfig, TrainConfig, fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cached") / "pictures"
    zoo.export(root, zoo.images(style="fluent3d")[:8])
    return root


def run(out, pipe=None, **data):
    """What two steps train, and how many pictures were encoded."""
    config = TrainConfig(
        data=DataConfig(size=32, **data), output=OutputConfig(folder=str(out), checkpoint_every=0), steps=2,
        optim=OptimConfig(batch=4, warmup=0), sample=SampleConfig(steps=1, prompts=["a cat face"]),
        held_out=HeldOutConfig(fraction=0, every=0), adapter=AdapterSection(r=1),
    )  # fmt: skip
    pipe = pipe or tiny.tiny_sd_pipeline()
    torch.manual_seed(0)
    vislr.apply(pipe, config.adapter.to_change())
    encoded = 0
    encode = pipe.vae.encode

    def counted(pixels):
        nonlocal encoded
        encoded += len(pixels)
        return encode(pixels)

    pipe.vae.encode = counted
    fit(pipe, "default", config, open_pool(config.data))
    return {name: p.detach().clone() for name, p in pipe.unet.named_parameters() if p.requires_grad}, encoded


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_hits_equal_misses_and_nothing_stale_is_served(folder, tmp_path):
    cache = {"folder": str(folder), "cache_folder": str(tmp_path / "cache")}
    memory, encoded = run(tmp_path / "1", folder=str(folder))
    assert encoded == 8
    filled, encoded = run(tmp_path / "2", **cache)
    assert encoded == 8
    assert same(memory, filled)
    hit, encoded = run(tmp_path / "3", **cache)
    assert encoded == 0
    assert same(memory, hit)
    # Without a cache pictures are encoded in batches, whose bits may differ.
    plain, encoded = run(tmp_path / "4", folder=str(folder), cache_latents=False, cache_text=False)
    assert encoded == 8
    assert all(torch.allclose(plain[name], hit[name], rtol=1e-3, atol=1e-5) for name in plain)
    # Another encoder: nothing of the old one is found.
    pipe = tiny.tiny_sd_pipeline()
    with torch.no_grad():
        next(pipe.vae.encoder.parameters()).add_(0.1)
    other, encoded = run(tmp_path / "5", pipe, **cache)
    assert encoded == 8
    assert not same(other, hit)
    # One changed picture: it alone is encoded again, and the run is that of a fresh cache.
    changed = sorted(folder.glob("*.png"))[3]
    Image.new("RGB", (64, 64), "blue").save(changed)
    after, encoded = run(tmp_path / "6", **cache)
    assert encoded == 1
    assert same(after, run(tmp_path / "7", folder=str(folder))[0])


def test_a_cache_too_small_for_all_still_gives_the_same(folder, tmp_path):
    limit = 20_000  # bytes: a few of eight pictures and their captions
    small, encoded = run(
        tmp_path / "1", folder=str(folder), cache_folder=str(tmp_path / "cache"), cache_limit_gb=limit / 1e9
    )
    assert encoded > 8
    assert same(small, run(tmp_path / "2", folder=str(folder))[0])
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tensors")) <= limit
