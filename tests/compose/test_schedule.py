"""Who runs in which step, and with what coefficient: the bookkeeping of Switch, Composite and CMLoRA."""

import dataclasses
import itertools
import json
import random

import pytest

from vislr.cache.plan import Refresh
from vislr.compose.costing import formula
from vislr.compose.plan import METHODS, ComposePlan, Dominance, LayerWeights, Merging, Switching
from vislr.compose.schedule import betas, lead_mix, switch_turns, turns
from vislr.core.errors import ConfigError

NAMES = tuple("abcde")


def cmlora(count, low=0, refresh=None, cache="x", **lead):
    names = NAMES[:count]
    split = count - low
    return ComposePlan(
        names, method="cmlora", cache=cache, refresh=refresh or Refresh(edges=2, middle=3),
        dominance=Dominance(high=names[:split], low=names[split:], **lead),
    )  # fmt: skip


def test_the_turns_of_the_paper_and_of_its_code():
    plan = ComposePlan(NAMES[:3], method="switch")
    # i(t) = floor(((t - 1) mod k tau) / tau) + 1 with t from 1.
    assert switch_turns(plan, 40) == [((t - 1) % 15) // 5 for t in range(1, 41)]
    late = dataclasses.replace(plan, switching=Switching(off_by_one=True))
    order = switch_turns(late, 40)
    assert order[:6] == [0] * 6
    assert order[6:11] == [1] * 5
    assert order[11:16] == [2] * 5
    assert order[16] == 0


def test_shares_are_kept_at_every_point_and_the_last_steps_are_given_away():
    shares = (0.5, 0.3, 0.2)
    plan = ComposePlan(NAMES[:3], method="w_switch", switching=Switching(shares=shares))
    order = switch_turns(plan, 50)
    assert [order.count(i) for i in range(3)] == [25, 15, 10]
    for end in range(1, 51):
        assert all(abs(order[:end].count(i) - share * end) <= 1 for i, share in enumerate(shares))
    last = dataclasses.replace(plan, switching=Switching(shares=shares, last="c", last_steps=5))
    assert switch_turns(last, 50)[45:] == [2] * 5
    assert switch_turns(last, 3) == [2] * 3


def test_coefficients_sum_to_one_and_beta_spans_composite_to_switch():
    rng = random.Random(0)
    for _ in range(100):
        count, beta = rng.randint(1, 9), rng.uniform(0.01, 50)
        mix = lead_mix(beta, count, rng.randrange(count))
        assert abs(sum(mix) - 1) < 1e-12
    assert lead_mix(1.0, 4, 2) == (0.25,) * 4
    assert lead_mix(1e9, 3, 1)[1] == pytest.approx(1)
    # The published defaults, beta = N - 0.5.
    for count, lead, other in ((2, 0.6, 0.4), (3, 0.556, 0.222), (4, 0.538, 0.154), (5, 0.529, 0.118)):
        mix = lead_mix(count - 0.5, count, 0)
        assert [round(value, 3) for value in mix[:2]] == [lead, other]


def test_decay_falls_towards_two_less_and_never_below_one():
    plan = cmlora(5, decay="geometric")
    found = betas(plan, 40)
    assert found[:3] == [4.5, 4.0, 3.75]
    assert found[-1] == pytest.approx(3.5)
    assert min(betas(cmlora(2, decay="geometric"), 40)) == 1.0
    assert betas(cmlora(5), 3) == [4.5] * 3


def test_whole_forwards_are_counted_as_n_plus_refreshes_less_one():
    for count, low, total in ((2, 0, 220), (3, 1, 220), (5, 2, 50), (4, 0, 25)):
        plan = cmlora(count, low)
        order = turns(plan, total)
        refreshes = len(plan.refresh.steps(total))
        assert sum(len(turn.full) for turn in order) == count + refreshes - 1
        assert len(order[0].full) == count
        assert order[0].cached == ()
        for turn in order:
            assert turn.running == tuple(range(count))
            assert abs(sum(turn.mix) - 1) < 1e-12
        rho = 0.4
        counted = sum(len(turn.full) + rho * len(turn.cached) for turn in order) / total
        assert counted == pytest.approx(formula(count, rho, refreshes, total), rel=1e-12)
    assert formula(2, 0.38, 92, 220) == pytest.approx(2 * 0.38 + 92 / 220 * 0.62 + 0.62 / 220)


def test_everybody_leads_in_its_phase_before_the_lead_comes_round():
    total = 220
    for count, low in ((3, 1), (5, 2), (4, 0), (2, 1)):
        plan = cmlora(count, low)
        order = turns(plan, total)
        refreshes = plan.refresh.steps(total)
        end = 6 / 11 * total
        high = [order[s].full for s in refreshes if s and s <= end]
        late = [order[s].full for s in refreshes if s > end]
        wide = count - low
        for start in range(len(high) - wide + 1):
            assert {full[0] for full in high[start : start + wide]} == set(range(wide))
        expected = set(range(wide, count)) if low else set(range(wide))
        for start in range(len(late) - len(expected) + 1):
            assert {full[0] for full in late[start : start + len(expected)]} == expected
        # No features of a phase's leaders grow older than one round of it.
        gap = max(b - a for a, b in itertools.pairwise(refreshes))
        for steps, leaders in (
            ([s for s in refreshes if s <= end], range(wide)), ([s for s in refreshes if s > end], expected)
        ):  # fmt: skip
            for place in leaders:
                led = [s for s in steps if place in order[s].full]
                assert led
                assert all(b - a <= len(leaders) * gap for a, b in itertools.pairwise(led))


def test_between_refreshes_the_lead_stays():
    plan = cmlora(3)
    refreshes = set(plan.refresh.steps(50))
    leaders = [turn.mix.index(max(turn.mix)) for turn in turns(plan, 50)]
    assert all(leaders[s] == leaders[s - 1] for s in range(1, 50) if s not in refreshes)
    assert [leaders[s] for s in sorted(refreshes)][:4] == [0, 1, 2, 0]


def test_the_low_phase_as_written_and_as_published_code_runs():
    total, start = 220, 121
    written = turns(cmlora(4, 1), total)
    assert {turn.mix.index(max(turn.mix)) for turn in written[start + 2 :]} == {3}
    code = turns(cmlora(4, 1, low_phase="all_but_first"), total)
    assert {turn.mix.index(max(turn.mix)) for turn in code[start + 2 :]} == {1, 2, 3}


def test_an_online_lead_follows_the_latent():
    plan = cmlora(2, 1, mode="online", refresh=Refresh(every=1), cache=None)
    shares = [0.6, 0.5, 0.41, 0.39, 0.2, 0.45]
    leaders = [turn.mix.index(max(turn.mix)) for turn in turns(plan, 6, shares)]
    assert leaders == [0, 0, 0, 1, 1, 0]


def test_refreshing_always_is_no_cache_at_all():
    for plan in (cmlora(3, refresh=Refresh(every=1)), cmlora(3, cache=None)):
        assert all(turn.cached == () and turn.full == (0, 1, 2) for turn in turns(plan, 20))
    composite = ComposePlan(NAMES[:3], method="composite", cache="x", refresh=Refresh(every=4))
    order = turns(composite, 10)
    assert [turn.full for turn in order[:5]] == [(0, 1, 2), (), (), (), (0, 1, 2)]
    assert all(turn.cached == (0, 1, 2) for turn in order if not turn.full)


def test_beta_one_is_composite():
    assert turns(cmlora(3, cache=None, beta=1.0), 30) == turns(ComposePlan(NAMES[:3], method="composite"), 30)


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_is_itself_by_every_method(method):
    lead = Dominance(high=("a",))
    plan = ComposePlan(("a",), method=method, dominance=lead)
    assert {turn.running for turn in turns(plan, 9)} == {(0,)}
    assert all(t.mix == (1.0,) for t in turns(plan, 9))


def test_a_plan_is_plain_data_and_back():
    plan = ComposePlan(
        NAMES[:2], (0.8, 1), "ties", ("a",), merging=Merging(0.3, 4, 7, (LayerWeights("up_blocks.*", (1.0, 0.0)),))
    )
    again = ComposePlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.weights == (0.8, 1)
    lead = cmlora(3, 1, decay="geometric", beta=2.0)
    assert ComposePlan.from_dict(json.loads(json.dumps(lead.to_dict()))) == lead
    data = lead.to_dict()
    data["dominance"]["hihg"] = []
    with pytest.raises(ConfigError, match=r"'hihg'.*did you mean 'high'"):
        ComposePlan.from_dict(data)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"adapters": ()}, "at least one"),
        ({"adapters": ("a", "a")}, "each once"),
        ({"weights": (1.0,)}, "2 adapters and weights"),
        ({"weights": (1.0, float("nan"))}, "finite"),
        ({"method": "composit"}, "did you mean 'composite'"),
        ({"passes": "both"}, "passes"),
        ({"text_adapters": ("x",)}, "'x'"),
        ({"merging": Merging(density=0.0)}, "density"),
        ({"merging": Merging(layers=(LayerWeights("*", (1.0,)),))}, "1 weights for 2"),
        ({"method": "switch", "merging": Merging(layers=(LayerWeights("*", (1.0, 1.0)),))}, "merging"),
        ({"switching": Switching(every=0)}, "every 0"),
        ({"switching": Switching(shares=(0.5, 0.6))}, "summing to 1"),
        ({"switching": Switching(last="z")}, "'z'"),
        ({"mix": (0.5, 0.4)}, "sum to 1"),
        ({"method": "cmlora"}, "high"),
        ({"method": "cmlora", "dominance": Dominance(low=("a", "b"))}, "at least one in 'high'"),
        ({"method": "cmlora", "dominance": Dominance(high=("a", "b"), beta=0.0)}, "beta"),
        ({"method": "cmlora", "dominance": Dominance(high=("a", "b"), mode="on")}, "mode"),
        ({"method": "merge", "cache": "x"}, "cache plan"),
        ({"steps": 0}, "steps"),
    ],
)
def test_impossible_plans_are_refused_by_name(fields, said):
    with pytest.raises(ConfigError, match=said):
        ComposePlan(**({"adapters": ("a", "b")} | fields))
