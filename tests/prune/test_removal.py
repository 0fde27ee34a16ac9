"""Units leave the model with their parameters, in every family, and come back as they were."""

import pytest
import tiny
import torch
from torch import nn

import vislr
from vislr.anatomy import describe, flops, sample_inputs
from vislr.core.errors import ConfigError, ModelError, TargetError, UndoError
from vislr.prune import LayerPlan, units_of, without
from vislr.prune.removal import attach, detach
from vislr.prune.skips import Removed


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


def timm_model(name, **options):
    import timm

    return timm.create_model(name, num_classes=3, **options).eval()


def bottlenecks():
    return timm_model("resnet26t", stem_width=8, channels=(8, 8, 8, 8))


def convnext():
    return timm_model("convnext_atto", dims=(8, 16, 24, 32), depths=(1, 1, 2, 1))


def mobilenet():
    return timm_model("mobilenetv3_small_050")


def vision_resnet():
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    return ResNet(BasicBlock, [1, 2, 1, 1], num_classes=3).eval()


# family -> (model, sample, granularities)
FAMILIES = {
    "sd": (tiny.tiny_unet, {"tokens": 16}, ("transformer", "sub")),
    "sdxl": (sdxl_unet, {"tokens": 16}, ("transformer", "block", "sub")),
    "sd3": (tiny.tiny_sd3_transformer, {"tokens": 16}, ("block", "sub", "part")),
    "sd3.5": (lambda: tiny.tiny_sd3_transformer(dual_attention_layers=(0,)), {"tokens": 16}, ("sub", "part")),
    "flux": (tiny.tiny_flux_transformer, {"tokens": 16, "height": 8, "width": 4}, ("block", "sub", "part")),
    "pixart": (tiny_pixart, {"tokens": 5}, ("block", "sub")),
    "dit": (tiny_dit, {}, ("block", "sub")),
    "vit": (tiny.tiny_vit, {}, ("block", "sub")),
    "scaled vit": (lambda: timm_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2,
                                      init_values=0.1), {}, ("sub",)),
    "resnet": (tiny.tiny_conv_net, {"height": 32, "width": 48}, ("block",)),
    "bottlenecks": (bottlenecks, {"height": 32, "width": 32}, ("block",)),
    "convnext": (convnext, {"height": 64, "width": 64}, ("block",)),
    "mobilenet": (mobilenet, {"height": 64, "width": 64}, ("block",)),
    "torchvision resnet": (vision_resnet, {"height": 64, "width": 64}, ("block",)),
}  # fmt: skip
# One case of each kind of block at its finest; the others say the same of coarser units and of other layouts.
_QUICK = {("sd", "sub"), ("sdxl", "block"), ("sd3", "part"), ("flux", "part"), ("pixart", "sub"), ("dit", "sub"),
          ("vit", "sub"), ("resnet", "block"), ("convnext", "block")}  # fmt: skip
CASES = [
    case if case in _QUICK else pytest.param(*case, marks=pytest.mark.slow)
    for case in ((family, granularity) for family, (_, _, kinds) in FAMILIES.items() for granularity in kinds)
]


def size(model):
    return sum(p.numel() for p in model.parameters())


def answer(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return output if torch.is_tensor(output) else output[0]


def random_norms(model):
    """Fresh BatchNorms and scales are the identity or nearly zero; give every branch something to say."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return model


@pytest.mark.parametrize(("family", "granularity"), CASES)
def test_every_unit_alone_and_all_together(family, granularity):
    build, sample, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = random_norms(build())
    inputs = sample_inputs(model, sample, device="cpu")
    base, total = answer(model, inputs), size(model)
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    inventory = units_of(model, granularity, sample=sample)
    assert inventory.parameters == total
    assert inventory.flops == flops(model, sample)
    for unit in inventory.units:
        attached = attach(model, LayerPlan((unit.name,)))
        assert size(model) == total - unit.parameters
        if unit.index % 6 == 0:
            assert flops(model, sample) == inventory.flops - unit.flops
        pruned = answer(model, inputs)
        assert pruned.shape == base.shape
        assert not torch.equal(pruned, base)
        detach(model, attached)
        with without(model, [unit.name]):
            assert torch.equal(answer(model, inputs), pruned), "the bypass is the removal"
        assert torch.equal(answer(model, inputs), base)
    every = LayerPlan(tuple(unit.name for unit in inventory.units))
    report = vislr.apply(model, every, name="all")
    assert report.parameters == (total, size(model))
    assert total - size(model) == inventory.most() == inventory.saved(every.removed)
    assert inventory.flops - flops(model, sample) == inventory.most("flops")
    assert answer(model, inputs).shape == base.shape
    assert describe(model, sample).family == describe(build(), sample).family
    vislr.remove(model, report)
    assert torch.equal(answer(model, inputs), base)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_nothing_changes_nothing(family):
    build, sample, _ = FAMILIES[family]
    model = build()
    inputs, modules = sample_inputs(model, sample, device="cpu"), dict(model.named_modules())
    base = answer(model, inputs)
    vislr.apply(model, LayerPlan(()))
    assert torch.equal(answer(model, inputs), base)
    assert dict(model.named_modules()) == modules


# A branch whose last layer is zero adds nothing: removal must give the very same picture.
LAST_LAYERS = {
    "sd": {"up_blocks.0.resnets.1": "conv2", "down_blocks.0.resnets.0": "conv2",
           "mid_block.attentions.0.transformer_blocks.0.attn2": "to_out.0", "mid_block.attentions.0": "proj_out",
           "mid_block.attentions.0.transformer_blocks.0.ff": "net.2"},
    "sd3": {"transformer_blocks.0.ff": "net.2", "transformer_blocks.0.ff_context": "net.2",
            "transformer_blocks.1.ff": "net.2"},
    "flux": {"single_transformer_blocks.0": "proj_out", "transformer_blocks.0.ff_context": "net.2"},
    "pixart": {"transformer_blocks.1.attn1": "to_out.0", "transformer_blocks.0.ff": "net.2"},
    "dit": {"transformer_blocks.1.attn1": "to_out.0", "transformer_blocks.0.ff": "net.2"},
    "vit": {"blocks.0.attn": "proj", "blocks.1.mlp": "fc2"},
    "scaled vit": {"blocks.1.attn": "proj"},
    "resnet": {"layer1.0": "bn2", "layer3.0": "bn2"},
    "bottlenecks": {"layer1.1": "bn3", "layer2.0": "bn3"},
    "convnext": {"stages.2.blocks.1": "mlp.fc2"},
    "mobilenet": {"blocks.1.1": "bn3"},
    "torchvision resnet": {"layer2.1": "bn2", "layer2.0": "bn2"},
}  # fmt: skip


@pytest.mark.parametrize(("family", "unit"), [(f, unit) for f, units in LAST_LAYERS.items() for unit in units])
def test_a_branch_that_adds_nothing_is_removed_without_a_trace(family, unit):
    build, sample, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = random_norms(build())
    inputs = sample_inputs(model, sample, device="cpu")
    last = model.get_submodule(f"{unit}.{LAST_LAYERS[family][unit]}")
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    base = answer(model, inputs)
    vislr.apply(model, LayerPlan((unit,)))
    torch.testing.assert_close(answer(model, inputs), base, rtol=0, atol=1e-6)


def test_a_channel_changing_resnet_keeps_its_shortcut():
    unet = tiny.tiny_unet(resnet_out_scale_factor=2.0)
    resnet = unet.up_blocks[0].resnets[0]
    assert resnet.conv_shortcut is not None
    shortcut, x = resnet.conv_shortcut, torch.randn(2, resnet.in_channels, 4, 4)
    vislr.apply(unet, LayerPlan(("up_blocks.0.resnets.0",)))
    stands = unet.up_blocks[0].resnets[0]
    assert list(stands.state_dict()) == ["conv_shortcut.weight", "conv_shortcut.bias"]
    assert torch.equal(stands(x, None), shortcut(x) / resnet.output_scale_factor)


@pytest.mark.parametrize("removal", ["skip", "identity"])
def test_identity_removal_adds_the_gated_norm_and_skip_adds_nothing(removal):
    torch.manual_seed(0)
    model = tiny.tiny_sd3_transformer()
    block = model.transformer_blocks[0]
    hidden, context, temb = torch.randn(2, 16, 16), torch.randn(2, 5, 16), torch.randn(2, 16)
    _, _, shift, scale, gate = block.norm1(hidden, emb=temb)
    with torch.no_grad(), without(model, ["transformer_blocks.0.attn"]):
        rest = block(hidden, context, temb)[1]
    vislr.apply(model, LayerPlan(("transformer_blocks.0.attn", "transformer_blocks.0.ff"), removal=removal))
    with torch.no_grad():
        out = block(hidden, context, temb)[1]
        if removal == "skip":
            assert torch.equal(out, hidden)
            return
        middle = hidden + block.norm1(hidden, emb=temb)[1][:, None] * block.norm1(hidden, emb=temb)[0]
        normed = block.norm2(middle) * (1 + scale[:, None]) + shift[:, None]
        assert torch.equal(out, middle + gate[:, None] * normed)
        assert not torch.equal(out, rest)


def test_an_adaptive_norm_is_replaced_by_a_plain_one():
    model = tiny.tiny_sd3_transformer(dual_attention_layers=(0,))
    hidden, emb = torch.randn(2, 16, 16), torch.randn(2, 16)
    plain = nn.functional.layer_norm(hidden, (16,), eps=1e-6)
    shapes = [len(model.transformer_blocks[i].norm1(hidden, emb=emb)) for i in (0, 1)]
    names = ("transformer_blocks.0.norm1", "transformer_blocks.1.norm1", "transformer_blocks.1.norm1_context")
    vislr.apply(model, LayerPlan(names))
    for i, count in enumerate(shapes):
        out = model.transformer_blocks[i].norm1(hidden, emb=emb)
        assert len(out) == count
        assert torch.equal(out[0], plain)
        assert [float(value) for value in out[1:5]] == [1, 0, 0, 1]
    # The last block has no gates on its context.
    assert torch.equal(model.transformer_blocks[1].norm1_context(hidden, emb), plain)


@pytest.mark.parametrize(("build", "blocks"), [
    (tiny.tiny_sd3_transformer, ["transformer_blocks.1"]),
    (tiny.tiny_sd3_transformer, ["transformer_blocks.0"]),
    (tiny.tiny_flux_transformer, ["transformer_blocks.0", "single_transformer_blocks.0"]),
])  # fmt: skip
def test_a_skipped_block_returns_both_streams_untouched(build, blocks):
    model = build()
    vislr.apply(model, LayerPlan(tuple(blocks)))
    hidden, context = torch.randn(2, 16, 16), torch.randn(2, 5, 16)
    for name in blocks:
        skipped = model.get_submodule(name)
        assert isinstance(skipped, Removed)
        out = skipped(hidden_states=hidden, encoder_hidden_states=context, temb=None)
        assert out[0] is context
        assert out[1] is hidden


def test_the_first_block_of_a_dit_leaves_the_embedding_that_the_output_reads():
    model = tiny_dit()
    vislr.apply(model, LayerPlan(("transformer_blocks.0",)))
    left = {key for key in model.state_dict() if key.startswith("transformer_blocks.0.")}
    assert left
    assert all(key.startswith("transformer_blocks.0.norm1.emb.") for key in left)


@pytest.mark.parametrize(("removal", "gone"), [("skip", True), ("identity", False)])
def test_what_goes_as_a_whole(removal, gone):
    """Without branches a block is the identity ("skip"); the reference code waits for its norms, too."""
    names = [f"transformer_blocks.0.{part}" for part in ("attn", "ff", "ff_context")]
    model = tiny.tiny_sd3_transformer()
    report = vislr.apply(model, LayerPlan(tuple(names), removal=removal))
    assert isinstance(model.transformer_blocks[0], Removed) is gone
    assert (report.sites == ("transformer_blocks.0",)) is gone
    vislr.remove(model, report)
    norms = [f"transformer_blocks.0.{part}" for part in ("norm1", "norm1_context")]
    assert vislr.apply(model, LayerPlan((*names, *norms), removal=removal)).sites == ("transformer_blocks.0",)
    unet = tiny.tiny_sdxl_pipeline().unet
    blocks = LayerPlan(tuple(f"mid_block.attentions.0.transformer_blocks.{i}" for i in (0, 1)), removal=removal)
    assert vislr.apply(unet, blocks).sites == ("mid_block.attentions.0",)


def test_undo_follows_the_model_and_frees_when_told():
    unet = tiny.tiny_unet()
    report = vislr.apply(unet, LayerPlan(("mid_block.attentions.0",)))
    unet.to(torch.float64)
    vislr.remove(unet, report)
    assert {p.dtype for p in unet.parameters()} == {torch.float64}
    report = vislr.apply(unet, LayerPlan(("mid_block.attentions.0",)), undo=False)
    with pytest.raises(UndoError, match="nothing was kept"):
        vislr.remove(unet, report)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "removed"), [
    ("sd", ("up_blocks.0.resnets.0", "down_blocks.1.attentions.0",
            "mid_block.attentions.0.transformer_blocks.0.attn1")),
    ("sd3", ("transformer_blocks.0", "transformer_blocks.1.ff")),
    ("flux", ("transformer_blocks.0.attn", "single_transformer_blocks.0")),
    ("dit", ("transformer_blocks.0",)),
])  # fmt: skip
def test_gradients_flow_through_what_is_left(family, removed, checkpointing):
    build, sample, _ = FAMILIES[family]
    model = build()
    vislr.apply(model, LayerPlan(removed))
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    model(**sample_inputs(model, sample, device="cpu"))[0].square().sum().backward()
    without_gradient = [name for name, p in model.named_parameters() if p.grad is None]
    # What only a removed branch's input reads: the last block's context, and queries of nothing.
    assert not any(name.startswith(("conv_in", "x_embedder", "pos_embed.proj", "conv_out", "proj_out"))
                   for name in without_gradient)  # fmt: skip
    if family == "sd":
        assert without_gradient == []


COMPILED = {
    "sd": ("up_blocks.0.resnets.0", "down_blocks.1.attentions.0", "mid_block.attentions.0.transformer_blocks.0.attn1"),
    "sd3": ("transformer_blocks.1", "transformer_blocks.0.attn", "transformer_blocks.0.norm1_context"),
    "flux": ("transformer_blocks.0.attn", "single_transformer_blocks.0"),
    "pixart": ("transformer_blocks.0", "transformer_blocks.1.attn2"),
    "dit": ("transformer_blocks.0", "transformer_blocks.1.ff"),
    "vit": ("blocks.0", "blocks.1.attn"),
    "resnet": ("layer1.0", "layer3.0"),
}


@pytest.mark.parametrize(
    "model", [m if m in ("sd", "flux") else pytest.param(m, marks=pytest.mark.slow) for m in COMPILED]
)
def test_compile_makes_one_graph_and_export_works(model):
    build, sample, _ = FAMILIES[model]
    unet = build()
    vislr.apply(unet, LayerPlan(COMPILED[model]))
    inputs = sample_inputs(unet, sample, device="cpu")
    inputs |= {} if model in ("vit", "resnet") else {"return_dict": False}
    expected = answer(unet, inputs)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    assert torch.equal(answer(compiled, inputs), expected)
    exported = torch.export.export(unet, (), inputs, strict=False)
    torch.testing.assert_close(answer(exported.module(), inputs), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"removed": ("mid_block.attention.0",)}, TargetError, "no unit 'mid_block.attention.0'; did you mean"),
        ({"removed": ("conv_in",)}, TargetError, "'conv_in' is a Conv2d, which is no unit"),
        ({"removed": ("mid_block",)}, TargetError, "no unit that can be removed"),
        ({"removed": ("up_blocks.0.resnets.0.conv1",)}, TargetError, "no unit that can be removed"),
        ({"removed": (), "architecture": "FluxTransformer2DModel"}, ModelError, "the plan is for a FluxTransformer2D"),
        ({"removed": ("transformer_blocks.0",), "structure": "0" * 64}, ModelError, "has no 'transformer_blocks.0'"),
        ({"removed": ("mid_block.attentions.0",), "structure": "0" * 64}, ModelError, "other names or shapes"),
    ],
)
def test_a_plan_that_does_not_fit_leaves_the_model_alone(plan, error, message):
    unet = tiny.tiny_unet()
    modules = dict(unet.named_modules())
    with pytest.raises(error, match=message):
        vislr.apply(unet, LayerPlan(**plan))
    assert dict(unet.named_modules()) == modules
    assert vislr.recipe_of(unet) == []


def test_a_unit_is_removed_once():
    unet = tiny.tiny_unet()
    vislr.apply(unet, LayerPlan(("mid_block.attentions.0",)))
    with pytest.raises(TargetError, match="removed already"):
        vislr.apply(unet, LayerPlan(("mid_block.attentions.0",)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"removed": ["a"], "ratoi": 1}, "a plan has no 'ratoi'; did you mean 'ratio'"),
        ({}, "removed is None"),
        ({"removed": "a"}, "removed is 'a'"),
        ({"removed": ["a", "a"]}, "removes 'a' twice"),
        ({"removed": [3]}, "expected names"),
        ({"removed": ["a"], "removal": "zero"}, "removal is 'zero'"),
        ({"removed": ["a"], "budget": "seconds"}, "budget is 'seconds'"),
        ({"removed": ["a"], "ratio": 1.5}, "ratio is 1.5"),
        ({"removed": ["a"], "schema": 9}, "schema 9"),
        ({"removed": ["a"], "scores": {"a": float("nan")}}, "score of 'a' is nan"),
        ([], "not a list"),
    ],
)
def test_a_damaged_plan_is_named(data, message):
    with pytest.raises(ConfigError, match=message):
        LayerPlan.from_dict(data)


def test_a_plan_is_plain_data():
    import json

    plan = LayerPlan(("a", "b"), "X", ratio=0.5, saved=3, total=7, scores={"a": 0.1, "b": 2.0}, settings={"seed": 1})
    assert LayerPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_classifier_s_plan_is_kept_beside_its_weights(tmp_path):
    import json

    import timm
    from safetensors.torch import load_file, save_file

    from vislr.prune import UniformDepth, plan_layers

    # Made by hand: nothing says with which arguments, so there is no folder of it.
    model = timm.create_model("resnet10t", stem_width=8, channels=(8, 16, 24, 32), num_classes=3)
    random_norms(model.eval())
    plan = plan_layers(model, UniformDepth(), 0.25)
    vislr.apply(model, plan, undo=False)
    inputs = sample_inputs(model, {"height": 32, "width": 32}, device="cpu")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match="plans"):
        vislr.save(model, tmp_path / "folder")
    again = tiny.tiny_conv_net(seed=1)
    vislr.apply(again, LayerPlan.from_dict(json.loads(json.dumps(plan.to_dict()))), undo=False)
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(answer(again, inputs), answer(model, inputs))


def test_order_of_undo_and_adapters():
    unet = tiny.tiny_unet()
    style = vislr.apply(unet, vislr.ConvLoraConfig(r=1), name="style")
    cut = vislr.apply(unet, LayerPlan(("mid_block.attentions.0",)), name="cut")
    more = vislr.apply(unet, vislr.ConvLoraConfig(r=1), name="more")
    for blocked, by in ((style, "cut"), (cut, "more")):
        with pytest.raises(UndoError, match=f"remove '{by}' first"):
            vislr.remove(unet, blocked)
    for report in (more, cut, style):
        vislr.remove(unet, report)
    assert vislr.recipe_of(unet) == []
