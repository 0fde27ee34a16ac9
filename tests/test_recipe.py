"""The face: apply, remove, switch, save, load; each on real pipelines with random weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import tiny
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file

import vislr
from vislr.core.errors import AdapterError, ConfigError, FormatError, ModelError, OutputError, TargetError, UndoError

CHANGES = {
    "convlora": vislr.ConvLoraConfig(r=1),
    "flora": vislr.FloraConfig(ranks=2),
    "lora": LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"]),
}
MODELS = {
    "sd": tiny.tiny_sd_pipeline,
    "sd3": tiny.tiny_sd3_pipeline,
    "vit": tiny.tiny_vit,
    "conv net": tiny.tiny_conv_net,
}


def change_for(kind, model):
    if kind == "lora" and model in ("vit", "conv net"):
        return LoraConfig(r=2, target_modules=["qkv"] if model == "vit" else ["conv1.3"])
    if kind == "lora" and model == "sd3":
        return LoraConfig(r=2, target_modules=["to_q"])
    return CHANGES[kind]


def picture(target, seed=1):
    """What the target makes of fixed input, as a tensor."""
    if isinstance(target, torch.nn.Module):
        with torch.no_grad():
            return target(torch.randn(2, 3, tiny.PIXELS, tiny.PIXELS, generator=torch.Generator().manual_seed(seed)))
    options = {"max_sequence_length": 16} if hasattr(target, "transformer") else {}
    target.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(seed)
    made = target("noto style, a cat face", num_inference_steps=2, generator=rng, output_type="pt", **options)
    return made.images


def denoiser(target):
    return target if isinstance(target, torch.nn.Module) else getattr(target, "transformer", None) or target.unet


def shake(target, name, seed=0):
    """Give the adapter weights that change the output, as training does."""
    from vislr.adapters.inject import adapter_parameters

    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(denoiser(target), name).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", CHANGES)
def test_apply_reports_and_remove_restores_bit_for_bit(kind, model):
    target = MODELS[model]()
    module = denoiser(target)
    before, modules = picture(target), dict(module.named_modules())
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    count = sum(p.numel() for p in module.parameters())
    report = vislr.apply(target, change_for(kind, model), name="style")
    assert report.sites
    assert set(report.sites) <= set(modules)
    assert report.parameters == (count, sum(p.numel() for p in module.parameters()))
    assert report.trainable == report.parameters[1] - count > 0
    assert report.flops[1] > report.flops[0] > 0
    assert report.sample["batch"] == 1
    assert [step["report"]["name"] for step in vislr.recipe_of(target)] == ["style"]
    assert torch.equal(picture(target), before), "a fresh adapter changes nothing"
    shake(target, "style")
    assert not torch.equal(picture(target), before)
    vislr.set_adapters(target, [])
    assert torch.equal(picture(target), before), "off is the base"
    vislr.remove(target, report)
    assert torch.equal(picture(target), before)
    assert dict(module.named_modules()) == modules
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
    assert vislr.recipe_of(target) == []
    with pytest.raises(UndoError, match="not on this"):
        vislr.remove(target, report)


def test_flops_after_apply_are_those_of_a_run():
    from torch.utils.flop_counter import FlopCounterMode

    unet = tiny.tiny_unet()
    report = vislr.apply(unet, vislr.ConvLoraConfig(r=2))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, report.sample["tokens"], tiny.HIDDEN))
    assert report.flops[1] == counter.get_total_flops()


def test_records_keep_the_order_and_undo_false_keeps_nothing():
    pipe = tiny.tiny_sd_pipeline()
    first = vislr.apply(pipe, CHANGES["lora"], name="a")
    second = vislr.apply(pipe, vislr.ConvLoraConfig(r=1, target_modules=["conv2"]), name="b", undo=False)
    steps = vislr.recipe_of(pipe)
    assert [step["report"]["name"] for step in steps] == ["a", "b"]
    assert json.loads(json.dumps(steps)) == steps or steps[0]["report"]["sites"]
    vislr.remove(pipe, first)
    with pytest.raises(UndoError, match="undo=False"):
        vislr.remove(pipe, second)


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("model", ["sd", "sd3", "vit"])
def test_an_adapter_file_gives_the_same_pictures_in_a_fresh_model(kind, model, tmp_path):
    target = MODELS[model]()
    base = picture(target)
    vislr.apply(target, change_for(kind, model), name="style")
    shake(target, "style")
    # A loaded adapter is frozen, and torch rounds a product with a trainable factor differently.
    denoiser(target).requires_grad_(False)
    expected = picture(target)
    path = vislr.save_adapter(target, tmp_path / "style.safetensors")
    fresh = MODELS[model]()
    report = vislr.load_adapter(fresh, path)
    assert report.name == "style"
    assert torch.equal(picture(fresh), expected)
    vislr.set_adapters(fresh, "style", 0.5)
    half = picture(fresh)
    assert not torch.equal(half, expected)
    assert not torch.equal(half, base)
    vislr.remove(fresh, report)
    assert torch.equal(picture(fresh), base)


def test_two_loaded_adapters_are_both_on_with_their_weights(tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    for seed, name in enumerate(("a", "b")):
        report = vislr.apply(pipe, CHANGES["convlora"], name=name)
        shake(pipe, name, seed)
        vislr.save_adapter(pipe, tmp_path / f"{name}.safetensors", name=name)
        vislr.remove(pipe, report)
    vislr.load_adapter(pipe, tmp_path / "a.safetensors", weight=0.5)
    vislr.load_adapter(pipe, tmp_path / "b.safetensors", weight=0.25)
    both = picture(pipe)
    other = tiny.tiny_sd_pipeline()
    vislr.load_adapter(other, tmp_path / "b.safetensors")
    vislr.load_adapter(other, tmp_path / "a.safetensors")
    other.set_adapters(["a", "b"], [0.5, 0.25])
    torch.testing.assert_close(picture(other), both, atol=1e-5, rtol=0)


NEW_PROCESS = """
import sys, torch
torch.set_num_threads(1)
if sys.argv[2] == "vislr":
    import vislr
    pipe = vislr.load(sys.argv[1])
else:
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
rng = torch.Generator().manual_seed(1)
out = pipe("noto style, a cat face", num_inference_steps=2, generator=rng, output_type="pt").images
from safetensors.torch import save_file
save_file({"image": out}, sys.argv[3])
"""


def image_in_new_process(folder, loader, out):
    subprocess.run([sys.executable, "-c", NEW_PROCESS, str(folder), loader, str(out)], check=True, timeout=300)
    return load_file(out)["image"]


def test_a_saved_folder_is_the_same_pipeline_in_a_new_process_and_the_base_in_stock_diffusers(tmp_path):
    torch.set_num_threads(1)
    pipe = tiny.tiny_sd_pipeline()
    base = picture(pipe)
    vislr.apply(pipe, vislr.ConvLoraConfig(r=1), name="a")
    shake(pipe, "a")
    vislr.apply(pipe, CHANGES["lora"], name="b")
    shake(pipe, "b")
    vislr.set_adapters(pipe, ["a", "b"], [0.75, 1.0])
    pipe.unet.requires_grad_(False)
    expected = picture(pipe)
    folder = vislr.save(pipe, tmp_path / "saved")
    assert torch.equal(picture(pipe), expected), "saving changes nothing"
    record = json.loads((folder / "vislr.json").read_text())
    assert [step["report"]["name"] for step in record["steps"]] == ["a", "b"]
    assert record["adapters"]["a"] == {"file": "adapters/a.safetensors", "weight": 0.75, "active": True}
    assert torch.equal(image_in_new_process(folder, "vislr", tmp_path / "1.safetensors"), expected)
    assert torch.equal(image_in_new_process(folder, "diffusers", tmp_path / "2.safetensors"), base)
    again = vislr.load(folder)
    assert [step["report"]["name"] for step in vislr.recipe_of(again)] == ["a", "b"]
    assert vislr.save(again, folder) == folder, "a folder of ours is replaced as a whole"


def test_a_fused_adapter_is_saved_as_weights(tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    vislr.apply(pipe, vislr.ConvLoraConfig(r=1), name="a")
    shake(pipe, "a")
    pipe.fuse_lora(adapter_names=["a"])
    fused = picture(pipe)
    folder = vislr.save(pipe, tmp_path / "fused")
    assert not (folder / "adapters").exists()
    assert torch.equal(picture(DiffusionPipeline.from_pretrained(folder)), fused)
    assert json.loads((folder / "vislr.json").read_text())["merged"] == ["a"]


def test_one_component_is_saved_and_loaded_too(tmp_path):
    unet = tiny.tiny_sd_pipeline().unet
    vislr.apply(unet, CHANGES["flora"], name="a")
    shake(unet, "a")
    folder = vislr.save(unet, tmp_path / "unet")
    again = vislr.load(folder)
    inputs = (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 16, tiny.HIDDEN))
    with torch.no_grad():
        assert torch.equal(again(*inputs).sample, unet(*inputs).sample)


def test_bad_input_is_named_and_leaves_the_model_alone(tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    base, keys = picture(pipe), list(pipe.unet.state_dict())
    with pytest.raises(ConfigError, match="ConvLoraConfig"):
        vislr.apply(pipe, {"r": 2})
    with pytest.raises(TargetError, match="to_q"):
        vislr.apply(pipe, vislr.ConvLoraConfig(target_modules=["to_qq"]))
    with pytest.raises(AdapterError, match="carries no adapter"):
        vislr.save_adapter(pipe, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="no adapter is called 'x'"):
        vislr.set_adapters(pipe, "x")
    assert list(pipe.unet.state_dict()) == keys
    assert torch.equal(picture(pipe), base)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="holds other files"):
        vislr.save(pipe, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    with pytest.raises(ModelError, match="save_adapter"):
        vislr.save(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), tmp_path / "vit")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing", "no folder"),
        ("empty", "no diffusers folder"),
        ("file", "is a file"),
        ("emoji-unit", "emoji-unet"),
    ],
)
def test_what_is_no_pipeline_is_refused_by_name(source, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("")
    with pytest.raises(ModelError, match=said):
        vislr.load(source)


def test_damaged_folders_are_refused_by_name(tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    vislr.apply(pipe, CHANGES["convlora"], name="a")
    shake(pipe, "a")
    folder = vislr.save(pipe, tmp_path / "saved")
    record = json.loads((folder / "vislr.json").read_text())
    for damage, said in (
        ({"schema": 99}, "schema 99"),
        ({"adapters": {"a": {"file": "../../secret", "weight": 1, "active": True}}}, "not in the folder"),
        ({"adapters": 3}, "no record of vislr"),
    ):
        (folder / "vislr.json").write_text(json.dumps(record | damage))
        with pytest.raises(FormatError, match=said):
            vislr.load(folder)
    (folder / "vislr.json").write_text(json.dumps(record))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelError, match="cannot load"):
        vislr.load(folder)
