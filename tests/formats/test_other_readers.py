"""Files that vislr writes, read by diffusers, LyCORIS and peft; and theirs, read by vislr."""

from __future__ import annotations

import copy
import warnings

import pytest
import tiny
import torch
from entries import random_entry
from torch import nn

import vislr
from vislr.adapters.targets import adaptable
from vislr.formats import attach_adapter, canonical_of, parse, read_canonical, render, write_canonical
from vislr.formats.canonical import CanonicalAdapter, Entry, join_name
from vislr.formats.live import detach, family_of_target, parts_of


def sdxl_pipeline():
    """Two layers a block, as SDXL: the original names count them."""
    pipe = tiny.tiny_sdxl_pipeline()
    torch.manual_seed(0)
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    pipe.register_modules(unet=type(pipe.unet).from_config(config | {"layers_per_block": 2}).eval())
    return pipe


PIPELINES = {
    "sd15": tiny.tiny_sd_pipeline,
    "sdxl": sdxl_pipeline,
    "sd3": tiny.tiny_sd3_pipeline,
    "flux": tiny.tiny_flux_pipeline,
}
# What diffusers 0.42 reads of ours: all diffusers files; kohya's of UNets and FLUX; ComfyUI's of FLUX.
READS = {"sd15": ("diffusers", "kohya"), "sdxl": ("diffusers", "kohya"), "sd3": ("diffusers",),
         "flux": ("diffusers", "kohya", "comfy")}  # fmt: skip


def picture(pipe):
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe("a red car", num_inference_steps=1, generator=generator, output_type="np").images)


def adapter_for(pipe, kind="lora", text=False):
    """An adapter on every third layer of the denoiser, weak enough that pictures stay pictures."""
    family, entries = family_of_target(pipe), {}
    generator = torch.Generator().manual_seed(1)
    for component, module in parts_of(pipe).items():
        layers = adaptable(module)
        if component.startswith("text_encoder"):
            layers = {site: layer for site, layer in layers.items() if text and "self_attn" in site}
        for n, (site, layer) in enumerate(layers.items()):
            if n % 3 or (family == "flux" and _beyond_diffusers(site)):
                continue
            form = kind if layer.weight.dim() > 2 or "tucker" not in kind else "lora"
            entry = random_entry(form, tuple(layer.weight.shape), generator)
            if layer.bias is None:
                entry.tensors.pop("diff_b", None)
            first = {"lora": "lora_up.weight", "loha": "hada_w1_a", "lokr": "lokr_w1", "diff": "diff"}[entry.kind]
            entry.tensors[first] = entry.tensors[first] / 8
            path = f"text_model.{site}" if component.startswith("text") and not site.startswith("text_model.") else site
            entries[join_name(component, path)] = entry
    return CanonicalAdapter(entries, family)


def _beyond_diffusers(site):
    """diffusers has the widths of FLUX's fused input layers in its code, and loses both ends of such files."""
    ends = "_embed" in site or site in ("proj_out", "norm_out.linear")
    return ends or ("single" in site and ("attn." in site or "proj_mlp" in site))


@pytest.mark.parametrize("family", PIPELINES)
def test_diffusers_gives_our_picture(family, tmp_path):
    pipe = PIPELINES[family]()
    plain = picture(pipe)
    adapter = adapter_for(pipe, "tucker")
    put = attach_adapter(pipe, adapter, "ours")
    ours = picture(pipe)
    assert not torch.allclose(ours, plain, atol=1e-3)
    detach(None, put)
    assert torch.equal(picture(pipe), plain)
    # Folded by the format itself for diffusers; diffusers refuses Tucker cores, so kohya's are folded before.
    folded = parse(*render(adapter, "diffusers")[:2], family=family)
    for form in READS[family]:
        write_canonical(folded, tmp_path / f"{form}.safetensors", form)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe.load_lora_weights(tmp_path / f"{form}.safetensors", adapter_name="theirs")
        assert torch.allclose(picture(pipe), ours, atol=1e-4), form
        pipe.unload_lora_weights()


@pytest.mark.parametrize("kind", ["tucker", "loha", "lokr", "diff"])
def test_files_that_diffusers_refuses_load_and_switch(kind, tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    plain = picture(pipe)
    adapter = adapter_for(pipe, kind)
    if kind == "diff":
        for path, module in pipe.unet.named_modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                changed = {part: torch.randn(len(module.weight)) / 8 for part in ("w_norm", "b_norm")}
                adapter.entries[f"unet.{path}"] = Entry("norm", changed, tuple(module.weight.shape))
    file = tmp_path / "style.safetensors"
    write_canonical(adapter, file, "kohya")
    with pytest.raises(Exception, match=r".+"):
        pipe.load_lora_weights(file, adapter_name="theirs")
    pipe.unload_lora_weights()
    report = vislr.load_adapter(pipe, file, name="style")
    assert len(report.sites) == len(adapter.entries)
    merged = tiny.tiny_sd_pipeline()
    with torch.no_grad():
        for name, entry in adapter.entries.items():
            layer = merged.unet.get_submodule(name.removeprefix("unet."))
            layer.weight += entry.delta().reshape(layer.weight.shape)
            if entry.bias_delta() is not None and layer.bias is not None:
                layer.bias += entry.bias_delta()
    assert torch.allclose(picture(pipe), picture(merged), atol=1e-4)
    pipe.set_adapters(["style"], [0.0])
    assert torch.allclose(picture(pipe), plain, atol=1e-5)
    pipe.set_adapters(["style"], [1.0])
    pipe.fuse_lora(adapter_names=["style"])
    assert torch.allclose(picture(pipe), picture(merged), atol=1e-4)
    pipe.unfuse_lora()
    vislr.save_adapter(pipe, tmp_path / "again.safetensors", name="style", format="kohya")
    again = read_canonical(tmp_path / "again.safetensors")
    for name, entry in read_canonical(file).entries.items():
        assert torch.equal(again.entries[name].product(), entry.product())
    # In vislr's own format the tensors come back as they are, config and hash of the base with them.
    vislr.save_adapter(pipe, tmp_path / "own.safetensors", name="style")
    ours = picture(pipe)
    vislr.remove(pipe, report)
    assert torch.equal(picture(pipe), plain)
    vislr.load_adapter(pipe, tmp_path / "own.safetensors", name="own")
    assert torch.equal(picture(pipe), ours)


def test_text_encoders_load_whatever_transformers_calls_them(tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    adapter = adapter_for(pipe, text=True)
    assert any(name.startswith("text_encoder.text_model.encoder.layers.0") for name in adapter.entries)
    plain = pipe.encode_prompt("a red car", "cpu", 1, False)[0]
    for form in ("kohya", "diffusers"):
        write_canonical(adapter, tmp_path / f"{form}.safetensors", form)
        report = vislr.load_adapter(pipe, tmp_path / f"{form}.safetensors", name=form)
        changed = pipe.encode_prompt("a red car", "cpu", 1, False)[0]
        assert not torch.allclose(changed, plain, atol=1e-4)
        back = canonical_of(pipe, form)
        assert set(back.entries) == set(adapter.entries)
        with pytest.raises(vislr.VislrError, match="'text_encoder' carries the adapter"):
            vislr.save(pipe, tmp_path / "folder")
        vislr.set_adapters(pipe, [form], [0.0])
        assert torch.equal(pipe.encode_prompt("a red car", "cpu", 1, False)[0], plain)
        vislr.remove(pipe, report)
        assert torch.equal(pipe.encode_prompt("a red car", "cpu", 1, False)[0], plain)


def test_a_file_with_more_than_the_target_has_is_refused_by_name(tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    write_canonical(adapter_for(pipe, text=True), tmp_path / "a.safetensors", "kohya")
    with pytest.raises(vislr.VislrError, match="layers for 'text_encoder', which this UNet2DConditionModel lacks"):
        vislr.load_adapter(pipe.unet, tmp_path / "a.safetensors")
    with pytest.raises(vislr.VislrError, match="is for the family 'sd15'; this FluxPipeline is 'flux'"):
        vislr.load_adapter(tiny.tiny_flux_pipeline(), tmp_path / "a.safetensors")


def test_peft_loads_our_folders(tmp_path):
    from peft import PeftModel

    unet = tiny.tiny_unet()
    adapter = adapter_for(unet, "dora")
    put = attach_adapter(unet, adapter, "ours")
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
    ours = unet(sample, 3, text).sample
    detach(None, put)
    write_canonical(adapter, tmp_path / "folder", "peft")
    theirs = PeftModel.from_pretrained(unet, tmp_path / "folder" / "unet")
    assert torch.allclose(theirs(sample, 3, encoder_hidden_states=text).sample, ours, atol=1e-6)
    theirs.save_pretrained(tmp_path / "saved")
    back = read_canonical(tmp_path / "saved")
    for name, entry in adapter.entries.items():
        weight = unet.get_submodule(name.removeprefix("unet.")).get_base_layer().weight.detach()
        assert torch.allclose(back.entries[name].delta(weight), entry.delta(weight), atol=1e-6)


class Net(nn.Module):
    """A conv with a kernel, a conv without, a linear; named as in a ResNet."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(8, 12, 3), "conv2": nn.Conv2d(12, 12, 1)})])
        self.fc = nn.Linear(16, 24)


def assert_same_output(theirs, layer, delta, bias=0):
    """Their forward against the base layer with our delta; their `get_merged_weight` has LoHa's scale twice."""
    x = torch.randn(2, layer.weight.shape[1], *(6,) * (layer.weight.dim() - 2))
    with torch.no_grad():
        wanted = torch.func.functional_call(layer, {"weight": layer.weight + delta, "bias": layer.bias + bias}, (x,))
        assert torch.allclose(theirs(x), wanted, atol=1e-5)


SHAPES = {"layer1.0.conv1": (12, 8, 3, 3), "layer1.0.conv2": (12, 12, 1, 1), "fc": (24, 16)}


@pytest.mark.parametrize(
    "kind", ["lora", "tucker", "loha", "loha tucker", "lokr", "lokr whole", "dora", "convlora", "flora"]
)
def test_lycoris_gives_our_deltas(kind):
    lycoris = pytest.importorskip("lycoris.wrapper")
    generator = torch.Generator().manual_seed(0)
    entries = {}
    for site, shape in SHAPES.items():
        fits = "tucker" not in kind or shape[2:] == (3, 3)
        form = kind if fits else {"tucker": "lora"}.get(kind, "loha")
        entries[site] = random_entry(form, shape, generator)
    tensors, _, _ = render(CanonicalAdapter(entries, "timm"), "kohya")
    net = Net()
    with torch.no_grad():
        network, _ = lycoris.create_lycoris_from_weights(1.0, None, net, {k: v.clone() for k, v in tensors.items()})
    assert len(network.loras) == len(entries)
    for layer in network.loras:
        site = next(site for site in SHAPES if layer.lora_name == "lycoris_" + site.replace(".", "_"))
        weight = net.get_submodule(site).weight.detach()
        assert_same_output(layer, net.get_submodule(site), entries[site].delta(weight))


OPTIONS = {
    "locon": {},
    "locon tucker": {"use_tucker": True},
    "loha": {},
    "loha tucker": {"use_tucker": True},
    "lokr": {"factor": 2},
    "lokr both": {"factor": 4, "decompose_both": True},
    "lokr tucker": {"factor": 2, "use_tucker": True},
    "lora dora": {"dora_wd": True},
    "lora dora in": {"dora_wd": True, "wd_on_output": False},
    "full": {},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_lycoris_writes_is_read(name):
    wrapper = pytest.importorskip("lycoris.wrapper")
    torch.manual_seed(0)
    net = Net()
    wrapper.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
    algo = {"lora": "locon"}.get(name.split()[0], name.split()[0])
    network = wrapper.create_lycoris(net, 1.0, linear_dim=2, linear_alpha=1, algo=algo, conv_dim=2, conv_alpha=1,
                                     **OPTIONS[name])  # fmt: skip
    plain = copy.deepcopy(net)
    network.apply_to()
    with torch.no_grad():
        for layer in network.loras:
            for key, parameter in layer.named_parameters():
                if "dora_scale" not in key and not key.startswith("org_module"):
                    parameter.copy_(torch.randn_like(parameter) / 4)
    back = parse({key: value.detach() for key, value in network.state_dict().items()}, {})
    assert back.family == "timm"
    assert len(back.entries) == len(network.loras) == 3
    for layer in network.loras:
        site = next(site for site in SHAPES if layer.lora_name == "lycoris_" + site.replace(".", "_"))
        weight = plain.get_submodule(site).weight.detach()
        entry, bias = back.entries[site], back.entries[site].bias_delta()
        delta = entry.delta(weight).reshape(weight.shape)
        assert_same_output(layer, plain.get_submodule(site), delta, 0 if bias is None else bias)


def test_diffusers_takes_fused_input_layers_of_flux_apart_as_we_do():
    """At the true width, which diffusers has in its code; the other layers are compared in a pipeline."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    generator = torch.Generator().manual_seed(0)
    shapes = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    entries = {
        f"transformer.single_transformer_blocks.3.{path}": random_entry("lora", (out, 3072), generator)
        for path, out in shapes.items()
    }
    tensors, _, _ = render(CanonicalAdapter(entries, "flux"), "kohya")
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    back = parse(theirs, {})
    assert set(back.entries) == set(entries)
    for name, entry in entries.items():
        assert torch.equal(back.entries[name].product(), entry.product())
