"""Short runs of tiny pipelines for the tests of the trainer: what they train, and whether a stopped one goes on."""

from __future__ import annotations

from contextlib import suppress

import tiny
import torch

from vislr.core.errors import Interrupted
from vislr.data import DataConfig
from vislr.pipelines import training_setup as setup
from vislr.train import (
    AdapterSection,
    HeldOutConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    SampleConfig,
    TrainConfig,
    fit,
)

STEPS = 4
BUILD = {
    "sd": tiny.tiny_sd_pipeline,
    "sd2": lambda: tiny.tiny_sd_pipeline(prediction_type="epsilon"),
    "sdxl": tiny.tiny_sdxl_pipeline,
    "sd3": tiny.tiny_sd3_pipeline,
    "flux": tiny.tiny_flux_pipeline,
    "pixart": tiny.tiny_pixart_pipeline,
    "dit": tiny.tiny_dit_pipeline,
}


def run(family, folder, out, /, *, stop=None, save=False, **changes):
    """Trained values by name, the target, the result (None if stopped)."""
    settings = {
        "data": DataConfig(folder=str(folder), size=32),
        "output": OutputConfig(folder=str(out), checkpoint_every=0),
        "optim": OptimConfig(batch=4, warmup=2, lr=5e-3),
        "sample": SampleConfig(steps=1, prompts=["0"] if family == "dit" else ["a cat face"]),
        "held_out": HeldOutConfig(every=0, repeats=1),
        "adapter": AdapterSection(r=2),
        "steps": STEPS,
    } | changes
    settings["model"] = settings.get("model", ModelConfig())
    config = TrainConfig(**settings)
    target = BUILD[family]()
    torch.manual_seed(0)
    config.model.base = "timm/x" if family == "dit" else "pipeline"
    train, held_out = setup.open_data(config)
    config.model.base = "pipeline"
    setup.attach(config, target)
    writer = setup.adapter_writer(config, target) if save else None
    result = None
    with suppress(Interrupted):
        result = fit(target, config.adapter.name, config, train, held_out, save_adapter=writer, stop=stop)
    modules = {"": getattr(target, "unet", None) or target.transformer}
    modules |= {name: getattr(target, name) for name in config.adapter.text_encoders}
    values = {
        f"{prefix}.{name}": p.detach().clone()
        for prefix, module in modules.items()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    return values, target, result


def goes_on(family, folder, tmp_path, /, **changes):
    """Trained values, after an unbroken run; a run that is stopped at step 2 and resumed must give the same bits."""
    whole, target, result = run(family, folder, tmp_path / "whole", **changes)
    run(family, folder, tmp_path / "parts", stop=lambda step: step == 2, **changes)
    output = OutputConfig(folder=str(tmp_path / "parts"), checkpoint_every=0, resume=True)
    parts, _, second = run(family, folder, tmp_path / "parts", **(changes | {"output": output}))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert result.history.held_out == second.history.held_out
    return whole, target, result
