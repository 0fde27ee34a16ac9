"""Counts against figures from elsewhere: a real forward counted by hand, and published totals."""

import pytest
import tiny
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vislr.anatomy import ARCHITECTURES, describe, flops, sample_inputs, sample_of, skeleton
from vislr.core.errors import ConfigError, ModelError


def tiny_pixart():
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=8, patch_size=2, num_layers=2, num_attention_heads=3, attention_head_dim=8, in_channels=4,
        out_channels=8, cross_attention_dim=24, caption_channels=24, norm_num_groups=4, use_additional_conditions=True,
    ).eval()  # fmt: skip


def tiny_dit():
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=8, patch_size=2, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4,
        out_channels=8, num_embeds_ada_norm=10, norm_num_groups=4,
    ).eval()  # fmt: skip


def sdxl_unet():
    return tiny.tiny_sdxl_pipeline().unet


def class_unet():
    return tiny.tiny_unet(class_embed_type="projection", projection_class_embeddings_input_dim=12)


def sd35_transformer():
    return tiny.tiny_sd3_transformer(dual_attention_layers=(0,))


def guided_flux():
    return tiny.tiny_flux_transformer(guidance_embeds=True)


def half_unet():
    return tiny.tiny_unet().to(torch.bfloat16)


def timm_model(name, **options):
    import timm

    return timm.create_model(name, num_classes=3, **options).eval()


def convnext():
    return timm_model("convnext_atto", dims=(8, 16, 24, 32), depths=(1, 1, 2, 1))


def mobilenet():
    return timm_model("mobilenetv3_small_050")


def swin():
    options = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    return timm_model("swin_tiny_patch4_window7_224", **options)


def vision_resnet():
    from torchvision.models import resnet18

    return resnet18(num_classes=3).eval()


FAMILIES = {
    "sd unet": (tiny.tiny_unet, "unet", {"tokens": 16}),
    "sdxl unet": (sdxl_unet, "unet", {"tokens": 16}),
    "class unet": (class_unet, "unet", {"tokens": 16, "height": 12, "batch": 2}),
    "bf16 unet": (half_unet, "unet", {"tokens": 16}),
    "sd3": (tiny.tiny_sd3_transformer, "sd3", {"tokens": 16}),
    "sd3.5": (sd35_transformer, "sd3", {"tokens": 16}),
    "flux": (tiny.tiny_flux_transformer, "flux", {"tokens": 16, "height": 8, "width": 4}),
    "guided flux": (guided_flux, "flux", {"tokens": 16, "height": 8, "width": 8}),
    "pixart": (tiny_pixart, "pixart", {"tokens": 5, "batch": 2}),
    "dit": (tiny_dit, "dit", {"batch": 2}),
    "timm vit": (tiny.tiny_vit, "vit", {}),
    "timm resnet": (tiny.tiny_conv_net, "conv", {"height": 32, "width": 48}),
    "timm convnext": (convnext, "conv", {"height": 64, "width": 64}),
    "timm mobilenet": (mobilenet, "conv", {"height": 64, "width": 64}),
    "timm swin": (swin, "conv", {}),
    "torchvision resnet": (vision_resnet, "conv", {"height": 64, "width": 64}),
}


class ProductCount(TorchFunctionMode):
    """What layers do not do: products of q, k and v, 2 Nq Nk (d + dv) FLOPs a head, fused or one by one."""

    total = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, key, value = (given[name] for name in ("query", "key", "value"))
            heads = query.shape[:-2].numel()
            self.total += 2 * heads * query.shape[-2] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        elif func in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            self.total += 2 * output.numel() * args[0].shape[-1]
        return output


def counted_by_hand(model, inputs):
    """(FLOPs per layer name, FLOPs of other products) of one real forward, from weights and output sizes alone."""
    layers = {}

    def note(name):
        def hook(module, args, output):
            # Every output number is a sum over one row of the weight.
            layers[name] = layers.get(name, 0) + 2 * output.numel() * module.weight[0].numel()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(note(name))
    with torch.no_grad(), ProductCount() as products:
        model(**inputs)
    return layers, products.total


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_equal_a_real_forward(name):
    build, family, sample = FAMILIES[name]
    model = build()
    anatomy = describe(model, sample)
    layers, products = counted_by_hand(model, sample_inputs(model, sample, device="cpu"))
    counted = {s.name: s.flops for s in anatomy.sites if s.kind in ("conv", "linear") and s.flops}
    assert anatomy.family == family
    assert counted == layers
    assert anatomy.flops == sum(layers.values()) + products == flops(model, sample)
    assert sum(stage.flops for stage in anatomy.stages()) == anatomy.flops
    assert anatomy.parameters == sum(p.numel() for p in model.parameters())
    assert sum(stage.parameters for stage in anatomy.stages()) == anatomy.parameters
    assert anatomy.sample == sample_of(model, sample)
    assert sample.items() <= anatomy.sample.items()


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_are_the_models_modules_in_forward_order(name):
    build, _, sample = FAMILIES[name]
    model = build()
    modules = dict(model.named_modules())
    anatomy = describe(model, sample)
    assert [site.depth for site in anatomy.sites] == list(range(len(anatomy.sites)))
    convs = {n for n, m in modules.items() if isinstance(m, nn.Conv2d)}
    assert {s.name for s in anatomy.sites if s.kind == "conv"} == convs
    linears = {n for n, m in modules.items() if isinstance(m, nn.Linear)}
    assert {s.name for s in anatomy.sites if s.kind == "linear"} == linears
    norms = {n for n, m in modules.items() if isinstance(m, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d))}
    assert norms <= {s.name for s in anatomy.sites if s.kind == "norm"}
    called = []
    for site in anatomy.sites:
        assert site.type == type(modules[site.name]).__name__
        weight = getattr(modules[site.name], "weight", None)
        assert site.shape == (() if weight is None else tuple(weight.shape))
        assert site.parameters == sum(p.numel() for p in modules[site.name].parameters())
        modules[site.name].register_forward_pre_hook(lambda m, a, n=site.name: called.append(n))
    with torch.no_grad():
        model(**sample_inputs(model, sample, device="cpu"))
    assert [s.name for s in anatomy.sites if s.name in called] == list(dict.fromkeys(called))


# Published or computed elsewhere: parameters, and FLOPs at the architecture's own size where known.
TRUE_SIZE = {
    "sd15": (859_520_964, 803.27e9),
    "sd21": (865_910_724, None),
    "sdxl": (2_567_463_684, 6.7612e12),
    "sd3-medium": (2_028_328_000, None),
    "sd35-large": (8_056_627_520, None),
    "flux-dev": (11_901_408_320, None),
    "flux-schnell": (11_891_178_560, None),
    "pixart-alpha": (611_349_152, None),
    "dit-xl-2": (749_826_464, 237.33e9),
}


def test_every_architecture_has_its_figure():
    assert set(TRUE_SIZE) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", TRUE_SIZE)
def test_true_size(name):
    parameters, counted = TRUE_SIZE[name]
    model = skeleton(name)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == parameters
    if counted is not None:
        assert flops(model) == pytest.approx(counted, rel=1e-4)


def test_sdxl_by_parts():
    """The block list of SDXL: 17 resnets, 11 transformers of 70 blocks, and the cost of each size of block."""
    anatomy = describe(skeleton("sdxl"))
    units = anatomy.select(kind="unit", removable=True)
    by_type = {kind: [s for s in units if s.type == kind] for kind in {s.type for s in units}}
    assert {kind: len(found) for kind, found in by_type.items()} == {
        "ResnetBlock2D": 17,
        "Transformer2DModel": 11,
        "BasicTransformerBlock": 70,
        "FeedForward": 70,
    }
    assert sum(s.parameters for s in by_type["ResnetBlock2D"]) == pytest.approx(327.9e6, rel=1e-3)
    assert sum(s.parameters for s in by_type["Transformer2DModel"]) == pytest.approx(2209.2e6, rel=1e-3)
    assert sum(s.parameters for s in by_type["FeedForward"]) == pytest.approx(1229.7e6, rel=1e-3)
    cost = sorted({round(s.flops / 1e9, 2) for s in by_type["BasicTransformerBlock"]})
    assert cost == [66.98, 104.56]
    assert len(anatomy.select(kind="attention", removable=True)) == 140


def test_flux_by_parts():
    anatomy = describe(skeleton("flux-dev"), {"height": 64, "width": 64})
    blocks = [s for s in anatomy.select(kind="unit", removable=True) if s.name == s.stage]
    assert [s.parameters for s in blocks] == [339_831_296] * 19 + [141_591_808] * 38
    assert anatomy.sites[0].stage == "stem"
    assert anatomy.sites[-1].name == "proj_out"
    assert anatomy.sites[-1].stage == "head"


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [("timm:resnet50", 4.09), ("timm:vit_base_patch16_224", 17.6), ("torchvision:convnext_tiny", 4.46)],
)
def test_classifiers_at_their_own_size(name, gmacs):
    """Multiply-adds as the libraries publish them; ours count attention's products too."""
    model = skeleton(name)
    assert sample_of(model) == {"height": 224, "width": 224, "batch": 1}
    assert flops(model) / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_a_constructor_that_computes_is_built_all_the_same():
    assert sum(p.numel() for p in skeleton("torchvision:regnet_y_400mf").parameters()) == 4_344_144


def test_flops_follow_the_sample():
    unet = tiny.tiny_unet()
    assert sample_of(unet) == {"height": 8, "width": 8, "tokens": 77, "batch": 1}
    assert flops(unet, {"batch": 3}) == 3 * flops(unet)
    assert flops(unet, {"tokens": 16}) < flops(unet)
    assert sample_inputs(unet, batch=5)["sample"].shape == (5, 4, 8, 8)
    assert sample_inputs(unet, {"batch": 2}, batch=5)["sample"].shape == (2, 4, 8, 8)


def test_sample_inputs_are_the_same_numbers_each_time():
    unet = tiny.tiny_unet().to(torch.bfloat16)
    first, second = (sample_inputs(unet, device="cpu") for _ in range(2))
    assert torch.equal(first["sample"], second["sample"])
    assert first["sample"].dtype == torch.bfloat16
    assert first["timestep"].dtype == torch.int64


def test_flux_positions_are_rows_and_columns():
    inputs = sample_inputs(tiny.tiny_flux_transformer(), {"height": 4, "width": 6}, device="cpu")
    assert inputs["img_ids"].tolist() == [[0, row, column] for row in range(2) for column in range(3)]
    assert inputs["hidden_states"].shape == (1, 6, 16)


@pytest.mark.parametrize(
    ("build", "sample", "message"),
    [
        (tiny.tiny_unet, {"hieght": 8}, "a sample of a unet model has no 'hieght'; did you mean 'height'"),
        (tiny.tiny_vit, {"tokens": 8}, "a sample of a vit model has no 'tokens'"),
        (tiny.tiny_unet, {"height": 0}, "sample height is 0; expected a whole number"),
        (tiny.tiny_unet, {"batch": True}, "sample batch is True"),
        (tiny.tiny_unet, {"width": "8"}, "sample width is '8'"),
        (tiny.tiny_sd3_transformer, {"width": 7}, "sample width 7 is no multiple of the patch size 2"),
        (tiny.tiny_flux_transformer, {"height": 7}, "sample height 7 is no multiple"),
    ],
)
def test_a_wrong_sample(build, sample, message):
    model = build()
    for function in (describe, flops, sample_inputs):
        with pytest.raises(ConfigError, match=message):
            function(model, sample)


def test_shapes_that_do_not_run_are_named():
    with pytest.raises(ModelError, match=r"one forward of VisionTransformer with .*\(1, 3, 40, 32\).* failed"):
        describe(tiny.tiny_vit(), {"height": 40})


@pytest.mark.parametrize(
    "build",
    [tiny.tiny_vae, tiny.tiny_text_encoder, lambda: nn.Linear(2, 2), lambda: nn.Sequential(nn.Linear(2, 2))],
)
def test_an_unsupported_model_lists_the_supported(build):
    with pytest.raises(ModelError, match=r"no reader for a \w+; supported are unet: .*flux: .*vit: .*conv: "):
        describe(build())


def test_what_is_no_model():
    with pytest.raises(ModelError, match="expected a diffusers pipeline or a module, not a str"):
        describe("emoji-unet")
