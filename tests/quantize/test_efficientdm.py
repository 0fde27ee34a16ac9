"""EfficientDM: QALoRA's algebra, step sizes by timestep, rates, distillation along the teacher's trajectory."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vislr
from vislr.adapters import QALoraConfig
from vislr.adapters.inject import adapter_layers
from vislr.adapters.qalora import delta_weight
from vislr.anatomy import sample_inputs
from vislr.core.errors import AdapterError, ConfigError
from vislr.core.quantizing import affine_of, to_codes
from vislr.quantize import QuantPlan, Trajectories, quant_layers, trajectory_inputs
from vislr.quantize.handler import attach as quantise
from vislr.quantize.layers import Spec, quantized
from vislr.quantize.steps import locate, looked_up
from vislr.train.efficientdm import (
    NAME,
    TuneConfig,
    attach_qalora,
    guided,
    merge_qalora,
    parameter_groups,
    tune,
)

SAMPLE = {"tokens": 16, "height": 8, "width": 8}
RUNS = Trajectories(("a cat face", "a bus"), 2, 2, 4, options={"height": 32, "width": 32})


def answer(model, timestep=None):
    inputs = sample_inputs(model, SAMPLE, device="cpu", batch=2)
    if timestep is not None:
        inputs["timestep"] = torch.as_tensor(timestep)
    with torch.no_grad():
        return model(**inputs)[0]


def disturb(model, name=NAME, seed=0):
    """Give B values, and scales and step sizes other ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter_layers(model, name).values():
            for part in ("qalora_scale", "qalora_input_scale"):
                if name in getattr(layer, part):
                    held = getattr(layer, part)[name]
                    held.mul_(1 + 0.1 * torch.rand(held.shape, generator=generator))
            if name in layer.qalora_B:
                size = layer.qalora_scale[name].mean()
                layer.qalora_B[name].copy_(torch.randn(layer.qalora_B[name].shape, generator=generator) * size * 3)
                if name in layer.qalora_input_zero:
                    layer.qalora_input_zero[name].add_(0.3)


@pytest.fixture
def tuned(student, w4a4):
    # Without the report, which counts FLOPs twice.
    quantise(student, w4a4)
    attach_qalora(student, 4)
    return student


# Algebra.


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv1d(4, 6, 5, padding=2),
     nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, dilation=2, padding=2)],
    ids=str,
)  # fmt: skip
def test_the_composed_kernel_is_two_convs_in_a_row(conv):
    torch.manual_seed(0)
    axes = conv.weight.dim() - 2
    A = torch.randn(3, 4, *conv.kernel_size, dtype=torch.float64)
    B = torch.randn(6, 3, *(1,) * axes, dtype=torch.float64)
    x = torch.randn(2, 4, *(9,) * axes, dtype=torch.float64)
    run = {1: F.conv1d, 2: F.conv2d}[axes]
    options = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    once = run(x, delta_weight(A, B), **options)
    twice = run(run(x, A, **options), B)
    assert torch.allclose(once, twice, rtol=1e-12)


def test_a_fresh_adapter_changes_nothing(student, w4a4):
    vislr.apply(student, w4a4)
    before = answer(student, 100)
    attached = attach_qalora(student, 4)
    assert torch.equal(answer(student, 100), before)
    # The ends train scales alone.
    layers = adapter_layers(student, NAME)
    assert {site for site, layer in layers.items() if layer.r[NAME] == 0} == {
        "conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out",
    }  # fmt: skip
    vislr.adapters.detach(student, attached)
    assert torch.equal(answer(student, 100), before)
    assert not any(hasattr(module, "qalora_A") for module in student.modules())


def test_merged_it_is_an_ordinary_quantised_layer(tuned, tmp_path):
    """Exported integers equal training bit for bit; unmerged, the base's own codes are back; a file holds it all."""
    disturb(tuned)
    trained = answer(tuned, 333.0)
    own = {name: layer.codes.clone() for name, layer in quant_layers(tuned).items()}
    layers = adapter_layers(tuned, NAME)
    for layer in layers.values():
        layer.merge()
    assert torch.equal(answer(tuned, 333.0), trained)
    changed = [name for name, layer in quant_layers(tuned).items() if not torch.equal(layer.codes, own[name])]
    assert len(changed) > 20
    for layer in layers.values():
        layer.unmerge()
    assert all(torch.equal(layer.codes, own[name]) for name, layer in quant_layers(tuned).items())
    assert torch.equal(answer(tuned, 333.0), trained)
    vislr.save_adapter(tuned, tmp_path / "tuned.safetensors", name=NAME)
    merge_qalora(tuned)
    assert torch.equal(answer(tuned, 333.0), trained)
    assert not hasattr(tuned, "peft_config")
    assert sum(p.numel() for n, p in tuned.named_parameters() if "qalora" in n) == 0


def test_the_adapters_own_file_loads_on_the_quantised_base(sd, w4a4, tuned, tmp_path):
    disturb(tuned)
    vislr.save_adapter(tuned, tmp_path / "tuned.safetensors", name=NAME)
    other = copy.deepcopy(sd.unet)
    vislr.apply(other, w4a4)
    plain = answer(other)
    report = vislr.load_adapter(other, tmp_path / "tuned.safetensors", name="mine")
    assert torch.equal(answer(other), answer(tuned))
    vislr.remove(other, report)
    assert torch.equal(answer(other), plain)
    with pytest.raises(AdapterError, match="no quantised layer"):
        vislr.load_adapter(copy.deepcopy(sd.unet), tmp_path / "tuned.safetensors", name="mine", any_base=True)


def test_only_one_is_active_and_only_at_weight_1(tuned):
    with pytest.raises(AdapterError, match="no weight but 1"):
        vislr.set_adapters(tuned, [NAME], [0.5])
    vislr.apply(tuned, QALoraConfig(r=2), name="second")
    with pytest.raises(AdapterError, match="only one can be active"):
        vislr.set_adapters(tuned, [NAME, "second"])


def test_qalora_needs_a_quantised_base_with_steps_of_one_size(student):
    with pytest.raises(AdapterError, match="has no quantised layer"):
        vislr.apply(student, QALoraConfig(r=2))
    vislr.apply(student, vislr.quantize.weight_only_plan(student, 4, group=16))
    with pytest.raises(AdapterError, match="has scales by group"):
        vislr.apply(student, QALoraConfig(r=2))


def test_a_small_update_does_nothing_and_a_large_one_flips_codes():
    torch.manual_seed(0)
    layer = nn.Linear(12, 5)
    base = quantized(layer, Spec(4, 16, "none", None, "uniform", False, 0), "minmax")
    x = torch.randn(3, 12)
    step = base.weight_scale
    small, large = 0.49 * step.expand(5, 12), 0.51 * step.expand(5, 12)
    assert torch.equal(base(x, delta=small), base(x))
    assert torch.equal(base.merged(small), base.integers())
    assert torch.equal(base.merged(large), (base.integers() + 1).clamp_max(15))
    assert not torch.equal(base(x, delta=large), base(x))


# Step sizes by timestep.


def test_a_table_is_looked_up_exactly_and_interpolated_between():
    table = (1.0, 11.0, 21.0, 41.0)
    scale = torch.tensor([1.0, 2.0, 3.0, 7.0], requires_grad=True)
    zero = torch.tensor([0.4, 1.0, 2.0, 5.0])
    at = locate(table, torch.tensor([41.0, 11.0, 26.0, 0.0, 99.0, 1.0]))
    found, whole = looked_up(scale, zero, at)
    assert torch.equal(found, torch.tensor([7.0, 2.0, 4.0, 1.0, 7.0, 1.0]))
    assert torch.equal(whole, torch.tensor([5.0, 1.0, 3.0, 0.0, 5.0, 0.0]))
    found[1].backward()
    assert torch.equal(scale.grad, torch.tensor([0.0, 1.0, 0.0, 0.0]))


def test_a_sampler_of_100_steps_holds_the_one_of_20(sd):
    """Entries of DDIM's 100 steps at the timesteps of its 20: the very same numbers, in any order of calls."""
    scheduler = copy.deepcopy(sd.scheduler)
    scheduler.set_timesteps(100)
    table = tuple(sorted(float(t) for t in scheduler.timesteps))
    scale = torch.rand(100) + 0.1
    by_time = dict(zip(table, scale, strict=True))
    scheduler.set_timesteps(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps[order]:
        assert looked_up(scale, torch.zeros(100), locate(table, t))[0] == by_time[float(t)]


def test_step_sizes_follow_the_timestep_not_the_number_of_calls(tuned):
    """Shuffled timesteps, extra calls, split guidance and mixed batches give what one call at the timestep gives."""
    disturb(tuned)
    times = [torch.tensor(t) for t in (999.0, 500.0, 37.0)]
    first = [answer(tuned, t) for t in times]
    assert (first[0] - first[2]).norm() > 0
    answer(tuned, 750.0)
    again = [answer(tuned, t) for t in reversed(times)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    inputs = sample_inputs(tuned, SAMPLE, device="cpu", batch=2)
    with torch.no_grad():
        mixed = tuned(**inputs | {"timestep": torch.tensor([999.0, 37.0])})[0]
        halves = [
            tuned(**{k: v[i : i + 1] if torch.is_tensor(v) and v.dim() else v for k, v in inputs.items()}
                  | {"timestep": times[2 * i]})[0]
            for i in range(2)
        ]  # fmt: skip
    assert torch.allclose(mixed, torch.cat(halves), atol=0.05 * float(mixed.abs().max()))
    # What a layer reads does not depend on the others of the batch at all.
    layer = next(layer for layer in quant_layers(tuned).values() if layer.spec.inputs == "timestep")
    x = torch.randn(2, *(8,) * (len(layer.shape) - 1)) if layer.steps else None
    layer.steps.context.enter(torch.tensor([999.0, 37.0]))
    both = layer.rounded(x)
    for i, t in ((0, 999.0), (1, 37.0)):
        layer.steps.context.enter(torch.tensor(t))
        assert torch.equal(layer.rounded(x[i : i + 1]), both[i : i + 1])


def test_a_loss_reaches_the_entries_of_its_own_timestep_alone(tuned):
    inputs = sample_inputs(tuned, SAMPLE, device="cpu", batch=2)
    layers = [layer for layer in adapter_layers(tuned, NAME).values() if NAME in layer.qalora_input_scale]
    entries = layers[0].get_base_layer().steps.timesteps
    tuned(**inputs | {"timestep": torch.tensor(entries[1])})[0].square().sum().backward()
    touched = 0
    for layer in layers:
        for part in (layer.qalora_input_scale, layer.qalora_input_zero):
            grad = part[NAME].grad
            assert (grad[torch.arange(len(entries)) != 1] == 0).all()
            touched += int(grad[1] != 0)
    assert touched > len(layers)


# Rates.


def test_rates_follow_the_mean_step_size(tuned):
    config = TuneConfig(rank=4)
    assert config.updates == 8000  # 160 trajectories, 2 at once, 100 steps
    groups = parameter_groups(tuned, config)
    factors = [group for group in groups if group["part"] == "factors"]
    layers = adapter_layers(tuned, NAME)
    assert len(factors) == sum(layer.r[NAME] > 0 for layer in layers.values())
    for group in factors:
        site = group["names"][0].rpartition(".")[0]
        assert group["lr"] == pytest.approx(float(layers[site].get_base_layer().weight_scale.mean()) / 2500)
    rates = {group["part"]: group["lr"] for group in groups[-2:]}
    assert rates == {"weight scales": 1e-6, "input zeros": 5e-4}
    for group in groups:
        if group["part"] == "input scales":
            mean = float(group["params"][0].detach().mean())
            assert group["lr"] == pytest.approx(min(5e-4, 0.01 * mean))
    flat = parameter_groups(tuned, TuneConfig(rank=4, scale_aware=False, train="qalora"))
    assert {group["lr"] for group in flat} == {2e-5}
    assert {group["part"] for group in flat} == {"factors"}


def test_adam_does_not_see_a_factor_of_the_gradient_and_sgd_does():
    """Why the paper's factor on gradients has to be a learning rate."""
    moved = {}
    for name, kind in (("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)):
        for how in ("plain", "gradient", "rate"):
            p = nn.Parameter(torch.ones(3, dtype=torch.float64))
            optimizer = kind([p], lr=0.1 * (0.01 if how == "rate" else 1))
            p.grad = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64) * (0.01 if how == "gradient" else 1)
            optimizer.step()
            moved[name, how] = p.detach() - 1
    assert torch.allclose(moved["adam", "gradient"], moved["adam", "plain"], rtol=1e-5)
    assert torch.allclose(moved["sgd", "gradient"], moved["sgd", "rate"], rtol=1e-12)
    assert torch.allclose(moved["adam", "rate"], 0.01 * moved["adam", "plain"], rtol=1e-9)


# Distillation.


def test_the_teacher_leads_and_is_not_changed(sd, tuned):
    """x_{t-1} is the teacher's own; the teacher has no gradients; every step of the trajectory is one update."""
    asked = trajectory_inputs(sd, RUNS)
    before = {name: p.clone() for name, p in sd.unet.state_dict().items()}
    seen = []
    handle = tuned.register_forward_pre_hook(lambda m, a, k: seen.append(k["sample"].clone()), with_kwargs=True)
    config = TuneConfig(trajectories=2, batch=2, steps=4, guidance=RUNS.guidance, rank=4, seed=0)
    result = tune(sd, tuned, RUNS, config, progress=False)
    handle.remove()
    assert result.updates == 4
    assert [torch.equal(one, given["sample"]) for one, given in zip(seen, asked, strict=True)] == [True] * 4
    assert all(torch.equal(value, before[name]) for name, value in sd.unet.state_dict().items())
    assert all(p.grad is None for p in sd.unet.parameters())
    counts = result.trained
    assert counts["factors"] == sum(
        p.numel() for n, p in tuned.named_parameters() if ".qalora_A" in n or ".qalora_B" in n
    )


def test_losses_are_of_guided_predictions():
    a = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guided(a, 3.0, True), a[:2] + 3 * (a[2:] - a[:2]))
    assert torch.equal(guided(a, 3.0, True, conditional_first=True), a[2:] + 3 * (a[:2] - a[2:]))
    assert guided(a, 3.0, False) is a


@pytest.mark.parametrize(
    "build",
    [
        "tiny_sd3_pipeline",
        *(pytest.param(f"tiny_{name}_pipeline", marks=pytest.mark.slow) for name in ("flux", "pixart", "dit")),
    ],
)
def test_transformers_are_calibrated_tuned_and_merged(build):
    """Every pipeline runs by itself: prompts or classes, doubled batches or distilled guidance."""
    import tiny

    pipe = getattr(tiny, build)()
    options = {"height": 32, "width": 32, "max_sequence_length": 16}
    if "pixart" in build:
        options |= {"use_resolution_binning": False, "clean_caption": False}
    if "dit" in build:
        options = {}
    runs = Trajectories(("a cat face", "a bus") if "dit" not in build else (), 2, 2, 2, 3.0, options=options)
    teacher = pipe.transformer
    plan = vislr.quantize.efficientdm_plan(pipe, 4, 8, source=runs)
    assert len(plan.timesteps) == 2
    student = copy.deepcopy(teacher).requires_grad_(False)
    vislr.apply(student, plan)
    attach_qalora(student, 2)
    result = tune(
        pipe, student, runs, TuneConfig(trajectories=2, batch=2, steps=2, rank=2, guidance=3.0), progress=False
    )
    assert result.updates == 2
    given = trajectory_inputs(pipe, runs)[0]
    with torch.no_grad():
        trained = student(**given)[0]
        merge_qalora(student)
        assert torch.equal(student(**given)[0], trained)


def test_a_window_is_learnt_whole_and_in_another_order(sd, tuned):
    asked = [given["sample"] for given in trajectory_inputs(sd, replace(RUNS, count=4))]
    seen = []
    handle = tuned.register_forward_pre_hook(lambda m, a, k: seen.append(k["sample"].clone()), with_kwargs=True)
    config = TuneConfig(trajectories=4, batch=2, steps=4, guidance=RUNS.guidance, rank=4, seed=0, window=2)
    result = tune(sd, tuned, RUNS, config, progress=False)
    handle.remove()
    assert result.updates == len(asked) == 8
    assert len(result.losses) == 1
    order = [next(i for i, one in enumerate(asked) if torch.equal(one, given)) for given in seen]
    assert sorted(order) == list(range(8)) != order


def test_guidance_is_the_published_one_unless_the_model_reads_it_as_an_input(sd):
    from types import SimpleNamespace

    from vislr.train.efficientdm import _runs_of

    flux = SimpleNamespace(config=SimpleNamespace(guidance_embeds=True))
    assert _runs_of(RUNS, TuneConfig(), sd.unet).guidance == 1.5
    assert _runs_of(RUNS, TuneConfig(), flux).guidance == RUNS.guidance
    assert _runs_of(RUNS, TuneConfig(guidance=3.0), flux).guidance == 3.0


@pytest.mark.parametrize(("window", "guidance"), [(1, RUNS.guidance), (3, None)])
def test_fine_tuning_lowers_the_error_and_resumes_exactly(sd, w4a4, tmp_path, window, guidance):
    from vislr.measure import teacher_distance

    inputs = trajectory_inputs(sd, Trajectories(("a house",), 2, 2, 4, seed=7, options=dict(RUNS.options)))

    def fresh():
        # Not a copy of a quantised model: diffusers' hooks tie a copy's forward to the original.
        model = copy.deepcopy(sd.unet).requires_grad_(False)
        quantise(model, w4a4)
        attach_qalora(model, 4)
        return model

    whole, part, again = fresh(), fresh(), fresh()
    before = teacher_distance(whole, sd.unet, inputs).value
    config = TuneConfig(
        trajectories=12, batch=2, steps=4, guidance=guidance, rank=4, reach=20, checkpoint_every=4, window=window
    )  # fmt: skip
    result = tune(sd, whole, RUNS, config, progress=False)
    assert result.updates == 24
    assert teacher_distance(whole, sd.unet, inputs).value < 0.99 * before

    # Stopped after the third batch, which ends a window of three, and taken up again.
    def stop(update, error):
        if update == 12:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(vislr.core.errors.Interrupted, match="stopped after 12 of 24"):
        tune(sd, part, RUNS, config, folder=tmp_path, progress=False, watch=stop)
    resumed = tune(sd, again, RUNS, config, folder=tmp_path, resume=True, progress=False)
    assert resumed.losses == pytest.approx(result.losses, rel=1e-6)
    for name, p in whole.named_parameters():
        assert torch.equal(p, dict(again.named_parameters())[name])
    with pytest.raises(ConfigError, match="holds checkpoints"):
        tune(sd, again, RUNS, config, folder=tmp_path, progress=False)


def test_calibration_resumes_and_sees_every_timestep(sd, tmp_path):
    from vislr.quantize import calibrate

    names = ["conv_in", "mid_block.resnets.0.conv1"]
    runs = Trajectories(("a cat face", "a bus"), 4, 2, 3, options={"height": 32, "width": 32})
    whole = calibrate(sd, names, runs)
    sd.scheduler.set_timesteps(3)
    assert whole.timesteps == tuple(sorted(float(t) for t in sd.scheduler.timesteps))

    class Stop(Exception):
        pass

    calls = []

    def stop(module, args):
        calls.append(1)
        if len(calls) == 5:
            raise Stop

    handle = sd.unet.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        calibrate(sd, names, runs, folder=tmp_path)
    handle.remove()
    again = calibrate(sd, names, runs, folder=tmp_path)
    for name in names:
        assert torch.equal(again.observers[name].state(), whole.observers[name].state())
    with pytest.raises(vislr.VislrError, match="another calibration"):
        calibrate(sd, names[:1], runs, folder=tmp_path)


def test_a_histogram_gives_the_ranges_of_all_values():
    from vislr.quantize.observers import RangeObserver

    torch.manual_seed(0)
    parts = [torch.randn(4000), torch.randn(4000) * 3, torch.randn(4000) - 1]
    observer = RangeObserver()
    for part in parts:
        observer.update(part)
    whole = torch.cat(parts)
    assert observer.range("minmax", 4) == (float(whole.min()), float(whole.max()))
    low, high = observer.range("percentile", 4)
    assert low == pytest.approx(float(whole.quantile(0.0005)), abs=0.2)
    assert high == pytest.approx(float(whole.quantile(0.9995)), abs=0.2)

    def error(pair):
        scale, zero = affine_of(torch.tensor(pair[0]), torch.tensor(pair[1]), 4)
        return float(((to_codes(whole, scale, zero, 4) - zero) * scale - whole).abs().pow(2.4).sum())

    best = min(error((s * observer.low, s * observer.high)) for s in torch.arange(0.21, 1.005, 0.01).tolist())
    assert error(observer.range("mse", 4)) <= 1.02 * best
    assert float(observer.counts.sum()) == 12000


# Counts of the LDM-4 ImageNet U-Net.


def test_the_counts_of_ldm4():
    """400,920,579 parameters; 265 of 283 layers quantised, 261 with QALoRA; 240 MiB at W4."""
    from diffusers import UNet2DConditionModel

    from vislr.adapters import adapter_parameters
    from vislr.quantize import layer_classes
    from vislr.quantize.handler import attach, stored_bytes
    from vislr.quantize.planning import assigned

    cross, up = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    with torch.device("meta"):
        model = UNet2DConditionModel(
            sample_size=64, in_channels=3, out_channels=3, block_out_channels=(192, 384, 576, 960), layers_per_block=2,
            down_block_types=("DownBlock2D", *cross), up_block_types=(*up, "UpBlock2D"), cross_attention_dim=512,
            attention_head_dim=1,
        )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == 400_920_579
    classes = layer_classes(model)
    assert (len(classes.body), len(classes.ends), len(classes.whole)) == (261, 4, 18)
    modules = dict(model.named_modules())
    assert sum(modules[name].weight.numel() for name in classes.whole) == 13_897_728
    layers = assigned(model, 4, 4, classes=classes)
    assert len(layers) == 265
    plan = QuantPlan(
        layers, inputs="timestep", ranges=dict.fromkeys(layers, (-1.0, 1.0)),
        timesteps=tuple(float(10 * i + 1) for i in range(100)),
    )  # fmt: skip
    before = stored_bytes(model)
    attach(model, plan)
    assert before / 2**20 == pytest.approx(1529.4, abs=0.1)
    assert stored_bytes(model) / 2**20 == pytest.approx(239, abs=2)
    attach_qalora(model, 32)
    counts = dict.fromkeys(("qalora_A", "qalora_B", "qalora_scale", "qalora_input_scale", "qalora_input_zero"), 0)
    for name, parameter in adapter_parameters(model, NAME).items():
        counts[name.split(".")[-2]] += parameter.numel()
    assert counts["qalora_A"] + counts["qalora_B"] == 22_482_944
    assert counts["qalora_scale"] == 241_731
    assert counts["qalora_input_scale"] + counts["qalora_input_zero"] == 52_200


def test_pruned_and_quantised_together_at_sd35_large():
    """HierarchicalPrune's cut of 8 blocks and NF4: 77.8 % fewer bytes of weights."""
    from vislr.anatomy import skeleton
    from vislr.prune import LayerPlan
    from vislr.prune.removal import attach as cut
    from vislr.quantize import weight_only_plan
    from vislr.quantize.handler import rebuild, stored_bytes

    model = skeleton("sd35-large")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    # The table of positions is no weight.
    del model.pos_embed._buffers["pos_embed"]
    before = stored_bytes(model)
    plan = weight_only_plan(model, 4, group=64, format="nf4", ends=True)
    gone = tuple(f"transformer_blocks.{i}" for i in range(28, 36))
    cut(model, LayerPlan(gone))
    left = {name: bits for name, bits in plan.layers.items() if not name.startswith(tuple(f"{g}." for g in gone))}
    rebuild(model, QuantPlan(left, format="nf4", group=64))
    assert 1 - stored_bytes(model) / before == pytest.approx(0.778, abs=0.0005)


def test_the_trained_plan_survives_json(w4a4):
    assert json.loads(json.dumps(w4a4.to_dict()))["timesteps"] == list(w4a4.timesteps)
