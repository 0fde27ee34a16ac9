"""The Tucker convolution: every path against three convolutions in float64."""

import pytest
import torch
import torch.nn.functional as F

from vislr import kernels
from vislr.kernels.tucker_conv import roofline

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PATHS = ("reference", *roofline.PATHS)
# (dtype, channels last, (C, R, S, Co), (kh, kw), stride, padding, dilation)
CASES = [
    (torch.float32, True, (24, 8, 8, 30), (3, 3), 1, 1, 1),
    (torch.float32, False, (9, 5, 17, 33), (1, 3), 1, (0, 2), (1, 2)),
    (torch.bfloat16, True, (16, 20, 40, 16), (3, 3), (2, 1), 1, 1),
    (torch.float16, True, (16, 16, 3, 8), (2, 2), 2, 0, 1),
]


def far(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def draw(case, has_base="map", has_down=True):
    dtype, last, (channels, first, second, out), size, *geometry = case
    torch.manual_seed(0)
    first = first if has_down else channels
    shapes = [(2, channels, 7, 9), (first, channels), (second, first, *size), (out, second)]
    tensors = [(torch.randn(shape) / max(1, shape[1]) ** 0.5).to(dtype) for shape in shapes]
    if not has_down:
        tensors[1] = None
    exact = plain(*tensors, None, 1.0, *geometry)
    base = {"map": torch.randn(exact.shape), "bias": torch.randn(out), "none": None}[has_base]
    tensors.append(None if base is None else base.to(dtype))
    if last:
        tensors = [
            x.contiguous(memory_format=torch.channels_last) if x is not None and x.dim() == 4 else x for x in tensors
        ]
    return tensors


def plain(x, down, core, up, base, scale, stride, padding, dilation):
    x, down, core, up, base = (None if t is None else t.double() for t in (x, down, core, up, base))
    h = x if down is None else F.conv2d(x, down[:, :, None, None])
    y = F.conv2d(F.conv2d(h, core, None, stride, padding, dilation), up[:, :, None, None]) * scale
    if base is None:
        return y
    return y + (base[:, None, None] if base.dim() == 1 else base)


@pytest.fixture
def take(monkeypatch):
    def set_path(path):
        kernels.set_mode("reference" if path == "reference" else "kernel")
        allowed = lambda shape: path if path != "full" or shape.has_down else "tail"  # noqa: E731
        monkeypatch.setattr(roofline, "choose", lambda shape, size=2: allowed(shape))

    yield set_path
    kernels.set_mode("auto")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, path, take):
    x, down, core, up, base = draw(case)
    take(path)
    y = kernels.tucker_convolution(x, down, core, up, base, 0.7, *case[4:])
    assert y.dtype == case[0]
    assert far(y, plain(x, down, core, up, base, 0.7, *case[4:])) < TOLERANCE[case[0]]
    assert y.is_contiguous(memory_format=torch.channels_last) == case[1] or path == "reference"


@pytest.mark.parametrize("path", ["reference", "tail", "chain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case, path, take):
    inputs = [tensor.requires_grad_() for tensor in draw(case)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = plain(*exact, 0.7, *case[4:])
    grad = torch.randn(expected.shape).to(case[0])
    expected.backward(grad.double())
    take(path)
    kernels.tucker_convolution(*inputs, 0.7, *case[4:]).backward(grad)
    for mine, theirs in zip(inputs, exact, strict=True):
        assert mine.grad.dtype == case[0]
        assert far(mine.grad, theirs.grad) < TOLERANCE[case[0]]


@pytest.mark.parametrize("path", ["reference", "tail", "chain"])
@pytest.mark.parametrize(("has_base", "has_down"), [("bias", True), ("none", False)])
def test_bias_and_missing_parts(path, has_base, has_down, take):
    """A compressed convolution has a bias in the place of a map, LoCon no first 1x1."""
    tensors = draw(CASES[0], has_base, has_down)
    inputs = [None if t is None else t.requires_grad_() for t in tensors]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    expected = plain(*exact, 1.5, *CASES[0][4:])
    expected.sum().backward()
    take(path)
    y = kernels.tucker_convolution(*inputs, 1.5, *CASES[0][4:])
    y.sum().backward()
    assert far(y, expected) < 2e-6
    for mine, theirs in zip(inputs, exact, strict=True):
        assert (mine is None) or far(mine.grad, theirs.grad) < 1e-5


def test_only_the_asked_gradients(take):
    """A frozen input and a trained core: the others stay without gradient."""
    x, down, core, up, base = draw(CASES[0])
    take("tail")
    kernels.tucker_convolution(x, down, core.requires_grad_(), up, base, 1.0, 1, 1).sum().backward()
    exact = core.detach().double().requires_grad_()
    plain(x, down, exact, up, base, 1.0, 1, 1, 1).sum().backward()
    assert far(core.grad, exact.grad) < 2e-6
    assert x.grad is None
    assert down.grad is None


def test_empty_batch(take):
    x, down, core, up, _ = draw(CASES[0], "none")
    for path in PATHS:
        take(path)
        assert kernels.tucker_convolution(x[:0], down, core, up, padding=1).shape == (0, 30, 7, 9)


def test_gradcheck_of_the_reference():
    tensors = [t.double().requires_grad_() for t in draw((torch.float32, False, (3, 2, 2, 3), (2, 2), 1, 1, 1))]
    tensors[0] = tensors[0].detach()[:1, :, :3, :3].clone().requires_grad_()
    tensors[4] = tensors[4].detach()[:1, :, :4, :4].clone().requires_grad_()
    with kernels.use("reference"):
        assert torch.autograd.gradcheck(lambda *t: kernels.tucker_convolution(*t, 0.7, 1, 1), tensors)


def test_autocast_casts_all_tensors():
    x, down, core, up, base = draw(CASES[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.tucker_convolution(x, down, core, up, base, 1.0, 1, 1).dtype == torch.bfloat16


@pytest.mark.parametrize(("rank", "ratio"), [(8, 1.05), (64, 1.47), (80, 1.68)])
def test_roofline_of_the_first_level(rank, ratio):
    """320 channels at 128 x 128, batch 2, without a map to add: ideal unfused over fused time."""
    shape = roofline.Shape(2 * 128**2, 2 * 128**2, 320, rank, rank, 320, 9, has_base=False)
    weights = 0  # a few kilobytes, left out
    assert shape.seconds("chain") / shape.seconds("full") + weights == pytest.approx(ratio, abs=0.02)


def test_the_path_follows_the_shape():
    def at(side, channels, rank):
        return roofline.choose(roofline.Shape(2 * side**2, 2 * side**2, channels, rank, rank, channels, 9))

    assert at(128, 320, 64) == "full"
    assert at(32, 1280, 320) == "chain"


WRONG = {
    "axes": (lambda x, d, c, u, b: (x[0], d, c, u, b), {}, "expected x \\(N, C, H, W\\)"),
    "rank": (lambda x, d, c, u, b: (x, d[:3], c, u, b), {}, "expected down \\(R, C\\)"),
    "base": (lambda x, d, c, u, b: (x, d, c, u, b[:, :, :3]), {}, "expected base \\(30,\\)"),
    "dtype": (lambda x, d, c, u, b: (x.half(), d, c, u, b), {}, "one floating dtype"),
    "size": (lambda x, d, c, u, b: (x[:, :, :2], d, c, u, None), {"padding": 0}, "no output position"),
    "stride": (lambda x, d, c, u, b: (x, d, c, u, b), {"stride": 0}, "at least 1, 0 and 1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    arguments, options, message = WRONG[wrong]
    with pytest.raises(kernels.KernelError, match=message):
        kernels.tucker_convolution(*arguments(*draw(CASES[0])), **({"padding": 1} | options))
