"""Attention kernels and their reference against the plain formula in float64."""

import pytest
import torch

from vislr import kernels
from vislr.kernels.attention import reference

MODES = ("reference", "kernel")
# The interpreter truncates where a GPU rounds to bf16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2, torch.float64: 1e-12}
# The log-sum-exp of torch's own CPU kernel, from half floats.
SUMS = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}
# (dtype, B, H, Nq, Nk, D): every dtype; head sizes of one and two column blocks; lengths around a block.
CASES = [
    (torch.float32, 2, 2, 70, 33, 40),
    (torch.float32, 1, 1, 1, 129, 64),
    (torch.bfloat16, 1, 3, 17, 64, 80),
    (torch.float16, 1, 2, 130, 65, 160),
    (torch.float16, 1, 1, 5, 3, 24),
]


def far(a, b):
    """Relative distance in the Euclidean norm."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def draw(case, seed=0):
    dtype, batch, heads, queries, keys, size = case
    torch.manual_seed(seed)
    shapes = [(batch, heads, n, size) for n in (queries, keys, keys)]
    # Memory order (B, N, H, D), as projections leave it: not contiguous.
    return [torch.randn(b, n, h, d).to(dtype).transpose(1, 2) for b, h, n, d in shapes]


def weights_of(q, k, scale=None):
    """The attention map and its log-sum-exp in float64."""
    logits = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return logits.softmax(-1), logits.logsumexp(-1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, mode):
    inputs = [x.requires_grad_() for x in draw(case)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grad = torch.randn(case[1], case[2], case[3], case[5])
    weights, lse = weights_of(*exact[:2])
    expected = weights @ exact[2]
    expected.backward(grad.to(case[0]).double())
    with kernels.use(mode):
        out, sums = kernels.attention_with_lse(*inputs)
        out.backward(grad.to(case[0]))
    assert out.dtype == case[0]
    assert sums.dtype == torch.float32
    assert not sums.requires_grad
    assert far(out, expected) < TOLERANCE[case[0]]
    assert far(sums, lse) < SUMS[case[0]]
    for mine, theirs in zip(inputs, exact, strict=True):
        assert far(mine.grad, theirs.grad) < TOLERANCE[case[0]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_column_sum(case, mode):
    q, k, v = draw(case)
    s = torch.rand(q.shape[:3])
    with kernels.use(mode):
        _, lse = kernels.attention_with_lse(q, k, v)
        total = kernels.attention_column_sum(q, k, lse, s)
    expected = torch.einsum("bhqk,bhq->bhk", weights_of(q, k)[0], s.double())
    assert total.dtype == torch.float32
    assert far(total, expected) < 2 * SUMS[case[0]]
    assert torch.allclose(total.sum(-1), s.sum(-1), rtol=10 * SUMS[case[0]])


def test_column_sum_does_not_depend_on_its_blocks(monkeypatch):
    q, k, v = draw((torch.float64, 2, 2, 70, 33, 8))
    _, lse = kernels.attention_with_lse(q, k, v)
    s = torch.rand(q.shape[:3], dtype=torch.float64)
    whole = kernels.attention_column_sum(q, k, lse, s)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1)
    assert far(kernels.attention_column_sum(q, k, lse, s), whole) < 1e-14


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gathered_attention(mode, dtype):
    q, k, v = (x.requires_grad_() for x in draw((dtype, 2, 2, 40, 40, 48)))
    rows = torch.stack([torch.randperm(40)[:19] for _ in range(2)])
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    chosen = [torch.stack([x[b][:, rows[b]] for b in range(2)]) for x in exact]
    expected = weights_of(*chosen[:2])[0] @ chosen[2]
    with kernels.use(mode):
        out, lse = kernels.gathered_attention(q, k, v, rows, rows)
        out.sum().backward()
        few, _ = kernels.gathered_attention(q, k, v, query_index=rows)
        whole, _ = kernels.attention_with_lse(q, k, v)
    expected.sum().backward()
    assert far(out, expected) < TOLERANCE[dtype]
    assert far(lse, weights_of(*chosen[:2])[1]) < SUMS[dtype]
    assert far(v.grad, exact[2].grad) < TOLERANCE[dtype]
    # The sum over outputs does not see q: its gradient is about 0 in size, so it is compared in full.
    assert torch.allclose(q.grad.double(), exact[0].grad, atol=2e-2)
    assert far(few, torch.stack([whole[b][:, rows[b]] for b in range(2)])) < TOLERANCE[dtype]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kept", "heads", "size"), [(1, 1, 16), (13, 3, 40), (50, 2, 16)])
def test_nearest_and_recover(mode, kept, heads, size):
    q, k, v = draw((torch.float32, 2, heads, 50, 50, size), seed=kept)
    keep = torch.stack([torch.randperm(50)[:kept] for _ in range(2)])
    values = torch.randn(2, kept, 20, requires_grad=True)
    with kernels.use(mode):
        _, lse = kernels.attention_with_lse(q, k, v)
        out, nearest = kernels.recover_by_attention(values, keep, q, k, lse)
        assert torch.equal(kernels.nearest_kept(q, k, lse, keep), nearest)
    mean = weights_of(q, k)[0].mean(1)
    expected = torch.stack([mean[b][:, keep[b]].argmax(-1) for b in range(2)])
    for b in range(2):
        expected[b, keep[b]] = torch.arange(kept)
    assert torch.equal(nearest, expected)
    assert torch.equal(out, torch.stack([values[b, expected[b]] for b in range(2)]))
    out.sum().backward()
    counts = torch.stack([torch.bincount(expected[b], minlength=kept) for b in range(2)])
    assert torch.equal(values.grad, counts[..., None].expand_as(values).to(values.dtype))
    assert torch.equal(kernels.recover(values, nearest), out)


@pytest.mark.parametrize("mode", MODES)
def test_empty_selections(mode):
    q, k, v = draw((torch.float32, 2, 2, 6, 6, 16))
    none = torch.empty(2, 0, dtype=torch.int64)
    with kernels.use(mode):
        out, lse = kernels.gathered_attention(q, k, v, query_index=none)
        assert out.shape == (2, 2, 0, 16)
        assert lse.shape == (2, 2, 0)
        out, lse = kernels.gathered_attention(q, k, v, key_index=none)
        assert torch.equal(out, torch.zeros(2, 2, 6, 16))
        assert torch.equal(lse, torch.full((2, 2, 6), -torch.inf))
        assert torch.equal(
            kernels.attention_column_sum(q[:, :, :0], k, lse[:, :, :0], lse[:, :, :0]), torch.zeros(2, 2, 6)
        )
        with pytest.raises(kernels.KernelError, match="keep holds no token"):
            kernels.nearest_kept(q, k, lse, none)


def test_gradcheck_of_the_reference():
    inputs = [x.requires_grad_() for x in draw((torch.float64, 1, 2, 5, 4, 3))]
    index = torch.tensor([[3, 0, 1]])
    with kernels.use("reference"):
        assert torch.autograd.gradcheck(lambda *x: kernels.attention_with_lse(*x)[0], inputs)
        assert torch.autograd.gradcheck(lambda *x: kernels.gathered_attention(*x, index, index)[0], inputs)


def test_the_formula_for_other_devices(monkeypatch):
    """What runs where torch has no attention that returns its log-sum-exp, in blocks of 16 queries."""
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1)
    q, k, v = (x.requires_grad_() for x in draw((torch.float64, 2, 2, 40, 33, 8)))
    weights, lse = weights_of(q, k)
    out, sums = reference.plain_attention(q, k, v, 8**-0.5)
    assert far(out, weights @ v) < 1e-14
    assert far(sums, lse) < 1e-14
    grads = [torch.autograd.grad(y.sum(), [q, v]) for y in (out, weights @ v)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


# numpy, inside of the interpreter, on rows beyond the end that are never stored.
@pytest.mark.filterwarnings("ignore:overflow")
def test_very_negative_logits_do_not_overflow():
    """Weights relative to a row's own log-sum-exp stay finite where all logits of the row are far below 0."""
    q, k, v = draw((torch.float32, 1, 1, 9, 7, 16))
    q, k = (q * 0 + 20).requires_grad_(), (k * 0 - 20).requires_grad_()
    with kernels.use("kernel"):
        out, lse = kernels.attention_with_lse(q, k, v)
        out.sum().backward()
    assert torch.allclose(lse, torch.full_like(lse, -20 * 20 * 16**0.5 + torch.log(torch.tensor(7.0)).item()))
    assert torch.allclose(out, v.mean(2, keepdim=True).expand_as(out), atol=1e-5)
    assert torch.isfinite(q.grad).all()
    assert torch.isfinite(k.grad).all()


WRONG = {
    "three axes": (lambda q, k, v: kernels.attention_with_lse(q[0], k, v), "expected \\(B, H, N, D\\)"),
    "other heads": (lambda q, k, v: kernels.attention_with_lse(q[:, :1], k, v), "the same B, H and D"),
    "dtypes": (lambda q, k, v: kernels.attention_with_lse(q, k.half(), v.half()), "one floating dtype"),
    "lse": (lambda q, k, v: kernels.attention_column_sum(q, k, q[:, 0, :, 0], q[..., 0]), "expected \\(B, H, Nq\\)"),
    "index": (lambda q, k, v: kernels.gathered_attention(q, k, v, torch.zeros(2, 3)), "expected int64"),
    "samples": (lambda q, k, v: kernels.gathered_attention(q, k, v, torch.zeros(3, 3).long()), "2 samples"),
    "recover": (lambda q, k, v: kernels.recover(q, torch.zeros(2, 3).long()), "expected \\(B, n, C\\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    call, message = WRONG[wrong]
    with pytest.raises(kernels.KernelError, match=message):
        call(*draw((torch.float32, 2, 2, 6, 6, 8)))
