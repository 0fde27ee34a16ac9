"""Schedules of refresh steps and the cache plan's data."""

import itertools
import random

import pytest

from vislr.cache.plan import CachePlan, Refresh, Region
from vislr.cache.planning import refreshes
from vislr.core.errors import ConfigError


def test_the_paper_s_run_refreshes_in_92_of_220_steps():
    steps = Refresh(edges=2, middle=3).steps(220)
    assert len(steps) == 92
    assert steps[0] == 0
    # 0.375 and 0.875 of 220 are 82.5 and 192.5; each stretch starts anew at the whole step below.
    assert [s for s in steps if s < 82] == list(range(0, 82, 2))
    assert [s for s in steps if 82 <= s < 192] == list(range(82, 192, 3))
    assert [s for s in steps if s >= 192] == list(range(192, 220, 2))


def test_equal_intervals_are_uniform_inside_each_stretch():
    rng = random.Random(0)
    for _ in range(50):
        total, k = rng.randint(1, 300), rng.randint(1, 9)
        steps = set(Refresh(edges=k, middle=k).steps(total))
        first, second = int(0.375 * total), int(0.875 * total)
        for start, end in ((0, first), (first, second), (second, total)):
            inside = sorted(s for s in steps if start <= s < end)
            assert all(b - a == k for a, b in itertools.pairwise(inside))
            assert not inside or inside[0] in (start, 0)
        assert 0 in steps


def test_uniform_and_chosen_refreshes():
    assert Refresh(every=4).steps(10) == (0, 4, 8)
    assert Refresh(every=1).steps(3) == (0, 1, 2)
    assert Refresh(every=1).always
    chosen = Refresh(chosen=(0, 2, 6), of=8)
    assert chosen.steps(8) == (0, 2, 6)
    # A run twice as long has them at the same fractions.
    assert chosen.steps(16) == (0, 4, 12)
    assert not chosen.always
    assert Refresh(edges=1, middle=1).always
    assert Refresh(chosen=(3,), of=4).steps(4) == (0, 3)


@pytest.mark.parametrize(
    "fields",
    [{}, {"every": 2, "edges": 2, "middle": 3}, {"edges": 2}, {"every": -1}, {"chosen": (0, 4), "of": 4},
     {"chosen": (2, 1), "of": 4}, {"chosen": (0,)}],
)  # fmt: skip
def test_impossible_refreshes_are_refused(fields):
    with pytest.raises(ConfigError):
        Refresh(**fields)


def test_a_block_is_computed_where_its_changes_add_up():
    assert refreshes([0.1, 0.1, 0.1, 0.3, 0.0], 0.15) == (0, 2, 4)
    assert refreshes([0.1] * 4, 1.0) == (0,)
    assert refreshes([0.1] * 3, 0.0) == (0, 1, 2, 3)


def test_a_plan_is_plain_data_and_back():
    import json

    plan = CachePlan(
        (Region("a", "b", Refresh(every=3)), Region("c", "c", Refresh(chosen=(0, 5), of=9))), 12, "measured"
    )
    assert CachePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    data = plan.to_dict()
    data["regions"][0]["refresh"]["evry"] = 1
    with pytest.raises(ConfigError, match=r"'evry'.*did you mean 'every'"):
        CachePlan.from_dict(data)
    with pytest.raises(ConfigError, match="steps"):
        CachePlan.from_dict(plan.to_dict() | {"steps": "many"})
    with pytest.raises(ConfigError, match="no 'regions'"):
        CachePlan.from_dict({})
    with pytest.raises(ConfigError):
        CachePlan(())
