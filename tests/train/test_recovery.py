"""Distillation losses and what is trained: identities of both papers, on real models."""

import math

import pytest
import tiny
import torch
from torch import nn

import vislr
from vislr.core.errors import ConfigError, ModelError, TargetError
from vislr.data import ImageFolder
from vislr.prune import LayerPlan
from vislr.train import DataConfig, Draw, HeldOutConfig, OptimConfig, SampleConfig
from vislr.train.calibration import calibration_inputs
from vislr.train.distill import Distillation, DistillConfig, feature_loss, make_teacher, taps_of
from vislr.train.distill_parts import after_first_cut, first_cut, kept_taps, sensitivity_rates, with_rates
from vislr.train.families import family_of
from vislr.train.recovery import RecoverySection, recover


def drawn(pipe, seed=0, batch=2):
    """A draw of a training forward of the pipeline's denoiser, gradients on."""
    rng = torch.Generator().manual_seed(seed)
    model = getattr(pipe, "unet", None) or pipe.transformer
    family = family_of(pipe)
    noisy, target = (torch.randn(batch, 4, 8, 8, generator=rng) for _ in range(2))
    time = torch.tensor([3, 700])[:batch] if hasattr(pipe, "unet") else torch.tensor([0.1, 0.8])[:batch]
    conditions = family.encode(["a cat face", "a pizza"][:batch])
    prediction = family.forward(model, noisy, time, conditions).float()
    loss = (prediction - target).square().flatten(1).mean(1)
    return Draw(noisy, time, conditions, prediction, target, loss)


@pytest.mark.parametrize("build", [tiny.tiny_sd_pipeline, tiny.tiny_sd3_pipeline, tiny.tiny_flux_pipeline])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(build):
    pipe, other = build(), build()
    teacher = getattr(other, "unet", None) or other.transformer
    with Distillation(pipe, teacher, DistillConfig(task=0.0)) as extra:
        assert extra.taps
        parts = extra(drawn(pipe))
        for name in ("output", "features", "objective"):
            assert parts[name].shape == (2,)
            assert parts[name].abs().max() == 0, name
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.parametrize("build", [tiny.tiny_sd_pipeline, tiny.tiny_sd3_pipeline])
def test_the_objective_is_the_weighted_sum_of_its_parts(build):
    pipe, other = build(), build(seed=1)
    teacher = getattr(other, "unet", None) or other.transformer
    with Distillation(pipe, teacher, DistillConfig(task=0.5, output=2.0, features=3.0)) as extra:
        draw = drawn(pipe)
        with torch.no_grad():
            answer = family_of(pipe).forward(teacher, draw.noisy, draw.time, draw.conditions)
        parts = extra(draw)
    expected = (draw.prediction - answer).square().flatten(1).mean(1)
    torch.testing.assert_close(parts["output"], expected, rtol=1e-5, atol=1e-7)
    total = 0.5 * draw.loss + 2 * parts["output"] + 3 * parts["features"]
    torch.testing.assert_close(parts["objective"], total)
    parts["objective"].mean().backward()
    model = getattr(pipe, "unet", None) or pipe.transformer
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_relative_features_do_not_change_with_the_scale_of_a_stage():
    torch.manual_seed(0)
    own = {name: [torch.randn(2, 3, 4)] for name in "ab"}
    theirs = {name: [torch.randn(2, 3, 4)] for name in "ab"}
    louder = [{"a": one["a"], "b": [100 * one["b"][0]]} for one in (own, theirs)]
    relative = feature_loss(own, theirs, "relative")
    torch.testing.assert_close(feature_loss(*louder, "relative"), relative)
    by_hand = sum((own[n][0] - theirs[n][0]).square().flatten(1).mean(1) / theirs[n][0].square().mean() for n in "ab")
    torch.testing.assert_close(relative, by_hand)
    plain = feature_loss(own, theirs, "none")
    assert (feature_loss(*louder, "none") / plain).min() > 100
    first = feature_loss(own, theirs, "first")
    ratio = (theirs["a"][0].square().mean() / theirs["b"][0].square().mean()).sqrt()
    parts = [(own[n][0] - theirs[n][0]).square().flatten(1).mean(1) for n in "ab"]
    torch.testing.assert_close(first, parts[0] + ratio * parts[1])


def test_features_are_taken_where_asked_and_only_there():
    pipe, other = tiny.tiny_sd_pipeline(), tiny.tiny_sd_pipeline(1)
    assert taps_of(pipe.unet) == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]
    vislr.apply(pipe, LayerPlan(("mid_block.attentions.0",)))
    with Distillation(pipe, other.unet, DistillConfig(features=0.0)) as extra:
        assert not any(module._forward_hooks for module in other.unet.modules())
        assert set(extra(drawn(pipe))) == {"objective", "output"}
    with Distillation(pipe, other.unet, taps=["mid_block"]) as extra:
        assert [n for n, m in other.unet.named_modules() if m._forward_hooks] == ["mid_block"]
        assert extra(drawn(pipe))["features"].min() > 0
    with pytest.raises(TargetError, match=r"no 'mid_blok'.*did you mean 'mid_block'"):
        Distillation(pipe, other.unet, taps=["mid_blok"])
    with pytest.raises(ModelError, match="student itself"):
        Distillation(pipe, pipe.unet)
    with pytest.raises(ConfigError, match="all 0"):
        DistillConfig(0, 0, 0)
    transformer = tiny.tiny_sd3_transformer()
    vislr.apply(transformer, LayerPlan(("transformer_blocks.0",)))
    assert taps_of(transformer) == ["transformer_blocks.1"]


def test_a_teacher_in_low_precision_or_in_main_memory_says_nearly_the_same():
    pipe, plain, half, away = (tiny.tiny_sd_pipeline() for _ in range(4))
    vislr.apply(pipe, LayerPlan(("mid_block.attentions.0",)))
    make_teacher(half.unet, dtype=torch.bfloat16)
    make_teacher(away.unet, offload=True)
    assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in away.unet.parameters()} == {"meta"}, "weights come only while a layer runs"
    losses = []
    for other in (plain, half, away):
        with Distillation(pipe, other.unet) as extra:
            losses.append(extra(drawn(pipe))["objective"].detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0.01)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-5, atol=1e-6)


def test_a_classifier_learns_its_teachers_classes():
    student, teacher = tiny.tiny_vit(), tiny.tiny_vit(seed=1)
    vislr.apply(student, LayerPlan(("blocks.0",)))
    pixels, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    with Distillation(student, teacher) as extra:
        assert extra.taps == ["blocks.1"]
        logits = student(pixels)
        parts = extra(Draw(pixels, torch.empty(0), {}, logits, labels, nn.functional.cross_entropy(logits, labels)))
    p, q = teacher(pixels).softmax(1), logits.softmax(1)
    torch.testing.assert_close(parts["output"], (p * (p / q).log()).sum(1))


# --- positional weight preservation ------------------------------------------------------------------------------


def test_only_what_comes_after_the_first_cut_is_trained():
    model = tiny.tiny_sd3_transformer(num_layers=5)
    with pytest.raises(TargetError, match="nothing was removed"):
        first_cut(model)
    vislr.apply(model, LayerPlan(("transformer_blocks.2", "transformer_blocks.3.ff")))
    trained = {name.split(".")[0] + "." + name.split(".")[1] for name in after_first_cut(model)}
    assert trained == {"transformer_blocks.3", "transformer_blocks.4", "norm_out.linear", "proj_out.weight",
                       "proj_out.bias"}  # fmt: skip
    taps = kept_taps(model, taps_of(model), after_first_cut(model))
    assert taps == ["transformer_blocks.3", "transformer_blocks.4"]


def test_a_partly_cut_block_is_trained_itself():
    model = tiny.tiny_sd3_transformer(num_layers=3)
    vislr.apply(model, LayerPlan(("transformer_blocks.1.attn",)))
    assert {name.split(".")[1] for name in after_first_cut(model) if name.startswith("transformer_blocks")} == {
        "1",
        "2",
    }


def test_a_unet_trains_what_its_forward_reaches_later():
    unet = tiny.tiny_unet()
    vislr.apply(unet, LayerPlan(("mid_block.attentions.0",)))
    stages = {name.split(".")[0] for name in after_first_cut(unet)}
    assert stages == {"mid_block", "up_blocks", "conv_norm_out", "conv_out"}
    assert not any(name.startswith("mid_block.resnets.0") for name in after_first_cut(unet))


# --- sensitivity-guided rates --------------------------------------------------------------------------------------


def test_rates_fall_with_the_drop():
    names = [f"blocks.{i}.weight" for i in range(6)] + ["head.weight"]
    drops = {f"blocks.{i}": drop for i, drop in enumerate((-0.1, 0.0, 0.1, 0.2, 0.4, 100.0))}
    rates = sensitivity_rates(dict.fromkeys(names, torch.zeros(1)), drops)
    values = [rates[name] for name in names[:6]]
    assert values == sorted(values, reverse=True)
    # The median of the positive drops is .3.
    assert values == pytest.approx([1, 1, 1, 1, 0.75, 0.0])
    assert rates["head.weight"] == 1
    assert set(sensitivity_rates(dict.fromkeys(names, torch.zeros(1)), drops, gamma=0).values()) == {1.0}
    binary = sensitivity_rates(dict.fromkeys(names, torch.zeros(1)), drops, mode="binary")
    assert [binary[name] for name in names[:6]] == [1, 1, 1, 1, 0, 0]
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in names}
    kept, left = with_rates(parameters, rates)
    assert set(kept) == set(left) == set(names) - {"blocks.5.weight"}
    with pytest.raises(ConfigError, match="nothing is left"):
        with_rates(parameters, dict.fromkeys(names, 0.0))


# --- the whole ------------------------------------------------------------------------------------------------------


def settings(**changes):
    values = {
        "steps": 4, "held_out": HeldOutConfig(fraction=0.2, every=0, repeats=1, bands=0),
        "optim": OptimConfig(lr=1e-3, batch=4, warmup=0), "sample": SampleConfig(steps=1), "checkpoint_every": 0,
    }  # fmt: skip
    return RecoverySection(**(values | changes))


def pruned():
    pipe, whole = tiny.tiny_sd_pipeline(), tiny.tiny_sd_pipeline().unet
    drops = {"up_blocks.0.resnets.1": 1.0, "up_blocks.1.resnets.1": 1.0, "up_blocks.1.resnets.0": 1e9}
    plan = LayerPlan(
        ("mid_block.attentions.0", "up_blocks.0.resnets.0"), saved=30, total=100, settings={"drops": drops}
    )
    vislr.apply(pipe, plan)
    return pipe, whole, plan


@pytest.mark.parametrize("train", ["all", "after-cut", "lora"])
def test_recovery_lowers_the_distance_and_touches_what_it_says(train, pictures, tmp_path):
    pipe, whole, plan = pruned()
    before = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    wanted = settings(train=train, steps=16, task=0.0, optim=OptimConfig(lr=1e-3, batch=8, warmup=2), rank=4)
    (batch,) = calibration_inputs(pipe, ImageFolder.with_captions(pictures), samples=8, batch=8)

    def distance():
        with torch.no_grad():
            return float((pipe.unet(**batch).sample - whole(**batch).sample).square().mean())

    start = distance()
    done = recover(
        pipe, whole, plan, wanted, data=DataConfig(folder=str(pictures)), folder=tmp_path / "run",
        put_on=lambda change, name: vislr.apply(pipe, change, name=name),
    )  # fmt: skip
    assert distance() < 0.95 * start
    assert done["steps"] == 16
    assert set(done["held_out"]) >= {"loss"}
    after = {name.replace(".base_layer", ""): p for name, p in pipe.unet.named_parameters()}
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    if train == "lora":
        assert moved == set()
    elif train == "all":
        assert any(name.startswith("conv_in") for name in moved)
    else:
        assert moved
        assert moved <= set(after_first_cut(pipe.unet))
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_sensitive_units_are_frozen_from_a_quarter_on(pictures, tmp_path):
    pipe, whole, plan = pruned()
    before = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    recover(
        pipe, whole, plan, settings(train="after-cut", sensitivity=1.0), data=DataConfig(folder=str(pictures)),
        folder=tmp_path / "run",
    )  # fmt: skip
    moved = {name for name, p in pipe.unet.named_parameters() if not torch.equal(before[name], p)}
    assert not any(name.startswith("up_blocks.1.resnets.0.") for name in moved)
    assert any(name.startswith("up_blocks.0.resnets.1.") for name in moved)
    with pytest.raises(ConfigError, match="needs the drops"):
        recover(
            pipe, whole, LayerPlan(("x",)), settings(sensitivity=1.0), data=DataConfig(folder=str(pictures)),
            folder=tmp_path / "other",
        )  # fmt: skip


@pytest.mark.parametrize("build", [tiny.tiny_sd_pipeline, tiny.tiny_sdxl_pipeline, tiny.tiny_sd3_pipeline])
def test_calibration_batches_run_and_repeat(build, pictures):
    pipe = build()
    model = getattr(pipe, "unet", None) or pipe.transformer
    folder = ImageFolder.with_captions(pictures)
    batches = calibration_inputs(pipe, folder, samples=10, batch=4, seed=3, size=32)
    assert [len(next(iter(batch.values()))) for batch in batches] == [4, 4, 2]
    again = calibration_inputs(pipe, folder, samples=10, batch=4, seed=3, size=32)
    with torch.no_grad():
        for batch, other in zip(batches, again, strict=True):
            assert torch.equal(model(**batch)[0], model(**other)[0])
    other = calibration_inputs(pipe, folder, samples=4, batch=4, seed=4, size=32)[0]
    first = batches[0]
    key = "sample" if "sample" in first else "hidden_states"
    assert not torch.equal(other[key], first[key])
    times = torch.cat([batch["timestep"].float().flatten() for batch in batches])
    assert times.min() >= 0
    assert times.max() < 1000
    assert not math.isclose(float(times.std()), 0)
