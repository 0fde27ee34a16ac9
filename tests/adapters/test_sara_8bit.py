"""SaRA with optimisers that keep 8-bit moments: bitsandbytes and torchao (extras; skipped by name without them)."""

import copy

import pytest
import torch
from torch import nn

from vislr.adapters import SaraConfig, adapter_parameters, attach
from vislr.adapters.sara import reselect

X = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))


def optimiser_of(library):
    """The library's AdamW8bit, and what its 8-bit state of one vector is made of: (codes, block size)."""
    if library == "bitsandbytes":
        found = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (8-bit AdamW)").optim
        return found.AdamW8bit, lambda state: state["state1"], 256
    found = pytest.importorskip("torchao.optim", reason="torchao (extra quant) is not installed (8-bit AdamW)")
    return found.AdamW8bit, lambda state: getattr(state["exp_avg"], "codes", state["exp_avg"]), 256


LIBRARIES = ["bitsandbytes", pytest.param("torchao", marks=pytest.mark.slow)]  # torchao compiles for half a minute


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64))


def vectors(net):
    return list(adapter_parameters(net, "a").values())


def step(net, optimizer, parts=1):
    optimizer.zero_grad()
    for part in X.chunk(parts):
        ((net(part) - 1).square().mean() / parts).backward()
    norm = nn.utils.clip_grad_norm_(vectors(net), 0.5)
    optimizer.step()
    return float(norm)


def check_weights(net, base):
    """Every trained entry of the weight is the vector's, every other one the base's."""
    for path, module in net.named_modules():
        if hasattr(module, "entries"):
            flat = torch.cat([part.detach().reshape(-1) for part in module.parts().values()])
            index = module.entries["a"].index.long()
            assert torch.equal(flat[index], module.current("a"))
            wanted = torch.cat([base[f"{path}.weight"].reshape(-1), base[f"{path}.bias"]])
            rest = torch.ones(len(flat), dtype=torch.bool)
            rest[index] = False
            assert torch.equal(flat[rest], wanted[rest])


@pytest.mark.parametrize("library", LIBRARIES)
def test_8_bit_moments_train_nearly_as_32_bit_ones(library):
    adamw, codes, block = optimiser_of(library)
    net, twin = build(), build()
    base = copy.deepcopy(net.state_dict())
    # One vector of whole blocks: torchao keeps others in 32 bit.
    change = SaraConfig(count=32 * block, target_modules=["0"], rank_weight=1e-3)
    for model in (net, twin):
        attach(model, change, "a")
    ours, theirs = adamw(vectors(net), lr=1e-2), torch.optim.AdamW(vectors(twin), lr=1e-2)
    for number in range(4):
        parts = 1 + number % 2
        assert step(net, ours, parts) == pytest.approx(step(twin, theirs, parts), rel=0.02)
    (vector,), (exact,) = vectors(net), vectors(twin)
    held = codes(ours.state[vector])
    assert (held.dtype, held.numel()) == (torch.uint8, 32 * block)
    start = twin[0].entries["a"].base
    assert (vector - exact).norm() < 0.1 * (exact - start).norm()
    check_weights(net, base)


def test_bitsandbytes_keeps_two_bytes_an_entry_of_any_number_and_resumes():
    adamw, _, block = optimiser_of("bitsandbytes")
    net, base = build(), build().state_dict()
    attach(net, SaraConfig(count=10_001, rank_weight=0.0), "a")
    optimizer = adamw(vectors(net), lr=1e-2)
    for _ in range(3):
        step(net, optimizer)
    for vector in vectors(net):
        states = optimizer.state[vector]
        for key in ("state1", "state2"):
            # Short vectors stay in 32 bit, as in the library's own use.
            wide = vector.numel() < 4096
            assert states[key].numel() * states[key].element_size() == vector.numel() * (4 if wide else 1)
        if not wide:
            assert states["absmax1"].numel() == -(-vector.numel() // block)
    check_weights(net, base)
    again = build()
    attach(again, SaraConfig(count=10_001, rank_weight=0.0), "a")
    with torch.no_grad():
        for one, other in zip(vectors(again), vectors(net), strict=True):
            one.copy_(other)
    resumed = adamw(vectors(again), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, each in ((net, optimizer), (again, resumed)):
        for _ in range(2):
            step(model, each)
    for one, other in zip(vectors(again), vectors(net), strict=True):
        assert torch.equal(one, other)
    # Moments that are no plain tensors start anew after a re-selection; training goes on.
    kept = reselect(net, "a", optimizer)
    assert 0 < kept < 10_001
    step(net, optimizer)
    assert sum(len(vector) for vector in vectors(net)) == kept
