"""SaRA's selection, training, rank term, re-selection and memory, by the paper's definitions; on real models."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import tiny_conv_net, tiny_sd3_transformer, tiny_unet, tiny_vit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vislr
from vislr.adapters import ConvLoraConfig, SaraConfig, adapter_parameters, attach, detach, set_adapters
from vislr.adapters.inject import active_adapters, adapter_weights, tuner_layers
from vislr.adapters.sara import SaraLayer, polar, reselect, suggested_lr
from vislr.adapters.sara_steps import rank_gradient
from vislr.anatomy import sample_inputs
from vislr.core.errors import AdapterError, FormatError, TargetError
from vislr.formats import attach_file, check_base, read_adapter, write_adapter
from vislr.recipe import base_state


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.wide = nn.Linear(8, 24)
        self.head = nn.Linear(24, 6)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3)) * self.scale
        return self.head(torch.relu(self.wide(x)))


X = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1))
PLAIN = {"rank_weight": 0.0}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def loss_of(net, x=X):
    return (net(x) - 1).square().mean()


def vectors(net, name="a"):
    return list(adapter_parameters(net, name).values())


def layers_of(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, SaraLayer)}


def weights(net):
    """Every base parameter under its own name, as a copy."""
    found = {}
    for name, parameter in net.named_parameters():
        if "sara_values" not in name:
            found[name.replace(".base_layer", "")] = parameter.detach().clone()
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def train(net, steps, name="a", optimizer=None, lr=0.02, **options):
    optimizer = optimizer or torch.optim.AdamW(vectors(net, name), lr=lr, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    return optimizer


# Selection.


def test_a_threshold_selects_by_magnitude_over_the_whole_model(net):
    base = weights(net)
    attached = attach(net, SaraConfig(threshold=0.05), "a")
    for name, layer in layers_of(net).items():
        flat = torch.cat([base[f"{name}.{part}"].reshape(-1) for part in ("weight", "bias")])
        assert layer.entries["a"].index.tolist() == (flat.abs() < 0.05).nonzero().flatten().tolist()
    # GroupNorm's zero bias is selected whole, its weight of ones not at all.
    assert layers_of(net)["norm"].entries["a"].index.tolist() == list(range(8, 16))
    assert list(layers_of(net)) == ["conv", "norm", "wide", "head"] == list(attached.sites)
    assert "left alone, no layer's weight or bias: scale" in attached.notes


@pytest.mark.parametrize("count", [1, 8, 9, 100, 500])
def test_a_count_is_exact_and_takes_the_smallest(net, count):
    base = weights(net)
    attach(net, SaraConfig(count=count), "a")
    assert sum(len(v) for v in vectors(net)) == count
    everything = torch.cat([v.reshape(-1).abs() for k, v in base.items() if k != "scale"])
    chosen = torch.cat([v.detach().abs() for v in vectors(net)])
    assert torch.equal(chosen.sort().values, everything.sort().values[:count])


def test_equal_magnitudes_at_the_limit_go_in_the_models_order():
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        net[0].weight.fill_(0.5)
        net[1].weight.fill_(-0.5)
        net[1].weight[0, 1] = 0.25
    attach(net, SaraConfig(count=14), "a")
    assert net[0].entries["a"].index.tolist() == list(range(12))
    assert net[1].entries["a"].index.tolist() == [0, 1]


def test_a_fraction_and_a_subset_of_layers(net):
    attached = attach(net, SaraConfig(fraction=0.1, target_modules=["wide", "head"], exclude_modules=["head"]), "a")
    assert attached.sites == ("wide",)
    assert len(vectors(net)[0]) == round(0.1 * (8 * 24 + 24))
    assert attached.change["kind"] == "sara"
    assert attached.change["config"]["sites"] == ["wide"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of threshold, count, fraction; got none"),
        ({"threshold": 1.0, "count": 3}, "got threshold and count"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"count": 0}, "count is 0"),
        ({"count": True}, "count is True"),
        ({"count": 5, "rank_weight": -1.0}, "rank_weight is -1.0"),
        ({"count": 5, "rank_matrices": 0}, "rank_matrices is 0"),
        ({"count": 5, "reselect_after": 1.5}, "reselect_after is 1.5"),
    ],
)
def test_impossible_configs(options, message):
    with pytest.raises(AdapterError, match=message):
        SaraConfig(**options)


def untouched(net, change, error, message, name="a"):
    base, modules, attributes = weights(net), dict(net.named_modules()), set(vars(net))
    flags = {key: p.requires_grad for key, p in net.named_parameters()}
    with pytest.raises(error, match=message):
        attach(net, change, name)
    assert same(weights(net), base)
    assert dict(net.named_modules()) == modules
    assert set(vars(net)) == attributes
    assert {key: p.requires_grad for key, p in net.named_parameters()} == flags


def test_errors_leave_the_model_untouched(net):
    untouched(net, SaraConfig(threshold=0.1, target_modules=["haed"]), TargetError, "did you mean 'head'")
    untouched(net, SaraConfig(threshold=0.1, target_modules=[]), TargetError, "target_modules is empty")
    untouched(net, SaraConfig(threshold=1e-9, exclude_modules=["norm"]), AdapterError, "no magnitude is below")
    untouched(net, SaraConfig(count=10**6), AdapterError, r"count is 1,000,000; the layers chosen have 678 entries")
    untouched(net, SaraConfig(threshold=0.1), AdapterError, "letters, digits", name="a.b")
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(AdapterError, match="meta device"):
        attach(empty, SaraConfig(threshold=0.1), "a")
    attached = attach(net, SaraConfig(threshold=0.1), "a")
    with pytest.raises(AdapterError, match="on the model already"):
        attach(net, SaraConfig(threshold=0.1), "a")
    detach(net, attached)


def test_tied_weights_are_an_error_until_they_are_left_out(net):
    net.twin = nn.Linear(24, 6)
    net.twin.weight = net.head.weight
    untouched(net, SaraConfig(threshold=0.1), AdapterError, "'head.weight' and 'twin.weight' are one tied tensor")
    net.again = net.conv
    untouched(net, SaraConfig(threshold=0.1, target_modules=["conv"]), AdapterError, "'conv.weight' and 'again.weight'")
    attached = attach(net, SaraConfig(threshold=0.1, exclude_modules=["head", "twin", "conv"]), "a")
    assert attached.sites == ("norm", "wide")


def test_an_attention_projection_used_without_its_forward_is_left_alone():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "norm": nn.LayerNorm(8)})
    untouched(model, SaraConfig(threshold=1.0, target_modules=["out_proj"]), AdapterError, "without its forward")
    attached = attach(model, SaraConfig(threshold=1.0), "a")
    assert attached.sites == ("norm",)
    assert "attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight and 1 more" in attached.notes[1]


# Training.


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_training_is_that_of_a_dense_model_with_everything_else_masked(net, options):
    """AdamW on dense tensors, gradients and decay masked, gives the same values; the rest keeps its bits."""
    dense, base = copy.deepcopy(net), weights(net)
    masks = {name: (v.abs() < 0.1) & (name != "scale") for name, v in base.items()}
    attach(net, SaraConfig(threshold=0.1, **PLAIN), "a")
    train(net, 4, weight_decay=0.1, **options)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(dense).backward()
        for name, parameter in dense.named_parameters():
            parameter.grad *= masks[name]
        optimizer.step()
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                parameter.copy_(torch.where(masks[name], parameter, base[name]))
    after = weights(net)
    for name, parameter in dense.named_parameters():
        assert torch.equal(after[name][~masks[name]], base[name][~masks[name]])
        assert torch.allclose(after[name], parameter, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(after["wide.weight"], base["wide.weight"], atol=1e-2)


def test_the_gradient_is_the_dense_one_gathered(net):
    dense = copy.deepcopy(net)
    attach(net, SaraConfig(threshold=0.1), "a")
    loss_of(net).backward()
    loss_of(dense).backward()
    for name, layer in layers_of(net).items():
        module = dense.get_submodule(name)
        flat = torch.cat([module.weight.grad.reshape(-1), module.bias.grad])
        assert torch.equal(layer.sara_values["a"].grad, flat[layer.entries["a"].index.long()])


def test_memory(net):
    """8 bytes of optimiser state an entry, no dense gradient kept, one dense gradient alive at a time."""
    attach(net, SaraConfig(fraction=0.3), "a")
    optimizer = train(net, 1)
    entries = sum(len(v) for v in vectors(net))
    state = [t for values in optimizer.state.values() for t in values.values()]
    assert sum(t.numel() * t.element_size() for t in state if t.dim()) == 8 * entries
    assert all(t.numel() == 1 for t in state if not t.dim())
    assert len([t for t in state if not t.dim()]) == len(vectors(net))
    shapes = {p.shape: p.numel() * 4 for n, p in net.named_parameters() if p.dim() > 1}
    assert len(shapes) == 3  # no two layers have gradients of one shape
    alive: list[weakref.ref] = []
    peak = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if torch.is_tensor(tensor) and tensor.shape in shapes and tensor.data_ptr() not in held:
                    alive.append(weakref.ref(tensor))
                    seen.add(tensor.shape)
            # By memory: a view of a gradient is not a second one.
            now = {t.data_ptr(): t.untyped_storage().nbytes() for t in (ref() for ref in alive) if t is not None}
            peak = max(peak, sum(now.values()))
            return result

    seen: set = set()
    loss = loss_of(net, X[:5])  # a batch of 6 would give activations of the head's shape
    held = {p.data_ptr() for p in net.parameters()}
    with Watch():
        loss.backward()
    assert seen == set(shapes)  # the dense gradient of every layer went by
    assert 0 < peak <= max(shapes.values())
    assert not [ref for ref in alive if ref() is not None]
    assert {n for n, p in net.named_parameters() if p.grad is not None} == set(adapter_parameters(net, "a"))


def test_the_forward_makes_no_copy_of_a_weight(net):
    attach(net, SaraConfig(fraction=0.3), "a")
    seen = []
    net.head.base_layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight))
    net(X)
    assert seen[0].data_ptr() == net.head.base_layer.weight.data_ptr()
    assert seen[0].grad_fn is not None


def test_accumulation_and_clipping(net):
    whole = copy.deepcopy(net)
    for model in (net, whole):
        attach(model, SaraConfig(fraction=0.5, **PLAIN), "a")
    for part in X.split(2):
        (loss_of(net, part) / 3).backward()
    loss_of(whole).backward()
    for one, other in zip(vectors(net), vectors(whole), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-8)
    norm = torch.cat([v.grad for v in vectors(net)]).norm()
    given = nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], 0.01)
    assert torch.allclose(given, norm)
    assert torch.allclose(torch.cat([v.grad for v in vectors(net)]).norm(), torch.tensor(0.01), rtol=1e-3)


def test_a_run_that_goes_on_gives_the_bits_of_the_unbroken_one(net):
    config = SaraConfig(threshold=0.1, rank_weight=1e-2)
    start = copy.deepcopy(net)
    attach(net, config, "a")
    optimizer = train(net, 3)
    kept = copy.deepcopy({"values": [v.detach() for v in vectors(net)], "optimizer": optimizer.state_dict()})
    train(net, 3, optimizer=optimizer)
    attach(start, config, "a")
    with torch.no_grad():
        for vector, value in zip(vectors(start), kept["values"], strict=True):
            vector.copy_(value)
    again = torch.optim.AdamW(vectors(start), lr=0.02)
    again.load_state_dict(kept["optimizer"])
    train(start, 3, optimizer=again)
    assert same(weights(start), weights(net))


class Behind(torch.optim.Optimizer):
    """Writes through the memory, as kernels of 8-bit optimisers do: torch's version counters see nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.detach().numpy()[...] -= 0.1 * parameter.grad.numpy()


def test_any_optimiser_and_any_other_change_reach_the_weight(net):
    attach(net, SaraConfig(threshold=0.1, **PLAIN), "a")
    version = vectors(net)[0]._version
    train(net, 2, optimizer=Behind(vectors(net)))
    assert vectors(net)[0]._version == version
    for layer in layers_of(net).values():
        flat = torch.cat([part.reshape(-1) for part in layer.parts().values()])
        assert torch.equal(flat[layer.entries["a"].index.long()], layer.sara_values["a"])
    before = net(X).detach()
    with torch.no_grad():
        vectors(net)[-1].add_(1.0)
        assert not torch.allclose(net(X), before, atol=0.1)  # without any optimiser: at the next forward


def test_checkpointing_and_channels_last(net):
    twin = copy.deepcopy(net)
    for model in (net, twin):
        attach(model, SaraConfig(threshold=0.1), "a")
    net.to(memory_format=torch.channels_last)
    (checkpoint(net, X.to(memory_format=torch.channels_last), use_reentrant=False) - 1).square().mean().backward()
    loss_of(twin).backward()
    for one, other in zip(vectors(net), vectors(twin), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_a_weight_changed_between_forward_and_backward_is_noticed(net):
    attach(net, SaraConfig(threshold=0.1), "a")
    loss = loss_of(net)
    set_adapters(net, ["a"], [2.0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_loss_scaler_and_accelerate(net):
    """The rank term is unscaled where a fused optimiser unscales by itself."""
    from accelerate import Accelerator

    plain, prepared = copy.deepcopy(net), copy.deepcopy(net)
    for model in (net, plain, prepared):
        attach(model, SaraConfig(threshold=0.1, rank_weight=0.1, rank_matrices=None), "a")
    train(plain, 3, fused=True)
    optimizer = torch.optim.AdamW(vectors(net), lr=0.02, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator = Accelerator(cpu=True)
    wrapped, outer = accelerator.prepare(prepared, torch.optim.AdamW(vectors(prepared), lr=0.02, fused=True))
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(net)).backward()
        scaler.step(optimizer)
        scaler.update()
        outer.zero_grad()
        accelerator.backward(loss_of(wrapped))
        outer.step()
    assert same(weights(prepared), weights(plain))
    for name, value in weights(net).items():
        assert torch.allclose(value, weights(plain)[name], rtol=1e-5, atol=1e-7)


# Rank term.


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (20, 20), (1, 7), (64, 200)])
def test_the_polar_factor_without_svd(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    # Singular values from 1 down to 1e-3, whatever the size of the matrix.
    for scale in (1e-9, 1.0, 1e7):
        exact = u @ torch.diag(scale * torch.logspace(0, -3, len(s), dtype=torch.float64)) @ vh
        assert torch.allclose(polar(exact), u @ vh, rtol=0, atol=1e-9)
        assert torch.allclose(polar(exact.float()), (u @ vh).float(), rtol=0, atol=2e-3)


def test_the_polar_factor_of_a_singular_matrix():
    left, right = torch.randn(8, 3, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(left @ right, full_matrices=False)
    assert torch.allclose(polar(left @ right), u[:, :3] @ vh[:3], atol=1e-7)
    assert torch.equal(polar(torch.zeros(3, 4)), torch.zeros(3, 4))


def masked(net, name):
    """The matrix of the trained entries of a layer's weight, by the definition."""
    layer = layers_of(net)[name]
    entries, weight = layer.entries["a"], layer.parts()["weight"]
    values = layer.sara_values["a"].detach().double().requires_grad_()
    cut = entries.trained_cut
    flat = torch.zeros(weight.numel(), dtype=torch.float64)
    return flat.index_put((entries.trained[:cut].long(),), values[:cut]).reshape(weight.shape[0], -1), values


@pytest.mark.parametrize("name", ["conv", "wide", "head"])
def test_the_rank_gradient_is_that_of_the_nuclear_norm(net, name):
    attach(net.double(), SaraConfig(fraction=0.6), "a")
    matrix, values = masked(net, name)
    (wanted,) = torch.autograd.grad(torch.linalg.matrix_norm(matrix, "nuc"), values)
    given = rank_gradient(layers_of(net)[name], "a")
    assert torch.allclose(given, wanted[: len(given)], rtol=1e-6, atol=1e-7)
    assert not wanted[len(given) :].any()  # the bias is no matrix


def test_the_rank_term_alone_makes_the_norm_fall(net):
    attach(net, SaraConfig(fraction=0.6, rank_weight=0.5, rank_matrices=None), "a")
    optimizer = torch.optim.SGD(vectors(net), lr=0.005)
    norms = []
    for _ in range(5):
        for vector in vectors(net):
            vector.grad = torch.zeros_like(vector)
        norms.append(
            [float(torch.linalg.matrix_norm(masked(net, n)[0].detach(), "nuc")) for n in ("conv", "wide", "head")]
        )
        optimizer.step()
    for before, after in itertools.pairwise(norms):
        assert all(b > a for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
def test_the_matrices_get_the_rank_term_in_turn(net, optimiser):
    attach(net, SaraConfig(fraction=0.6, rank_weight=0.5), "a")
    optimizer = optimiser(vectors(net), lr=1e-4)
    order = []
    for _ in range(4):
        for vector in vectors(net):
            vector.grad = torch.zeros_like(vector)
        optimizer.step()
        order.append([name for name, layer in layers_of(net).items() if layer.sara_values["a"].grad.any()])
    assert order == [["conv"], ["wide"], ["head"], ["conv"]]


def test_the_rank_weight_changes_the_training(net):
    twin = copy.deepcopy(net)
    attach(net, SaraConfig(fraction=0.5, **PLAIN), "a")
    attach(twin, SaraConfig(fraction=0.5, rank_weight=5e-2), "a")
    train(net, 3)
    train(twin, 3)
    assert not torch.allclose(weights(net)["conv.weight"], weights(twin)["conv.weight"], atol=1e-4)


# Progressive re-selection.


def test_re_selection(net):
    attach(net, SaraConfig(threshold=0.1, **PLAIN), "a")
    optimizer = train(net, 3)
    loss = loss_of(net)  # a graph of before stays alive, as in a loop
    loss.backward()
    before, values = weights(net), {n: v.detach().clone() for n, v in adapter_parameters(net, "a").items()}
    parameters = vectors(net)
    left = reselect(net, "a", optimizer)
    assert same(weights(net), before)
    assert all(one is other for one, other in zip(parameters, vectors(net), strict=True))
    assert 0 < left == sum(len(v) for v in vectors(net)) < sum(len(v) for v in values.values())
    trained = {}
    for name, layer in layers_of(net).items():
        entries, old = layer.entries["a"], values[f"{name}.sara_values.a"]
        small = old.abs() < 0.1
        assert torch.equal(layer.sara_values["a"], old[small])
        assert torch.equal(entries.trained, entries.index[small])
        trained[name] = set(entries.trained.tolist())
    state = [t for each in optimizer.state.values() for t in each.values() if t.dim()]
    assert sum(t.numel() * t.element_size() for t in state) == 8 * left
    train(net, 2, optimizer=optimizer)
    after = weights(net)
    for name in layers_of(net):
        old = torch.cat([before[f"{name}.{part}"].reshape(-1) for part in ("weight", "bias")])
        new = torch.cat([after[f"{name}.{part}"].reshape(-1) for part in ("weight", "bias")])
        assert set((old != new).nonzero().flatten().tolist()) <= trained[name]
    assert not same(after, before)
    del loss


def test_moments_go_on_over_the_re_selection(net):
    """What is left is trained as a dense model whose mask shrinks would be."""
    dense, base = copy.deepcopy(net), weights(net)
    masks = {name: (v.abs() < 0.1) & (name != "scale") for name, v in base.items()}
    attach(net, SaraConfig(threshold=0.1, reselect_after=3, **PLAIN), "a")
    train(net, 6)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=0.02)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(dense).backward()
        before = {name: p.detach().clone() for name, p in dense.named_parameters()}
        if step == 3:
            masks = {name: masks[name] & (before[name].abs() < 0.1) for name in masks}
        for name, parameter in dense.named_parameters():
            parameter.grad *= masks[name]
        optimizer.step()
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                parameter.copy_(torch.where(masks[name], parameter, before[name]))
    assert sum(len(v) for v in vectors(net)) == sum(int(m.sum()) for m in masks.values())
    for name, value in weights(net).items():
        assert torch.allclose(value, dict(dense.named_parameters())[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
def test_re_selection_comes_after_so_many_steps_and_once(net, optimiser):
    base = weights(net)
    attached = attach(net, SaraConfig(threshold=0.1, reselect_after=2, **PLAIN), "a")
    optimizer = optimiser(vectors(net), lr=0.02 if optimiser is torch.optim.AdamW else 0.5)
    sizes = []
    for _ in range(4):
        train(net, 1, optimizer=optimizer)
        sizes.append(sum(len(v) for v in vectors(net)))
    assert sizes[0] > sizes[1] == sizes[2] == sizes[3]
    # Scale, off and removal reach the frozen entries too.
    trained = weights(net)
    set_adapters(net, ["a"], [0.0])
    assert same(weights(net), base)
    set_adapters(net, ["a"], [1.0])
    assert same(weights(net), trained)
    detach(net, attached)
    assert same(weights(net), base)


def test_a_run_goes_on_after_the_re_selection(net, tmp_path):
    config = SaraConfig(threshold=0.1, reselect_after=2, rank_weight=1e-2)
    start = copy.deepcopy(net)
    attach(net, config, "a")
    optimizer = train(net, 3)
    file = read_adapter(write_adapter(net, "a", tmp_path / "a.safetensors"))
    state = copy.deepcopy(optimizer.state_dict())
    train(net, 3, optimizer=optimizer)
    attach_file(start, "a", file)
    again = torch.optim.AdamW(vectors(start), lr=0.02)
    again.load_state_dict(state)
    train(start, 3, optimizer=again)
    assert same(weights(start), weights(net))


# Files, other adapters, copies.


def test_a_file_on_another_base_or_damaged(net, tmp_path):
    attach(net, SaraConfig(threshold=0.1), "a")
    train(net, 2)
    file = read_adapter(write_adapter(net, "a", tmp_path / "a.safetensors"))
    torch.manual_seed(7)
    other = Net().eval()
    base = weights(other)
    with pytest.raises(AdapterError, match="base weights differ"):
        check_base(other, file)
    attached = attach_file(other, "a", file, any_base=True)
    layer, index = layers_of(other)["wide"], file.tensors["wide"]["sara_index"].long()
    flat = torch.cat([base["wide.weight"].reshape(-1), base["wide.bias"]])
    wanted = (flat[index].double() + file.tensors["wide"]["sara_delta"]).float()
    assert torch.equal(layer.sara_values["a"], wanted)
    detach(other, attached)
    assert same(weights(other), base)
    for suffix, change, message in (
        ("sara_index", lambda t: t.flip(0), "is not increasing"),
        ("sara_index", lambda t: t + 10**6, "is not increasing within"),
        ("sara_index", lambda t: t.float(), "expected a vector of int32"),
        ("sara_delta", lambda t: t[1:], "has shape"),
        ("sara_shape", lambda t: t + 1, r"the layer's weight has shape \(24, 8\)"),
        ("sara_kept", lambda t: torch.tensor([-1]), "is not increasing"),
    ):
        wrong = copy.deepcopy(file)
        wrong.tensors["wide"][suffix] = change(wrong.tensors["wide"].get(suffix))
        with pytest.raises(FormatError, match=message):
            attach_file(other, "a", wrong, any_base=True)
        assert same(weights(other), base)
        assert not layers_of(other)


@pytest.mark.parametrize("order", ["sara first", "convlora first"])
@pytest.mark.parametrize("removed", ["sara", "convlora"])
def test_beside_an_adapter_of_another_kind(net, order, removed, tmp_path):
    base, output = weights(net), net(X).detach()
    modules = dict(net.named_modules())
    changes = {"sara": SaraConfig(threshold=0.1, **PLAIN), "convlora": ConvLoraConfig(r=2, target_modules=["wide"])}
    attached = {}
    for name in ["sara", "convlora"] if order == "sara first" else ["convlora", "sara"]:
        attached[name] = attach(net, changes[name], name)
    for name in changes:
        set_adapters(net, [name])
        for parameter in vectors(net, name):
            parameter.requires_grad_()
        train(net, 2, name)
    alone = {}
    for name in changes:
        set_adapters(net, [name])
        alone[name] = net(X).detach()
        assert not torch.allclose(alone[name], output, atol=1e-3)
    set_adapters(net, list(changes))
    files = {name: read_adapter(write_adapter(net, name, tmp_path / f"{name}.safetensors")) for name in changes}
    assert same(vislr.recipe.base_state(net), base)
    torch.manual_seed(0)
    fresh = Net().eval()
    for name in changes:
        put = attach_file(fresh, name, files[name])
        assert torch.equal(fresh(X), alone[name])
        detach(fresh, put)
    detach(net, attached.pop(removed))
    (name,) = attached
    set_adapters(net, [name])
    assert torch.equal(net(X), alone[name])
    detach(net, attached[name])
    assert dict(net.named_modules()) == modules
    assert torch.equal(net(X), output)
    assert same(dict(net.named_parameters()), base)


def test_copies_and_other_dtypes(net):
    attach(net, SaraConfig(threshold=0.1, **PLAIN), "a")
    train(net, 1)
    twin, trained = copy.deepcopy(net), weights(net)
    train(twin, 2)
    assert same(weights(net), trained)
    assert not same(weights(twin), trained)
    set_adapters(twin, [])
    set_adapters(net, [])
    assert same(weights(twin), weights(net))
    set_adapters(net, ["a"])
    reference = {name: value.bfloat16() for name, value in trained.items()}
    assert same(weights(net.to(torch.bfloat16)), reference)
    assert net(X.bfloat16()).dtype == torch.bfloat16


def test_layers_that_are_gone_are_not_stepped(net):
    from vislr.adapters.sara_layer import LIVE

    attached = attach(net, SaraConfig(threshold=0.1), "a")
    mine = set(layers_of(net).values())
    optimizer = train(net, 1)
    detach(net, attached)
    base = weights(net)
    for group in optimizer.param_groups:
        for vector in group["params"]:
            vector.grad = torch.ones_like(vector)
    optimizer.step()
    assert same(weights(net), base)
    assert mine <= set(LIVE)
    gone = [weakref.ref(layer) for layer in mine]
    del mine, attached, vector, group, optimizer
    gc.collect()
    assert all(ref() is None for ref in gone)


# The face, on real models.

MODELS = {"unet": tiny_unet, "sd3": tiny_sd3_transformer, "vit": tiny_vit, "resnet": tiny_conv_net}


@pytest.mark.parametrize("family", MODELS)
def test_on_real_models(family, tmp_path):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    fresh = copy.deepcopy(model)
    size = {"height": 32, "width": 32} if family == "resnet" else None if family == "vit" else {"tokens": 5}
    inputs = sample_inputs(model, sample=size, device="cpu")

    def run(of):
        given = of(**inputs)
        return given if torch.is_tensor(given) else given[0]

    base, modules, output = copy.deepcopy(model.state_dict()), dict(model.named_modules()), run(model).detach()
    report = vislr.apply(model, SaraConfig(fraction=0.05), name="style")
    parameters = adapter_parameters(model, "style")
    count = sum(p.numel() for p in parameters.values())
    assert (report.kind, report.trainable) == ("sara", count)
    assert report.flops[0] == report.flops[1]
    assert any(f"trains {count:,} of " in note for note in report.notes)
    if family == "vit":
        assert "left alone, no layer's weight or bias: cls_token, pos_embed" in report.notes
    assert torch.equal(run(model), output)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (run(model) - 1).square().mean().backward()
        assert [name for name, p in parameters.items() if p.grad is None] == []
        optimizer.step()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(parameters)
    trained = run(model).detach()
    assert not torch.allclose(trained, output, atol=1e-4)
    assert same(vislr.recipe.base_state(model), base)

    file = vislr.save_adapter(model, tmp_path / "style.safetensors")
    vislr.load_adapter(fresh, file, weight=1.0)
    assert torch.equal(run(fresh), trained)
    assert adapter_weights(fresh) == active_adapters(fresh) == {"style": 1.0}
    vislr.set_adapters(fresh, "style", 0.0)
    assert torch.equal(run(fresh), output)
    vislr.remove(model, report)
    assert dict(model.named_modules()) == modules
    assert same(model.state_dict(), base)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(run(model), output)


def test_save_and_load_a_model_with_adapters_inside(tmp_path):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = tiny_unet()
    base = copy.deepcopy(unet.state_dict())
    for name in ("a", "b"):
        vislr.apply(unet, SaraConfig(fraction=0.02, target_modules=r".*attn.*|.*norm.*"), name=name)
        with torch.no_grad():
            for vector in vectors(unet, name):
                vector.add_(0.1)
    vislr.set_adapters(unet, ["a", "b"], [1.0, 0.5])
    held = vislr.recipe.base_state(unet)
    assert same(held, base)
    vislr.save(unet, tmp_path / "unet")
    assert same(UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict(), base)
    again = vislr.load(tmp_path / "unet")
    assert active_adapters(again) == {"a": 1.0, "b": 0.5}
    assert same(weights(again), weights(unet))


def test_diffusers_own_switches():
    torch.manual_seed(0)
    unet = tiny_unet()
    inputs = sample_inputs(unet, sample={"tokens": 5}, device="cpu")
    before = unet(**inputs)[0].detach()
    vislr.apply(unet, SaraConfig(fraction=0.05), name="a")
    with torch.no_grad():
        for vector in vectors(unet):
            vector.add_(0.05)
        trained = unet(**inputs)[0]
        unet.disable_adapters()
        assert torch.equal(unet(**inputs)[0], before)
        unet.enable_adapters()
        assert torch.equal(unet(**inputs)[0], trained)
        unet.fuse_lora()
        assert torch.equal(unet(**inputs)[0], trained)
        with pytest.raises(AdapterError, match="merged"):
            vislr.set_adapters(unet, [])
        unet.unfuse_lora()
        unet.delete_adapters("a")
        assert torch.equal(unet(**inputs)[0], before)
    assert not [m for m in unet.modules() if isinstance(m, BaseTunerLayer) and m._get_available_adapters()]


def test_compiled_as_one_graph(net):
    base, twin = copy.deepcopy(net), copy.deepcopy(net)
    for model in (net, twin):
        attach(model, SaraConfig(threshold=0.1), "a")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.optim.AdamW(vectors(m), lr=0.02) for m in (net, twin))
    for _ in range(3):
        for run, optimizer in ((compiled, ours), (twin, theirs)):
            optimizer.zero_grad()
            loss_of(run).backward()
            optimizer.step()
    with torch.no_grad():
        trained = twin(X)
        assert torch.allclose(compiled(X), trained, rtol=1e-5, atol=1e-6)
        # What the trainer sets to show the base.
        for layer in layers_of(net).values():
            layer._disable_adapters = True
        assert torch.allclose(compiled(X), base(X), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(base(X), trained, atol=1e-3)


def test_the_papers_learning_rate():
    for threshold, rate in ((2e-4, 9.32e-4), (8e-4, 7.56e-4), (2e-3, 4.97e-4)):
        assert suggested_lr(threshold) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", [LoraConfig(r=2, target_modules=["0", "1"]), ConvLoraConfig(r=2)], ids=type)
def test_weights_merged_with_another_kind_are_saved_as_they_are(other, first):
    torch.manual_seed(0)
    net, plain = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)) for _ in range(2))
    changes = [("other", other), ("sparse", SaraConfig(fraction=0.3))]
    for name, config in changes if first else reversed(changes):
        attach(net, config, name)
    set_adapters(net, ["other", "sparse"], [1.0, 1.0])
    with torch.no_grad():
        for name in ("other", "sparse"):
            for parameter in adapter_parameters(net, name).values():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(3, 8)
    wanted = net(x)
    for _, layer in tuner_layers(net):
        layer.merge(adapter_names=[name for name, _ in changes if name in layer._get_available_adapters()])
    plain.load_state_dict(base_state(net))
    torch.testing.assert_close(plain(x), wanted, rtol=1e-5, atol=1e-5)
