"""What a composition costs: FLOPs of every kind of pass, counted on meta, over the turns of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vislr.anatomy import meta_copy, sample_inputs
from vislr.anatomy.cost import count
from vislr.compose.evaluate import compose_hook
from vislr.compose.plan import ComposePlan
from vislr.compose.schedule import Turn, turns


@dataclass(frozen=True)
class Cost:
    """The cost of a run, per step on average.

    Attributes:
        steps: of the run.
        whole: FLOPs of one forward with one adapter, 2 per multiply-add, mean over the adapters.
        flops: FLOPs of a step.
        rho: FLOPs of a cached forward over those of a whole one; None: nothing is cached.
        refreshes: whole forwards in the run.
        cached: cached forwards in the run.
    """

    steps: int
    whole: int
    flops: int
    rho: float | None
    refreshes: int
    cached: int

    @property
    def forwards(self) -> float:
        """Full-model forwards a step."""
        return self.flops / self.whole

    def lines(self) -> list[str]:
        """What a user should know."""
        lines = [f"{self.forwards:.2f} full forwards a step, on average over a run of {self.steps} steps"]
        if self.rho is not None:
            lines.append(
                f"{self.refreshes} whole and {self.cached} cached forwards; each {self.rho:.3f} of a whole one"
            )
        return lines


def formula(count: int, rho: float, refreshes: int, steps: int) -> float:
    """CMLoRA's expected cost in full forwards a step: N rho + |K|/T (1 - rho) + (N - 1)(1 - rho)/T."""
    return count * rho + refreshes / steps * (1 - rho) + (count - 1) * (1 - rho) / steps


def plan_cost(module: Any, plan: ComposePlan, sample: dict[str, int] | None = None) -> Cost:
    """Count a plan that is on a denoiser.

    Online leads are counted as high throughout; the lead does not change how many forwards there are.
    """
    twin = meta_copy(module)
    hook: Any = compose_hook(twin)
    inputs = sample_inputs(twin, sample)
    order = turns(plan, plan.steps)

    def counted(turn: Turn) -> int:
        hook.conductor.turn = turn
        return count(twin, inputs).total

    several = len(plan.adapters)
    if order[0].together:
        flops = counted(order[0])
        return Cost(plan.steps, flops, flops, None, plan.steps, 0)
    single = [tuple(float(place == chosen) for place in range(several)) for chosen in range(several)]
    caching = any(turn.cached for turn in order)
    whole, partial = [], []
    for place in range(several):
        whole.append(counted(Turn((place,), (), single[place])))
        if caching:
            partial.append(counted(Turn((), (place,), single[place])))
    total = sum(sum(whole[p] for p in turn.full) + sum(partial[p] for p in turn.cached) for turn in order)
    mean = sum(whole) / several
    return Cost(
        plan.steps,
        round(mean),
        round(total / plan.steps),
        sum(partial) / several / mean if caching else None,
        sum(len(turn.full) for turn in order),
        sum(len(turn.cached) for turn in order),
    )
