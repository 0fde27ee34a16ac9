"""Time of the model with and without the token plan that is on it, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vislr.anatomy import denoiser_of, sample_inputs
from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import ConfigError
from vislr.measure import Measurement, interleaved
from vislr.tokens.handler import applied, held_in
from vislr.tokens.plan import EARLY, LATE

DENSE = "dense"


def time_plan(
    target: Any, *, sample: dict[str, int] | None = None, rounds: int = 6, warmup: int = 1
) -> dict[str, Measurement]:
    """Seconds of one call without the plan, and of one call in each of its phases, interleaved.

    Args:
        target: a pipeline or a backbone with a token plan on it, where it lies and in its dtype; a compiled one is
            timed compiled.
        sample: as in `vislr.anatomy.sample_of`.
        rounds, warmup: as in `vislr.measure.interleaved`.

    Returns:
        "dense" and each phase ("early", "late"), the phases with their speedup over "dense".

    Raises:
        ConfigError: no token plan is on the model.
    """
    model = denoiser_of(target)[1]
    found = applied(model)
    if found is None:
        raise ConfigError("no token plan is on this model; apply one before it is timed")
    inner = unwrapped(model)
    device = next(inner.parameters()).device
    inputs = sample_inputs(inner, sample, device=device, batch=2 if found.plan.guidance == "shared" else 1)

    def call(phase: str | None) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), held_in(inner, phase):
                model(**inputs)

        return run

    calls = {DENSE: call(None)} | {phase: call(phase) for phase in found.plan.phases()}
    training = inner.training
    inner.eval()
    try:
        return interleaved(calls, baseline=DENSE, rounds=rounds, warmup=warmup, device=device)
    finally:
        inner.train(training)


def timing_notes(target: Any, figures: dict[str, Measurement]) -> tuple[str, ...]:
    """Lines for a report; one that is not faster is said loudly."""
    found = applied(denoiser_of(target)[1])
    assert found is not None
    share = found.plan.early_share
    dense, late = figures[DENSE].value, figures[LATE].value
    average = share * figures[EARLY].value + (1 - share) * late if EARLY in figures else late
    line = (
        f"measured: {dense * 1e3:.1f} ms a call without the plan, {average * 1e3:.1f} ms with it on average over a run"
    )
    if average >= dense:
        return (line, f"WARNING: SLOWER: this plan makes the model {average / dense:.2f}x slower on this machine")
    return (f"{line}: {dense / average:.2f}x faster",)
