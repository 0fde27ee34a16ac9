"""A conv as three convs: what is computed, how well, and what it costs."""

import copy

import numpy as np
import pytest
import tensorly
import timm
import torch
from tensorly.decomposition import partial_tucker
from torch import nn

from vislr.adapters import TuckerReport, tucker_from_weight
from vislr.anatomy import flops
from vislr.core.errors import AdapterError

GEOMETRIES = {
    "plain": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "non-square": {"kernel_size": (3, 5), "stride": (1, 2), "padding": (0, 2)},
    "same": {"kernel_size": (3, 4), "padding": "same"},
    "no bias": {"kernel_size": 3, "bias": False},
    "pointwise": {"kernel_size": 1},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
    "circular": {"kernel_size": 5, "padding": 2, "padding_mode": "circular"},
}


def conv_of(inside=6, out=9, seed=0, **options):
    torch.manual_seed(seed)
    return nn.Conv2d(inside, out, **({"kernel_size": 3, "padding": 1} | options))


def structured(inside=12, out=16, rank=4, noise=0.1, seed=0):
    """A conv whose weight is nearly of low rank, as trained ones are."""
    conv = conv_of(inside, out, seed)
    core, u, v = torch.randn(rank, rank, 3, 3), torch.randn(out, rank), torch.randn(inside, rank)
    with torch.no_grad():
        weight = torch.einsum("bahw,ob,ia->oihw", core, u, v)
        conv.weight.copy_(weight / weight.std() + noise * torch.randn_like(weight))
    return conv


def composed(layers):
    """The one weight that the three convs stand for."""
    first, core, last = (layer.weight.detach().double() for layer in layers)
    return torch.einsum("bahw,ob,ai->oihw", core, last[..., 0, 0], first[..., 0, 0])


def kept(weight, ranks):
    """Energy shares that the modes' own singular values leave out at these ranks."""
    total = weight.square().sum()
    sides = (weight.flatten(1), weight.transpose(0, 1).flatten(1))
    values = [torch.linalg.svdvals(side.double()) for side in sides]
    return [float(s[rank:].square().sum() / total) for s, rank in zip(values, ranks, strict=True)]


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_full_rank_is_the_conv_and_less_is_the_conv_with_the_approximation(kind):
    conv = conv_of(**GEOMETRIES[kind])
    before = copy.deepcopy(conv.state_dict())
    x = torch.randn(2, 6, 9, 10)
    layers, report = tucker_from_weight(conv, ranks=(9, 6))
    assert [type(layer) for layer in layers] == [nn.Conv2d] * 3
    assert report.error == 0.0
    assert torch.allclose(layers(x), conv(x), atol=1e-5)
    layers, report = tucker_from_weight(conv, ranks=(4, 3))
    assert [tuple(layer.weight.shape[:2]) for layer in layers] == [(3, 6), (4, 3), (9, 4)]
    weight = conv.weight.detach().double()
    assert report.error == pytest.approx(float((composed(layers) - weight).norm() / weight.norm()), rel=1e-5)
    approximate = copy.deepcopy(conv)
    approximate.weight.data = composed(layers).float()
    assert torch.allclose(layers(x), approximate(x), atol=1e-5)
    assert all(torch.equal(conv.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("noise", [0.1, 10.0])
def test_error_is_monotone_and_within_the_known_bounds(noise):
    conv = structured(noise=noise)
    weight = conv.weight.detach().double()
    errors = {}
    for ranks in [(r, s) for r in (2, 4, 7, 16) for s in (2, 4, 7, 12)]:
        layers, report = tucker_from_weight(conv, ranks=ranks)
        errors[ranks] = report.error
        tails = kept(weight, ranks)
        # No approximation of these ranks is better than either mode alone; HOSVD is at most their sum.
        assert max(tails) - 1e-9 <= report.error**2 <= sum(tails) + 1e-9
        # Not worse than the truncated higher-order SVD.
        u, v = (
            torch.linalg.svd(side)[0][:, :rank]
            for side, rank in zip((weight.flatten(1), weight.transpose(0, 1).flatten(1)), ranks, strict=True)
        )
        truncated = torch.einsum("oihw,op,ij->pjhw", weight, u @ u.T, v @ v.T)
        assert report.error <= float((truncated - weight).norm() / weight.norm()) + 1e-7
        # Orthonormal factors: the convs at the ends keep norms.
        assert torch.allclose(
            layers[2].weight[..., 0, 0].T @ layers[2].weight[..., 0, 0], torch.eye(ranks[0]), atol=1e-5
        )
    for (r, s), error in errors.items():
        assert all(errors[other] <= error + 1e-4 for other in errors if other[0] >= r and other[1] >= s)
    # As good as tensorly from its own start, run long.
    _, found = partial_tucker(weight.numpy(), rank=[4, 4], modes=[0, 1], n_iter_max=500, tol=1e-12)
    assert errors[4, 4] <= float(found[-1]) + 1e-4


def test_ranks_by_energy_are_the_cheapest_that_keep_it():
    conv = structured()
    total = sum(p.numel() for p in conv.parameters())
    last = 0
    for energy in (0.5, 0.9, 0.97, 1.0):
        layers, report = tucker_from_weight(conv, energy=energy)
        assert 1 - report.error**2 >= energy - 1e-9
        count = sum(p.numel() for p in layers.parameters())
        assert report.parameters == (total, count)
        assert count >= last
        last = count
    assert tucker_from_weight(conv, energy=0.97)[1].ranks == (4, 4)
    assert tucker_from_weight(conv, energy=1.0)[1].ranks == (16, 12)
    # By trying every pair: no cheaper one of the truncated SVD's keeps as much.
    weight, (chosen, wanted) = conv.weight.detach().double(), (tucker_from_weight(conv, energy=0.8)[1], 0.8)
    u, v = (torch.linalg.svd(side)[0] for side in (weight.flatten(1), weight.transpose(0, 1).flatten(1)))
    rotated = torch.einsum("oihw,op,ij->pjhw", weight, u, v).square().sum((2, 3)).numpy()
    for r in range(1, 17):
        for s in range(1, 13):
            if rotated[:r, :s].sum() / rotated.sum() >= wanted:
                assert 12 * s + 9 * r * s + 16 * r + 16 >= chosen.parameters[1]


def test_ranks_by_latency_keep_most_of_what_is_fast_enough():
    conv, sample = structured(48, 64, 8, noise=1.0), torch.randn(2, 48, 12, 12)
    layers, report = tucker_from_weight(conv, speedup=1e-6, sample=sample)
    # Anything is fast enough: the most energy of what was timed.
    assert report.ranks == max(report.timed, key=lambda one: one.kept).ranks
    assert layers(sample).shape == conv(sample).shape
    assert len(report.timed) >= 4
    own = 9 * 48 * 64
    costs = [48 * one.ranks[1] + 9 * one.ranks[0] * one.ranks[1] + 64 * one.ranks[0] for one in report.timed]
    assert costs == sorted(costs)
    assert costs[-1] <= 0.75 * own
    kept = [one.kept for one in report.timed]
    assert kept == sorted(kept)
    assert all(rank % 8 == 0 for one in report.timed for rank in one.ranks)
    assert all(one.seconds > 0 and one.speedup > 0 for one in report.timed)
    assert report.seconds > 0
    # The truncated decomposition keeps what it says, and refinement loses nothing of it.
    best = max(report.timed, key=lambda one: one.kept)
    assert 1 - report.error**2 >= best.kept - 1e-9
    with pytest.raises(
        AdapterError, match=r"no ranks are 1e\+06 times as fast here; the fastest of \d+ that were timed, "
    ):
        tucker_from_weight(conv, speedup=1e6, sample=sample)
    small = tucker_from_weight(conv_of(), speedup=1e-6, sample=torch.randn(1, 6, 5, 5))[1]
    assert small.ranks == (8, 6)


def test_ranks_by_budget_keep_most_within_it():
    conv = structured(noise=1.0)
    total = sum(p.numel() for p in conv.parameters())
    errors = []
    for budget in (0.05, 0.2, 0.5, 1.0):
        layers, report = tucker_from_weight(conv, budget=budget)
        count = sum(p.numel() for p in layers.parameters())
        assert count == report.parameters[1] <= budget * total
        assert tucker_from_weight(conv, budget=int(budget * total))[1] == report
        errors.append(report.error)
    assert errors == sorted(errors, reverse=True)
    # Exactly the parameters of ranks (1, 1), and one below.
    assert tucker_from_weight(conv, budget=12 + 9 + 16 + 16)[1].ranks == (1, 1)
    with pytest.raises(AdapterError, match=r"52 parameters is below the 53 of ranks \(1, 1\)"):
        tucker_from_weight(conv, budget=52)


@pytest.mark.parametrize(("stride", "size"), [(1, 8), (2, 8)])
def test_flops_are_the_formula(stride, size):
    class Net(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return self.body(x)

    def count(body):
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            body(torch.zeros(1, 16, size, size))
        return counter.get_total_flops()

    conv = conv_of(16, 16, stride=stride, bias=False)
    layers, report = tucker_from_weight(conv, ranks=(8, 8))
    assert count(layers) / count(conv) == pytest.approx(report.flops_ratio, rel=1e-12)
    if stride == 1:
        # C = S: (2 r + 9 r^2) / 9 at r = 0.5 is 0.361.
        assert report.flops_ratio == pytest.approx((2 * 0.5 + 9 * 0.25) / 9)
        assert round(report.flops_ratio, 3) == 0.361


def test_in_a_real_net():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", stem_width=8, channels=(8, 16, 24, 32), num_classes=3).eval()
    nn.init.ones_(model.layer3[0].bn2.weight)  # timm starts it at 0, where the conv would not matter
    x = torch.randn(2, 3, 32, 32)
    before, cost = model(x), flops(model)
    conv = model.layer3[0].conv2
    model.layer3[0].conv2, report = tucker_from_weight(conv, ranks=(24, 24))
    assert torch.allclose(model(x), before, atol=1e-4)
    model.layer3[0].conv2, report = tucker_from_weight(conv, budget=0.4)
    assert flops(model) < cost
    assert report.flops_ratio < 0.5
    model(x).sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in model.layer3[0].conv2)


def test_type_flags_and_backend_are_kept():
    conv = conv_of().to(torch.bfloat16).requires_grad_(False).eval()
    tensorly.set_backend("pytorch")
    try:
        layers, report = tucker_from_weight(conv, ranks=(9, 6))
        layers_small, _ = tucker_from_weight(conv, ranks=(3, 3))
        assert tensorly.get_backend() == "pytorch"
    finally:
        tensorly.set_backend("numpy")
    parameters = [*layers.parameters(), *layers_small.parameters()]
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    assert not any(p.requires_grad for p in parameters)
    assert not layers.training
    assert isinstance(report, TuckerReport)
    assert torch.allclose(composed(layers), conv.weight.double(), atol=1e-2)
    zero = conv_of()
    nn.init.zeros_(zero.weight)
    layers, report = tucker_from_weight(zero, energy=0.9)
    assert (report.ranks, report.error) == ((1, 1), 0.0)
    assert torch.equal(layers(torch.ones(1, 6, 4, 4)), zero(torch.ones(1, 6, 4, 4)))


def broken():
    conv = conv_of()
    conv.weight.data[0, 0, 0, 0] = np.inf
    return conv


@pytest.mark.parametrize(
    ("conv", "options", "message"),
    [
        (lambda: nn.Linear(3, 3), {"ranks": (1, 1)}, "a Linear; expected a Conv2d"),
        (lambda: nn.ConvTranspose2d(3, 3, 3), {"ranks": (1, 1)}, "a ConvTranspose2d; expected a Conv2d"),
        (lambda: nn.Conv2d(6, 6, 3, groups=3), {"ranks": (1, 1)}, "3 groups"),
        (lambda: nn.Conv2d(6, 6, 3, device="meta"), {"ranks": (1, 1)}, "meta device"),
        (lambda: nn.utils.parametrizations.weight_norm(conv_of()), {"ranks": (1, 1)}, "parametrised"),
        (lambda: timm.layers.create_conv2d(6, 6, 3, stride=2, padding="same"), {"ranks": (1, 1)}, "from the input"),
        (broken, {"ranks": (1, 1)}, "NaN or infinite"),
        (conv_of, {}, "one of ranks, energy, budget, speedup; got none"),
        (conv_of, {"speedup": 2.0}, r"sample has shape \(\); speedup is measured on \(N, 6, H, W\)"),
        (conv_of, {"speedup": 2.0, "sample": torch.zeros(1, 5, 8, 8)}, r"sample has shape \(1, 5, 8, 8\)"),
        (conv_of, {"speedup": 0, "sample": torch.zeros(1, 6, 8, 8)}, "speedup is 0; expected a number above 0"),
        (conv_of, {"speedup": 2.0, "energy": 0.5}, "speedup is given beside"),
        (conv_of, {"energy": 0.9, "budget": 0.5}, "got energy and budget"),
        (conv_of, {"ranks": (10, 6)}, r"ranks are \(10, 6\); expected .* to \(9, 6\)"),
        (conv_of, {"ranks": (0, 6)}, r"\(0, 6\)"),
        (conv_of, {"ranks": 4}, "ranks are 4"),
        (conv_of, {"ranks": (2.0, 2)}, "ranks are"),
        (conv_of, {"energy": 1.1}, "energy is 1.1"),
        (conv_of, {"energy": 0}, "energy is 0"),
        (conv_of, {"budget": 1.5}, "budget is 1.5"),
        (conv_of, {"budget": 0}, "budget is 0"),
        (conv_of, {"budget": True}, "budget is True"),
    ],
)
def test_what_cannot_be_is_named(conv, options, message):
    with pytest.raises(AdapterError, match=message):
        tucker_from_weight(conv(), **options)
