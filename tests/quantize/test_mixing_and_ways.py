"""Mixed precision against brute force, the choice of a way of computing, and oneDNN's int8 linears."""

import copy
import itertools
import random

import pytest
import torch
from torch import nn

import vislr
from vislr.core.errors import ConfigError
from vislr.core.files import read_json
from vislr.kernels.dispatch import cpu_has
from vislr.quantize import (
    Trajectories,
    choose_ways,
    mixed_plan,
    ptq_plan,
    quant_layers,
    running,
    sensitivity,
    trajectory_inputs,
    without_slower,
)
from vislr.quantize.layers import Spec, quantized
from vislr.quantize.onednn import onednn_linear
from vislr.quantize.running import LayerTime, Ways
from vislr.quantize.sensitivity import choose

RUNS = Trajectories(("a cat face",), 1, 1, 2, options={"height": 32, "width": 32})


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_optimal(seed):
    rng = random.Random(seed)
    options = [[(rng.random(), rng.randint(1, 10**9)) for _ in range(3)] for _ in range(6)]
    low, high = (sum(f(weight for _, weight in one) for one in options) for f in (min, max))
    limit = low + rng.randrange(0, high - low + 1)
    found = choose(options, limit)
    sums = [
        (sum(o[i][0] for o, i in zip(options, picked, strict=True)),
         sum(o[i][1] for o, i in zip(options, picked, strict=True)))
        for picked in itertools.product(range(3), repeat=6)
    ]  # fmt: skip
    best = min(cost for cost, weight in sums if weight <= limit)
    cost = sum(o[i][0] for o, i in zip(options, found, strict=True))
    assert sum(o[i][1] for o, i in zip(options, found, strict=True)) <= limit
    assert cost == pytest.approx(best, rel=1e-9)
    assert choose(options, low - 1) is None


def test_bits_are_chosen_by_what_each_layer_costs(sd, student, tmp_path):
    inputs = trajectory_inputs(sd, RUNS)
    bits = {"*": None, "mid_block.*": (4, 16), "up_blocks.0.resnets.*": (4, 16)}
    plan = vislr.quantize.weight_only_plan(student, 4, group=None, layers=bits)
    with torch.no_grad():
        before = student(**inputs[0])[0]
    found = sensitivity(student, plan, [(2, 16), (4, 16), (8, 16)], inputs, folder=tmp_path)
    with torch.no_grad():
        assert torch.equal(student(**inputs[0])[0], before)
    assert set(found) == set(plan.layers)
    assert all(one[0].error > one[1].error > one[2].error for one in found.values())
    sizes = [sum(one[i].size for one in found.values()) // 8 for i in range(3)]
    assert sizes[0] < sizes[1] < sizes[2]
    # Kept errors are read, not made again.
    again = sensitivity(nn_that_fails(student), plan, [(2, 16), (4, 16), (8, 16)], inputs, folder=tmp_path)
    assert again == found
    half = mixed_plan(plan, found, size=(sizes[0] + sizes[2]) // 2)
    assert half.settings["bytes"] <= (sizes[0] + sizes[2]) // 2
    assert len({pair[0] for pair in half.layers.values()}) > 1
    report = vislr.apply(student, half)
    coded = {name: layer.spec.bits for name, layer in quant_layers(student).items()}
    assert coded == {name: pair[0] for name, pair in half.layers.items()}
    taken = sum(8 * v.numel() * v.element_size() for layer in quant_layers(student).values()
                for v in layer._buffers.values() if v is not None)  # fmt: skip
    assert taken == sum(next(c.size for c in found[n] if c.bits == half.layers[n]) for n in half.layers)
    vislr.remove(student, report)
    by_error = mixed_plan(plan, found, error=sum(half.scores.values()))
    assert by_error.settings["bytes"] <= half.settings["bytes"]
    with pytest.raises(ConfigError, match="least possible is"):
        mixed_plan(plan, found, size=sizes[0] - 1)


def nn_that_fails(model):
    """The model, whose forwards only count as the float one: a quantised layer in it would raise."""

    def refuse(module, args):
        assert not quant_layers(module), "a kept error was made again"

    model.register_forward_pre_hook(refuse)
    return model


def test_ways_are_measured_once_kept_and_reported(student, sd, tmp_path):
    inputs = trajectory_inputs(sd, RUNS)[0]
    plan = ptq_plan(sd, 8, 8, source=RUNS, bits={"*": None, "mid_block.*": (8, 8)})
    vislr.apply(student, plan)
    with torch.no_grad():
        before = student(**inputs)[0]
    cache = tmp_path / "ways.json"
    first = choose_ways(student, inputs, cache=cache, rounds=6)
    assert first.measured > 0
    assert {one.site for one in first.layers} == set(plan.layers)
    for one in first.layers:
        assert quant_layers(student)[one.site].way == one.way
        assert one.seconds[one.way] == min(s for way, s in one.seconds.items() if way != "float")
        assert {"float", "dequantise", "integer"} <= set(one.seconds) <= {"float", "dequantise", "integer", "onednn"}
    second = choose_ways(student, inputs, cache=cache, rounds=6)
    assert second.measured == 0
    assert second.layers == first.layers
    assert "quantised layers alone" in second.notes()[0]
    assert all(one.site in second.table() for one in second.layers)
    with torch.no_grad():
        assert (student(**inputs)[0] - before).norm() < 0.05 * before.norm()


def test_a_stopped_choice_goes_on_where_it_was(tmp_path, monkeypatch):
    spec = Spec(8, 8, "dynamic", None, "uniform", True, 0)
    widths = (8, 16, 24, 32)
    net = nn.Sequential(*(quantized(nn.Linear(a, b), spec, "minmax") for a, b in itertools.pairwise(widths)))
    inputs, cache, timed = {"input": torch.randn(4, 8)}, tmp_path / "ways.json", running.interleaved

    def stopped_at_the_third(calls, **options):
        if cache.is_file() and len(read_json(cache)) == 2:
            raise KeyboardInterrupt
        return timed(calls, **options)

    monkeypatch.setattr(running, "interleaved", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        choose_ways(net, inputs, cache=cache, rounds=6)
    kept = read_json(cache)
    monkeypatch.setattr(running, "interleaved", timed)
    assert choose_ways(net, inputs, cache=cache, rounds=6).measured == 1
    assert kept.items() <= read_json(cache).items()
    assert len(read_json(cache)) == 3


@pytest.mark.slow
def test_however_many_layers_there_are_all_are_timed_compiled():
    import torch._dynamo

    spec = Spec(8, 8, "dynamic", None, "uniform", True, 0)
    widths = (8, 16, 24, 32, 8)
    net = nn.Sequential(*(quantized(nn.Linear(a, b), spec, "minmax") for a, b in itertools.pairwise(widths)))
    # Three ways of four layers are more versions than torch.compile keeps of one function.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found = choose_ways(net, {"input": torch.randn(4, 8)}, rounds=6, compile=True)
    assert [set(one.seconds) for one in found.layers] == [{"float", "dequantise", "integer"}] * 4


def test_layers_that_would_be_slower_stay_as_they_are(sd):
    plan = ptq_plan(sd, 8, 8, inputs="dynamic")
    names = list(plan.layers)
    seconds = [{"float": 2.0, "integer": 1.0 if i % 2 else 3.0} for i in range(len(names))]
    times = tuple(LayerTime(name, (4, 4), one, "integer") for name, one in zip(names, seconds, strict=True))
    ways = Ways(times, "a machine", 0)
    assert set(without_slower(plan, ways).layers) == set(names[1::2])
    assert f"{len(names[::2])} of {len(names)} layers are slower" in ways.notes()[1]
    with pytest.raises(ConfigError, match=r"the best is .* with 2.00x"):
        without_slower(plan, ways, least=2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("input_bits", [4, 7, 8])
def test_onednn_linears(input_bits, dtype):
    """Largest codes everywhere: pairs of 8 x 8 bits overflow where a CPU has no int8 instructions, of 8 x 7 do not."""
    layer = nn.Linear(96, 40)
    quant = quantized(layer, Spec(8, input_bits, "static", None, "uniform", True, 1), "minmax").to(dtype)
    quant.set_input(torch.tensor(0.03), torch.tensor(0))
    quant.codes = torch.where(torch.rand(quant.codes.shape) < 0.1, quant.codes, -128).to(torch.int8)
    x = torch.rand(3, 5, 96).to(dtype) + 0.03 * (1 << input_bits)
    assert ("onednn" in quant.ways()) == (input_bits < 8 or cpu_has("int8"))
    if "onednn" not in quant.ways():
        quant.codes = quant.codes // 2
    with torch.no_grad():
        expected = quant(x)
        found = onednn_linear(quant, x)
        assert torch.equal(torch.compile(onednn_linear, fullgraph=True)(quant, x), found)
        quant.codes.neg_()  # written to in place, and with that packed anew
        assert torch.equal(onednn_linear(quant, x), onednn_linear(copy.deepcopy(quant), x))
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert (found - expected).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()
