"""Classifiers of timm as folders: saved and loaded with what was done to them, or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch

import vislr
from vislr import prune, quantize, tokens, zoo
from vislr.core.errors import FormatError, ModelError

PICTURES = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64).sin()


def vit():
    return zoo.classifier("emoji-vit")


def conv():
    return zoo.classifier("emoji-conv")


def by_name():
    torch.manual_seed(0)
    return timm.create_model("mobilenetv3_small_050", num_classes=3).eval()


def quarter(model):
    return prune.plan_layers(model, prune.UniformDepth(), ratio=0.25)


def integers(model):
    return quantize.weight_only_plan(model, 8, group=None)


CHANGES = {
    "plain": lambda model: [],
    "pruned": lambda model: [quarter(model)],
    "quantised": lambda model: [integers(model)],
    "pruned, then quantised": lambda model: [quarter(model), integers],
    "adapter": lambda model: [vislr.ConvLoraConfig(r=2, init="gaussian")],
    "pruned with an adapter": lambda model: [quarter(model), vislr.ConvLoraConfig(r=2)],
    "tokens": lambda model: [tokens.at_edm_plan(model, keep=0.5)],
}
CASES = [
    (make, change) for make in (vit, conv, by_name) for change in CHANGES if change != "tokens" or make is vit
]  # fmt: skip


def changed(make, change):
    model = make()
    for one in CHANGES[change](model):
        vislr.apply(model, one(model) if callable(one) else one)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "convlora_B" in name:
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def recipe(model):
    """Without the place in the order of all changes of the process."""
    return [step | {"report": step["report"] | {"index": 0}} for step in vislr.recipe_of(model)]


@torch.no_grad()
def answer(model):
    return model(PICTURES)


@pytest.mark.parametrize(("make", "change"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_a_folder_gives_the_same_answers(make, change, tmp_path):
    model = changed(make, change)
    vislr.save(model, tmp_path / "folder")
    loaded = vislr.load(tmp_path / "folder")
    assert torch.equal(answer(loaded), answer(model))
    assert recipe(loaded) == recipe(model)
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    # Saved once more it is the same folder.
    vislr.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "folder" / "config.json").read_bytes()


def test_timm_alone_loads_what_has_no_plan_and_fails_on_what_has(tmp_path):
    for change in ("plain", "adapter"):
        vislr.save(changed(vit, change), tmp_path / change)
        stock = timm.create_model(f"local-dir:{tmp_path / change}", pretrained=True).eval()
        assert torch.equal(answer(stock), answer(vit()))
    for change in ("pruned", "quantised"):
        vislr.save(changed(vit, change), tmp_path / change)
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
            timm.create_model(f"local-dir:{tmp_path / change}", pretrained=True)


def test_another_process_loads_it(tmp_path):
    model = changed(conv, "pruned")
    vislr.save(model, tmp_path / "folder")
    torch.save(PICTURES, tmp_path / "x.pt")
    code = (
        "import sys, torch, vislr; from safetensors.torch import save_file; m = vislr.load(sys.argv[1]); "
        "save_file({'y': m(torch.load(sys.argv[2])).detach()}, sys.argv[3])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "folder", tmp_path / "x.pt", tmp_path / "y"], check=True)
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "y")["y"], answer(model))


def test_the_structure_is_undone_in_memory_and_saved_as_it_then_is(tmp_path):
    model = vit()
    before = answer(model)
    report = vislr.apply(model, quarter(model))
    vislr.remove(model, report)
    assert torch.equal(answer(model), before)
    vislr.save(model, tmp_path / "whole")
    assert "vislr" not in json.loads((tmp_path / "whole" / "config.json").read_text())


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda c: c["model_args"].update(checkpoint_path="x.pth"), ModelError, "argument 'checkpoint_path'"),
        (lambda c: c["model_args"].update(pretrained_cfg="x"), ModelError, "argument 'pretrained_cfg'"),
        (lambda c: c.update(architecture="vit_tiny_patch16_22"), ModelError, "timm does not know; did you mean"),
        (lambda c: c["model_args"].update(depth=5), ModelError, "layer"),
        (lambda c: c["model_args"].update(embed_dim=96), ModelError, "the plan is for another VisionTransformer"),
        (lambda c: c["vislr"][0]["plan"].update(removed=[]), FormatError, "was edited"),
        (lambda c: c.pop("vislr"), FormatError, "do not fit their config"),
        (lambda c: c.update(model_args=["depth"]), FormatError, "is no config of timm"),
    ],
)
def test_edited_folders_are_refused_by_name(edit, error, message, tmp_path):
    vislr.save(changed(vit, "pruned"), tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        vislr.load(tmp_path / "folder")


def test_damaged_weights_are_refused_by_name(tmp_path):
    vislr.save(vit(), tmp_path / "folder")
    weights = tmp_path / "folder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FormatError, match="do not fit their config"):
        vislr.load(tmp_path / "folder")
    weights.unlink()
    with pytest.raises(FormatError, match=r"has no model\.safetensors"):
        vislr.load(tmp_path / "folder")


def test_a_model_that_its_name_does_not_tell_is_refused(tmp_path):
    odd = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2)
    with pytest.raises(ModelError, match="is no plain 'vit_tiny_patch16_224' of timm"):
        vislr.save(odd, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    # The size alone is found out.
    sized = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2).eval()
    vislr.save(sized, tmp_path / "sized")
    assert torch.equal(vislr.load(tmp_path / "sized")(PICTURES[:, :, :32, :32]), sized(PICTURES[:, :, :32, :32]))
