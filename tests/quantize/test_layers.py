"""Quantised layers: codes, packing, gradients in float64, and every way of computing against the float definition."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vislr.core.errors import AdapterError
from vislr.core.quantizing import (
    affine_of,
    fake_quantize,
    merged_codes,
    merged_weight,
    round_through,
    to_codes,
    top,
)
from vislr.quantize.layers import Spec, quantized
from vislr.quantize.weights import nf4_table, pack, packed_shape, quantize_weight, unpack

LAYERS = {
    "linear": (lambda: nn.Linear(70, 24), (5, 7, 70)),
    "linear without bias": (lambda: nn.Linear(33, 10, bias=False), (4, 33)),
    "conv1d": (lambda: nn.Conv1d(6, 9, 5, stride=2, padding=2), (3, 6, 21)),
    "conv2d": (lambda: nn.Conv2d(5, 8, 3, padding=1), (2, 5, 9, 8)),
    "conv2d strided": (lambda: nn.Conv2d(6, 7, 3, stride=2, padding=1), (2, 6, 9, 8)),
    "conv2d groups": (lambda: nn.Conv2d(6, 8, 3, groups=2, padding=2, dilation=2), (2, 6, 9, 8)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 8)),
}


def made(name, bits=4, input_bits=16, inputs="none", group=None, kind="uniform", symmetric=False, entries=0):
    torch.manual_seed(1)
    layer = LAYERS[name][0]()
    x = torch.randn(LAYERS[name][1])
    spec = Spec(bits, input_bits, inputs, group, kind, symmetric, entries)
    quant = quantized(layer, spec, "minmax")
    if entries:
        quant.set_input(*affine_of(x.min() * 0.8, x.max() * 0.9, input_bits))
    return layer, quant, x


def by_formula(layer, quant, x):
    """The layer with both factors as their codes say, in float64."""
    copied = copy.deepcopy(layer).double()
    copied.weight.data = quant.dequantized(torch.float32).double()
    return copied(quant.rounded(x).double())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("columns", [1, 7, 64, 130])
def test_packed_codes_come_back_for_any_number_of_columns(bits, columns):
    codes = torch.randint(0, top(bits) + 1, (6, columns), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for block in (2, 64):
        packed = pack(codes, bits, block)
        assert packed.shape == packed_shape(6, columns, bits, block)
        assert torch.equal(unpack(packed, bits, columns, block), codes)
    # As many bytes as the bits need, rounded up to whole bytes of 2, 4 or 8 bits.
    held = {2: 2, 3: 4, 4: 4, 5: 8, 8: 8}[bits]
    assert pack(codes, bits).numel() == 6 * -(-columns * held // 8)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_those_of_the_table(bits):
    """Against autograd through rounding and clipping written out; in range, above, below."""
    torch.manual_seed(0)
    x = (torch.randn(3, 40, dtype=torch.float64) * (4 if bits < 8 else 60)).requires_grad_()
    scale = torch.tensor([[0.11], [0.2], [0.31]], dtype=torch.float64, requires_grad=True)
    zero = torch.tensor([[1.0], [2.0], [0.0]], dtype=torch.float64, requires_grad=True)
    weigh = torch.randn(3, 40, dtype=torch.float64)
    (fake_quantize(x, scale, zero, bits) * weigh).sum().backward()
    found = [t.grad.clone() for t in (x, scale, zero)]
    for t in (x, scale, zero):
        t.grad = None
    code = round_through(x / scale) + zero
    inside = (code >= 0) & (code <= top(bits))
    assert inside.any()
    assert (code > top(bits)).any()
    assert (code < 0).any()
    code = torch.where(inside, code, code.detach().clamp(0, top(bits)))
    (((code - zero) * scale) * weigh).sum().backward()
    for one, t in zip(found, (x, scale, zero), strict=True):
        assert torch.allclose(one, t.grad, rtol=1e-12, atol=1e-12)


def test_quantising_twice_changes_nothing_and_codes_stay_in_range():
    torch.manual_seed(0)
    x = torch.randn(8, 50)
    for bits in (2, 3, 4, 8):
        for symmetric in (False, True):
            scale, zero = affine_of(x.amin(1, keepdim=True), x.amax(1, keepdim=True), bits, symmetric)
            codes = to_codes(x, scale, zero, bits)
            assert codes.min() >= 0
            assert codes.max() <= top(bits)
            once = fake_quantize(x, scale, zero, bits)
            assert torch.equal(fake_quantize(once, scale, zero, bits), once)
            assert torch.equal(fake_quantize(torch.zeros(8, 1), scale, zero, bits), torch.zeros(8, 1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_update_merges_into_codes(bits):
    """q' = clip(q + round(BA / delta)); below half a step nothing happens, above it a code flips."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, top(bits) + 1, (6, 72), generator=generator).to(torch.uint8)
    scale = torch.rand(6, 1, generator=generator) * 0.1 + 0.05
    zero = torch.randint(0, top(bits) + 1, (6, 1), generator=generator).float()
    base = (codes - zero) * scale
    delta = torch.randn(6, 72, generator=generator) * 0.2
    merged = merged_codes(codes, scale, delta, bits)
    assert torch.equal(merged, to_codes(base + delta, scale, zero, bits))
    assert torch.equal(merged_weight(codes, zero, scale, delta, bits), (merged - zero) * scale)
    small = torch.full_like(delta, 0.49) * scale
    assert torch.equal(merged_codes(codes, scale, small, bits), codes.float())
    large = torch.full_like(delta, 0.51) * scale
    assert torch.equal(merged_codes(codes, scale, large, bits), (codes.float() + 1).clamp_max(top(bits)))


def test_gradients_of_a_merged_weight():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (4, 9), generator=generator).to(torch.uint8)
    zero = torch.randint(0, 16, (4, 1), generator=generator).double()
    scale = (torch.rand(4, 1, generator=generator, dtype=torch.float64) + 0.1).requires_grad_()
    delta = (torch.randn(4, 9, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    weigh = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    (merged_weight(codes, zero, scale, delta, 4) * weigh).sum().backward()
    found = delta.grad.clone(), scale.grad.clone()
    delta.grad = scale.grad = None
    code = round_through(delta / scale) + codes
    inside = (code >= 0) & (code <= 15)
    assert inside.any() and not inside.all()  # noqa: PT018
    (((torch.where(inside, code, code.detach().clamp(0, 15)) - zero) * scale) * weigh).sum().backward()
    assert torch.allclose(found[0], delta.grad, rtol=1e-12)
    assert torch.allclose(found[1], scale.grad, rtol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8, "symmetric": True}, {"bits": 4}, {"bits": 2}, {"bits": 3, "group": 16}, {"bits": 4, "group": 64},
        {"bits": 4, "group": 32, "kind": "nf4", "symmetric": True},
        {"bits": 8, "symmetric": True, "input_bits": 8, "inputs": "dynamic"},
        {"bits": 8, "symmetric": True, "input_bits": 8, "inputs": "static", "entries": 1},
        {"bits": 6, "input_bits": 8, "inputs": "static", "entries": 1},
        {"bits": 4, "input_bits": 8, "inputs": "static", "entries": 1},
        {"bits": 4, "input_bits": 4, "inputs": "static", "entries": 1},
        {"bits": 2, "symmetric": True, "input_bits": 8, "inputs": "dynamic"},
        {"bits": 4, "input_bits": 4, "inputs": "dynamic"},
    ],
    ids=str,
)  # fmt: skip
def test_every_way_gives_what_the_codes_say(name, options):
    layer, quant, x = made(name, **options)
    expected = by_formula(layer, quant, x)
    for way in quant.ways():
        if way == "onednn" or (way == "packed" and options["bits"] == 8):
            continue
        quant.way = way
        with torch.no_grad():
            error = (quant(x).double() - expected).norm() / expected.norm()
        assert error < 1e-5, (way, float(error))
    assert isinstance(quant, type(layer))
    assert quant.weight.shape == layer.weight.shape


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
def test_observers(observer):
    """MSE search never loses against the full range; one outlier costs a percentile nothing."""
    torch.manual_seed(0)
    weight = torch.randn(12, 4000)
    weight[:, 0] = 40

    def error(found):
        back = (found.codes.float() - found.zero) * found.scale
        return (back - weight)[:, 1:].norm() / weight[:, 1:].norm()

    full = error(quantize_weight(weight, 4, symmetric=False, observer="minmax"))
    found = error(quantize_weight(weight, 4, symmetric=False, observer=observer))
    assert {"minmax": found == full, "mse": found < full, "percentile": found < 0.3 * full}[observer]


def test_nf4_is_the_published_table():
    # QLoRA, appendix E, to the digits printed there.
    published = [-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
                 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
    assert torch.allclose(nf4_table(), torch.tensor(published), atol=5e-7)


def test_a_quantised_weight_refuses_to_be_written():
    _, quant, _ = made("linear")
    with pytest.raises(AdapterError, match="cannot merge into a quantised weight"):
        quant.weight.data += 1
    assert torch.equal(quant.weight, quant.dequantized())


def test_scales_stay_float32():
    _, quant, x = made("linear", bits=8, input_bits=8, inputs="static", entries=1, symmetric=True)
    before = quant.weight_scale.clone(), quant.input_scale.clone()
    quant.to(torch.bfloat16)
    assert torch.equal(quant.weight_scale, before[0])
    assert torch.equal(quant.input_scale, before[1])
    assert (quant.bias.dtype, quant.compute_dtype, quant.weight.dtype) == (torch.bfloat16,) * 3
    assert quant(x.bfloat16()).dtype == torch.bfloat16
    quant.float().half().to(torch.float32)
    assert torch.equal(quant.weight_scale, before[0])


def test_a_layer_of_a_transformer_is_still_a_linear():
    _, quant, x = made("linear", bits=4)
    assert (quant.in_features, quant.out_features) == (70, 24)
    assert torch.equal(F.linear(x, quant.weight.data, quant.bias), quant(x))
