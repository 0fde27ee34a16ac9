"""Integer products against float64 arithmetic on the values of the codes."""

import pytest
import torch
import torch.nn.functional as F

from vislr import kernels
from vislr.kernels.integer_gemm import reference

MODES = ("reference", "kernel")
ZEROS = [(False, False), (True, False), (False, True), (True, True)]


def far(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def codes(*shape, low=-128, high=128):
    return torch.randint(low, high, shape, dtype=torch.int8)


def zeros(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("has_x", "has_w"), ZEROS)
def test_linear_w8a8(mode, has_x, has_w):
    torch.manual_seed(0)
    # Rows in the leading axes, none of the sizes a multiple of a block, weight not contiguous.
    x, weight = codes(2, 35, 130), codes(130, 41).mT
    scales = torch.rand(2, 35), torch.rand(41)
    bias = torch.randn(41)
    zero_x, zero_w = (zeros(2, 35) if has_x else None), (zeros(41) if has_w else None)
    values = (x.double() - (zero_x.double()[..., None] if has_x else 0)) * scales[0].double()[..., None]
    weights = (weight.double() - (zero_w.double()[:, None] if has_w else 0)) * scales[1].double()[:, None]
    with kernels.use(mode):
        y = kernels.linear_w8a8(x, weight, *scales, bias, zero_x, zero_w, dtype=torch.float32)
    assert far(y, F.linear(values, weights, bias.double())) < 2e-7


@pytest.mark.parametrize("mode", MODES)
def test_sums_are_exact(mode):
    """Integers that float32 cannot hold: 2000 products of 127 * 127 and one of 1."""
    x = torch.full((1, 2001), 127, dtype=torch.int8)
    x[0, -1] = 1
    weight = x.clone()
    ones = torch.ones(1)
    with kernels.use(mode):
        y = kernels.linear_w8a8(
            x, weight, ones, ones, x_zero=torch.tensor([127], dtype=torch.int32), dtype=torch.float32
        )
    assert y.item() == -126.0


def one_by_one(x, weight):
    """Products added in their order, in the dtype of x: rounds wherever a sum on the way is too large."""
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=x.dtype)
    for a, b in zip(x.unbind(1), weight.unbind(1), strict=True):
        total += a[:, None] * b
    return total


def test_exact_in_any_order():
    """1100 products of 127 * 127, one of 1, and 1100 that take the first away: float32 loses the one."""
    x = torch.full((1, 2201), 127.0)
    weight = torch.cat((torch.full((1, 1100), 127.0), torch.ones(1, 1), torch.full((1, 1100), -127.0)), 1)
    x[0, 1100] = 1
    assert one_by_one(x, weight).item() != 1
    assert reference.exact(one_by_one, x, weight).item() == 1
    # Small weights are not taken in pieces.
    calls = []
    reference.exact(lambda a, b: calls.append(a.shape[1]) or F.linear(a, b), x, weight.sign())
    assert calls == [2201]


@pytest.mark.parametrize(("channels", "side"), [(300, 3), (1, 40)], ids=["pieces", "one channel"])
def test_exact_convolution(channels, side):
    """The largest codes there are, more than float32 can sum."""
    x, weight = (torch.full((1, channels, side, side), sign, dtype=torch.int8) for sign in (127, -128))
    x[0, 0, 0, 0] -= 1
    ones, zero = torch.ones(1), torch.tensor([-128], dtype=torch.int32)
    with kernels.use("reference"):
        y = kernels.conv_w8a8(x, weight, ones, ones, None, zero, dtype=torch.float32)
    assert y.item() == torch.tensor(-128.0 * (255 * channels * side * side - 1)).item()


@pytest.mark.parametrize("mode", MODES)
def test_linear_w8a8_of_nothing(mode):
    with kernels.use(mode):
        y = kernels.linear_w8a8(codes(0, 16), codes(4, 16), torch.ones(0), torch.ones(4))
    assert y.shape == (0, 4)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_quantize_rows(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 100).to(dtype)
    x[0, 0] = 0
    found, scale = kernels.quantize_rows(x)
    with kernels.use("kernel"):
        again = kernels.quantize_rows(x)
    assert torch.equal(found, again[0])
    assert torch.equal(scale, again[1])
    assert found.dtype == torch.int8
    assert torch.equal(found[0, 0], torch.zeros(100, dtype=torch.int8))
    assert torch.equal(found.abs().amax(-1)[1:], torch.full((2, 5), 127, dtype=torch.int8))
    assert ((found * scale[..., None] - x.float()).abs() <= scale[..., None] * 0.5001).all()


def test_packing():
    torch.manual_seed(0)
    given = torch.randint(0, 16, (5, 70))
    packed = kernels.pack_int4(given, group=32, fill=3)
    assert packed.shape == (5, 48)
    unpacked = kernels.unpack_int4(packed, group=32)
    assert torch.equal(unpacked[:, :70].long(), given)
    assert (unpacked[:, 70:] == 3).all()
    assert packed[0, 0].item() == given[0, 0].item() + 16 * given[0, 16].item()


def four_bits(rows, depth, group):
    groups = -(-depth // group)
    given = torch.randint(0, 16, (rows, depth))
    scale = torch.rand(rows, groups)
    zero = torch.randint(0, 16, (rows, groups), dtype=torch.uint8)
    wide = [t.double().repeat_interleave(group, 1)[:, :depth] for t in (zero, scale)]
    return kernels.pack_int4(given, group, zero[:, -1]), scale, zero, (given.double() - wide[0]) * wide[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "shape", "group", "tolerance"),
    [
        (torch.float32, (70, 130, 40), 32, 1e-6),
        (torch.float16, (3, 64, 65), 64, 2e-3),
        (torch.bfloat16, (17, 100, 5), 64, 1.2e-2),
        (torch.float32, (4, 30, 5), 10, 1e-6),
    ],
    ids=str,
)
def test_linear_w4a16(mode, dtype, shape, group, tolerance):
    torch.manual_seed(0)
    rows, depth, columns = shape
    packed, scale, zero, weight = four_bits(columns, depth, group)
    x = torch.randn(rows, depth).to(dtype).requires_grad_()
    bias = torch.randn(columns).to(dtype).requires_grad_()
    # A group of 10 has no kernel: blocks are powers of two.
    with kernels.use(mode if group != 10 else "auto"):
        y = kernels.linear_w4a16(x, packed, scale, bias, zero, group)
        y.sum().backward()
    assert far(y, F.linear(x.double(), weight, bias.double())) < tolerance
    assert far(x.grad, weight.sum(0).expand(rows, -1)) < tolerance
    assert far(bias.grad, torch.full((columns,), float(rows))) < tolerance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(70, 130, 40), (1, 64, 7)])
def test_linear_w4a8(mode, shape):
    torch.manual_seed(0)
    rows, depth, columns = shape
    packed, scale, zero, weight = four_bits(columns, depth, 64)
    x, x_scale, bias = codes(rows, depth), torch.rand(rows), torch.randn(columns)
    with kernels.use(mode):
        y = kernels.linear_w4a8(x, packed, x_scale, scale, bias, zero, 64, dtype=torch.float32)
        middle = kernels.linear_w4a8(x, packed, x_scale, scale, group=64, dtype=torch.float32)
    assert far(y, F.linear(x.double() * x_scale.double()[:, None], weight, bias.double())) < 2e-6
    eights = torch.full_like(zero, reference.MIDDLE)
    with kernels.use(mode):
        assert torch.equal(
            middle, kernels.linear_w4a8(x, packed, x_scale, scale, None, eights, 64, dtype=torch.float32)
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("has_x", "has_w"), ZEROS)
@pytest.mark.parametrize("last", [False, True])
def test_conv_w8a8(mode, has_x, has_w, last):
    torch.manual_seed(0)
    x, weight = codes(2, 20, 9, 7), codes(30, 20, 3, 2)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    scales, bias = (torch.rand(2), torch.rand(30)), torch.randn(30)
    zero_x, zero_w = (zeros(2) if has_x else None), (zeros(30) if has_w else None)
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    values = (x.double() - (zero_x.double()[:, None, None, None] if has_x else 0)) * scales[0].double()[
        :, None, None, None
    ]
    taps = (weight.double() - (zero_w.double()[:, None, None, None] if has_w else 0)) * scales[1].double()[
        :, None, None, None
    ]
    with kernels.use(mode):
        y = kernels.conv_w8a8(x, weight, *scales, bias, zero_x, zero_w, **geometry, dtype=torch.float32)
    assert far(y, F.conv2d(values, taps, bias.double(), **geometry)) < 2e-7
    assert y.is_contiguous(memory_format=torch.channels_last) == last or mode == "reference"


WRONG = {
    "codes": (lambda: kernels.linear_w8a8(torch.ones(2, 3), codes(4, 3), torch.ones(2), torch.ones(4)), "torch.int8"),
    "depth": (
        lambda: kernels.linear_w8a8(codes(2, 3), codes(4, 5), torch.ones(2), torch.ones(4)),
        "expected \\(2, 5\\)",
    ),
    "range": (lambda: kernels.pack_int4(torch.full((1, 4), 16), 4), "expected 0 to 15"),
    "group": (lambda: kernels.pack_int4(torch.zeros(1, 4).long(), 3), "even group"),
    "scale": (
        lambda: kernels.linear_w4a16(torch.ones(1, 64), torch.zeros(2, 32).byte(), torch.ones(2), group=64),
        "scale is",
    ),
    "size": (
        lambda: kernels.conv_w8a8(codes(1, 2, 2, 2), codes(1, 2, 3, 3), torch.ones(1), torch.ones(1)),
        "no output position",
    ),
    "rows": (lambda: kernels.quantize_rows(torch.ones(2, 0)), "K at least 1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    call, message = WRONG[wrong]
    with pytest.raises(kernels.KernelError, match=message):
        call()
