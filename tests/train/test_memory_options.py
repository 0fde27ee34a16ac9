"""Options that save memory or time: they change where things are and how fast, and not what is learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training import BUILD, run

from vislr.train import AdapterSection, DataConfig, HeldOutConfig, ModelConfig, OptimConfig, OutputConfig
from vislr.train.base import activations_aside
from vislr.train.diffusion import Diffusion


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_in_main_memory_give_the_same_bits(checkpointing, pictures, tmp_path):
    options = {"steps": 2, "adapter": AdapterSection(kind="lora", r=2), "optim": OptimConfig(batch=2, warmup=0)}
    plain, _, _ = run("sd3", pictures, tmp_path / "a", model=ModelConfig(checkpointing=checkpointing), **options)
    model = ModelConfig(checkpointing=checkpointing, offload_activations=True)
    # Begun without, and gone on with it.
    begun = ModelConfig(checkpointing=checkpointing)
    run("sd3", pictures, tmp_path / "b", model=begun, stop=lambda step: step == 1, **options)
    output = OutputConfig(folder=str(tmp_path / "b"), checkpoint_every=0, resume=True)
    aside, _, _ = run("sd3", pictures, tmp_path / "b", model=model, output=output, **options)
    assert equal(plain, aside)


def test_what_is_put_aside():
    """Activations are copied away, once each; weights, and views of them, are not."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(32, 64, requires_grad=True)
    copied = []
    empty_like = torch.empty_like

    def counted(tensor, **options):
        copied.append(tensor.data_ptr())
        return empty_like(tensor, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", counted)
        with activations_aside(model):
            loss = model(x).square().mean()
    weights = {p.data_ptr() for p in model.parameters()}
    assert copied
    assert not weights & set(copied)
    grads = torch.autograd.grad(loss, [x, *model.parameters()])
    expected = torch.autograd.grad(model(x).square().mean(), [x, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("crop", ["center", "random"])
def test_encoders_leave_the_device_while_they_are_not_needed(crop, pictures, tmp_path):
    places = {"text_encoder": [], "vae": []}

    def watched():
        pipe = tiny_sd()
        for name, seen in places.items():
            module, to = getattr(pipe, name), getattr(pipe, name).to

            def moved(*args, to=to, seen=seen, **options):
                seen.append("cpu" if args[0] == "cpu" else "device")
                return to(*args, **options)

            module.to = moved
        return pipe

    tiny_sd = BUILD["sd"]
    options = {"steps": 2, "data": DataConfig(folder=str(pictures), size=32, crop=crop)}
    plain, _, _ = run("sd", pictures, tmp_path / "a", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILD, "sd", watched)
        aside, _, _ = run("sd", pictures, tmp_path / "b", model=ModelConfig(offload="encoders"), **options)
    assert equal(plain, aside)
    # Once captions are encoded the text encoder stays away; it comes for each of the two sample grids.
    assert places["text_encoder"][-1] == "cpu"
    assert places["text_encoder"].count("device") == 3  # with the pipeline, then twice
    # Random cuts need the VAE in every step: then it stays.
    assert ("cpu" in places["vae"]) == (crop == "center")


def test_trained_text_encoders_stay(pictures, tmp_path):
    _, target, result = run(
        "sd", pictures, tmp_path, steps=1, model=ModelConfig(offload="encoders"),
        adapter=AdapterSection(kind="lora", r=2, text_encoders=["text_encoder"]),
    )  # fmt: skip
    assert isinstance(result.task, Diffusion)
    assert not result.task.captions.bounded
    assert target.text_encoder.device == target.unet.device


@pytest.mark.slow
def test_a_compiled_denoiser_learns_the_same_without_a_break(pictures, tmp_path):
    from torch._dynamo.utils import counters

    options = {
        "steps": 3, "adapter": AdapterSection(kind="lora", r=2, target_modules=["to_q"]),
        "held_out": HeldOutConfig(fraction=0.0, every=0), "optim": OptimConfig(batch=2, warmup=0),
    }  # fmt: skip
    plain, _, _ = run("sd3", pictures, tmp_path / "a", **options)
    counters.clear()
    compiled, target, _ = run("sd3", pictures, tmp_path / "b", model=ModelConfig(compile=True), **options)
    assert not counters["graph_break"]
    # With and without gradients, adapter on and off: more would be a recompilation at every step.
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    assert target.transformer._compiled_call_impl is None
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5)
