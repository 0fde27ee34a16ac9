"""A LoRA made before pruning still works after it: what lay on removed units is dropped, with the reported loss."""

import math

import pytest
import tiny
import torch
from peft import LoraConfig

import vislr
from vislr.adapters.inject import adapter_layers, adapter_parameters
from vislr.core.errors import AdapterError
from vislr.prune import LayerPlan
from vislr.train.families import family_of

CUT = ("up_blocks.0.resnets.0", "mid_block.attentions.0", "down_blocks.1.attentions.0.transformer_blocks.0.attn1")
LORA = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v", "conv1", "conv_shortcut", "proj_in"])
CHANGES = {
    ("lora", "vislr"): LORA,
    ("lora", "diffusers"): LORA,
    ("lora", "kohya"): LORA,
    ("lora", "comfy"): LORA,
    ("lora", "peft"): LORA,
    ("convlora", "vislr"): vislr.ConvLoraConfig(r=1, target_modules=["to_q", "conv1", "conv_shortcut"]),
    ("flora", "vislr"): vislr.FloraConfig(ranks=2, target_modules=["to_q", "conv1", "conv_shortcut"]),
    ("sara", "vislr"): vislr.SaraConfig(fraction=0.2, target_modules=["to_q", "conv1"]),
}


def answer(pipe):
    with torch.no_grad():
        conditions = family_of(pipe).encode(["a cat face"])
        noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return family_of(pipe).forward(pipe.unet, noisy, torch.tensor([400]), conditions)


def styled(kind, format):
    """A pipeline with a trained adapter, and the norm of each layer's change."""
    pipe = tiny.tiny_sd_pipeline()
    vislr.apply(pipe, CHANGES[kind, format], name="style")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(pipe.unet, "style").values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    pipe.unet.requires_grad_(False)
    return pipe


def norms(pipe):
    found = {}
    for site, layer in adapter_layers(pipe.unet, "style").items():
        delta = layer.delta_weight("style") if hasattr(layer, "delta_weight") else layer.get_delta_weight("style")
        found[site] = float(delta.double().square().sum())
    return found


@pytest.mark.parametrize(("kind", "format"), CHANGES)
def test_an_adapter_of_the_whole_model_on_the_pruned_one(kind, format, tmp_path):
    pipe = styled(kind, format)
    squares = norms(pipe) if kind != "sara" else None
    path = vislr.save_adapter(pipe, tmp_path / "style.safetensors", format=format)
    # The other way round: prune the model that carries it.
    vislr.apply(pipe, LayerPlan(CUT), name="cut")
    expected = answer(pipe)
    kept = set(adapter_layers(pipe.unet, "style"))
    fresh = tiny.tiny_sd_pipeline()
    vislr.apply(fresh, LayerPlan(CUT), name="cut")
    report = vislr.load_adapter(fresh, path, name="style")
    assert set(adapter_layers(fresh.unet, "style")) == kept
    torch.testing.assert_close(answer(fresh), expected, rtol=0, atol=1e-5)
    (note,) = [note for note in report.notes if note.startswith("pruned model")]
    assert f"{len(kept)} layers of the adapter kept" in note
    if "conv_shortcut" in str(CHANGES[kind, format].target_modules):
        assert "up_blocks.0.resnets.0.conv_shortcut" in kept, "the shortcut stays, and its layer with it"
    if squares is not None:
        lost = math.sqrt(sum(v for site, v in squares.items() if site not in kept) / sum(squares.values()))
        assert 0 < lost < 1
        assert f"{lost:.1%} of the change's norm lost" in note
    assert vislr.recipe_of(fresh)[-1]["report"]["notes"][-1] == note
    vislr.remove(fresh, report)
    plain = tiny.tiny_sd_pipeline()
    vislr.apply(plain, LayerPlan(CUT))
    assert torch.equal(answer(fresh), answer(plain))


def test_an_adapter_that_lost_nothing_says_nothing_and_one_that_lost_all_is_refused(tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    vislr.apply(pipe, LoraConfig(r=1, target_modules=["mid_block.attentions.0.proj_in"]), name="style")
    path = vislr.save_adapter(pipe, tmp_path / "style.safetensors")
    other = tiny.tiny_sd_pipeline()
    vislr.apply(other, LayerPlan(("up_blocks.0.resnets.0",)))
    assert not any("pruned" in note for note in vislr.load_adapter(other, path).notes)
    gone = tiny.tiny_sd_pipeline()
    vislr.apply(gone, LayerPlan(("mid_block.attentions.0",)))
    with pytest.raises(AdapterError, match="all 1 layers of the adapter lie on units that were removed"):
        vislr.load_adapter(gone, path)
    # A key that was never there is no removed unit.
    with pytest.raises(AdapterError):
        vislr.load_adapter(tiny.tiny_sd3_pipeline(), path)
