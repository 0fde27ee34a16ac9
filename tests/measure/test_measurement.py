"""Measurements and their intervals: round trips, and intervals against values worked out by hand."""

import json
import math

import numpy as np
import pytest

from vislr.core.errors import VislrError
from vislr.measure import Measurement
from vislr.measure.measurement import bootstrap_interval, median_interval, proportion_interval


def test_json_round_trip_keeps_everything():
    part = Measurement(2.0, (1.5, 2.5), 7, 3, "ratio")
    whole = Measurement(0.25, (0.125, 0.5), 7, 3, "s", "how", "abc", {"threads": 1, "bands": [0, 1]}, {"speedup": part})
    bare = Measurement(3, None, 1, None, "FLOP")
    for one in (whole, bare):
        assert Measurement.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.parametrize(
    ("n", "low", "high", "coverage"),
    # 1 - 2 sum_{i<k} C(n, i) / 2^n, by hand: 6 -> 1 - 2/64; 9 -> 1 - 2 * 10/512; 20 -> the textbook's 6th and 15th.
    [(1, 0, 0, "0.0%"), (5, 0, 4, "93.8%"), (6, 0, 5, "96.9%"), (9, 1, 7, "96.1%"), (20, 5, 14, "95.9%")],
)
def test_median_interval_takes_the_right_order_statistics(n, low, high, coverage):
    values = list(np.random.default_rng(0).permutation(n).astype(float))
    value, interval, how = median_interval(values)
    assert value == (n - 1) / 2
    assert interval == (low, high)
    assert how.endswith(f"order statistics {low + 1} and {high + 1}, coverage {coverage}")


def test_proportion_interval_solves_the_score_equation():
    z = 1.959964
    for hits, n in ((3, 10), (55, 100), (0, 8), (8, 8)):
        low, high = proportion_interval(hits, n)
        for p in (low, high):
            if 0 < p < 1:
                assert (hits / n - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, rel=1e-9)
    assert proportion_interval(0, 8)[0] == 0.0
    assert proportion_interval(8, 8)[1] == pytest.approx(1.0)


def test_bootstrap_of_a_mean_has_the_normal_width_and_follows_the_seed():
    values = np.random.default_rng(5).normal(size=400)

    def mean(counts):
        return counts @ values / counts.sum(1)

    low, high = bootstrap_interval(mean, 400, seed=1)
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(400), rel=0.1)
    assert (low, high) == bootstrap_interval(mean, 400, seed=1)
    assert (low, high) != bootstrap_interval(mean, 400, seed=2)


def test_errors_of_the_room_are_vislr_errors():
    from vislr import measure

    with pytest.raises(VislrError, match="cannot time 0 callables"):
        measure.interleaved({})
    with pytest.raises(VislrError, match="did you mean 'fast'"):
        measure.interleaved({"fast": int, "slow": int}, baseline="fas")
    with pytest.raises(VislrError, match="0 rounds"):
        measure.peak_memory(int, rounds=0)


def test_every_public_name_stays_what_it_is_when_reached_twice():
    import importlib

    from vislr import measure

    first = {name: getattr(measure, name) for name in measure.__all__}
    for module in ("features", "measurement", "memory", "quality", "record", "teacher", "timing"):
        importlib.import_module(f"vislr.measure.{module}")
    assert {name: getattr(measure, name) for name in measure.__all__} == first
    assert all(callable(value) for value in first.values())
