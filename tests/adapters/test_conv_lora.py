"""ConvLoRA against its definition: index formula, published counts, ranks, what is trained."""

import pytest
import torch
from torch import nn

from vislr.adapters import ConvLoraConfig, adapter_parameters, attach
from vislr.adapters.conv_lora import chain_forward, delta_weight, factor_shapes, use_chain
from vislr.adapters.geometry import geometry_of
from vislr.core.errors import AdapterError


def factors(shape, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in factor_shapes(shape, r)]


def test_index_formula_of_the_reshape():
    # Section 1.2: with q = c k + a, delta[o, c, a, b] = sum_rho B[o k + q // Ci, rho] A[rho, (q mod Ci) k + b].
    out, inside, k, r = 5, 7, 3, 2
    A, B = factors((out, inside, k, k), r)
    assert A.shape == (r * k, inside * k)
    assert B.shape == (out * k, r * k)
    delta = delta_weight(A, B, (out, inside, k, k), scale=0.5)
    for o in range(out):
        for c in range(inside):
            for a in range(k):
                for b in range(k):
                    q = c * k + a
                    value = 0.5 * B[o * k + q // inside] @ A[:, (q % inside) * k + b]
                    assert abs(delta[o, c, a, b] - value) < 1e-12


def test_kernel_of_one_is_plain_lora():
    A, B = factors((6, 4, 1, 1), 2)
    assert A.shape == (2, 4)
    assert B.shape == (6, 2)
    assert torch.equal(delta_weight(A, B, (6, 4, 1, 1))[:, :, 0, 0], B @ A)
    assert factor_shapes((6, 4), 2) == ((2, 4), (6, 2))


def test_rank_over_the_unfolded_input_is_that_of_a_locon_of_rank_r_k_squared():
    A, B = factors((40, 9, 3, 3), 2)
    delta = delta_weight(A, B, (40, 9, 3, 3))
    assert torch.linalg.matrix_rank(delta.reshape(40, -1)) == 2 * 3 * 3


class Encoder(nn.Module):
    """The convs of the paper's residual 2-D U-Net that its adapters go on, and 1x1 shortcuts between."""

    def __init__(self):
        super().__init__()
        widths = {"init_path": (1, 16), "down1": (16, 32), "down2": (32, 64), "down3": (64, 128)}
        for stage, (before, width) in widths.items():
            first = nn.Conv2d(before, width, 3, padding=1) if before == 1 else nn.Conv2d(before, width, 2, stride=2)
            blocks = [nn.Conv2d(width, width, 3, padding=1) for _ in range(6)]
            self.add_module(stage, nn.ModuleDict({"first": first, "blocks": nn.ModuleList(blocks)}))
            self.add_module(f"{stage}_shortcut", nn.Conv2d(before, width, 1))


@pytest.mark.parametrize(
    ("stages", "published"),
    [("init_path", 3_762), ("init_path|down1", 11_058), ("init_path|down1|down2", 25_650),
     ("init_path|down1|down2|down3", 54_834)],
)  # fmt: skip
def test_published_counts(stages, published):
    net = Encoder().to("meta")
    attach(net, ConvLoraConfig(r=2, alpha=2, target_modules=rf"({stages})\..*"), "a")
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == published


@pytest.mark.parametrize("r", [1, 2, 5])
@pytest.mark.parametrize(("out", "inside", "k"), [(8, 6, 3), (5, 7, 1), (12, 4, 5)])
def test_count_of_a_square_kernel(r, out, inside, k):
    geometry = geometry_of(nn.Conv2d(inside, out, k))
    assert ConvLoraConfig(r=r).count(geometry) == r * k * k * (inside + out)


def test_cost_decides_between_chain_and_dense():
    wide, narrow = geometry_of(nn.Conv2d(96, 96, 3)), geometry_of(nn.Conv2d(3, 8, 3))
    assert use_chain(wide, 2, 1000)
    # 18 maps for 8 outputs: the delta itself is cheaper, unless there is next to nothing to convolve.
    assert not use_chain(narrow, 2, 1000)
    assert use_chain(geometry_of(nn.Linear(64, 64)), 4, 1)
    # A depthwise conv has nothing to gain: its delta is as small as the maps are many.
    assert not use_chain(geometry_of(nn.Conv2d(8, 8, 3, groups=8)), 1, 1000)


@pytest.mark.parametrize(("inside", "k"), [(320, 3), (4, 3), (7, 5), (3, 7)])
def test_pieces_that_begin_inside_of_a_channels_kernel(inside, k):
    """The sizes of Stable Diffusion (320, 640, 1280) are no multiples of 3: their chain has a conv a piece."""
    geometry = geometry_of(nn.Conv2d(inside, 6, k, padding=k // 2))
    A, B = factors(geometry.shape, 2)
    x = torch.randn(2, inside, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.profiler.profile(record_shapes=True) as profile:
        found = chain_forward(x, A, B, 0.5, geometry)
    expected = nn.functional.conv2d(x, delta_weight(A, B, geometry.shape, 0.5), padding=k // 2)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    kernels = [event.input_shapes[1] for event in profile.events() if event.name == "aten::conv2d"]
    # Each sees a k-th of the channels and the one that it shares, none all of them; then the mixing 1x1.
    assert len(kernels) == k + 1
    assert max(shape[1] for shape in kernels[:-1]) <= inside // k + 2
    assert use_chain(geometry_of(nn.Conv2d(320, 320, 3)), 2, 1024)


def test_chain_makes_no_grouped_conv():
    geometry = geometry_of(nn.Conv2d(12, 8, 3, padding=1, groups=2))
    A, B = factors(geometry.shape, 2)
    x = torch.randn(2, 12, 5, 5, dtype=torch.float64, requires_grad=True)
    with torch.profiler.profile(record_shapes=True) as profile:
        chain_forward(x, A.requires_grad_(), B.requires_grad_(), 1.0, geometry).sum().backward()
    kernels = [event.input_shapes[1] for event in profile.events() if event.name == "aten::conv2d"]
    assert kernels == [[6, 2, 3, 3]]  # one conv over 2 channels of every piece; a grouped one would see 12


def test_init():
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": nn.Conv2d(64, 64, 3)})
    attach(net, ConvLoraConfig(r=4, target_modules=["layer"]), "a")
    A, B = adapter_parameters(net, "a").values()
    bound = (64 * 3) ** -0.5
    assert A.abs().max() <= bound
    assert abs(A.std() - bound / 3**0.5) < 0.05 * bound
    assert torch.count_nonzero(B) == 0
    attach(net, ConvLoraConfig(r=4, init="gaussian", target_modules=["layer"]), "b")
    assert abs(next(iter(adapter_parameters(net, "b").values())).std() - 0.25) < 0.01


def test_a_step_trains_the_adapter_alone():
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": nn.Conv2d(6, 6, 3), "norm": nn.BatchNorm2d(6)})
    attach(net, ConvLoraConfig(target_modules=["layer"]), "a")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # A moves from the second step on, when B is no longer 0
        optimizer.zero_grad()
        net["norm"](net["layer"](torch.randn(2, 6, 5, 5))).pow(3).sum().backward()
        optimizer.step()
    changed = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["layer.convlora_A.a", "layer.convlora_B.a", "norm.running_mean", "norm.running_var",
                       "norm.num_batches_tracked"]  # fmt: skip


@pytest.mark.parametrize(
    "wrong", [{"r": 0}, {"r": -1}, {"r": 2.5}, {"r": True}, {"alpha": float("nan")}, {"init": "orthogonal"}]
)
def test_impossible_configs(wrong):
    with pytest.raises(AdapterError):
        ConvLoraConfig(**wrong)


def test_rank_larger_than_the_weight():
    net = nn.ModuleDict({"layer": nn.Linear(8, 4)})
    before = dict(net.named_modules())
    with pytest.raises(AdapterError, match=r"'layer': rank 5 .*\(4, 8\) allows \(4\)"):
        attach(net, ConvLoraConfig(r=5, target_modules=["layer"]), "a")
    assert dict(net.named_modules()) == before
