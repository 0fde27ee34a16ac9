"""Every property of ConvLoRA and FLoRA on every kind of layer; peft's LoRA beside them where it claims to work."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layers import CASES, CONV, make_layer
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn

from vislr.adapters import ConvLoraConfig, FloraConfig, adapter_parameters, attach, detach, set_adapters
from vislr.adapters import conv_lora as conv_lora_room
from vislr.adapters import flora as flora_room
from vislr.adapters.geometry import cut, geometry_of, glue
from vislr.core.errors import AdapterError
from vislr.formats import attach_file, read_adapter, write_adapter

KINDS = {"convlora": ConvLoraConfig(r=2, alpha=3, target_modules=["layer"]),
         "flora": FloraConfig(ranks=0.5, scale=1.5, target_modules=["layer"])}  # fmt: skip
LORA = LoraConfig(r=2, lora_alpha=3, target_modules=["layer"])
LORA_CASES = ["linear"] + [f"conv{d}d-{v}" for d in CONV for v in ("plain", "stride", "odd-channels")]

both = pytest.mark.parametrize("kind", KINDS)
every = pytest.mark.parametrize("case", CASES)


def build(case: str, dtype=torch.float32):
    """A net of one layer, and an input."""
    torch.manual_seed(1)
    layer, x = make_layer(case)
    return nn.ModuleDict({"layer": layer}).to(dtype).eval(), x.to(dtype)


def run(net, x):
    with torch.no_grad():
        return net["layer"](x)


def content(path):
    """Header and bytes of every tensor; safetensors writes the header's keys in any order."""
    with safe_open(str(path), framework="np") as file:
        return file.metadata(), {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118


def randomise(net, name, size=0.2, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(net, name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size)


def dense(case, x, weight, bias, layer):
    """The layer's output with another weight, written down independently of vislr."""
    if case == "linear":
        return F.linear(x, weight, bias)
    twin = copy.deepcopy(layer)
    del twin.weight
    twin.weight = weight
    return twin._conv_forward(x, weight, bias)


def delta_by_definition(kind, net, name="a"):
    """The delta from the formulas in `docs/adapters.md`, by einsum and explicit index arithmetic."""
    layer = net["layer"]
    tensors = {key.split(".")[1]: p for key, p in adapter_parameters(net, name).items()}
    shape = layer.get_base_layer().weight.shape
    if kind == "convlora":
        k1 = shape[2] if len(shape) > 2 else 1
        product = tensors["convlora_B"] @ tensors["convlora_A"]
        columns = product.shape[1]
        flat = torch.arange(shape.numel())
        return 1.5 * product[flat // columns, flat % columns].reshape(shape), k1
    factors = [tensors[f] for f in ("flora_out", "flora_in", "flora_k1", "flora_k2", "flora_k3") if f in tensors]
    core, modes = "vwxyz"[: len(shape)], "oihkl"[: len(shape)]
    terms = ",".join([core, *(m + c for m, c in zip(modes, core, strict=True))])
    return 1.5 * torch.einsum(f"{terms}->{modes}", tensors["flora_core"], *factors), None


@both
@every
def test_off_is_the_base_bit_for_bit(kind, case):
    net, x = build(case)
    original, before = net["layer"], run(net, x)
    attached = attach(net, KINDS[kind], "a")
    assert torch.equal(run(net, x), before)  # the initial delta is 0
    randomise(net, "a")
    assert not torch.allclose(run(net, x), before, atol=1e-3)
    net["layer"].enable_adapters(False)
    assert torch.equal(run(net, x), before)
    net["layer"].enable_adapters(True)
    net["layer"].merge()
    net["layer"].enable_adapters(False)
    assert torch.equal(run(net, x), before)  # off wins over merged: it is taken out of the weight
    assert not net["layer"].merged
    net["layer"].enable_adapters(True)
    set_adapters(net, [])
    assert torch.equal(run(net, x), before)
    detach(net, attached)
    assert net["layer"] is original
    assert torch.equal(run(net, x), before)


@both
@every
def test_merged_is_unmerged_and_unmerge_restores(kind, case):
    net, x = build(case, torch.float64)
    weight = net["layer"].weight.detach().clone()
    attach(net, KINDS[kind], "a")
    randomise(net, "a")
    with_adapter = run(net, x)
    net["layer"].merge()
    assert torch.allclose(run(net, x), with_adapter, rtol=1e-10, atol=1e-12)
    assert torch.allclose(net["layer"].weight, weight + delta_by_definition(kind, net)[0], rtol=1e-10, atol=1e-12)
    net["layer"].unmerge()
    assert torch.equal(net["layer"].weight, weight)
    assert torch.equal(run(net, x), with_adapter)
    net["layer"].merge(keep_base=False)
    assert torch.allclose(run(net, x), with_adapter, rtol=1e-10, atol=1e-12)
    with pytest.warns(UserWarning, match="approximate"):
        net["layer"].unmerge()
    assert torch.allclose(net["layer"].weight, weight, rtol=1e-10, atol=1e-12)


@both
@every
def test_the_chain_is_the_conv_with_the_delta(kind, case):
    net, x = build(case, torch.float64)
    geometry = geometry_of(net["layer"])
    attach(net, KINDS[kind], "a")
    randomise(net, "a")
    delta = delta_by_definition(kind, net)[0]
    expected = dense(case, x, delta, None, net["layer"].get_base_layer())
    assert torch.allclose(geometry.convolve(x, delta, geometry.groups), expected, rtol=1e-10, atol=1e-12)
    tensors = [p for _, p in adapter_parameters(net, "a").items()]
    if kind == "flora":
        chained = flora_room.chain_forward(x, tensors[0], tensors[1:], 1.5, geometry)
    else:
        chained = conv_lora_room.chain_forward(x, *tensors, 1.5, geometry)
    assert torch.allclose(chained, expected, rtol=1e-10, atol=1e-12)


@both
@pytest.mark.parametrize("case", ["conv2d-plain", "conv2d-groups", "conv2d-circular", "conv3d-plain", "conv3d-groups"])
def test_channels_last_gives_the_same(kind, case):
    net, x = build(case, torch.float64)
    attach(net, KINDS[kind], "a")
    randomise(net, "a")
    expected = run(net, x)
    last = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    assert torch.allclose(run(net, last), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dims", CONV)
def test_cut_and_glue_keep_the_memory_format(dims):
    formats = {1: [torch.contiguous_format], 2: [torch.contiguous_format, torch.channels_last],
               3: [torch.contiguous_format, torch.channels_last_3d]}  # fmt: skip
    x = torch.randn(2, 6, *(5, 4, 3)[:dims])
    for memory in formats[dims]:
        pieces = cut(x.contiguous(memory_format=memory), 3)
        assert torch.equal(pieces, x.reshape(6, 2, *x.shape[2:]))
        assert pieces.is_contiguous(memory_format=memory)
        assert torch.equal(glue(pieces, 3), x)
        assert glue(pieces, 3).is_contiguous(memory_format=memory)


@both
@pytest.mark.parametrize("case", ["linear", "conv2d-groups", "conv2d-reflect", "conv2d-odd-channels"])
def test_one_graph_under_compile(kind, case):
    net, x = build(case)
    attach(net, KINDS[kind], "a")
    randomise(net, "a")
    # The "eager" backend runs what was captured as it stands; fullgraph refuses a break.
    compiled = torch.compile(net["layer"], backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), net["layer"](x))


@both
@every
def test_gradients_are_those_of_the_dense_definition(kind, case):
    net, x = build(case, torch.float64)
    attach(net, KINDS[kind], "a")
    randomise(net, "a")
    layer, parameters = net["layer"], list(adapter_parameters(net, "a").values())
    x.requires_grad_()
    base = layer.get_base_layer()
    expected = dense(case, x, base.weight + delta_by_definition(kind, net)[0], base.bias, base)
    given = layer(x)
    direction = torch.randn(given.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    wanted = torch.autograd.grad(expected, [x, *parameters], direction)
    got = torch.autograd.grad(given, [x, *parameters], direction)
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)
    # Nothing of the base is trained.
    assert [n for n, p in net.named_parameters() if p.requires_grad] == list(adapter_parameters(net, "a"))


@both
@every
def test_save_and_load(kind, case, tmp_path):
    net, x = build(case)
    attach(net, KINDS[kind], "a")
    randomise(net, "a")
    file = write_adapter(net, "a", tmp_path / "a.safetensors")
    net["layer"].merge()
    merged = write_adapter(net, "a", tmp_path / "merged.safetensors")
    assert content(merged) == content(file)
    net["layer"].unmerge()
    fresh, _ = build(case)
    attach_file(fresh, "b", read_adapter(file))
    assert torch.equal(run(fresh, x), run(net, x))
    again = write_adapter(fresh, "b", tmp_path / "again.safetensors")
    assert content(again) == content(file)


@both
@every
def test_two_adapters_and_scales(kind, case):
    net, x = build(case, torch.float64)
    before = run(net, x)
    first = attach(net, KINDS[kind], "a")
    randomise(net, "a")
    alone = run(net, x) - before
    attach(net, KINDS[kind], "b")
    assert torch.equal(run(net, x), before)  # the new one is active, and still 0
    randomise(net, "b", seed=3)
    other = run(net, x) - before
    set_adapters(net, ["a", "b"], [0.5, -2.0])
    both_on = run(net, x)
    assert torch.allclose(both_on - before, 0.5 * alone - 2 * other, rtol=1e-9, atol=1e-11)
    layer = net["layer"]
    layer.scale_layer(3.0)
    assert torch.allclose(run(net, x) - before, 3 * (both_on - before), rtol=1e-9, atol=1e-11)
    layer.unscale_layer(3.0)
    weight = layer.weight.detach().clone()
    layer.merge(adapter_names=["a"])
    assert torch.allclose(run(net, x), both_on, rtol=1e-9, atol=1e-11)  # b is added to the merged weight
    layer.merge(adapter_names=["b"])
    assert torch.allclose(run(net, x), both_on, rtol=1e-9, atol=1e-11)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    detach(net, first)
    assert torch.allclose(run(net, x) - before, -2 * other, rtol=1e-9, atol=1e-11)


@both
@every
def test_bfloat16_merges_in_float32_and_rounds_once(kind, case):
    net, x = build(case, torch.bfloat16)
    weight = net["layer"].weight.detach().clone()
    before = run(net, x)
    attach(net, KINDS[kind], "a")
    assert {p.dtype for p in adapter_parameters(net, "a").values()} == {torch.float32}
    assert torch.equal(run(net, x), before)
    randomise(net, "a")
    with_adapter = run(net, x)
    assert with_adapter.dtype == torch.bfloat16
    layer = net["layer"]
    expected = (weight.float() + layer.delta("a")).bfloat16()
    layer.merge()
    assert torch.equal(layer.weight, expected)
    scale = with_adapter.float().abs().max()
    assert (run(net, x).float() - with_adapter.float()).abs().max() < 0.03 * scale
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


@both
@pytest.mark.parametrize("case", ["linear", "conv1d-groups", "conv2d-reflect", "conv3d-plain"])
def test_an_unbatched_input(kind, case):
    net, x = build(case, torch.float64)
    attach(net, KINDS[kind], "a")
    randomise(net, "a")
    assert torch.allclose(run(net, x[0]), run(net, x)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", LORA_CASES)
def test_peft_lora_where_it_works(case, tmp_path):
    net, x = build(case)
    original, before = net["layer"], run(net, x)
    attached = attach(net, LORA, "a")
    assert torch.equal(run(net, x), before)
    randomise(net, "a")
    with_adapter = run(net, x)
    net["layer"].merge()
    assert torch.allclose(run(net, x), with_adapter, rtol=1e-4, atol=1e-5)
    net["layer"].unmerge()
    assert torch.allclose(run(net, x), with_adapter, rtol=1e-4, atol=1e-5)
    detach(net, attached)
    assert net["layer"] is original
    net, _ = build(case)
    attach(net, LORA, "a")
    randomise(net, "a")
    fresh, _ = build(case)
    attach_file(fresh, "b", read_adapter(write_adapter(net, "a", tmp_path / "a.safetensors")))
    assert torch.equal(run(fresh, x), run(net, x))


@pytest.mark.parametrize(
    "case", [f"conv{d}d-{v}" for d in CONV for v in ("dilation", "reflect", "replicate", "circular")]
)
def test_peft_lora_is_refused_where_it_is_wrong(case):
    net, x = build(case)
    before = run(net, x)
    with pytest.raises(AdapterError, match="ConvLoRA is not"):
        attach(net, LORA, "a")
    assert not any(isinstance(module, BaseTunerLayer) for module in net.modules())
    assert torch.equal(run(net, x), before)
