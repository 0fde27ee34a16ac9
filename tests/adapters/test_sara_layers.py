"""SaRA on every kind of layer: in place and exact, against dense definitions written down here."""

import copy

import pytest
import torch
from layers import CASES as LAYERS
from layers import make_layer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from vislr.adapters import SaraConfig, adapter_parameters, attach, detach, set_adapters
from vislr.adapters.sara import SaraLayer
from vislr.formats import attach_file, read_adapter, write_adapter

# (layer, input) of layers that are neither linear nor conv.
OTHERS = {
    "layernorm": (lambda: nn.LayerNorm(6), (2, 5, 6)),
    "groupnorm": (lambda: nn.GroupNorm(2, 6), (2, 6, 7)),
    "batchnorm": (lambda: nn.BatchNorm2d(6), (2, 6, 4, 4)),
    "rmsnorm": (lambda: nn.RMSNorm(6), (2, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2), (2, 6, 4, 3)),
    "channels-last": (lambda: nn.Conv2d(6, 12, 3, padding=1).to(memory_format=torch.channels_last), (2, 6, 5, 4)),
}
CASES = [*LAYERS, *OTHERS]
every = pytest.mark.parametrize("case", CASES)
HALF = SaraConfig(fraction=0.5, rank_weight=0.0)
THIRD = SaraConfig(fraction=0.3, rank_weight=0.0)


def build(case, dtype=torch.float32):
    torch.manual_seed(1)
    if case in OTHERS:
        make, shape = OTHERS[case]
        layer, x = make(), torch.randn(shape)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn_like(parameter))
    else:
        layer, x = make_layer(case)
    return nn.ModuleDict({"layer": layer}).to(dtype).eval(), x.to(dtype)


def run(net, x):
    with torch.no_grad():
        return net["layer"](x)


def parts_of(net):
    """The live weight and bias as one row-major vector."""
    layer = net["layer"].get_base_layer() if isinstance(net["layer"], SaraLayer) else net["layer"]
    return torch.cat([p.detach().reshape(-1) for p in layer.parameters()])


def train(net, x, name="a", steps=2, lr=0.05):
    optimizer = torch.optim.AdamW(adapter_parameters(net, name).values(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (net["layer"](x).float() - 1).square().mean().backward()
        optimizer.step()


@every
def test_on_is_a_no_op_and_off_is_the_base_bit_for_bit(case):
    net, x = build(case)
    original, before, bits = net["layer"], run(net, x), parts_of(net)
    attached = attach(net, HALF, "a")
    assert torch.equal(run(net, x), before)
    assert torch.equal(net["layer"](x), before)  # the forward that records a graph
    train(net, x)
    trained, output = parts_of(net), run(net, x)
    changed = trained != bits
    index = net["layer"].entries["a"].index.long()
    assert 0 < changed.sum() <= len(index) == round(0.5 * len(bits))
    assert not changed[[i for i in range(len(bits)) if i not in set(index.tolist())]].any()
    assert torch.equal(trained[index], net["layer"].sara_values["a"])
    net["layer"].enable_adapters(False)
    assert torch.equal(parts_of(net), bits)
    assert torch.equal(run(net, x), before)
    net["layer"].enable_adapters(True)
    assert torch.equal(run(net, x), output)
    set_adapters(net, [])
    assert torch.equal(parts_of(net), bits)
    set_adapters(net, ["a"])
    assert torch.equal(parts_of(net), trained)
    detach(net, attached)
    assert net["layer"] is original
    assert torch.equal(parts_of(net), bits)
    assert torch.equal(run(net, x), before)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_delta_file_are_the_result_in_place(case, dtype, tmp_path):
    net, x = build(case, dtype)
    base = parts_of(net)
    attach(net, HALF, "a")
    assert {p.dtype for p in adapter_parameters(net, "a").values()} == {torch.float32}
    train(net, x, steps=3)
    file = write_adapter(net, "a", tmp_path / "a.safetensors")
    tensors = load_file(file)
    index, delta = tensors["layer.sara_index"], tensors["layer.sara_delta"]
    assert (index.dtype, delta.dtype) == (torch.int32, torch.float64)
    assert tuple(tensors["layer.sara_shape"]) == net["layer"].weight.shape
    expected = base.clone()
    expected[index.long()] = (base[index.long()].double() + delta).float().to(dtype)
    assert torch.equal(parts_of(net), expected)
    assert not torch.equal(expected, base)

    fresh, _ = build(case, dtype)
    attach_file(fresh, "b", read_adapter(file))
    assert torch.equal(parts_of(fresh), expected)
    assert torch.equal(run(fresh, x), run(net, x))
    assert torch.equal(fresh["layer"].sara_values["b"], net["layer"].sara_values["a"])
    again = write_adapter(fresh, "b", tmp_path / "again.safetensors")
    with safe_open(str(file), "np") as one, safe_open(str(again), "np") as other:
        assert one.metadata() == other.metadata()
        assert all(one.get_tensor(k).tobytes() == other.get_tensor(k).tobytes() for k in one.keys())  # noqa: SIM118


@every
def test_gradients_are_those_of_the_dense_definition(case):
    net, x = build(case, torch.float64)
    twin = copy.deepcopy(net["layer"])
    attach(net, HALF, "a")
    attach(net, THIRD, "b")
    layer, generator = net["layer"], torch.Generator().manual_seed(3)
    with torch.no_grad():
        for vector in layer.sara_values.values():
            vector.add_(torch.randn(vector.shape, generator=generator, dtype=torch.float64))
    set_adapters(net, ["a", "b"], [0.5, -2.0])
    for vector in layer.sara_values.values():
        vector.requires_grad_()
    x.requires_grad_()
    base = torch.cat([p.detach().reshape(-1) for p in twin.parameters()])
    total = base.clone()
    for name, scale in (("a", 0.5), ("b", -2.0)):
        index = layer.entries[name].index.long()
        total = total.index_add(0, index, scale * (layer.sara_values[name] - base[index]))
    sizes = [p.numel() for p in twin.parameters()]
    swapped = {
        key: piece.reshape(p.shape) for (key, p), piece in zip(twin.named_parameters(), total.split(sizes), strict=True)
    }
    expected, given = functional_call(twin, swapped, (x,)), layer(x)
    assert torch.allclose(given, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(given.shape, dtype=torch.float64, generator=generator)
    leaves = [x, *layer.sara_values.values()]
    wanted = torch.autograd.grad(expected, leaves, direction)
    for one, other in zip(torch.autograd.grad(given, leaves, direction), wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["layer.sara_values.a", "layer.sara_values.b"]


@every
def test_two_adapters_scales_and_merging(case):
    net, x = build(case)
    base = parts_of(net)
    first = attach(net, HALF, "a")
    train(net, x)
    with_a = parts_of(net)
    second = attach(net, THIRD, "b")
    assert torch.equal(parts_of(net), base)  # the new one is active, and still changes nothing
    assert torch.equal(net["layer"].entries["b"].base, base[net["layer"].entries["b"].index.long()])
    train(net, x, "b", steps=3)
    with_b = parts_of(net)
    expected = (base.double() + 0.5 * (with_a.double() - base) - 2 * (with_b.double() - base)).float()
    set_adapters(net, ["a", "b"], [0.5, -2.0])
    both = parts_of(net)
    assert torch.equal(both, expected)
    set_adapters(net, ["b", "a"], [-2.0, 0.5])
    assert torch.equal(parts_of(net), expected)
    set_adapters(net, ["a"], [0.0])
    assert torch.equal(parts_of(net), base)
    layer = net["layer"]
    set_adapters(net, ["a"], [2.0])
    assert torch.equal(parts_of(net), (base.double() + 2 * (with_a.double() - base)).float())
    layer.scale_layer(0.5)
    assert torch.equal(parts_of(net), with_a)
    layer.unscale_layer(0.5)
    set_adapters(net, ["a", "b"])
    layer.merge(adapter_names=["a"])
    layer.enable_adapters(False)
    assert torch.equal(parts_of(net), with_a)  # merged: part of the weight
    layer.unmerge()
    assert torch.equal(parts_of(net), base)
    layer.enable_adapters(True)
    detach(net, first)
    assert torch.equal(parts_of(net), with_b)
    detach(net, second)
    assert torch.equal(parts_of(net), base)
    assert not isinstance(net["layer"], SaraLayer)


@pytest.mark.parametrize("case", ["linear", "conv2d-plain", "layernorm"])
def test_autocast(case):
    net, x = build(case)
    attach(net, HALF, "a")
    with torch.autocast("cpu", torch.bfloat16):
        output = net["layer"](x)
    output.float().square().mean().backward()
    gradient = net["layer"].sara_values["a"].grad.clone()
    net["layer"].sara_values["a"].grad = None
    net["layer"](x).square().mean().backward()
    exact = net["layer"].sara_values["a"].grad
    assert gradient.dtype == torch.float32
    assert (gradient - exact).norm() < 0.03 * exact.norm()
