"""AdaBN: the statistics are the target's exactly, belong to the adapter, and leave everything else alone."""

import copy
import json
import re

import numpy as np
import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import vislr
from tests.support.tiny import tiny_conv_net, tiny_unet, tiny_vit
from vislr.adapters import (
    AdaBnConfig,
    ConvLoraConfig,
    SaraConfig,
    adapt_statistics,
    adapter_names,
    adapter_parameters,
    attach,
    detach,
)
from vislr.adapters.adabn_layer import AdaBnLayer
from vislr.adapters.inject import adapter_weights, tuner_layers
from vislr.adapters.targets import batch_norms, modules_outside
from vislr.core.errors import AdapterError, DataError, FormatError, UndoError
from vislr.formats import read_adapter

TARGET = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 1.7 + 0.8
SUFFIXES = ("running_mean", "running_var", "num_batches_tracked")


class Small(nn.Module):
    """BatchNorm1d/2d/3d by `dims`, one of them without gamma and beta, dropout, a branch; norm at the input."""

    def __init__(self, dims=2):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.norm_in = norm(3)
        self.conv1, self.norm1 = conv(3, 6, 3, padding=1, bias=False), norm(6)
        self.branch, self.norm2 = conv(3, 6, 1), norm(6, affine=False)
        self.dropout = nn.Dropout(0.5)
        self.conv2, self.norm3 = conv(6, 4, 3), norm(4)
        self.head, self.norm4 = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.norm_in(x)
        x = torch.relu(self.norm1(self.conv1(x))) + self.norm2(self.branch(x))
        x = self.norm3(self.conv2(self.dropout(x)))
        return self.norm4(self.head(x.flatten(2).mean(2)))


def randomised(model, seed=0):
    """Scales, shifts and statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.bias.data.copy_(torch.randn(module.num_features, generator=generator))
    return model.eval()


def effnet():
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", num_classes=3).eval()


def small(dims=2):
    torch.manual_seed(0)
    return randomised(Small(dims))


NETS = {
    "small": (small, TARGET),
    "1d": (lambda: small(1), TARGET.flatten(2)[..., :200]),
    "3d": (lambda: small(3), TARGET.reshape(12, 3, 4, 16, 16)),
    "resnet": (lambda: randomised(tiny_conv_net()), TARGET),
    "efficientnet": (lambda: randomised(effnet()), TARGET),
}


def run(model, x=TARGET):
    with torch.no_grad():
        return model(x)


def truth(model, x):
    """All images in one batch: in training mode every BatchNorm normalises with that batch's own moments."""
    model = copy.deepcopy(model).train()
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: counts.update({name: inputs[0].numel() // inputs[0].shape[1]})
            )
        elif isinstance(module, nn.Dropout):
            module.eval()
    run(model, x)
    # Torch keeps the unbiased variance; the definition is the plain mean of squares.
    return {
        name: (norm.running_mean, norm.running_var * (counts[name] - 1) / counts[name])
        for name, norm in batch_norms(model).items()
    }


def statistics_of(model, name="default"):
    layers = {site: layer for site, layer in modules_outside(model).items() if isinstance(layer, AdaBnLayer)}
    return {site: (layer.statistics(name).mean, layer.statistics(name).var) for site, layer in layers.items()}


def error(found, wanted):
    assert found.keys() == wanted.keys()
    pairs = [(a, b) for key in wanted for a, b in zip(found[key], wanted[key], strict=True)]
    return max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in pairs)


def base_of(model):
    return {
        ".".join(part for part in key.split(".") if part != "base_layer"): value.clone()
        for key, value in model.state_dict().items()
        if "adabn_statistics" not in key
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(found[key], wanted[key]), key


@pytest.mark.parametrize("kind", NETS)
def test_exact_statistics_are_the_pooled_moments(kind):
    build, x = NETS[kind]
    model = build()
    before, modules, source = run(model, x), dict(model.named_modules()), base_of(model)
    wanted = truth(model, x)
    attached = attach(model, AdaBnConfig())
    assert attached.sites == tuple(wanted)
    assert torch.equal(run(model, x), before)  # a new adapter changes nothing
    # Batch sizes and orders, one image at a time where the head's BatchNorm1d then gets a single value.
    for batches in ([x], list(x.split(5)), list(x.flip(0).split(1))):
        result = adapt_statistics(model, batches)
        assert (result.mode, result.images, result.batches, result.unreached) == ("exact", 12, len(batches), ())
        assert error(statistics_of(model), wanted) < 1e-5
    assert not torch.allclose(run(model, x), before, atol=1e-2)
    assert {int(layer.statistics("default").count) for _, layer in tuner_layers(model)} == {12}
    assert_same(base_of(model), source)  # gamma, beta, weights and source statistics
    assert not any(module.training for module in model.modules())
    detach(model, attached)
    assert dict(model.named_modules()) == modules
    assert_same(model.state_dict(), source)
    assert torch.equal(run(model, x), before)


def test_passes_are_one_for_each_depth():
    model = small()
    attach(model, AdaBnConfig())
    # norm1 and norm2 lie side by side.
    assert adapt_statistics(model, [TARGET]).passes == 4
    model = randomised(tiny_conv_net())
    attach(model, AdaBnConfig())
    # 3 in the stem, 2 in each of 4 blocks; the shortcuts' are side by side with the blocks'.
    assert (len(batch_norms(model)), adapt_statistics(model, [TARGET]).passes) == (15, 11)


def test_depths_see_through_detach_and_views():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

        def forward(self, x):
            both = torch.zeros(len(x), 6, *x.shape[2:])
            both[:, :3] = self.norm1(x).detach()
            with torch.no_grad():
                y = self.norm2(both)
            both.transpose(2, 3).relu_()
            return self.norm3(both.add_(y))

    model = randomised(Cut())
    wanted = truth(model, TARGET)
    attach(model, AdaBnConfig())
    assert adapt_statistics(model, TARGET.split(4)).passes == 3
    assert error(statistics_of(model), wanted) < 1e-5


def test_a_single_pass_over_the_whole_net_is_wrong():
    # Pictures of unlike contrast, as in any set.
    x = TARGET * torch.linspace(0.2, 2, 12).view(-1, 1, 1, 1)
    wanted = truth(small(), x)
    for training in (False, True):
        model = small()
        moments, squares, counts = {}, {}, {}

        def watch(name, moments=moments, squares=squares, counts=counts):
            def hook(module, inputs):
                x = inputs[0].double().transpose(0, 1).flatten(1)
                moments[name] = moments.get(name, 0) + x.sum(1)
                squares[name] = squares.get(name, 0) + x.square().sum(1)
                counts[name] = counts.get(name, 0) + x.shape[1]

            return hook

        for name, norm in batch_norms(model).items():
            norm.register_forward_pre_hook(watch(name))
            norm.train(training)
        for batch in x.split(2):
            run(model, batch)
        found = {
            name: (moments[name] / counts[name], squares[name] / counts[name] - (moments[name] / counts[name]) ** 2)
            for name in moments
        }
        assert error({"norm_in": found["norm_in"]}, {"norm_in": wanted["norm_in"]}) < 1e-5  # nothing lies before it
        assert error(found, wanted) > 0.01
    model = small()
    attach(model, AdaBnConfig())
    adapt_statistics(model, x.split(2))
    assert error(statistics_of(model), wanted) < 1e-5


def test_an_unchanged_target_changes_nothing():
    model = small()
    for name, (mean, var) in truth(model, TARGET).items():
        norm = model.get_submodule(name)
        norm.running_mean.copy_(mean), norm.running_var.copy_(var)
    before = run(model)
    attach(model, AdaBnConfig())
    adapt_statistics(model, TARGET.split(5))
    assert torch.allclose(run(model), before, atol=2e-5)


def test_an_affine_shift_at_the_first_norm_is_undone():
    model, x = small().double(), TARGET.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = 1e-12
    for name, (mean, var) in truth(model, x).items():
        norm = model.get_submodule(name)
        norm.running_mean.copy_(mean), norm.running_var.copy_(var)
    wanted = run(model, x)
    factor, offset = torch.tensor([0.4, 1.5, 3.0]).view(1, 3, 1, 1), torch.tensor([2.0, -1.0, 0.3]).view(1, 3, 1, 1)
    shifted = x * factor.double() + offset.double()
    assert (run(model, shifted) - wanted).abs().max() > 0.5
    attach(model, AdaBnConfig())
    adapt_statistics(model, shifted.split(5))
    assert torch.allclose(run(model, shifted), wanted, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_ema_is_what_torch_does_in_training(momentum):
    model = small()
    for norm in batch_norms(model).values():
        norm.momentum = momentum
    reference = copy.deepcopy(model)
    for norm in batch_norms(reference).values():
        norm.train()
    for batch in TARGET.split(4):
        run(reference, batch)
    source = base_of(model)
    attach(model, AdaBnConfig(mode="ema"))
    # An iterator will do: one pass.
    result = adapt_statistics(model, iter(TARGET.split(4)))
    assert (result.mode, result.passes, result.batches) == ("ema", 1, 3)
    for site, norm in batch_norms(reference).items():
        layer = model.get_submodule(site)
        assert torch.equal(layer.running_mean, norm.running_mean)
        assert torch.equal(layer.running_var, norm.running_var)
        assert int(layer.num_batches_tracked) == 3
    assert_same(base_of(model), source)
    assert not any(module.training for module in model.modules())


def test_in_training_mode_the_adapters_statistics_move_and_the_sources_stay():
    model = small()
    source, before = base_of(model), run(model)
    attached = attach(model, AdaBnConfig())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.train()
    torch.manual_seed(0)
    model(TARGET).square().mean().backward()
    assert model.norm_in.base_layer.weight.grad is not None
    assert all(flags.values())
    model.eval()
    assert not torch.equal(model.norm3.running_mean, source["norm3.running_mean"])
    assert_same(base_of(model), source)
    detach(model, attached)
    assert torch.equal(run(model), before)


def test_batches_of_other_forms():
    wanted = truth(small(), TARGET)

    class Loader:
        def __init__(self, wrap):
            self.wrap = wrap

        def __iter__(self):
            return (self.wrap(batch) for batch in TARGET.split(5))

    for wrap in (lambda x: (x, torch.zeros(len(x))), lambda x: [x], lambda x: {"x": x}):
        model = small()
        attach(model, AdaBnConfig())
        adapt_statistics(model, Loader(wrap))
        assert error(statistics_of(model), wanted) < 1e-5


def bad_nan():
    x = TARGET.clone()
    x[3, 0, 0, 0] = float("nan")
    return [x]


class Shrinking:
    """Gives fewer images each time."""

    def __init__(self):
        self.left = 16

    def __iter__(self):
        self.left -= 4
        return iter([TARGET[: self.left]])


@pytest.mark.parametrize("mode", ["exact", "ema"])
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda: [], "no images"),
        (lambda: [TARGET[:0]], "no images"),
        (lambda: ["picture.png"], "a batch is a str; expected a tensor"),
        (lambda: [torch.ones(1, 3, 3, 3)], "one value a channel"),
        (bad_nan, "'norm_in' values that are not finite"),
        (Shrinking, "8 images in the first pass and 4 in a later"),
        (lambda: iter(TARGET.split(4)), "give a list or a DataLoader"),
    ],
)
def test_bad_images_are_named_and_change_nothing(mode, batches, message):
    if mode == "ema" and ("later" in message or "DataLoader" in message):
        return
    model = small()
    attach(model, AdaBnConfig(mode=mode))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DataError, match=message):
        adapt_statistics(model, batches())
    assert_same(model.state_dict(), state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(module.training for module in model.modules())


def test_models_and_names_that_do_not_fit():
    for model, found in ((tiny_vit(), "5 LayerNorm"), (tiny_unet(), "GroupNorm"), (nn.Linear(2, 2), "none")):
        with pytest.raises(AdapterError, match=f"has no BatchNorm with running statistics .norms: .*{found}"):
            vislr.apply(model, AdaBnConfig(), name="t")
        assert not hasattr(model, "peft_config")
        assert not adapter_names(model)
    untracked = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(AdapterError, match="1 BatchNorm2d"):
        attach(untracked, AdaBnConfig())
    with pytest.raises(AdapterError, match="choose 'exact' or 'ema'"):
        AdaBnConfig(mode="online")
    model = small()
    with pytest.raises(AdapterError, match=re.escape("first vislr.apply(model, vislr.AdaBnConfig())")):
        adapt_statistics(model, [TARGET])
    attach(model, AdaBnConfig(), "target")
    with pytest.raises(AdapterError, match="'target' is on the model already"):
        attach(model, AdaBnConfig(), "target")
    with pytest.raises(AdapterError, match="'taget' carries no statistics; did you mean 'target'"):
        adapt_statistics(model, [TARGET], name="taget")
    vislr.set_adapters(model, [])
    with pytest.raises(AdapterError, match="'target' is not active"):
        adapt_statistics(model, [TARGET])
    shared = small()
    shared.norm2 = shared.norm1
    with pytest.raises(AdapterError, match="share one weight"):
        attach(shared, AdaBnConfig())
    assert not any(isinstance(module, AdaBnLayer) for module in shared.modules())


def test_a_norm_that_feeds_itself_has_no_exact_statistics():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.norm(x))

    model = Loop().eval()
    attach(model, AdaBnConfig())
    with pytest.raises(AdapterError, match="'norm' is used at several depths"):
        adapt_statistics(model, [TARGET])

    class Twins(Loop):
        def forward(self, x):
            return self.norm(x[:, :3]) - self.norm(x[:, 3:])

    # Two images at once through one norm: both count.
    model = Twins().eval()
    attach(model, AdaBnConfig())
    adapt_statistics(model, [torch.cat([TARGET, TARGET * 3], 1)])
    both = torch.cat([TARGET, TARGET * 3])
    assert torch.allclose(model.norm.running_mean, both.mean((0, 2, 3)), atol=1e-5)


def test_unreached_norms_keep_the_source():
    model = small()
    model.extra = nn.BatchNorm2d(3)
    attach(model, AdaBnConfig())
    assert adapt_statistics(model, [TARGET]).unreached == ("extra",)
    assert torch.equal(model.extra.running_var, torch.ones(3))


def merge(model, on=True):
    for _, layer in tuner_layers(model):
        layer.merge() if on else layer.unmerge()


def assert_same_file(a, b):
    assert_same(load_file(a), load_file(b))
    with safe_open(a, framework="pt") as first, safe_open(b, framework="pt") as second:
        assert first.metadata() == second.metadata()


def test_merge_copies_and_unmerge_restores(tmp_path):
    model = small()
    source, before = base_of(model), run(model)
    attached = attach(model, AdaBnConfig(), "t")
    adapt_statistics(model, TARGET.split(5))
    adapted = run(model)
    vislr.save_adapter(model, tmp_path / "apart.safetensors")
    merge(model)
    assert torch.equal(run(model), adapted)
    assert torch.equal(model.norm3.base_layer.running_mean, model.norm3.statistics("t").mean)
    assert int(model.norm3.base_layer.num_batches_tracked) == 3
    vislr.save_adapter(model, tmp_path / "merged.safetensors")
    assert_same_file(tmp_path / "apart.safetensors", tmp_path / "merged.safetensors")
    with pytest.raises(UndoError, match="merged"):
        detach(model, attached)
    with pytest.raises(AdapterError, match="merged"):
        adapt_statistics(model, [TARGET], name="t")
    merge(model, on=False)
    assert_same(base_of(model), source)
    assert torch.equal(run(model), adapted)
    merge(model)
    for _, layer in tuner_layers(model):
        layer.enable_adapters(False)
    assert torch.equal(run(model), before)
    assert_same(base_of(model), source)


def test_through_peft():
    model = small()
    before = run(model)
    peft_model = get_peft_model(model, AdaBnConfig())
    assert torch.equal(run(peft_model), before)
    adapt_statistics(peft_model, TARGET.split(5))
    adapted = run(peft_model)
    assert not torch.allclose(adapted, before, atol=1e-2)
    with peft_model.disable_adapter():
        assert torch.equal(run(peft_model), before)
    merged = peft_model.merge_and_unload()
    assert not any(isinstance(module, AdaBnLayer) for module in merged.modules())
    assert torch.equal(run(merged), adapted)


def test_one_adapter_with_statistics_at_a_time(tmp_path):
    model = small()
    before = run(model)
    first = vislr.apply(model, AdaBnConfig(), name="a")
    adapt_statistics(model, [TARGET])
    in_a = run(model)
    vislr.save_adapter(model, tmp_path / "a.safetensors")
    # A further one is on alone, as any adapter; both at once are refused.
    second = vislr.apply(model, AdaBnConfig(), name="b")
    assert torch.equal(run(model), before)
    adapt_statistics(model, [TARGET * 2 - 1])
    in_b = run(model)
    for refused in (
        lambda: vislr.set_adapters(model, ["a", "b"]),
        lambda: vislr.load_adapter(model, tmp_path / "a.safetensors", name="c"),
        lambda: vislr.set_adapters(model, "a", 0.5),
    ):
        with pytest.raises(AdapterError, match=r"only one can be in use|no weight but 1"):
            refused()
        assert adapter_names(model) == ["a", "b"]
        assert torch.equal(run(model), in_b)
    with pytest.raises(AdapterError, match="only one can be in use"):
        model.norm3.merge(adapter_names=["a", "b"])
    vislr.set_adapters(model, "a")
    assert torch.equal(run(model), in_a)
    vislr.set_adapters(model, [])
    assert torch.equal(run(model), before)
    with pytest.raises(AdapterError, match="no weight but 1"):
        vislr.load_adapter(model, tmp_path / "a.safetensors", name="c", weight=0.5)
    assert adapter_names(model) == ["a", "b"]
    assert len(vislr.recipe_of(model)) == 2
    vislr.remove(model, first)
    vislr.remove(model, second)
    assert torch.equal(run(model), before)
    assert not hasattr(model, "peft_config")
    assert not vislr.recipe_of(model)


def trained(model, name):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_alone_in_a_file(tmp_path):
    model = small()
    vislr.apply(model, AdaBnConfig(mode="ema"), name="t")
    adapt_statistics(model, TARGET.split(4))
    path = vislr.save_adapter(model, tmp_path / "t.safetensors")
    assert {key.rpartition(".")[2] for key in load_file(path)} == {"adabn_mean", "adabn_var", "adabn_count"}
    file = read_adapter(path)
    assert (file.kind, file.config.mode, file.tensors["norm3"]["adabn_count"].dtype) == ("adabn", "ema", torch.int64)
    fresh = small()
    before = run(fresh)
    report = vislr.load_adapter(fresh, path)
    assert report.kind == "adabn"
    assert torch.equal(run(fresh), run(model))
    vislr.remove(fresh, report)
    assert torch.equal(run(fresh), before)
    other = randomised(Small(), seed=5)
    with pytest.raises(AdapterError, match="base weights differ"):
        vislr.load_adapter(other, path)
    vislr.load_adapter(other, path, any_base=True)
    with pytest.raises(AdapterError, match="this ResNet has no layer 'norm"):
        vislr.load_adapter(tiny_conv_net(), path)


def test_beside_a_conv_lora_of_the_same_name(tmp_path):
    model = small()
    before, source = run(model), base_of(model)
    low_rank = vislr.apply(model, ConvLoraConfig(r=2, target_modules=["conv1", "conv2"]), name="t")
    trained(model, "t")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    low_rank_alone = run(model)
    statistics = vislr.apply(model, AdaBnConfig(), name="t")
    assert torch.equal(run(model), low_rank_alone)
    assert adapter_names(model) == ["t"]
    assert {n.replace(".base_layer", ""): p.requires_grad for n, p in model.named_parameters()} == {
        n.replace(".base_layer", ""): flag for n, flag in flags.items()
    }
    adapt_statistics(model, TARGET.split(5))
    both = run(model)
    path = vislr.save_adapter(model, tmp_path / "t.safetensors")

    # Scale is the delta's alone.
    vislr.set_adapters(model, "t", 0.5)
    assert torch.equal(model.norm3.running_mean, model.norm3.statistics("t").mean)
    assert not torch.allclose(run(model), both, atol=1e-3)
    assert adapter_weights(model) == {"t": 0.5}
    vislr.set_adapters(model, "t")
    merge(model)
    assert torch.allclose(run(model), both, atol=1e-4)
    assert_same_file(vislr.save_adapter(model, tmp_path / "m.safetensors"), path)
    merge(model, on=False)

    # One file holds both, and comes off as one.
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["vislr.manifest"])
    assert set(manifest["sites"].values()) == {"convlora", "adabn"}
    assert manifest["statistics"]["mode"] == "exact"
    fresh = small()
    modules = dict(fresh.named_modules())
    report = vislr.load_adapter(fresh, path)
    assert len(report.sites) == 7
    assert torch.equal(run(fresh), both)
    with pytest.raises(AdapterError, match="only one can be in use"):
        vislr.load_adapter(fresh, path, name="again")
    assert adapter_names(fresh) == ["t"]
    assert torch.equal(run(fresh), both)
    vislr.remove(fresh, report)
    assert dict(fresh.named_modules()) == modules
    assert torch.equal(run(fresh), before)
    with pytest.raises(FormatError, match="components of pipelines"):
        vislr.save_adapter(model, tmp_path / "d.safetensors", format="diffusers")

    # The parts come off one by one, in any order.
    other = copy.deepcopy(model)
    vislr.remove(model, statistics)
    assert torch.equal(run(model), low_rank_alone)
    with pytest.raises(UndoError):
        vislr.remove(model, statistics)
    vislr.remove(model, low_rank)
    assert torch.equal(run(model), before)
    assert not hasattr(model, "peft_config")
    vislr.remove(other, low_rank)
    assert adapter_names(other) == ["t"]
    assert isinstance(other.peft_config["t"], AdaBnConfig)
    assert torch.equal(other.norm3.running_mean, other.norm3.statistics("t").mean)
    vislr.remove(other, statistics)
    assert torch.equal(run(other), before)
    assert_same(base_of(other), source)


@pytest.mark.parametrize("damage", ["negative", "count", "missing", "nan", "shape", "config"])
def test_damaged_files_are_refused(damage, tmp_path):
    model = small()
    vislr.apply(model, ConvLoraConfig(r=1, target_modules=["conv2"]), name="t")
    attach(model, AdaBnConfig(), "t")
    path = vislr.save_adapter(model, tmp_path / "t.safetensors")
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    if damage == "negative":
        tensors["norm3.adabn_var"][1] = -1.0
    elif damage == "count":
        tensors["norm3.adabn_count"] = torch.tensor(-1)
    elif damage == "missing":
        del tensors["norm3.adabn_mean"]
    elif damage == "nan":
        tensors["norm3.adabn_mean"][0] = np.nan
    elif damage == "shape":
        tensors["norm3.adabn_var"] = torch.ones(7)
    else:
        manifest = json.loads(header["vislr.manifest"])
        del manifest["statistics"]
        header["vislr.manifest"] = json.dumps(manifest)
    save_file(tensors, path, header)
    fresh = small()
    before, modules = run(fresh), dict(fresh.named_modules())
    with pytest.raises(FormatError, match=r"norm3|disagree about BatchNorm"):
        vislr.load_adapter(fresh, path)
    assert dict(fresh.named_modules()) == modules
    assert torch.equal(run(fresh), before)


@pytest.mark.parametrize("first", ["sara", "adabn"])
def test_with_sparse_tuning_of_the_same_norms(first):
    model = small()
    before = run(model)
    wanted = truth(model, TARGET)
    configs = {"sara": SaraConfig(fraction=0.3, target_modules=["norm3", "conv2"]), "adabn": AdaBnConfig()}
    order = [first, *(kind for kind in configs if kind != first)]
    reports = [vislr.apply(model, configs[kind], name=kind) for kind in order]
    vislr.set_adapters(model, ["sara", "adabn"])
    assert torch.equal(run(model), before)
    adapt_statistics(model, TARGET.split(5))
    for site in ("norm1", "norm3"):
        layers = [layer for path, layer in tuner_layers(model) if isinstance(layer, AdaBnLayer) and site in path]
        (found,) = layers
        assert torch.allclose(found.statistics("adabn").mean, wanted[site][0], atol=1e-5)
    in_use = run(model)
    assert not torch.allclose(in_use, before, atol=1e-2)
    model.requires_grad_(True)
    assert torch.allclose(model(TARGET).detach(), in_use, atol=1e-6)
    vislr.remove(model, reports[0])
    assert torch.equal(run(model), before if first == "adabn" else in_use)
    vislr.remove(model, reports[1])
    assert torch.equal(run(model), before)
    vislr.apply(model, SaraConfig(fraction=0.3, target_modules=["norm3"]), name="t")
    with pytest.raises(AdapterError, match="changes 'norm3' itself"):
        vislr.apply(model, AdaBnConfig(), name="t")


def test_other_adapters_switch_the_statistics_off_and_on():
    model = small()
    before = run(model)
    attach(model, AdaBnConfig(), "t")
    adapt_statistics(model, [TARGET])
    adapted = run(model)
    lora = vislr.apply(model, LoraConfig(r=2, target_modules=["conv2"]), name="lora")
    assert torch.equal(run(model), before)  # the newest is the only active one
    vislr.set_adapters(model, ["t", "lora"], [1.0, 0.5])
    assert torch.equal(run(model), adapted)
    vislr.remove(model, lora)
    assert lora.kind == "peft"
    assert torch.equal(run(model), adapted)


def test_half_precision_keeps_its_type():
    model = small().to(torch.bfloat16)
    attach(model, AdaBnConfig())
    x = TARGET.to(torch.bfloat16)
    adapt_statistics(model, x.split(5))
    layer = model.norm_in
    assert layer.statistics("default").mean.dtype == torch.bfloat16
    assert torch.allclose(layer.running_mean.float(), x.float().mean((0, 2, 3)), atol=4e-3)
    assert run(model, x).dtype == torch.bfloat16


def test_statistics_move_to_the_other_style():
    def pictures(style):
        found = vislr.zoo.images(style=style)[:32]
        arrays = np.stack([np.asarray(picture.image()) for picture in found])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1

    source, target = (pictures(style) for style in vislr.zoo.STYLES[:2])
    model = tiny_conv_net()
    with torch.no_grad():
        for site, (mean, var) in truth(model, source).items():
            norm = model.get_submodule(site)
            norm.running_mean.copy_(mean), norm.running_var.copy_(var)
    own, wanted = truth(model, source), truth(model, target)
    distance = {site: (own[site][0] - wanted[site][0]).norm().item() for site in own}
    assert min(distance.values()) > 1e-3  # the styles do differ in every layer
    attach(model, AdaBnConfig())
    adapt_statistics(model, target.split(8))
    for site, (mean, _) in statistics_of(model).items():
        assert (mean - wanted[site][0]).norm() < 1e-4 < distance[site]
