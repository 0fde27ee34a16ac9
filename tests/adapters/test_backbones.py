"""ConvLoRA, FLoRA and peft's LoRA on every family: on, one step, save, load into a fresh model, off."""

import copy

import pytest
import timm
import torch
from peft import LoHaConfig, LoraConfig
from timm.models._efficientnet_builder import decode_arch_def
from tiny import tiny_conv_net, tiny_flux_transformer, tiny_sd3_transformer, tiny_unet, tiny_vit

from vislr.adapters import ConvLoraConfig, FloraConfig, adapter_parameters, attach, detach
from vislr.anatomy import describe, sample_inputs
from vislr.core.errors import AdapterError
from vislr.formats import attach_file, read_adapter, write_adapter


def tiny_pixart():
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        cross_attention_dim=16, caption_channels=24, patch_size=2, norm_type="ada_norm_single",
    )  # fmt: skip


def tiny_dit():
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def tiny_convnext():
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 24), num_classes=3)


def tiny_mobilenet():
    # Strided convs that pad by their input's size (timm's Conv2dSame), some of them depthwise.
    return timm.models.MobileNetV3(
        decode_arch_def([["ds_r1_k3_s2_e1_c8"], ["ir_r2_k5_s2_e3_c12"]], 1.0), num_classes=3, stem_size=8,
        num_features=16, pad_type="same",
    )  # fmt: skip


MODELS = {
    "unet": tiny_unet,
    "sd3": tiny_sd3_transformer,
    "flux": tiny_flux_transformer,
    "pixart": tiny_pixart,
    "dit": tiny_dit,
    "vit": tiny_vit,
    "resnet": tiny_conv_net,
    "convnext": tiny_convnext,
    "mobilenet": tiny_mobilenet,
}
CONFIGS = {
    "convlora": ConvLoraConfig(r=2),
    "flora": FloraConfig(ranks=4),
    "lora": LoraConfig(r=2, lora_alpha=2),
}


def build(family):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    if family in ("sd3", "flux", "pixart", "dit", "convnext"):
        # Fresh ones put out zeros, or blocks do next to nothing.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    small = {"height": 32, "width": 32} if family in ("resnet", "convnext", "mobilenet") else {"tokens": 5}
    if family == "flux":
        small |= {"height": 8, "width": 8}
    elif family in ("vit", "dit"):
        small = None
    return model, sample_inputs(model, sample=small, device="cpu")


def run(model, inputs):
    output = model(**inputs)
    return output if torch.is_tensor(output) else output[0]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", MODELS)
def test_on_step_save_load_off(family, kind, tmp_path):
    model, inputs = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules, attributes = dict(model.named_modules()), set(vars(model))
    with torch.no_grad():
        output = run(model, inputs)
    attached = attach(model, CONFIGS[kind], "style")
    with torch.no_grad():
        assert torch.equal(run(model, inputs), output)
    parameters = list(adapter_parameters(model, "style").values())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(p.numel() for p in parameters)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss = (run(model, inputs) - 1).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    # Every layer that an adapter went on is used by the forward.
    unused = [n for n, p in adapter_parameters(model, "style").items() if p.grad is None]
    assert unused == []
    for name, value in model.state_dict().items():
        plain = name.replace(".base_layer", "")
        assert plain not in before or torch.equal(value, before[plain])
    with torch.no_grad():
        adapted = run(model, inputs)
    assert not torch.allclose(adapted, output, atol=1e-5)

    file = write_adapter(model, "style", tmp_path / "style.safetensors")
    fresh, _ = build(family)
    assert attach_file(fresh, "again", read_adapter(file)).sites == attached.sites
    with torch.no_grad():
        assert torch.equal(run(fresh, inputs), adapted)

    detach(model, attached)
    assert dict(model.named_modules()) == modules
    assert set(vars(model)) == attributes
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(run(model, inputs), output)


@pytest.mark.parametrize("family", MODELS)
def test_default_targets_are_the_backbone(family):
    model, _ = build(family)
    sites = attach(model, FloraConfig(ranks=1), "a").sites
    stages = {site.name: site.stage for site in describe(model).sites}
    assert {stages[site] for site in sites}.isdisjoint({"stem", "head"})
    assert not [site for site in sites if "time_emb" in site or ".norm" in site]
    expected = {
        "unet": "resnets.0.conv1",
        "sd3": "attn.to_q",
        "flux": "proj_mlp",
        "pixart": "attn2.to_k",
        "dit": "ff.net.2",
        "vit": "attn.qkv",
        "resnet": "conv2",
        "convnext": "conv_dw",
        "mobilenet": "conv_pw",
    }
    assert any(site.endswith(expected[family]) for site in sites)


@pytest.mark.parametrize("kind", ["convlora", "flora"])
def test_merging_a_net_with_padding_by_input(kind):
    model, inputs = build("mobilenet")
    attach(model, ConvLoraConfig(r=1, target_modules=r"conv_stem|blocks\..*conv.*") if kind == "convlora" else
           FloraConfig(ranks=0.5, target_modules=r"conv_stem|blocks\..*conv.*"), "a")  # fmt: skip
    with torch.no_grad():
        for parameter in adapter_parameters(model, "a").values():
            parameter.copy_(0.05 * torch.randn_like(parameter))
        adapted = run(model, inputs)
        for module in model.modules():
            if hasattr(module, "merged_adapters"):
                module.merge()
        assert torch.allclose(run(model, inputs), adapted, rtol=1e-4, atol=1e-5)


def test_peft_is_refused_where_it_pads_wrongly():
    model, _ = build("mobilenet")
    with pytest.raises(AdapterError, match="padding chosen from the input"):
        attach(model, LoHaConfig(target_modules=["conv_stem"]), "a")


def test_another_architecture(tmp_path):
    model, _ = build("dit")
    attach(model, CONFIGS["convlora"], "a")
    file = read_adapter(write_adapter(model, "a", tmp_path / "a.safetensors"))
    for other in ("pixart", "vit", "unet"):
        wrong, _ = build(other)
        modules = dict(wrong.named_modules())
        with pytest.raises(AdapterError, match="the adapter is for"):
            attach_file(wrong, "a", file)
        assert dict(wrong.named_modules()) == modules


def test_an_adapter_on_a_pruned_copy_is_refused_by_shape(tmp_path):
    model, _ = build("unet")
    attach(model, CONFIGS["convlora"], "a")
    file = read_adapter(write_adapter(model, "a", tmp_path / "a.safetensors"))
    wider = tiny_unet(block_out_channels=(32, 64))
    modules, weights = dict(wider.named_modules()), copy.deepcopy(wider.state_dict())
    with pytest.raises(AdapterError, match="has shape"):
        attach_file(wider, "a", file, any_base=True)
    assert dict(wider.named_modules()) == modules
    assert all(torch.equal(value, weights[name]) for name, value in wider.state_dict().items())
