"""Units, stages and selection."""

import pytest
import tiny
import torch
from torch import nn

from vislr.anatomy import Site, denoiser_of, describe, sample_inputs, skeleton
from vislr.core.errors import ModelError, TargetError


@pytest.fixture(scope="module")
def sd():
    return describe(tiny.tiny_unet(layers_per_block=2))


def names(sites):
    return [site.name for site in sites]


def test_stages_of_a_unet(sd):
    order = [stage.name for stage in sd.stages()]
    assert order == ["stem", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "head"]
    assert names(sd.select(stage="stem")) == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"]
    assert names(sd.select(stage="head")) == ["conv_norm_out", "conv_out"]


def test_units_of_a_unet(sd):
    units = sd.select(kind="unit", removable=True, stage="mid_block")
    transformer = "mid_block.attentions.0"
    assert names(units) == [
        "mid_block.resnets.0",
        transformer,
        f"{transformer}.transformer_blocks.0",
        f"{transformer}.transformer_blocks.0.ff",
        "mid_block.resnets.1",
    ]
    branches = names(sd.select(kind="attention", removable=True, stage="mid_block"))
    assert branches == [f"{transformer}.transformer_blocks.0.attn{i}" for i in (1, 2)]
    # What resizes, and what lies first and last, is no unit.
    assert not any("samplers" in name or name.startswith("conv_") for name in names(sd.select(kind="unit")))


def test_a_resnet_that_resizes_is_not_removable():
    unet = tiny.tiny_unet(resnet_time_scale_shift="scale_shift", down_block_types=("ResnetDownsampleBlock2D",) * 2)
    found = describe(unet).select(kind="unit", stage="down_blocks.*")
    assert names(found) == ["down_blocks.0.resnets.0", "down_blocks.1.resnets.0"]


@pytest.mark.parametrize("family", ["unet", "sd3", "flux", "vit"])
def test_removable_units_can_be_left_out(family):
    """With any one removable unit passing its input on (a branch: giving nothing), the forward runs as before."""
    model = {
        "unet": tiny.tiny_unet,
        "sd3": lambda: tiny.tiny_sd3_transformer(dual_attention_layers=(0,)),
        "flux": tiny.tiny_flux_transformer,
        "vit": tiny.tiny_vit,
    }[family]()
    sample = {"height": 8, "width": 8} if family == "flux" else {}
    inputs = sample_inputs(model, sample, device="cpu")
    modules = dict(model.named_modules())

    def run():
        with torch.no_grad():
            return model(**inputs)[0]

    def zeros(output):
        return tuple(map(zeros, output)) if isinstance(output, tuple) else torch.zeros_like(output)

    def leave_out(module, args, kwargs, output):
        if type(module).__name__ in ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"):
            return kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        if type(module).__name__ == "ResnetBlock2D" and module.conv_shortcut is not None:
            return module.conv_shortcut(args[0])
        if type(module).__name__ in ("Block", "BasicTransformerBlock", "ResnetBlock2D"):
            return args[0]
        if type(module).__name__ == "Transformer2DModel":
            return (args[0],)
        return zeros(output)

    whole = run()
    chosen = describe(model, sample).select(removable=True)
    assert len(chosen) >= 4
    for site in chosen:
        handle = modules[site.name].register_forward_hook(leave_out, with_kwargs=True)
        reduced = run()
        handle.remove()
        assert reduced.shape == whole.shape
        assert not torch.equal(reduced, whole), site.name
    assert torch.equal(run(), whole)


def plain(identity, channels=8):
    """A small residual net of no known library."""

    class Cell(nn.Module):
        def __init__(self, skip):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
            self.skip = skip

        def forward(self, x):
            y = self.body(x)
            return torch.relu(y + x) if self.skip else torch.relu(y)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, channels, 3)
            self.cells = nn.Sequential(*(Cell(skip) for skip in identity))
            self.last = nn.Linear(channels, 2)

        def forward(self, image):
            return self.last(self.cells(self.first(image)).mean((2, 3)))

    return Net().eval()


def test_residual_blocks_are_found_in_the_graph():
    """By what they compute, whatever they are called; frozen weights change nothing."""
    net = plain((True, False, True)).requires_grad_(False)
    anatomy = describe(net, {"height": 16, "width": 16})
    assert {s.name: s.removable for s in anatomy.select(kind="unit")} == {
        "cells.0": True,
        "cells.1": False,
        "cells.2": True,
    }
    assert [stage.name for stage in anatomy.stages()] == ["stem", "cells.0", "cells.1", "cells.2", "head"]
    assert not any(p.requires_grad for p in net.parameters())


def test_a_net_without_skips_has_no_units():
    anatomy = describe(plain((False, False)), {"height": 16, "width": 16})
    assert all(site.kind != "unit" for site in anatomy.sites)
    with pytest.raises(TargetError, match="this conv model has no unit site"):
        anatomy.select(kind="unit")


# (removable units, others, stages) as their papers lay them out.
CONV_NETS = {
    "timm:resnet18": (8, 0, ["stem", "layer1", "layer2", "layer3", "layer4", "head"]),
    "torchvision:resnet50": (16, 0, ["stem", "layer1", "layer2", "layer3", "layer4", "head"]),
    "timm:resnetv2_50": (16, 0, ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head"]),
    "timm:convnext_atto": (12, 0, ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head", "other"]),
    "timm:efficientnet_b0": (9, 6, ["stem", *(f"blocks.{i}" for i in range(7)), "head"]),
    "torchvision:efficientnet_b0": (9, 7, ["stem", *(f"features.{i}" for i in range(1, 8)), "head"]),
    "torchvision:mobilenet_v2": (10, 7, ["stem", *(f"features.{i}" for i in range(1, 18)), "head"]),
    "timm:regnety_002": (13, 0, ["stem", "s1", "s2", "s3", "s4", "head"]),
    "torchvision:vgg11": (0, 0, ["features", "classifier"]),
}


@pytest.mark.parametrize("name", CONV_NETS)
def test_units_and_stages_of_conv_nets(name):
    removable, others, stages = CONV_NETS[name]
    anatomy = describe(skeleton(name), {"height": 64, "width": 64} if "vgg" not in name else None)
    units = [site for site in anatomy.sites if site.kind == "unit"]
    assert (sum(s.removable for s in units), sum(not s.removable for s in units)) == (removable, others)
    assert [stage.name for stage in anatomy.stages()] == stages


def test_hierarchical_vit_blocks_that_change_width_stay():
    anatomy = describe(skeleton("timm:hiera_tiny_224"))
    kept = names(s for s in anatomy.select(kind="unit", removable=False) if s.name == s.stage)
    assert kept == ["blocks.1", "blocks.3", "blocks.10"]


def test_select_by_glob_regex_and_all_together(sd):
    assert names(sd.select(kind="conv", name="up_blocks.1.resnets.*.conv1")) == [
        f"up_blocks.1.resnets.{i}.conv1" for i in range(3)
    ]
    assert names(sd.select(name="re:mid_block\\.resnets\\.[01]")) == ["mid_block.resnets.0", "mid_block.resnets.1"]
    everything = sd.select()
    assert everything == sd.sites
    assert all(isinstance(site, Site) for site in everything)
    parts = [set(sd.select(kind=kind)) for kind in ("conv", "linear", "attention", "norm", "unit")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(everything)
    assert set(sd.select(removable=True)) | set(sd.select(removable=False)) == set(everything)
    assert names(sd.select("linear", "*.to_q", "mid_*", False)) == [
        f"mid_block.attentions.0.transformer_blocks.0.attn{i}.to_q" for i in (1, 2)
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"kind": "convs"}, "no sites of kind 'convs'; did you mean 'conv'?"),
        ({"name": "conv_inn"}, "no site matches 'conv_inn'; did you mean 'conv_in'"),
        (
            {"kind": "conv", "name": "up_block.0.resnets.1.conv*"},
            "no conv site matches 'up_block.0.resnets.1.conv*'; did you mean 'up_blocks.0.resnets.1.conv",
        ),
        ({"kind": "unit", "removable": True, "name": "mid_block.*.conv1"}, "no removable unit site matches"),
        ({"stage": "mid"}, "no site in stage 'mid'; did you mean 'mid_block'"),
        ({"kind": "attention", "stage": "stem"}, "no attention site in stage 'stem'"),
        ({"kind": "norm", "removable": True}, "this unet model has no removable norm site"),
        ({"name": "re:("}, "'re:(' is no regular expression"),
        ({"name": "re:mid_block"}, "no site matches 're:mid_block'; did you mean 'mid_block.resnets.1"),
    ],
)
def test_nothing_selected_is_an_error_with_the_nearest(sd, wanted, message):
    with pytest.raises(TargetError) as caught:
        sd.select(**wanted)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_table(sd):
    text = sd.table(sd.select(kind="conv", stage="head"))
    lines = text.splitlines()
    conv = next(site for site in sd.sites if site.name == "conv_out")
    assert lines[1].split() == ["conv_out", "conv", "Conv2d", "head", "4x16x3x3", "580", "73.73", "k"]
    assert conv.flops == 2 * 4 * 8 * 8 * 16 * 9
    assert f"{len(sd.sites)} sites, {sd.parameters:,} parameters" in lines[-1]
    assert lines[-1].endswith("at height 8, width 8, tokens 77, batch 1")
    assert len(sd.table().splitlines()) == len(sd.sites) + len(sd.stages()) + 5


def test_denoiser_of():
    pipe = tiny.tiny_sd_pipeline()
    assert denoiser_of(pipe) == ("unet", pipe.unet)
    assert denoiser_of(pipe.vae) == ("", pipe.vae)
    pipe = tiny.tiny_sd3_pipeline()
    assert denoiser_of(pipe) == ("transformer", pipe.transformer)
    assert describe(pipe) == describe(pipe.transformer)


def test_a_pipeline_without_denoiser():
    from diffusers import DiffusionPipeline

    class Encoder(DiffusionPipeline):
        def __init__(self, vae):
            super().__init__()
            self.register_modules(vae=vae)

    with pytest.raises(ModelError, match=r"the Encoder has no 'unet' and no 'transformer'; it has \['vae'\]"):
        denoiser_of(Encoder(tiny.tiny_vae()))
