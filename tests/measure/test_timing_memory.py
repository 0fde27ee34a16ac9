"""The order and the count of timed calls, ratios of given times, and peaks of known allocations."""

import collections

import numpy as np
import pytest

from vislr.measure import interleaved, peak_memory
from vislr.measure.timing import compare_times

MB = 1_000_000
# The kernel counts pages per core in lots; see peak_memory.
SLACK = 2 * MB


def run(seed, rounds=7, warmup=2):
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in ("a", "b", "c")}
    return interleaved(functions, rounds=rounds, warmup=warmup, seed=seed, device="cpu"), calls


def test_every_callable_runs_once_a_round_in_an_order_that_the_seed_sets():
    results, calls = run(seed=0)
    assert list(results) == ["a", "b", "c"]
    assert collections.Counter(calls) == {"a": 9, "b": 9, "c": 9}
    rounds = [tuple(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert run(seed=0)[1] == calls
    assert run(seed=1)[1] != calls


def test_results_state_what_they_rest_on():
    results, _ = run(seed=4)
    assert results["a"].parts == {}
    assert set(results["b"].parts) == {"speedup"}
    for one in results.values():
        assert (one.n, one.seed, one.unit) == (7, 4, "s")
        assert one.interval[0] <= one.value <= one.interval[1]
        assert one.settings["baseline"] == "a"
        assert one.settings["clock"] == "perf_counter"
        assert one.settings["threads"] >= 1
        assert one.settings["device"]


def test_speedup_is_the_median_ratio_within_rounds():
    # The machine is 10 times slower in rounds 3 and 4; within a round "work" takes half of "base".
    base = [1.0, 1.1, 10.0, 11.0, 1.2, 1.0]
    work = [value / 2 for value in base]
    results = compare_times({"work": work, "base": base}, "base", 0, {})
    assert results["base"].value == pytest.approx(1.15)
    assert results["base"].interval == (1.0, 11.0)
    speedup = results["work"].parts["speedup"]
    assert speedup.value == pytest.approx(2.0)
    assert speedup.interval == pytest.approx((2.0, 2.0))
    assert speedup.unit == "ratio"


def test_peak_of_touched_memory_is_counted_also_when_it_is_freed_at_once():
    def touch():
        np.ones(200 * MB, dtype=np.uint8)

    peak = peak_memory(touch, device="cpu")
    assert 200 * MB - SLACK <= peak.value < 260 * MB
    assert peak.unit == "bytes"
    assert peak.n == 3
    assert peak.settings["memory"] == "resident set"


def test_memory_that_is_held_before_or_never_touched_is_not_counted():
    held = np.ones(100 * MB, dtype=np.uint8)
    assert peak_memory(lambda: held.nbytes, device="cpu").value < 20 * MB
    assert peak_memory(lambda: np.empty(200 * MB, dtype=np.uint8), device="cpu").value < 20 * MB


def test_peak_is_the_highest_point_not_the_sum():
    def twice():
        for _ in range(2):
            block = np.ones(100 * MB, dtype=np.uint8)
            del block

    assert 100 * MB - SLACK <= peak_memory(twice, device="cpu").value < 130 * MB
