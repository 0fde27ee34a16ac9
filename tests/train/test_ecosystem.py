"""Adapters of real classes at tiny configs: train a step, save, load in stock diffusers; the output is the same."""

from __future__ import annotations

import pytest
import tiny
import torch

import vislr
from vislr.data import DataConfig
from vislr.pipelines import training_setup as setup
from vislr.train import (
    AdapterSection,
    HeldOutConfig,
    OptimConfig,
    OutputConfig,
    SampleConfig,
    TrainConfig,
    fit,
    sample_images,
)
from vislr.train.families import family_of

BUILD = {
    "sdxl": tiny.tiny_sdxl_pipeline,
    "sd3": tiny.tiny_sd3_pipeline,
    "flux": tiny.tiny_flux_pipeline,
    "sd": tiny.tiny_sd_pipeline,
}
# Model, text encoders that are trained, format.
CASES = [
    ("sdxl", [], "diffusers"),
    ("sd3", [], "diffusers"),
    ("flux", [], "diffusers"),
    pytest.param("sd", ["text_encoder"], "diffusers", marks=pytest.mark.slow),
    ("sdxl", ["text_encoder", "text_encoder_2"], "diffusers"),
    ("sd", ["text_encoder"], "kohya"),
]


def denoised(pipe):
    """What the denoiser makes of fixed noise and a caption: text encoders count, too."""
    family = family_of(pipe)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    rng = torch.Generator().manual_seed(1)
    x, sizes = torch.randn(1, 4, 8, 8, generator=rng), torch.full((1, 2), 32.0)
    time = torch.tensor([400]) if hasattr(pipe, "unet") else torch.tensor([0.4])
    told = family.encode(["a cat face"]) | family.frame(sizes, torch.zeros(1, 2), sizes)
    with torch.no_grad():
        return family.forward(denoiser, x, time, told)


@pytest.mark.parametrize(("model", "encoders", "form"), CASES)
def test_one_step_saved_and_loaded_by_stock_diffusers(model, encoders, form, pictures, tmp_path):
    config = TrainConfig(
        data=DataConfig(folder=str(pictures), size=32),
        output=OutputConfig(folder=str(tmp_path), checkpoint_every=0, format=form),
        # One long step, so that the adapter's part is far above rounding.
        optim=OptimConfig(batch=2, warmup=0, lr=0.05), sample=SampleConfig(steps=1, prompts=["a cat face"]),
        held_out=HeldOutConfig(fraction=0.0, every=0),
        adapter=AdapterSection(kind="lora", r=3, alpha=6.0, text_encoders=encoders), steps=1,
    )  # fmt: skip
    pipe = BUILD[model]()
    base = denoised(pipe)
    train, held_out = setup.open_data(config)
    setup.attach(config, pipe)
    fit(pipe, "default", config, train, held_out)
    setup.adapter_writer(config, pipe)(tmp_path / "adapter.safetensors")
    trained = denoised(pipe)
    stock = BUILD[model]()
    stock.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    assert (trained - base).norm() > 0.01 * base.norm()
    torch.testing.assert_close(denoised(stock), trained, rtol=1e-4, atol=1e-5)
    ours = BUILD[model]()
    vislr.load_adapter(ours, tmp_path / "adapter.safetensors", name="style")
    torch.testing.assert_close(denoised(ours), trained, rtol=1e-4, atol=1e-5)
    drawn = [sample_images(one, ["a cat face"], [0], steps=1, guidance=1.0, size=32)[0] for one in (pipe, stock)]
    difference = torch.tensor([list(image.tobytes()) for image in drawn]).diff(dim=0).abs().max()
    assert difference <= 1
