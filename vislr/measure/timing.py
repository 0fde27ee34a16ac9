"""Times that can be compared: every callable in every round, in a shuffled order, on one clock."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vislr.core.errors import ConfigError, hint
from vislr.measure.measurement import Measurement, median_interval
from vislr.measure.record import device_name

if TYPE_CHECKING:
    import torch


def interleaved(
    callables: Mapping[str, Callable[[], Any]],
    *,
    baseline: str | None = None,
    rounds: int = 20,
    warmup: int = 3,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> dict[str, Measurement]:
    """Time callables against one another.

    Each is called `warmup` times, then once in each of `rounds` rounds; the order within a round is
    shuffled anew. A slow minute of the machine then hits all of them alike, and a ratio is taken
    within a round.

    Args:
        callables: name -> function without arguments. Results are dropped.
        baseline: name that the others are compared with; default: the first.
        rounds: at least 6 for a 95 % interval; fewer give the range and say its coverage.
        warmup: untimed calls of each, before the first round (compilation, caches, allocators).
        seed: of the order.
        device: "cuda" measures with CUDA events between two synchronisations; "cpu" with
            `time.perf_counter`. Default: "cuda" if anything used CUDA by the end of the warm-up.

    Returns:
        by name, in the order given: the median seconds of a call. All but the baseline carry the
        part `"speedup"`: the median over rounds of (baseline's time / own time), above 1 = faster.

    Raises:
        ConfigError: nothing to time, an unknown baseline, no rounds.
    """
    import torch

    names = list(callables)
    if not names or rounds < 1 or warmup < 0:
        raise ConfigError(f"cannot time {len(names)} callables in {rounds} rounds after {warmup} warm-up calls")
    baseline = names[0] if baseline is None else baseline
    if baseline not in callables:
        raise ConfigError(f"no callable named '{baseline}' to compare with{hint(baseline, names)}")
    for _ in range(warmup):
        for name in names:
            callables[name]()
    if device is None:
        device = "cuda" if torch.cuda.is_initialized() else "cpu"
    device = torch.device(device)
    time_one = _cuda_time if device.type == "cuda" else _cpu_time
    rng = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in rng.sample(names, len(names)):
            times[name].append(time_one(callables[name], device))
    settings = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "warmup": warmup,
        "baseline": baseline,
        "clock": "cuda events" if device.type == "cuda" else "perf_counter",
    }
    return compare_times(times, baseline, seed, settings)


def compare_times(
    times: Mapping[str, Sequence[float]], baseline: str, seed: int | None, settings: Mapping[str, Any]
) -> dict[str, Measurement]:
    """Medians and speedups of times (in seconds, one a round) that were taken side by side."""
    results = {}
    for name, own in times.items():
        parts = {}
        if name != baseline:
            ratios = [base / max(mine, 1e-12) for base, mine in zip(times[baseline], own, strict=True)]
            value, interval, how = median_interval(ratios)
            how = f"time of '{baseline}' over own time in the same round, {how}"
            parts["speedup"] = Measurement(value, interval, len(own), seed, "ratio", how)
        value, interval, how = median_interval(own)
        results[name] = Measurement(value, interval, len(own), seed, "s", how, settings=settings, parts=parts)
    return results


def _cpu_time(function: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_time(function: Callable[[], Any], device: torch.device) -> float:
    import torch

    # The stream is empty when the first event is put on it, so launch gaps of the call count too.
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000
