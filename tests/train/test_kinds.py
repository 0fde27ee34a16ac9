"""Kinds of adapter in the trainer: each trains, goes on and loads again, and the words on its card are true."""

from __future__ import annotations

import re
import shlex

import pytest
import tiny
import torch
from safetensors.torch import load_file
from training import BUILD, goes_on, run

import vislr
from vislr.cli import main
from vislr.pipelines import train_adapter
from vislr.train import AdapterSection, ModelConfig, OptimConfig


def denoised(pipe):
    rng = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 16, 16, generator=rng)
    with torch.no_grad():
        return pipe.unet(x, torch.tensor([5, 900]), text).sample


@pytest.mark.parametrize("kind", ["dora", *(pytest.param(k, marks=pytest.mark.slow) for k in ("oft", "loha", "lokr"))])
def test_pefts_kinds_train_resume_and_load(kind, pictures, tmp_path):
    adapter = AdapterSection(kind=kind, r=4)
    values, target, result = goes_on("sd", pictures, tmp_path, adapter=adapter, optim=OptimConfig(batch=4, lr=0.02))
    assert result.trainable == sum(value.numel() for value in values.values())
    trained = denoised(target)
    vislr.save_adapter(target, tmp_path / "a.safetensors")
    fresh = BUILD["sd"]()
    assert (trained - denoised(fresh)).norm() > 1e-3 * trained.norm()
    vislr.load_adapter(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(denoised(fresh), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["sara", *(pytest.param(k, marks=pytest.mark.slow) for k in ("convlora", "flora", "dora", "loha", "lokr"))]
)
def test_files_of_two_components_load(kind, pictures, tmp_path):
    given = {"fraction": 0.1, "rank_weight": 0.0} if kind == "sara" else {}
    adapter = AdapterSection(kind=kind, r=2, text_encoders=["text_encoder"], **given)
    optim = OptimConfig(batch=2, warmup=0, lr=0.02)
    _, target, _ = run("sd", pictures, tmp_path, adapter=adapter, optim=optim, steps=2)
    vislr.save_adapter(target, tmp_path / "a.safetensors")
    fresh = BUILD["sd"]()
    vislr.load_adapter(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(denoised(fresh), denoised(target), rtol=1e-4, atol=1e-5)
    texts = [pipe.encode_prompt(["a cat face"], "cpu", 1, False)[0] for pipe in (BUILD["sd"](), target, fresh)]
    assert (texts[1] - texts[0]).norm() > 1e-3 * texts[0].norm()
    torch.testing.assert_close(texts[2], texts[1], rtol=1e-4, atol=1e-5)


def test_a_layer_with_the_adapters_name_is_not_trained(pictures, tmp_path):
    values, target, _ = run("sd", pictures, tmp_path, adapter=AdapterSection(kind="lora", r=2, name="conv1"), steps=2)
    fresh = BUILD["sd"]().unet.state_dict()
    assert any(".conv1." in name for name in fresh)
    assert all(".lora_" in name for name in values)
    held = {name.replace(".base_layer", ""): value for name, value in target.unet.state_dict().items()}
    assert all(torch.equal(held[name], value) for name, value in fresh.items())


@pytest.mark.parametrize("kind", ["convlora", pytest.param("flora", marks=pytest.mark.slow)])
def test_a_delta_made_over_weights_in_8_bit_floats(kind, pictures, tmp_path):
    """With so few positions the delta is made and used as a conv, which reads the type of the weight."""
    plain, _, _ = run("sd", pictures, tmp_path / "plain", adapter=AdapterSection(kind=kind, r=2), steps=1)
    optim = OptimConfig(batch=1, warmup=0, lr=5e-3)
    model = ModelConfig(storage="fp8", checkpointing=True)
    values, target, result = run(
        "sd", pictures, tmp_path / "fp8", adapter=AdapterSection(kind=kind, r=2), model=model, optim=optim, steps=2
    )
    assert values.keys() == plain.keys()
    layer = target.unet.mid_block.resnets[0].conv1
    assert layer.base_layer.weight.dtype == torch.float8_e4m3fn
    assert layer.delta("default").dtype == torch.float32
    assert 0 < result.history.last("held_out")["drift"] < 1


def commands(card):
    """The lines of a card that begin with `vislr convert`."""
    return [shlex.split(line)[1:] for line in card.splitlines() if line.startswith("vislr convert")]


@pytest.mark.parametrize(
    ("kind", "more", "formats"),
    [
        ("convlora", [], ["diffusers", "kohya"]),
        ("sara", ["--adapter.fraction", "0.05"], ["kohya"]),
        pytest.param("oft", [], [], marks=pytest.mark.slow),
        pytest.param("dora", [], ["diffusers", "kohya"], marks=pytest.mark.slow),
        pytest.param("lokr", ["--output.format", "kohya"], ["diffusers"], marks=pytest.mark.slow),
        pytest.param("flora", ["--output.format", "diffusers"], ["kohya"], marks=pytest.mark.slow),
    ],
)
def test_the_card_says_what_works(kind, more, formats, sd_folder, pictures, tmp_path, monkeypatch):
    argv = [
        "--model.base", str(sd_folder), "--data.folder", str(pictures), "--output.folder", str(tmp_path / "out"),
        "--steps", "2", "--optim.batch", "2", "--optim.warmup", "0", "--optim.lr", "0.02", "--sample.steps", "1",
        "--sample.prompts", "a cat face", "--held_out.every", "0", "--adapter.kind", kind, *more,
    ]  # fmt: skip
    assert train_adapter.main(argv) == 0
    monkeypatch.chdir(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert [command[-1] for command in commands(card)] == formats
    for command in commands(card):
        assert main(command) == 0
    # What the vislr lines of the card give.
    code = re.search(r"```python\n(import vislr.*?)```", card, re.DOTALL)[1]
    names: dict = {}
    exec(code.replace('image = pipe("a cat face").images[0]', ""), names)
    trained = denoised(names["pipe"])
    stock = tiny.tiny_sd_pipeline()
    if kind == "sara":
        vislr.fuse(names["pipe"])
        names["pipe"].save_pretrained("fused")
        stock = type(stock).from_pretrained("fused")
    elif "diffusers" in formats or "--output.format" in more:
        direct = "diffusers" in more
        stock.load_lora_weights(".", weight_name="adapter.safetensors" if direct else "adapter-diffusers.safetensors")
    if kind != "oft":
        assert (trained - denoised(tiny.tiny_sd_pipeline())).norm() > 1e-3 * trained.norm()
        torch.testing.assert_close(denoised(stock), trained, rtol=1e-3, atol=1e-4)


def test_going_on_from_a_kohya_file_counts_and_trains_it(sd_folder, pictures, tmp_path, capsys):
    pipe = BUILD["sd"]()
    torch.manual_seed(0)
    vislr.apply(pipe, AdapterSection(kind="flora", r=3).to_change())
    vislr.save_adapter(pipe, tmp_path / "start.safetensors", format="kohya")
    argv = [
        "--model.base", str(sd_folder), "--data.folder", str(pictures), "--output.folder", str(tmp_path / "out"),
        "--steps", "1", "--optim.batch", "2", "--optim.warmup", "0", "--optim.lr", "0.02", "--sample.steps", "1",
        "--held_out.every", "0", "--init-adapter", str(tmp_path / "start.safetensors"),
    ]  # fmt: skip
    assert train_adapter.main(argv) == 0
    start, end = load_file(tmp_path / "start.safetensors"), load_file(tmp_path / "out" / "adapter.safetensors")
    count = sum(value.numel() for name, value in start.items() if not name.endswith("alpha"))
    assert f"training  {count:,} parameters" in capsys.readouterr().out
    alike = {name: f"lora_unet_{name.partition('.lora_')[0].replace('.', '_')}.lora_{name.partition('.lora_')[2]}"
             for name in end if ".lora_" in name}  # fmt: skip
    assert any(not torch.equal(end[name], start[other]) for name, other in alike.items())
    # Scales are no weights.
    assert all(torch.equal(end[name], start[f"lora_unet_{name.removesuffix('.alpha').replace('.', '_')}.alpha"])
               for name in end if name.endswith(".alpha"))  # fmt: skip
