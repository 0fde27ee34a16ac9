"""FLoRA against its definition: Tucker sum, ranks, published counts, first step, special cases."""

import math

import pytest
import torch
from torch import nn

from vislr.adapters import FloraConfig, adapter_parameters, attach, set_adapters
from vislr.adapters.flora import delta_weight, use_chain
from vislr.adapters.geometry import geometry_of
from vislr.core.errors import AdapterError
from vislr.kernels import dispatch


def parts(shape, ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(ranks, generator=generator, dtype=torch.float64)
    return core, [
        torch.randn(d, r, generator=generator, dtype=torch.float64) for d, r in zip(shape, ranks, strict=True)
    ]


def test_tucker_sum():
    core, (B, A, C, D) = parts((5, 4, 3, 2), (3, 2, 2, 1))
    # Section 2.1 writes the core as (in, out, h, w).
    expected = 4.0 * torch.einsum("abcd,ia,ob,hc,wd->oihw", core.transpose(0, 1), A, B, C, D)
    assert torch.allclose(delta_weight(core, [B, A, C, D], 4.0), expected, rtol=1e-12)


def test_a_linear_is_b_core_a():
    core, (B, A) = parts((6, 5), (3, 2))
    assert torch.allclose(delta_weight(core, [B, A]), B @ core @ A.T, rtol=1e-12)


@pytest.mark.parametrize(("shape", "ranks"), [((9, 8, 3, 3), (4, 3, 2, 3)), ((9, 8), (3, 3)), ((9, 8, 5), (4, 2, 3))])
def test_multilinear_ranks(shape, ranks):
    delta = delta_weight(*parts(shape, ranks))
    for mode, rank in enumerate(ranks):
        assert torch.linalg.matrix_rank(delta.movedim(mode, 0).reshape(shape[mode], -1)) == rank


def test_full_ranks_with_identity_factors_reach_any_delta():
    delta = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    identities = [torch.eye(d, dtype=torch.float64) for d in delta.shape]
    assert torch.equal(delta_weight(delta, identities), delta)
    # And with any invertible factors, by solving for the core.
    factors = [torch.randn(d, d, dtype=torch.float64) + 3 * torch.eye(d) for d in delta.shape]
    core = delta_weight(delta, [torch.linalg.inv(f) for f in factors])
    assert torch.allclose(delta_weight(core, factors), delta, rtol=1e-9, atol=1e-9)


def test_lora_is_two_modes_and_an_identity_core():
    _, (B, A) = parts((6, 5), (2, 2))
    assert torch.allclose(delta_weight(torch.eye(2, dtype=torch.float64), [B, A], 0.5), 0.5 * B @ A.T, rtol=1e-12)


@pytest.mark.parametrize(
    ("layer", "ranks", "expected"),
    [
        (nn.Conv2d(320, 320, 3), [16, 16, 2, 2], (16, 16, 2, 2)),
        (nn.Conv2d(320, 320, 3), 16, (16, 16, 3, 3)),
        (nn.Conv2d(320, 320, 3), 0.5, (160, 160, 2, 2)),
        (nn.Conv2d(320, 320, 3), [4, 0.1, 1.0, 0.1], (4, 32, 3, 1)),
        (nn.Conv2d(16, 16, 7, groups=16), 8, (8, 1, 7, 7)),
        (nn.Linear(10, 20), [4, 3, 2, 2], (4, 3)),
        (nn.Conv1d(10, 20, 5), 4, (4, 4, 4)),
        (nn.Conv3d(10, 20, (1, 3, 3)), 2, (2, 2, 1, 2, 2)),
    ],
)
def test_ranks_and_count(layer, ranks, expected):
    geometry, config = geometry_of(layer), FloraConfig(ranks=ranks)
    assert config.ranks_of(geometry) == expected
    formula = math.prod(expected) + sum(d * r for d, r in zip(geometry.shape, expected, strict=True))
    assert config.count(geometry) == formula


def test_count_of_the_notes_example():
    assert FloraConfig(ranks=[16, 16, 2, 2]).count(geometry_of(nn.Conv2d(320, 320, 3))) == 11_276


def test_published_count_on_llama_7b():
    with torch.device("meta"):
        blocks = []
        for _ in range(32):
            sizes = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096),
                     "up_proj": (4096, 11008), "down_proj": (11008, 4096), "gate_proj": (4096, 11008)}  # fmt: skip
            blocks.append(nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()}))
        net = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    attached = attach(net, FloraConfig(ranks=4, target_modules=targets), "a")
    assert len(attached.sites) == 160
    assert sum(p.numel() for p in adapter_parameters(net, "a").values()) == 7_012_352 + 2_560


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3), nn.Linear(8, 8)], ids=["conv", "linear"])
def test_the_first_step_moves_the_core_alone(layer):
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": layer})
    attach(net, FloraConfig(ranks=3, target_modules=["layer"]), "a")
    x = torch.randn(2, 8, 6, 6) if isinstance(layer, nn.Conv2d) else torch.randn(4, 8)
    net["layer"](x).pow(2).sum().backward()
    gradients = {name.split(".")[1]: p.grad for name, p in adapter_parameters(net, "a").items()}
    assert torch.count_nonzero(gradients.pop("flora_core"))
    for gradient in gradients.values():
        assert torch.count_nonzero(gradient) == 0


def test_init_of_the_factors():
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": nn.Linear(4000, 4000)})
    for init, std in (
        ("kaiming_normal", 1 / math.sqrt(2 * 16)),
        ("normal", 0.02),
        ("kaiming_uniform", 1 / math.sqrt(48)),
    ):
        attach(net, FloraConfig(ranks=16, init=init, target_modules=["layer"]), init)
        core, out, inside = adapter_parameters(net, init).values()
        assert torch.count_nonzero(core) == 0
        for factor in (out, inside):
            assert abs(factor.std() - std) < 0.02 * std


def test_a_weight_rescales_the_delta():
    net = nn.ModuleDict({"layer": nn.Conv2d(6, 6, 3)})
    attach(net, FloraConfig(ranks=2, scale=4.0, target_modules=["layer"]), "a")
    for parameter in adapter_parameters(net, "a").values():
        nn.init.normal_(parameter)
    delta = net["layer"].delta("a")
    set_adapters(net, "a", 0.25)
    assert torch.allclose(net["layer"].delta("a"), delta / 4)


def test_dropout_acts_on_the_adapters_input_in_training():
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": nn.Linear(16, 16)})
    attach(net, FloraConfig(ranks=4, dropout=0.5, target_modules=["layer"]), "a")
    for parameter in adapter_parameters(net, "a").values():
        nn.init.normal_(parameter)
    x = torch.randn(3, 16)
    net.eval()
    assert torch.equal(net["layer"](x), net["layer"](x))
    net.train()
    assert not torch.equal(net["layer"](x), net["layer"](x))
    set_adapters(net, [])
    assert torch.equal(net["layer"](x), net["layer"].base_layer(x))


def test_cost_decides_between_chain_and_dense():
    assert use_chain(geometry_of(nn.Conv2d(320, 320, 3)), (16, 16, 2, 2), 4096)
    assert not use_chain(geometry_of(nn.Conv2d(96, 96, 7, groups=96)), (16, 1, 2, 2), 4096)


@pytest.mark.parametrize(
    "wrong",
    [{"ranks": 0}, {"ranks": -2}, {"ranks": 1.5}, {"ranks": 0.0}, {"ranks": [4, 0]}, {"ranks": [4]}, {"ranks": True},
     {"scale": float("inf")}, {"dropout": 1.0}, {"init": "zeros"}],
)  # fmt: skip
def test_impossible_configs(wrong):
    with pytest.raises(AdapterError):
        FloraConfig(**wrong)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [([9, 4, 2, 2], "rank 9 is larger than mode 'out' of size 8"), (7, "mode 'in' of size 6"),
     ([4, 4, 4, 2], "mode 'k1' of size 3"), ([4, 4], "for 4 modes")],
)  # fmt: skip
def test_ranks_that_do_not_fit(ranks, message):
    net = nn.ModuleDict({"layer": nn.Conv2d(6, 8, 3)})
    original = net["layer"]
    with pytest.raises(AdapterError, match=message):
        attach(net, FloraConfig(ranks=ranks, target_modules=["layer"]), "a")
    assert net["layer"] is original


@pytest.mark.parametrize("conv", [{"padding": 1}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}])
def test_the_fused_kernel_gives_what_the_chain_gives(conv, monkeypatch):
    """On a GPU one kernel adds the adapter to the base's output; here Triton's interpreter runs it."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": nn.Conv2d(12, 16, 3, **conv)})
    attach(net, FloraConfig(ranks=[4, 4, 3, 3], target_modules=["layer"]), "a")
    parameters = list(adapter_parameters(net, "a").values())
    for p in parameters:
        nn.init.normal_(p, std=0.5)
    fused = []
    original = dispatch.use_kernel
    monkeypatch.setattr("vislr.kernels.tucker_conv.use_kernel", lambda x: fused.append(1) or original(x))
    x = torch.randn(2, 12, 8, 8)
    results = []
    for mode in ("reference", "kernel"):
        with dispatch.use(mode):
            y = net["layer"](x)
            results.append((y, torch.autograd.grad(y.square().mean(), parameters)))
    assert fused  # the second went through the kernel
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
