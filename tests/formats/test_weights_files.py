"""Files without a model: checkpoints layer by layer, what fine-tuning changed, merges of files that others wrote."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_flux_transformer, tiny_sd_pipeline
from torch import nn

from vislr.adapters import attach
from vislr.cli import main
from vislr.core.errors import AdapterError, ConfigError, FormatError, ModelError
from vislr.formats import attach_file, read_adapter
from vislr.formats.canonical import CanonicalAdapter, Entry
from vislr.formats.exchange import read_canonical, write_canonical
from vislr.formats.weights import merge_adapters, resize
from vislr.formats.weights_base import open_checkpoint, shared
from vislr.formats.weights_extract import extract_lora, extract_sara


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)
        self.norm = nn.GroupNorm(3, 12)
        self.fc = nn.Linear(12, 10)
        self.out = nn.Linear(10, 4)


def saved(model, path):
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


@pytest.fixture
def pair(tmp_path):
    """Paths of a net and of the same with changed conv (everywhere), norm, and bias and two entries of fc."""
    torch.manual_seed(0)
    net = Net()
    saved(net, tmp_path / "base.safetensors")
    with torch.no_grad():
        net.conv.weight.add_(torch.randn_like(net.conv.weight) * 0.01)
        net.norm.weight.mul_(1.5)
        net.fc.bias.add_(0.1)
        net.fc.weight[2, 3] += 0.5
        net.fc.weight[7, 11] -= 0.25
    saved(net, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def differences(pair):
    before, after = load_file(pair[0]), load_file(pair[1])
    return {key: after[key].double() - before[key].double() for key in before}


def test_a_lora_of_the_difference_loses_the_discarded_singular_values(pair):
    base, tuned = map(open_checkpoint, pair)
    expected = differences(pair)
    for rank in (1, 4, 12):
        outcome = extract_lora(base, tuned, rank)
        assert list(outcome.adapter.entries) == ["conv", "fc"]
        assert outcome.adapter.entries["fc"].rank == min(rank, 2)
        for name, entry in outcome.adapter.entries.items():
            change = expected[f"{name}.weight"]
            singular = torch.linalg.svdvals(change.flatten(1))
            lost = float((entry.delta(dtype=torch.float64) - change).norm())
            assert lost == pytest.approx(float(singular[rank:].norm()), abs=1e-6)
            assert outcome.errors[name] == pytest.approx(float(singular[rank:].norm() / singular.norm()), abs=1e-5)
        assert outcome.notes == ("2 changes of biases, norms and tables are left out (rest keeps them)",)


def test_the_rest_is_kept_exactly(pair):
    outcome = extract_lora(*map(open_checkpoint, pair), energy=0.9, rest=True)
    expected = differences(pair)
    entries = outcome.adapter.entries
    assert outcome.notes == ()
    assert sorted(entries) == ["conv", "fc", "norm"]
    assert torch.equal(entries["norm"].tensors["w_norm"].double(), expected["norm.weight"])
    assert torch.equal(entries["fc"].bias_delta(torch.float64), expected["fc.bias"].float().double())
    assert outcome.error <= 0.1**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sara_of_the_difference_gives_the_tuned_model_bit_for_bit(pair, dtype, tmp_path):
    for path in pair:
        save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    base, tuned = map(open_checkpoint, pair)
    outcome = extract_sara(base, tuned)
    entries = outcome.adapter.entries
    assert sorted(entries) == ["conv", "fc", "norm"]
    assert entries["fc"].tensors["sara_index"].tolist() == [2 * 12 + 3, 7 * 12 + 11, *range(120, 130)]
    write_canonical(outcome.adapter, tmp_path / "sara.safetensors", "vislr")
    again = read_canonical(tmp_path / "sara.safetensors")
    before, after = load_file(pair[0]), load_file(pair[1])
    for name, entry in again.entries.items():
        weight = before[f"{name}.weight"].double() + entry.delta(dtype=torch.float64).reshape(
            before[f"{name}.weight"].shape
        )
        assert torch.equal(weight.to(dtype), after[f"{name}.weight"])
        bias = entry.bias_delta(torch.float64)
        if bias is not None:
            assert torch.equal((before[f"{name}.bias"].double() + bias).to(dtype), after[f"{name}.bias"])


def test_a_share_of_sara_keeps_the_largest_changes(pair):
    outcome = extract_sara(*map(open_checkpoint, pair), density=0.1)
    change = differences(pair)["conv.weight"].flatten()
    entry = outcome.adapter.entries["conv"]
    assert len(entry.tensors["sara_index"]) == round(0.1 * 12 * 27)
    kept = change.abs().sort(descending=True).values[: len(entry.tensors["sara_index"])]
    assert torch.allclose(entry.tensors["sara_delta"].abs().sort(descending=True).values, kept)
    assert outcome.errors["conv"] == pytest.approx(
        float((change.norm() ** 2 - kept.norm() ** 2) ** 0.5 / change.norm())
    )


def test_models_that_do_not_go_together(pair, tmp_path):
    base, tuned = map(open_checkpoint, pair)
    with pytest.raises(AdapterError, match="does not differ"):
        extract_lora(base, base, 4)
    with pytest.raises(ConfigError, match="needs a rank"):
        extract_lora(base, tuned)
    save_file({"conv.weight": torch.zeros(12, 3, 1, 1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"'conv' is \(12, 3, 3, 3\) in .* and \(12, 3, 1, 1\)"):
        shared(base, open_checkpoint(tmp_path / "other.safetensors"))
    save_file({"other.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="no layer in common"):
        shared(base, open_checkpoint(tmp_path / "other.safetensors"))
    broken = load_file(pair[1])
    broken["fc.weight"][0, 0] = torch.nan
    save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises(AdapterError, match="'fc' has NaN"):
        extract_lora(base, open_checkpoint(tmp_path / "nan.safetensors"), 2)


# Checkpoints.


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pipeline_folder_has_every_layer(tmp_path, sharded):
    pipe = tiny_sd_pipeline()
    size = "200KB" if sharded else "10GB"
    pipe.save_pretrained(tmp_path / "pipe", max_shard_size=size)
    assert len(list((tmp_path / "pipe" / "unet").glob("*.safetensors"))) > 1 or not sharded
    found = open_checkpoint(tmp_path / "pipe")
    assert found.family == "sd15"
    for name, module in pipe.unet.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            assert torch.equal(found.weights[f"unet.{name}"], module.weight)
            if module.bias is not None:
                assert torch.equal(found.biases[f"unet.{name}"], module.bias)
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    assert torch.equal(found.weights[text], pipe.text_encoder.get_submodule("encoder.layers.0.mlp.fc1").weight)
    alone = open_checkpoint(tmp_path / "pipe" / "unet")
    assert torch.equal(alone.weights["unet.conv_in"], pipe.unet.conv_in.weight)


def test_a_single_file_of_flux_is_taken_apart(tmp_path):
    model = tiny_flux_transformer()
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    block = "transformer_blocks.0.attn"
    half = weights["norm_out.linear"].shape[0] // 2
    tensors = {
        "double_blocks.0.img_attn.qkv.weight": torch.cat([weights[f"{block}.{p}"] for p in ("to_q", "to_k", "to_v")]),
        "single_blocks.0.linear1.weight": torch.cat(
            [weights[f"single_transformer_blocks.0.{p}"] for p in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        ),
        "final_layer.adaLN_modulation.1.weight": torch.cat(
            [weights["norm_out.linear"][half:], weights["norm_out.linear"][:half]]
        ),
        "img_in.weight": weights["x_embedder"],
    }
    for prefix in ("", "model.diffusion_model."):
        save_file(
            {prefix + key: value.detach().clone() for key, value in tensors.items()}, tmp_path / "flux.safetensors"
        )
        found = open_checkpoint(tmp_path / "flux.safetensors")
        assert found.family == "flux"
        assert len(found.weights) == 9
        for name, value in found.weights.items():
            assert torch.equal(value, weights[name.removeprefix("transformer.")])


def test_a_single_file_of_sd(tmp_path):
    tensors = {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.randn(320, 768),
        "model.diffusion_model.middle_block.0.in_layers.2.weight": torch.randn(8, 8, 3, 3),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": torch.randn(8, 8),
        "first_stage_model.encoder.conv_in.weight": torch.randn(8, 3, 3, 3),
        "alphas_cumprod": torch.ones(10),
    }
    save_file(tensors, tmp_path / "sd.safetensors")
    found = open_checkpoint(tmp_path / "sd.safetensors")
    assert found.family == "sd15"
    assert dict(zip(found.weights, (value.shape for value in found.weights.values()), strict=True)) == {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (320, 768),
        "unet.mid_block.resnets.0.conv1": (8, 8, 3, 3),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": (8, 8),
    }


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ModelError, match="there is no folder or file"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ModelError, match="has no safetensors weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"'weights.bin' is a pickle"):
        open_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text, said in (
        ("{", "is no index"),
        (json.dumps({"weight_map": {"a": "../../secret.safetensors"}}), "expected files beside it"),
        (json.dumps({"weight_map": ["a"]}), "is no index"),
    ):
        index.write_text(text)
        with pytest.raises(ModelError, match=said):
            open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "missing.safetensors"}}))
    with pytest.raises(FormatError, match="there is no file"):
        open_checkpoint(tmp_path)


# What peft itself makes.


def random_lora(model, **config):
    """A peft model with random LoRA weights, and the dense changes of its layers."""
    torch.manual_seed(3)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["fc", "out"], **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return wrapped, {name: wrapped.get_submodule(f"base_model.model.{name}") for name in ("fc", "out")}


def dense_change(layer):
    before = layer.get_base_layer().weight.detach().double().clone()
    layer.merge()
    after = layer.get_base_layer().weight.detach().double()
    return after - before


def test_rslora_dora_and_differing_ranks_of_peft_merge_to_the_sum_of_what_they_do(tmp_path):
    torch.manual_seed(0)
    net = Net()
    saved(net, tmp_path / "base.safetensors")
    makes = {"rs": {"r": 4, "lora_alpha": 6, "use_rslora": True}, "dora": {"r": 2, "lora_alpha": 3, "use_dora": True},
             "plain": {"r": 3, "lora_alpha": 1, "rank_pattern": {"out": 2}, "alpha_pattern": {"out": 7}}}  # fmt: skip
    changes = {}
    for name, config in makes.items():
        copy = Net()
        copy.load_state_dict(net.state_dict())
        wrapped, layers = random_lora(copy, **config)
        wrapped.save_pretrained(tmp_path / name)
        changes[name] = {site: dense_change(layer) for site, layer in layers.items()}
    adapters = [read_canonical(tmp_path / name, family="timm") for name in makes]
    weights = [0.5, 1.0, -2.0]
    base = open_checkpoint(tmp_path / "base.safetensors")
    merged = merge_adapters(adapters, weights, rank=10, base=base.weights)
    for site in ("fc", "out"):
        expected = sum(w * changes[name][site] for name, w in zip(makes, weights, strict=True))
        made = merged.adapter.entries[site].delta(dtype=torch.float64)
        assert float((made - expected).norm()) < 2e-6 * max(1, float(expected.norm()))
    with pytest.raises(AdapterError, match="give the base model's weights"):
        merge_adapters(adapters, weights)


def test_a_resized_file_goes_on_a_model(tmp_path):
    torch.manual_seed(0)
    pipe = tiny_sd_pipeline()
    attach(pipe.unet, LoraConfig(r=6, lora_alpha=4, target_modules=["to_q", "conv1"]), "a")
    from vislr.adapters import adapter_parameters
    from vislr.formats import write_adapter

    with torch.no_grad():
        for parameter in adapter_parameters(pipe.unet, "a").values():
            parameter.normal_(0, 0.1)
    write_adapter(pipe.unet, "a", tmp_path / "a.safetensors", format="diffusers", component="unet")
    outcome = resize(read_canonical(tmp_path / "a.safetensors"), 3)
    write_canonical(outcome.adapter, tmp_path / "b.safetensors", "diffusers")
    fresh = tiny_sd_pipeline()
    attach_file(fresh.unet, "b", read_adapter(tmp_path / "b.safetensors"), any_base=True)
    for name, entry in outcome.adapter.of("unet").items():
        layer = fresh.unet.get_submodule(name)
        assert torch.allclose(layer.get_delta_weight("b"), entry.delta(), atol=1e-6)


# The command.


def small_file(path, seed, r, dtype=torch.float32, family="sd15"):
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    for name in ("unet.mid_block.attentions.0.proj_in", "unet.mid_block.resnets.0.conv1"):
        shape = (32, 32, 3, 3) if "conv" in name else (32, 32)
        tensors = {
            "lora_down.weight": torch.randn(r, *shape[1:], generator=generator),
            "lora_up.weight": torch.randn(32, r, *(1,) * (len(shape) - 2), generator=generator),
            "alpha": torch.tensor(2.0),
        }
        entries[name] = Entry("lora", tensors, shape)
    write_canonical(CanonicalAdapter(entries, family), path, "kohya", dtype=dtype)
    return str(path)


def deltas(path):
    return {name: entry.delta(dtype=torch.float64) for name, entry in read_canonical(path).entries.items()}


def test_the_command_merges_subtracts_and_resizes(tmp_path, capsys):
    a, b = small_file(tmp_path / "a.safetensors", 1, 4), small_file(tmp_path / "b.safetensors", 2, 2)
    both = str(tmp_path / "both.safetensors")
    assert main(["merge", a, f"{b}:0.5", "--out", both]) == 0
    said = capsys.readouterr().out
    assert "2 layers, ranks 6 to 6" in said
    assert "exact" in said
    assert "(kohya, 6 tensors)" in said
    one, two, sum_of = deltas(a), deltas(b), deltas(both)
    for name in one:
        assert torch.allclose(sum_of[name], one[name] + 0.5 * two[name], atol=1e-5)
    back = str(tmp_path / "back.safetensors")
    assert main(["merge", both, f"{b}:-0.5", "--out", back, "--rank", "4"]) == 0
    assert "relative error" in capsys.readouterr().out
    for name, delta in deltas(back).items():
        assert torch.allclose(delta, one[name], atol=1e-4)
    small = str(tmp_path / "small.safetensors")
    assert main(["merge", a, "--out", small, "--rank", "2", "--format", "diffusers", "--dtype", "float16"]) == 0
    assert {value.dtype for value in load_file(small).values()} == {torch.float16}
    assert {entry.rank for entry in read_canonical(small).entries.values()} == {2}
    tied = str(tmp_path / "ties.safetensors")
    assert main(["merge", a, b, "--out", tied, "--method", "ties", "--density", "0.3", "--config", "merge.yaml"]) == 0
    assert "relative error" in capsys.readouterr().out


def test_the_result_is_as_wide_as_what_came_in(tmp_path):
    half = [small_file(tmp_path / f"{n}.safetensors", n, 2, torch.float16) for n in (1, 2)]
    out = str(tmp_path / "out.safetensors")
    assert main(["merge", *half, "--out", out]) == 0
    kinds = {value.dtype for key, value in load_file(out).items() if not key.endswith("alpha")}
    assert kinds == {torch.float16}


def test_the_command_extracts(tmp_path, capsys):
    pipe = tiny_sd_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv1.weight.add_(torch.randn(32, 32, 3, 3) * 0.1)
    pipe.save_pretrained(tmp_path / "tuned")
    folders = ["--tuned", str(tmp_path / "tuned"), "--base", str(tmp_path / "base")]
    out = str(tmp_path / "out.safetensors")
    assert main(["merge", *folders, "--rank", "4", "--out", out]) == 0
    assert "1 layers, ranks 4 to 4" in capsys.readouterr().out
    fresh = tiny_sd_pipeline()
    fresh.load_lora_weights(out, adapter_name="a")
    assert main(["merge", *folders, "--extract", "sara", "--density", "1", "--out", out]) == 0
    entry = read_canonical(out).entries["unet.mid_block.resnets.0.conv1"]
    weight = open_checkpoint(tmp_path / "base").weights["unet.mid_block.resnets.0.conv1"]
    after = (weight.double() + entry.delta(dtype=torch.float64)).float()
    assert torch.equal(after, pipe.unet.mid_block.resnets[0].conv1.weight)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "x"], "not both, not neither"),
        (["a.safetensors", "--tuned", "b", "--out", "x"], "not both"),
        (["--tuned", "b", "--out", "x"], "--tuned needs --base"),
        (["a.safetensors", "--out", "x"], "one file alone"),
        (["a.safetensors:lots", "--out", "x"], "'lots' is no weight"),
        (["a.safetensors", "b.safetensors", "--out", "x"], "there is no file 'a.safetensors'"),
        (["a", "b", "--method", "tie", "--out", "x"], "method is 'tie'"),
    ],
)
def test_wrong_commands_are_one_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["merge", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
