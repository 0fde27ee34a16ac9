"""The door: targets, errors before anything changes, exact removal, nesting, switching on any model."""

import copy
import warnings

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vislr.adapters import (
    ConvLoraConfig,
    FloraConfig,
    adapter_names,
    adapter_parameters,
    attach,
    detach,
    set_adapters,
)
from vislr.adapters.inject import active_adapters, adapter_weights, merged_adapters
from vislr.core.errors import AdapterError, TargetError, UndoError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.block = nn.ModuleDict({"conv1": nn.Conv2d(8, 8, 3, padding=1), "conv2": nn.Conv2d(8, 8, 1)})
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        x = self.conv1(self.block["conv2"](self.block["conv1"](self.stem(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "convlora": lambda targets: ConvLoraConfig(r=2, target_modules=targets),
    "flora": lambda targets: FloraConfig(ranks=2, target_modules=targets),
    "lora": lambda targets: LoraConfig(r=2, target_modules=targets),
    "dora": lambda targets: LoraConfig(r=2, use_dora=True, target_modules=targets),
    "loha": lambda targets: LoHaConfig(r=2, target_modules=targets),
    "lokr": lambda targets: LoKrConfig(r=2, target_modules=targets),
    "oft": lambda targets: OFTConfig(r=0, oft_block_size=2, target_modules=targets),
}


def run(model):
    with torch.no_grad():
        return model(X)


def randomise(model, name, seed=2, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def state_of(model):
    """All that an attach could leave behind."""
    return {
        "modules": dict(model.named_modules()),
        "attributes": set(vars(model)) | set(model._modules),
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "weights": {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()},
    }


def assert_untouched(model, before):
    after = state_of(model)
    for key in ("modules", "attributes", "flags"):
        assert after[key] == before[key]
    for name, (pointer, value) in before["weights"].items():
        assert after["weights"][name][0] == pointer
        assert torch.equal(after["weights"][name][1], value)


@pytest.mark.parametrize("kind", CONFIGS)
def test_on_and_off_leaves_nothing(kind, net):
    net.stem.requires_grad_(False)
    before, output = state_of(net), run(net)
    config = CONFIGS[kind](["conv2", "head"])
    written = copy.deepcopy(config)
    attached = attach(net, config, "style")
    assert config == written
    assert attached.sites == ("block.conv2", "head")
    assert attached.change["kind"] == ("lora" if kind == "dora" else kind)
    assert torch.allclose(run(net), output, atol=1e-6)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == set(adapter_parameters(net, "style"))
    randomise(net, "style")
    assert not torch.allclose(run(net), output, atol=1e-4)
    detach(net, attached)
    assert_untouched(net, before)
    assert torch.equal(run(net), output)
    # And again, under the same name.
    detach(net, attach(net, config, "style"))
    assert_untouched(net, before)


def test_targets(net):
    def sites(**options):
        attached = attach(net, ConvLoraConfig(r=1, **options), "a")
        detach(net, attached)
        return attached.sites

    assert sites(target_modules=["conv1"]) == ("block.conv1", "conv1")
    assert sites(target_modules="conv1") == ("conv1",)
    assert sites(target_modules=r"block\..*") == ("block.conv1", "block.conv2")
    assert sites(target_modules=["conv1", "head"], exclude_modules=["block.conv1"]) == ("conv1", "head")
    assert sites(sites=["conv1"]) == ("conv1",)  # exact, no ending
    assert sites() == ("block.conv1", "block.conv2", "conv1")  # read as a conv net: neither stem nor head
    net.block["fc"] = nn.Linear(8, 8)
    assert sites(target_modules="all-linear") == ("block.fc",)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["conv3"]}, TargetError, "'conv3' matches no layer; did you mean 'conv2', 'conv1'"),
        ({"target_modules": ["conv1", "haed"]}, TargetError, "'haed' matches no layer; did you mean 'head'"),
        ({"target_modules": "blok.*"}, TargetError, "matches no layer; did you mean 'block'"),
        ({"target_modules": "block("}, TargetError, "no regular expression"),
        ({"target_modules": []}, TargetError, "empty"),
        ({"target_modules": ["block"]}, AdapterError, "a ModuleDict: .*inside it are 'block.conv1'"),
        ({"target_modules": ["conv1"], "exclude_modules": ["convv"]}, TargetError, "exclude_modules 'convv'"),
        ({"target_modules": ["conv1"], "exclude_modules": ["conv1"]}, TargetError, "leaves no target"),
        ({"sites": ["mid.conv1"]}, AdapterError, "no such layer; did you mean .*'block.conv1'"),
        ({"target_modules": ["head"], "r": 7}, AdapterError, "rank 7"),
    ],
)
def test_errors_leave_the_model_untouched(options, error, message, net):
    before = state_of(net)
    with pytest.raises(error, match=message):
        attach(net, ConvLoraConfig(**options), "a")
    assert_untouched(net, before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=0, target_modules=["head"]), "rank r is 0"),
        (LoraConfig(r=-1, target_modules=["head"]), "rank r is -1"),
        (LoraConfig(target_modules=["haed"]), "'haed' matches no layer; did you mean 'head'"),
        (LoraConfig(target_modules="hae.*"), "matches no layer"),
        (LoraConfig(target_modules=["head"], bias="all"), "bias='all'"),
        (LoraConfig(target_modules=["conv1"], modules_to_save=["head"]), "modules_to_save"),
        (LoraConfig(target_modules=["head"], init_lora_weights="pissa"), "changes the base weights"),
        (LoraConfig(target_modules=["block"]), "peft refuses"),
        (LoKrConfig(r=0, target_modules=["head"]), "rank r is 0"),
        (LoHaConfig(r=2, target_modules=["block"]), "peft refuses"),
    ],
)  # fmt: skip
def test_errors_of_peft_configs_leave_the_model_untouched(config, message, net):
    before = state_of(net)
    with pytest.raises((AdapterError, TargetError), match=message):
        attach(net, config, "a")
    assert_untouched(net, before)


@pytest.mark.parametrize("name", ["", "a.b", "keys", None, "a b"])
def test_impossible_names(name, net):
    before = state_of(net)
    with pytest.raises(AdapterError, match="name"):
        attach(net, ConvLoraConfig(target_modules=["head"]), name)
    assert_untouched(net, before)


def test_a_name_is_used_once(net):
    attach(net, ConvLoraConfig(target_modules=["head"]), "a")
    before = state_of(net)
    with pytest.raises(AdapterError, match="'a' is on the model already"):
        attach(net, FloraConfig(ranks=2, target_modules=["conv2"]), "a")
    assert_untouched(net, before)


def test_nan_in_the_base(net):
    with torch.no_grad():
        net.block["conv2"].weight[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"'block.conv2' has NaN"):
        attach(net, ConvLoraConfig(target_modules=["conv2"]), "a")
    attach(net, ConvLoraConfig(target_modules=["head"]), "a")  # layers that are not touched may be as they are


def test_layers_that_cannot_carry_an_adapter():
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    with pytest.raises(AdapterError, match="without its forward"):
        attach(attention, ConvLoraConfig(target_modules=["out_proj"]), "a")
    normed = nn.ModuleDict({"fc": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    with pytest.raises(AdapterError, match="parametrised"):
        attach(normed, ConvLoraConfig(target_modules=["fc"]), "a")

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(AdapterError, match="something else than its weight says"):
        attach(nn.ModuleDict({"fc": Doubled(4, 4)}), ConvLoraConfig(target_modules=["fc"]), "a")


def test_tied_weights():
    net = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    net["two"].weight = net["one"].weight
    with pytest.raises(AdapterError, match="'one' and 'two' share one weight"):
        attach(net, ConvLoraConfig(target_modules=["one"]), "a")


# peft's LoRA of a conv does not go around another kind of peft's own; around ours it does.
NESTS = [(first, second) for second in ("convlora", "flora") for first in CONFIGS if first != second]
NESTS += [("convlora", "lora"), ("flora", "lora"), ("convlora", "dora"), ("flora", "loha"), ("convlora", "oft")]


@pytest.mark.parametrize(("first", "second"), NESTS)
@pytest.mark.parametrize("remove", ["inner", "outer"])
def test_two_kinds_on_one_layer(first, second, remove, net):
    before, output = state_of(net), run(net)
    inner = attach(net, CONFIGS[first](["conv2", "head"]), "inner")
    randomise(net, "inner")
    with_inner = run(net)
    outer = attach(net, CONFIGS[second](["conv2", "head"]), "outer")
    assert active_adapters(net) == {"outer": 1.0}
    randomise(net, "outer")
    with_outer = run(net)
    nest = net.block.conv2
    assert isinstance(nest, BaseTunerLayer)
    assert isinstance(nest.base_layer, BaseTunerLayer)
    set_adapters(net, ["inner", "outer"])
    together = run(net)
    assert not torch.allclose(together, with_inner, atol=1e-5)
    assert not torch.allclose(together, with_outer, atol=1e-5)
    gone, kept, kept_output = (inner, outer, with_outer) if remove == "inner" else (outer, inner, with_inner)
    detach(net, gone)
    assert isinstance(net.block.conv2, BaseTunerLayer)
    assert not isinstance(net.block.conv2.base_layer, BaseTunerLayer)
    assert torch.equal(run(net), kept_output)
    assert adapter_names(net) == [kept.undo["name"]]
    detach(net, kept)
    assert_untouched(net, before)
    assert torch.equal(run(net), output)


@pytest.mark.parametrize(("first", "second"), [("convlora", "flora"), ("flora", "convlora")])
def test_nested_merges_come_out_in_any_order(first, second, net):
    weight = net.head.weight.detach().clone()
    attach(net, CONFIGS[first](["head"]), "a")
    attach(net, CONFIGS[second](["head"]), "b")
    set_adapters(net, ["a", "b"], [0.7, 1.3])
    randomise(net, "a")
    randomise(net, "b", seed=3)
    outer, inner = net.head, net.head.base_layer
    expected, deltas = run(net), outer.delta("b") + inner.delta("a")
    for order in ([outer, inner], [inner, outer]):
        for layer in order:
            layer.merge()
        assert torch.equal(outer.weight, weight + deltas)
        assert torch.allclose(run(net), expected, atol=1e-6)
        for layer in order:  # not the reverse
            layer.unmerge()
        assert torch.equal(outer.weight, weight)
        assert torch.equal(run(net), expected)


def test_a_merge_beside_pefts_own(net):
    # peft adds to and subtracts from the weight in place, inside of ours.
    weight = net.head.weight.detach().clone()
    attach(net, CONFIGS["lora"](["head"]), "l")
    attach(net, CONFIGS["convlora"](["head"]), "c")
    set_adapters(net, ["l", "c"])
    randomise(net, "l")
    randomise(net, "c", seed=3)
    expected = run(net)
    outer, inner = net.head, net.head.base_layer
    for merging in ([outer, inner], [inner, outer]):
        for layer in merging:
            layer.merge()
        assert torch.allclose(run(net), expected, atol=1e-6)
        for layer in merging:
            layer.unmerge()
        assert torch.allclose(outer.weight, weight, atol=1e-6)


def test_attach_and_detach_out_of_order(net):
    before, output = state_of(net), run(net)
    a = attach(net, ConvLoraConfig(target_modules=["conv1", "head"]), "a")
    randomise(net, "a")
    with_a = run(net)
    b = attach(net, FloraConfig(ranks=2, target_modules=["head", "conv2"]), "b")
    c = attach(net, ConvLoraConfig(target_modules=["conv1"]), "c")
    assert adapter_names(net) == ["a", "b", "c"]
    assert active_adapters(net) == {"c": 1.0}
    detach(net, b)
    assert active_adapters(net) == {"c": 1.0}
    detach(net, c)
    assert active_adapters(net) == {}  # what c replaced is gone
    set_adapters(net, "a")
    assert torch.equal(run(net), with_a)
    detach(net, a)
    assert_untouched(net, before)
    assert torch.equal(run(net), output)
    with pytest.raises(UndoError, match="not on the model"):
        detach(net, a)


def test_detach_gives_the_earlier_adapter_back(net):
    attach(net, ConvLoraConfig(target_modules=["head"]), "a")
    randomise(net, "a")
    with_a = run(net)
    b = attach(net, ConvLoraConfig(target_modules=["head"]), "b")
    assert not any(p.requires_grad for p in adapter_parameters(net, "a").values())
    detach(net, b)
    assert active_adapters(net) == {"a": 1.0}
    assert all(p.requires_grad for p in adapter_parameters(net, "a").values())
    assert torch.equal(run(net), with_a)


def test_merged_adapters_stay(net):
    attached = attach(net, ConvLoraConfig(target_modules=["head"]), "a")
    net.head.merge()
    assert merged_adapters(net) == {"a"}
    with pytest.raises(UndoError, match="merged"):
        detach(net, attached)
    for call in (
        lambda: attach(net, ConvLoraConfig(target_modules=["head"]), "b"),
        lambda: set_adapters(net, "a", 0.5),
        lambda: net.head.delete_adapter("a"),
    ):
        with pytest.raises(AdapterError, match="merged"):
            call()
    net.head.unmerge()
    detach(net, attached)
    assert type(net.head) is nn.Linear


def test_a_broken_adapter_is_not_merged_safely(net):
    attach(net, ConvLoraConfig(target_modules=["head"]), "a")
    weight = net.head.weight.detach().clone()
    with torch.no_grad():
        net.head.convlora_A["a"][0, 0] = float("inf")
    with pytest.raises(AdapterError, match="not finite"):
        net.head.merge(safe_merge=True)
    assert torch.equal(net.head.weight, weight)
    assert not net.head.merged


def test_set_adapters(net):
    attach(net, ConvLoraConfig(target_modules=["conv1"]), "a")
    attach(net, FloraConfig(ranks=2, target_modules=["head"]), "b")
    attach(net, OFTConfig(r=0, oft_block_size=2, target_modules=["conv2"]), "o")
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    set_adapters(net, ["b", "a"], [0.8, 2])
    assert active_adapters(net) == {"a": 2.0, "b": 0.8}
    assert adapter_weights(net) == {"a": 2.0, "b": 0.8, "o": 1.0}
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    for names, weights, message in (
        ("c", None, "no adapter is called 'c'; choose from 'a', 'b', 'o'"),
        (["a", "b"], [1.0], "2 adapters and 1 weights"),
        (["a", "a"], None, "named twice"),
        ("a", float("nan"), "finite"),
        ("a", ["x"], "finite"),
        ("o", 0.5, "no weight but 1"),
    ):
        with pytest.raises(AdapterError, match=message):
            set_adapters(net, names, weights)
        assert active_adapters(net) == {"a": 2.0, "b": 0.8}


def test_a_copy_of_the_model_stands_alone(net):
    attached = attach(net, ConvLoraConfig(target_modules=["conv1", "head"]), "a")
    randomise(net, "a")
    net.head.merge()
    twin = copy.deepcopy(net)
    expected = run(net)
    net.head.unmerge()
    detach(net, attached)
    assert torch.equal(run(twin), expected)
    twin.head.unmerge()
    assert torch.equal(twin.head.weight, net.head.weight)
    detach(twin, attached)
    assert torch.equal(run(twin), run(net))


def test_peft_configs_without_targets_go_on_the_backbone(net):
    attached = attach(net, LoraConfig(r=2), "a")
    assert attached.sites == ("block.conv1", "block.conv2", "conv1")
    detach(net, attached)
    # "conv1" alone, though its name is also an ending of "block.conv1".
    net.block.conv1 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
    attached = attach(net, LoraConfig(r=2), "a")
    assert attached.sites == ("block.conv2", "conv1")
    assert "block.conv1" in attached.notes[-1]
    assert isinstance(net.block.conv1, nn.Conv2d)
    detach(net, attached)
    attached = attach(net, LoraConfig(r=2, target_modules="all-linear"), "a")
    assert attached.sites == ("head",)


def test_the_door_is_quiet(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a", "b"):
            attach(net, ConvLoraConfig(target_modules=["head"]), name)
            attach(net, FloraConfig(ranks=2, target_modules=["head"]), name + "f")
