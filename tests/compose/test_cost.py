"""The counted cost of compositions, against FLOPs of real runs and the formula."""

import pytest
import torch
from adapted import NAMES
from torch.utils.flop_counter import FlopCounterMode

import vislr
from vislr import cache, compose
from vislr.adapters.inject import adapter_layers
from vislr.anatomy import sample_inputs, skeleton
from vislr.cache.plan import Refresh
from vislr.compose.costing import formula


def test_a_run_of_cmlora_costs_what_the_formula_says(sd):
    """Every FLOP of real calls, counted outside; rho from the same counter, on one adapter alone."""
    steps = 16
    plan = compose.cmlora_plan(sd.pipe, NAMES, steps=steps, passes="separate")
    inputs = sample_inputs(sd.model, {"batch": 2, "tokens": 8}, device="cpu")

    def counted(calls):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for call in range(calls):
                time = torch.full_like(inputs["timestep"].float(), 999.0 - 60 * call)
                sd.model(**(inputs | {"timestep": time}))
        return counter.get_total_flops()

    whole = part = 0
    for name in NAMES:
        vislr.set_adapters(sd.pipe, [name])
        whole += counted(1) / 3
        with cache.cached(sd.model, cache.interval_plan(sd.model, 2, plan.cache, steps=2)):
            part += counted(2) / 3
    vislr.set_adapters(sd.pipe, [])
    rho = part / whole - 1
    with compose.composed(sd.model, plan):
        total = counted(steps)
    expected = formula(3, rho, len(plan.refresh.steps(steps)), steps)
    assert total / steps / whole == pytest.approx(expected, rel=0.02)
    found = compose.cost(sd.model, plan)
    assert found.rho == pytest.approx(rho, rel=0.02)
    assert found.forwards == pytest.approx(expected, rel=0.02)
    assert found.refreshes == 3 + len(plan.refresh.steps(steps)) - 1
    assert found.refreshes + found.cached == 3 * steps


@pytest.mark.parametrize(
    ("method", "forwards"), [("merge", 1), ("cat", 1), ("switch", 1), ("composite", 3), ("w_composite", 3)]
)
def test_full_forwards_a_step(sd, method, forwards):
    words = {"prompt": "a cat face", "triggers": ["a", "cat", "face"]} if method.startswith("w_") else {}
    report = vislr.apply(sd.pipe, compose.compose_plan(sd.pipe, NAMES, None, method, **words), name="mix")
    assert report.flops[1] / report.flops[0] == pytest.approx(forwards, rel=0.03)
    assert f"{forwards:.2f} full forwards a step" in str(report) or method == "switch"
    assert report.sites == tuple(dict.fromkeys(s for n in NAMES for s in adapter_layers(sd.model, n)))
    vislr.remove(sd.pipe, report)


@pytest.mark.slow
def test_a_cached_pass_of_sd15_costs_0_38_of_a_whole_one():
    model = skeleton("sd15", {})
    plan = cache.interval_plan(model, 2, steps=2)
    assert (plan.regions[0].first, plan.regions[0].last) == ("down_blocks.1", "up_blocks.2")
    report = vislr.apply(model, plan)
    rho = 2 * report.flops[1] / report.flops[0] - 1
    assert rho == pytest.approx(0.380, abs=0.001)
    # N rho + |K|/T (1 - rho) + (N - 1)(1 - rho)/T at T = 220, |K| = 92.
    refreshes = len(Refresh(edges=2, middle=3).steps(220))
    assert [round(formula(n, rho, refreshes, 220), 2) for n in (2, 3, 4, 5)] == [1.02, 1.41, 1.79, 2.17]
    vislr.remove(model, report)


@pytest.mark.slow
def test_the_boundary_of_sdxl_runs_attention():
    model = skeleton("sdxl", {})
    assert cache.region_at(model, "up_blocks.1").last == "up_blocks.0"
    plan = cache.CachePlan((cache.region_at(model, "up_blocks.1", Refresh(every=2)),), 2)
    report = vislr.apply(model, plan)
    assert 0.1 < 2 * report.flops[1] / report.flops[0] - 1 < 0.5
    vislr.remove(model, report)
