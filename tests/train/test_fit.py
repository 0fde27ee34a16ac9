"""The loop: what it learns, what it leaves alone, and that a stopped run goes on bit for bit."""

from __future__ import annotations

import itertools
import json
import os
import signal

import pytest
import tiny
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

import vislr
from vislr.core.errors import AdapterError, ConfigError, FormatError, Interrupted, OutputError, TrainingError
from vislr.data import ImageFolder
from vislr.train import (
    AdapterSection,
    DataConfig,
    HeldOutConfig,
    OptimConfig,
    OutputConfig,
    SampleConfig,
    TrainConfig,
    fit,
)
from vislr.train.adapted import adapter_training, adapters_off
from vislr.train.checkpoints import checkpoints_in
from vislr.train.evaluation import best_of, out_of_patience
from vislr.train.optimizers import learning_rate

BUILD = {
    "unet": tiny.tiny_sd_pipeline,
    "unet-xl": tiny.tiny_sdxl_pipeline,
    "sd3": tiny.tiny_sd3_pipeline,
    "flux": tiny.tiny_flux_pipeline,
    "vit": lambda: tiny.tiny_vit(classes=2),
    "conv": lambda: tiny.tiny_conv_net(classes=2),
}


def config(root, out, **changes):
    settings = {
        "data": DataConfig(folder=str(root), size=32),
        "output": OutputConfig(folder=str(out), checkpoint_every=0),
        "optim": OptimConfig(batch=4, warmup=2, lr=5e-3),
        "sample": SampleConfig(steps=1, prompts=["a cat face"]),
        "held_out": HeldOutConfig(every=0, repeats=2),
        "adapter": AdapterSection(r=2),
        "steps": 8,
    }
    return TrainConfig(**(settings | changes))


def folders(root):
    has_classes = any(path.is_dir() for path in root.iterdir())
    whole = ImageFolder.with_classes(root) if has_classes else ImageFolder.with_captions(root)
    return whole.split(0.25)


def train(model, root, out, *, stop=None, **changes):
    """The target, its trained values by name, and the result."""
    target = BUILD[model]()
    settings = config(root, out, **changes)
    torch.manual_seed(0)
    vislr.apply(target, settings.adapter.to_change())
    head = target.get_classifier() if isinstance(target, torch.nn.Module) else None
    parts = folders(root)
    try:
        result = fit(target, "default", settings, *parts, head=head, stop=stop)
    finally:
        module = target if head is not None else getattr(target, "unet", None) or target.transformer
        values = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    return target, values, result


KINDS = ("convlora", "flora", "lora")
# One of each by default, all combinations with `-m slow`.
FAST = {("unet", "convlora"), ("sd3", "lora"), ("vit", "flora"), ("conv", "convlora")}
LEARNING = [
    pytest.param(model, kind, marks=[] if (model, kind) in FAST else pytest.mark.slow)
    for model in ("unet", "sd3", "vit", "conv")
    for kind in KINDS
]


@pytest.mark.parametrize(("model", "kind"), LEARNING)
def test_training_lowers_the_held_out_loss(model, kind, pictures, classes, tmp_path):
    data = classes if model in ("vit", "conv") else pictures
    optim = OptimConfig(batch=8, lr=1e-2 if model in ("unet", "sd3") else 3e-3, warmup=5)
    _, values, result = train(model, data, tmp_path, adapter=AdapterSection(kind=kind, r=2), steps=24, optim=optim)
    curve = result.history.held_out["loss"]
    assert [step for step, _ in curve] == [0, 24]
    assert curve[1][1] < curve[0][1]
    assert result.trainable == sum(value.numel() for value in values.values())
    assert (tmp_path / "samples" / "000000.png").is_file()
    assert (tmp_path / "samples" / "000024.png").is_file()


@pytest.mark.parametrize("model", ["unet", "sd3"])
def test_resume_gives_the_bits_of_an_unbroken_run(model, pictures, tmp_path):
    kind = AdapterSection(kind="lora", dropout=0.3)  # dropout draws from the global stream
    settings = {"adapter": kind, "held_out": HeldOutConfig(every=3)}
    _, whole, first = train(model, pictures, tmp_path / "whole", **settings)
    with pytest.raises(Interrupted, match="stopped at step 5 of 8"):
        train(model, pictures, tmp_path / "parts", stop=lambda step: step == 5, **settings)
    again = OutputConfig(folder=str(tmp_path / "parts"), checkpoint_every=0, resume=True)
    _, parts, second = train(model, pictures, tmp_path / "parts", output=again, **settings)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert first.history.held_out == second.history.held_out
    assert any((tmp_path / "parts" / "tensorboard").iterdir())


def test_resume_is_exact_with_pixels_workers_accumulation_and_a_head(classes, tmp_path):
    settings = {
        "data": DataConfig(folder=str(classes), size=32, crop="random", flip=True),
        "optim": OptimConfig(batch=2, accumulation=2, lr=5e-3),
    }
    _, whole, _ = train("conv", classes, tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        train("conv", classes, tmp_path / "parts", stop=lambda step: step == 3, **settings)
    settings["data"] = DataConfig(folder=str(classes), size=32, crop="random", flip=True, workers=2)
    again = OutputConfig(folder=str(tmp_path / "parts"), checkpoint_every=0, resume=True)
    _, parts, _ = train("conv", classes, tmp_path / "parts", output=again, **settings)
    assert {"fc.weight", "fc.bias"} < parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_random_crops_of_a_pipeline_read_pixels_and_accumulation_equals_a_larger_batch(pictures, tmp_path):
    data = DataConfig(folder=str(pictures), size=32, crop="random")
    _, one, _ = train("unet", pictures, tmp_path / "a", data=data, optim=OptimConfig(batch=4), steps=3)
    _, two, _ = train("unet", pictures, tmp_path / "b", data=data, optim=OptimConfig(batch=2, accumulation=2), steps=3)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("model", ["unet-xl", "flux"])
def test_other_families_train(model, pictures, tmp_path):
    _, values, result = train(model, pictures, tmp_path, steps=3)
    assert result.steps == 3
    assert sum(bool(value.abs().sum() > 0) for name, value in values.items() if "convlora_B" in name) > 0


@pytest.mark.parametrize("model", ["unet", "conv"])
def test_the_base_is_not_changed(model, pictures, classes, tmp_path):
    fresh = BUILD[model]()
    target, _, _ = train(model, classes if model == "conv" else pictures, tmp_path)
    before = (fresh if model == "conv" else fresh.unet).state_dict()
    trained = target if model == "conv" else target.unet
    after = {name.replace(".base_layer", ""): value for name, value in trained.state_dict().items()}
    unchanged = [name for name in before if not name.startswith("fc.")]
    assert len(unchanged) > 20
    # Running means of BatchNorm included: the base stays in eval mode.
    assert all(torch.equal(before[name], after[name]) for name in unchanged)
    assert not trained.training


def test_pictures_before_are_those_of_the_base(pictures, tmp_path):
    from vislr.train import sample_images

    _, _, result = train("unet", pictures, tmp_path, optim=OptimConfig(batch=4, lr=0.1, warmup=0))
    columns = result.before.columns
    base = BUILD["unet"]()
    base.unet.to(memory_format=torch.channels_last)
    expected = sample_images(base, columns, [0] * len(columns), steps=1, guidance=4.0, size=32)
    assert [image.tobytes() for image in result.before.rows[0]] == [image.tobytes() for image in expected]
    assert result.after.rows[0][0].tobytes() != result.before.rows[0][0].tobytes()
    assert result.task.before_after(result.before, result.after).width > 128 * len(columns)


def test_adapters_off_and_training_mode():
    model = tiny.tiny_conv_net()
    vislr.apply(model, AdapterSection(kind="lora", dropout=0.5).to_change())
    adapter_training([model], True)
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert layers
    assert all(layer.lora_dropout["default"].training for layer in layers)
    assert not any(layer.training for layer in norms)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.add_(1.0)
    adapter_training([model], False)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with adapters_off([model]):
        assert torch.equal(model(x), tiny.tiny_conv_net()(x))
    assert not torch.equal(model(x), tiny.tiny_conv_net()(x))
    assert not any(layer.lora_dropout["default"].training for layer in layers)


def test_learning_rate_rises_and_falls():
    optim = OptimConfig(lr=2.0, final_lr=0.1, warmup=4)
    rates = [learning_rate(step, 20, optim) for step in range(20)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[3:]))
    assert learning_rate(0, 1, OptimConfig(lr=1.0, warmup=0)) == 1.0


def test_checkpoints_are_kept_to_a_limit_and_carry_the_adapter(pictures, tmp_path):
    output = OutputConfig(folder=str(tmp_path), checkpoint_every=2, keep=2)
    target, settings = BUILD["unet"](), config(pictures, tmp_path, output=output, steps=9)
    vislr.apply(target, settings.adapter.to_change())
    fit(target, "default", settings, *folders(pictures), save_adapter=lambda path: vislr.save_adapter(target, path))
    kept = checkpoints_in(tmp_path)
    assert [path.name for path in kept] == ["000006", "000008"]
    assert json.loads((kept[-1] / "state.json").read_text())["step"] == 8
    other = BUILD["unet"]()
    vislr.load_adapter(other, kept[-1] / "adapter.safetensors", any_base=True)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path not in kept]


def test_a_checkpoint_of_another_run_is_refused(classes, tmp_path):
    with pytest.raises(Interrupted):
        train("vit", classes, tmp_path, stop=lambda step: step == 2)
    with pytest.raises(OutputError, match=r"stopped at step 000002; expected output.resume"):
        train("vit", classes, tmp_path)
    resume = {"output": OutputConfig(folder=str(tmp_path), checkpoint_every=0, resume=True)}
    with pytest.raises(ConfigError, match=r"cannot resume: steps was 8 and is 9"):
        train("vit", classes, tmp_path, steps=9, **resume)
    with pytest.raises(ConfigError, match="a step saw 4 pictures and would see 8"):
        train("vit", classes, tmp_path, optim=OptimConfig(batch=8, warmup=2, lr=5e-3), **resume)
    with pytest.raises(FormatError, match="holds another adapter"):
        train("vit", classes, tmp_path, adapter=AdapterSection(r=3), **resume)
    weights = checkpoints_in(tmp_path)[0] / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FormatError, match="damaged"):
        train("vit", classes, tmp_path, **resume)


def test_changed_pictures_are_noticed_on_resume(classes, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(classes, data)
    with pytest.raises(Interrupted):
        train("conv", data, tmp_path / "out", stop=lambda step: step == 1)
    first = next(path for path in folders(data)[0].samples).path
    shutil.copy(data / "grey" / "19.png" if first.name != "19.png" else data / "grey" / "0.png", first)
    output = OutputConfig(folder=str(tmp_path / "out"), resume=True)
    with pytest.raises(ConfigError, match=r"the pictures in .* have changed"):
        train("conv", data, tmp_path / "out", output=output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_leave(number, classes, tmp_path):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as left:
        train("vit", classes, tmp_path, stop=lambda step: os.kill(os.getpid(), number) if step == 3 else False)
    assert left.value.exit_code == 130
    assert checkpoints_in(tmp_path)[-1].name == "000004"
    assert signal.getsignal(number) is before


def test_a_loss_that_is_no_number_ends_the_run(classes, tmp_path):
    with pytest.raises(TrainingError, match="the loss is nan at step 5"):
        train("vit", classes, tmp_path, optim=OptimConfig(batch=4, lr=1e30, warmup=0, clip=0))


@pytest.mark.parametrize("ends", [False, True])
def test_weights_that_are_no_numbers_are_not_kept(ends, classes, tmp_path):
    """They show in the loss one step later: by then the checkpoints before must still be there."""
    output = OutputConfig(folder=str(tmp_path), checkpoint_every=1, keep=2, log_every=100)

    def spoil(step):
        if step == (7 if ends else 5):
            value = next(parameter for parameter in target.parameters() if parameter.requires_grad)
            value.register_hook(lambda gradient: gradient * float("nan"))

    target, settings = BUILD["vit"](), config(classes, tmp_path, output=output)
    vislr.apply(target, settings.adapter.to_change())
    with pytest.raises(TrainingError, match=f"trained weights are not finite after step {8 if ends else 6}"):
        fit(target, "default", settings, *folders(classes), stop=spoil)
    kept = checkpoints_in(tmp_path)
    assert [int(path.name) for path in kept] == ([6, 7] if ends else [4, 5])
    for path in kept:
        assert all(value.isfinite().all() for value in load_file(path / "trainable.safetensors").values())


def test_a_loss_that_is_no_number_is_never_the_lowest():
    points = [(2, float("nan")), (4, 0.5), (6, float("nan")), (8, 0.7)]
    assert best_of(points) == (4, 0.5)
    assert out_of_patience(points, 2)
    assert not out_of_patience(points, 3)


def test_without_held_out_pictures_or_adapter(pictures, tmp_path):
    target, settings = BUILD["unet"](), config(pictures, tmp_path, steps=3)
    with pytest.raises(AdapterError, match="carries no adapter 'default'"):
        fit(target, "default", settings, ImageFolder.with_captions(pictures))
    vislr.apply(target, settings.adapter.to_change())
    result = fit(target, "default", settings, ImageFolder.with_captions(pictures))
    assert result.history.held_out == {}
    assert (tmp_path / "curves.png").is_file()
