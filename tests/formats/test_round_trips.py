"""Family x format x kind of adapter: the change of every weight after reading is the one that was written."""

from __future__ import annotations

import pytest
import torch
from entries import SITES, random_adapter

from vislr.core.errors import FormatError
from vislr.formats import parse, read_canonical, render, write_canonical
from vislr.formats.canonical import CanonicalAdapter, Entry
from vislr.formats.exchange import FORMATS

KINDS = ("lora", "tucker", "dora", "dora in", "loha", "loha tucker", "lokr", "lokr whole", "diff", "convlora", "flora",
         "sara", "qalora")  # fmt: skip
IN_MEMORY = ("vislr", "kohya", "comfy", "diffusers")
# Kinds that a format has no place for, or only with a base: refused by name.
REFUSED = {
    "diffusers": {"dora in": "norm per input", "diff": "bias's change", "sara": "bias's change"},
    "kohya": {"dora": "all of them", "dora in": "magnitude"},
    "comfy": {"dora": "all of them", "dora in": "magnitude"},
}
# Families whose modules are fused in the original code; elsewhere kohya and ComfyUI keep DoRA.
FUSED = ("sd3", "flux")
NO_COMFY = ("dit", "timm")


def deltas(adapter: CanonicalAdapter) -> dict[str, torch.Tensor]:
    """Full name -> (product, bias's change, magnitude) in float64, each flat, one after the other."""
    found = {}
    for name, entry in adapter.entries.items():
        parts = [entry.product(torch.float64).flatten()]
        bias = entry.bias_delta(torch.float64)
        # A fused layer's bias is there for all parts if it is for one; zeros are no change.
        if bias is not None and bias.any():
            parts.append(bias)
        if entry.dora:
            parts.append(entry.tensors["dora_scale"].double().flatten())
        found[name] = torch.cat(parts)
    return found


def refusal(family: str, form: str, kind: str) -> str | None:
    """Part of the message with which this combination is refused; None: it is written."""
    if form == "comfy" and family in NO_COMFY:
        return "ComfyUI has no module"
    if form == "diffusers" and family == "timm":
        return "components of pipelines"
    if form in ("kohya", "comfy") and kind.startswith("dora") and family not in FUSED:
        return None
    return REFUSED.get(form, {}).get(kind)


@pytest.mark.parametrize("form", IN_MEMORY)
@pytest.mark.parametrize("family", SITES)
def test_every_kind_comes_back(family, form):
    for kind in KINDS:
        adapter = random_adapter(family, kind)
        if not adapter.entries:
            continue
        message = refusal(family, form, kind)
        if message is not None:
            if kind == "sara" and all(entry.bias_delta() is None for entry in adapter.entries.values()):
                continue
            with pytest.raises(FormatError, match=message):
                render(adapter, form)
            continue
        tensors, header, done = render(adapter, form)
        back = parse(tensors, header, family=family)
        assert back.family == family
        expected, found = deltas(adapter), deltas(back)
        assert set(found) == set(expected), kind
        # ConvLoRA's exact rank may be above the weight's, and is cut by SVD then; all else is exact for these values.
        tolerance = 1e-6 if kind in ("convlora", "sara") else 0.0
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=0, atol=tolerance), (kind, name)
        assert done.worst < 1e-6


@pytest.mark.parametrize("form", FORMATS)
def test_through_files(tmp_path, form):
    adapter = random_adapter("sdxl", "lora")
    done = write_canonical(adapter, tmp_path / "out.safetensors", form)
    back = read_canonical(tmp_path / "out.safetensors")
    assert back.family == "sdxl"
    assert back.format == ("peft" if form == "peft" else form)
    expected, found = deltas(adapter), deltas(back)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert done.path == tmp_path / "out.safetensors"
    assert done.worst == 0


def test_a_chain_of_formats_ends_where_it_began(tmp_path):
    adapter = start = random_adapter("flux", "lora")
    for form in ("kohya", "comfy", "diffusers", "peft", "vislr"):
        write_canonical(adapter, tmp_path / form, form)
        adapter = read_canonical(tmp_path / form)
    assert set(adapter.entries) == set(start.entries)
    for name, entry in start.entries.items():
        # Ranks are back where they were, too: what was fused comes apart.
        assert adapter.entries[name].rank == entry.rank
        assert torch.equal(adapter.entries[name].product(), entry.product())


def test_fusing_keeps_the_scale_and_multiplies_the_rank():
    adapter = random_adapter("flux", "lora")
    tensors, _, _ = render(adapter, "kohya")
    key = "lora_unet_single_blocks_37_linear1"
    assert tensors[f"{key}.lora_down.weight"].shape[0] == 8  # four LoRAs of rank 2
    assert tensors[f"{key}.alpha"] == 4.0  # alpha / rank is 1 / 2, as before
    assert tensors[f"{key}.lora_up.weight"].shape[0] == 7 * 48


def test_halves_of_the_last_norm_are_swapped():
    adapter = random_adapter("sd3", "lora")
    tensors, _, _ = render(adapter, "kohya")
    up = adapter.entries["transformer.norm_out.linear"].tensors["lora_up.weight"]
    half = len(up) // 2
    swapped = tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(swapped, torch.cat([up[half:], up[:half]]))
    # Of the context's norms, that of the last block alone has two chunks, and is swapped.
    for block, moved in ((23, True), (3, False)):
        own = adapter.entries[f"transformer.transformer_blocks.{block}.norm1_context.linear"].tensors["lora_up.weight"]
        there = tensors[f"lora_unet_joint_blocks_{block}_context_block_adaLN_modulation_1.lora_up.weight"]
        assert torch.equal(there, own) is not moved


def test_a_lone_part_of_a_fused_module_leaves_the_others_alone():
    adapter = random_adapter("sd3", "lora")
    back = parse(*render(adapter, "comfy")[:2])
    fused = [name for name in back.entries if "transformer_blocks.1.attn.add_" in name]
    assert fused == ["transformer.transformer_blocks.1.attn.add_k_proj"]


def test_a_core_is_padded_for_comfy_and_folded_for_diffusers():
    adapter = random_adapter("sd15", "tucker")
    name = "unet.down_blocks.1.resnets.0.conv1"
    entry = adapter.entries[name]
    assert entry.tensors["lora_mid.weight"].shape[:2] == (3, 2)
    comfy = render(adapter, "comfy")[0]
    key = "diffusion_model.input_blocks.4.0.in_layers.2"
    assert comfy[f"{key}.lora_mid.weight"].shape[:2] == (3, 3)
    assert comfy[f"{key}.alpha"] == 1.5  # 1 / 2 of a divisor that went from 2 to 3
    diffusers, header, _ = render(adapter, "diffusers")
    assert diffusers[f"{name}.lora_A.weight"].shape[0] == 3
    assert not any(key.endswith(".alpha") for key in diffusers)
    assert '"unet.lora_alpha": 1.5' in header["lora_adapter_metadata"]


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "convlora", "flora", "sara"])
def test_svd_states_its_error(kind):
    adapter = random_adapter("sd2", kind)
    tensors, header, done = render(adapter, "diffusers", rank=1)
    back = parse(tensors, header, family="sd2")
    assert done.errors
    for name, entry in adapter.entries.items():
        wanted, given = entry.product(torch.float64), back.entries[name].product(torch.float64)
        error = float((given.reshape(wanted.shape) - wanted).norm() / wanted.norm())
        assert back.entries[name].rank == 1
        assert error == pytest.approx(done.errors.get(name, 0.0), abs=1e-5)


def test_dora_is_baked_with_the_base_weights():
    adapter = random_adapter("sd15", "dora in")
    weights = {
        name: torch.randn(entry.shape, generator=torch.Generator().manual_seed(7))
        for name, entry in adapter.entries.items()
    }
    with pytest.raises(FormatError, match="give the base model"):
        render(adapter, "kohya", dora="bake")
    whole = parse(*render(adapter, "kohya", dora="diff", weights=weights)[:2])
    baked = parse(*render(adapter, "diffusers", dora="bake", weights=weights)[:2])
    for name, entry in adapter.entries.items():
        wanted = entry.delta(weights[name])
        assert torch.equal(whole.entries[name].delta(), wanted)
        assert torch.allclose(baked.entries[name].delta(), wanted, atol=1e-5)


def test_norms_go_to_kohya_and_are_refused_or_dropped_elsewhere():
    adapter = random_adapter("sd15", "lora")
    norm = "unet.down_blocks.0.resnets.0.norm1"
    adapter.entries[norm] = Entry("norm", {"w_norm": torch.ones(5), "b_norm": torch.ones(5)}, (5,))
    back = parse(*render(adapter, "kohya")[:2])
    assert torch.equal(back.entries[norm].bias_delta(), torch.ones(5))
    with pytest.raises(FormatError, match=f"'{norm}': format 'diffusers' has no place for a norm's change"):
        render(adapter, "diffusers")
    assert render(adapter, "diffusers", drop=True)[2].dropped == [norm]


def test_storing_in_half_precision_leaves_alphas_alone():
    tensors, _, _ = render(random_adapter("sd15", "lora"), "kohya", dtype=torch.bfloat16)
    assert {t.dtype for key, t in tensors.items() if key.endswith(".alpha")} == {torch.float32}
    assert {t.dtype for key, t in tensors.items() if not key.endswith(".alpha")} == {torch.bfloat16}
