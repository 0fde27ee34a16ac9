"""Plans for a budget: how much may stay so that a run costs what was asked, counted on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vislr.anatomy import denoiser_of, meta_copy, sample_inputs, sample_of
from vislr.anatomy.cost import count
from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import ConfigError
from vislr.tokens.plan import EARLY, LATE, TokenPlan

# Fewer than this share of the tokens is no picture any more; the reachable maximum is that of this share.
LEAST = 0.05
# A budget is met within this share of it.
CLOSE = 0.01


@dataclass(frozen=True)
class PlanFlops:
    """FLOPs of one forward under a plan, 2 per multiply-add.

    Attributes:
        dense: without the plan.
        early, late: of a call of each phase, ranking and recovery included.
        early_share: share of a run's calls that are early.
        sample: the shapes counted at.
    """

    dense: int
    early: int
    late: int
    early_share: float
    sample: dict[str, int]

    @property
    def average(self) -> float:
        """Of one call, over a run."""
        return self.early_share * self.early + (1 - self.early_share) * self.late

    @property
    def saved(self) -> float:
        """Share of the dense FLOPs that a run saves."""
        return 1 - self.average / self.dense

    def notes(self) -> tuple[str, ...]:
        """Lines for a report."""
        lines = [f"a run saves {self.saved:.1%} of the FLOPs on average: {self.dense / self.average:.2f}x fewer"]
        if self.early_share:
            early, late = self.early / 1e9, self.late / 1e9
            lines.append(f"early calls ({self.early_share:.0%} of a run) {early:.3f}, late calls {late:.3f} GFLOP")
        if self.average >= self.dense:
            lines.append(
                "WARNING: this plan saves nothing: ranking and recovery cost as much as the tokens that leave, or no "
                "token leaves at this size"
            )
        return tuple(lines)


class Counter:
    """Counts plans on one copy of a model without memory."""

    def __init__(self, model: Any, sample: dict[str, int] | None = None):
        from vislr.tokens.handler import applied, take_hooks

        model = unwrapped(denoiser_of(model)[1])
        self.sample = sample_of(model, sample)
        self.twin: nn.Module = meta_copy(model)
        # A plan that is on the model is not part of what another plan is compared with.
        on = applied(model)
        if on is not None:
            take_hooks(self.twin, on.hooked)
        self.inputs = sample_inputs(self.twin, self.sample)
        self.dense = count(self.twin, self.inputs).total
        self.tokens = 1  # most tokens of any span counted so far
        self._known: dict[TokenPlan, PlanFlops] = {}

    def __call__(self, plan: TokenPlan) -> PlanFlops:
        """Count both phases of a plan; each plan once."""
        from vislr.tokens import handler

        if plan in self._known:
            return self._known[plan]
        hooks = handler.put_hooks(self.twin, plan)
        try:
            totals = {}
            for phase in plan.phases():
                with handler.held_in(self.twin, phase):
                    totals[phase] = count(self.twin, self.inputs).total
            found = handler.applied(self.twin)
            assert found is not None
            self.tokens = max(self.tokens, *(route.total for route in found.routes))
        finally:
            handler.take_hooks(self.twin, hooks)
        late = totals[LATE]
        self._known[plan] = PlanFlops(self.dense, totals.get(EARLY, late), late, plan.early_share, self.sample)
        return self._known[plan]


def plan_flops(model: Any, plan: TokenPlan, sample: dict[str, int] | None = None) -> PlanFlops:
    """What a plan costs on a model, by torch's FlopCounterMode on the changed model.

    Args:
        model: a pipeline or a backbone, on any device; it is not changed and needs no free memory.
        plan: the plan; a token plan that is on the model does not count.
        sample: as in `vislr.anatomy.sample_of`.
    """
    return Counter(model, sample)(plan)


def solve(counter: Counter, build: Callable[[float], TokenPlan], target: float, least: float) -> TokenPlan:
    """The plan of the family `build(keep)` whose average FLOPs are nearest to `target`, within 1 % of it.

    Args:
        counter: counts plans.
        build: share that stays -> plan; more stays, more FLOPs.
        target: average FLOPs of a call.
        least: smallest share that `build` takes.

    Raises:
        ConfigError: the budget cannot be reached; names the reachable maximum.
    """
    if target >= counter.dense:
        raise ConfigError(f"{_saved(target, counter)} of the FLOPs is asked to be saved; expected more than 0")
    cost = {least: counter(build(least)).average}
    if cost[least] > target * (1 + CLOSE):
        raise ConfigError(
            f"{_saved(target, counter)} of the FLOPs cannot be saved this way: at most {_saved(cost[least], counter)} "
            f"({counter.dense / cost[least]:.2f}x) with {least:.0%} of the tokens kept"
        )
    low, high, middle = least, 1.0, 0.5
    while min(abs(one - target) for one in cost.values()) > 1e-3 * target and high - low > 0.4 / counter.tokens:
        width = high - low
        cost[middle] = counter(build(middle)).average
        if cost[middle] > target:
            high = middle
        else:
            low = middle
        # A guess that hardly narrows the bracket is followed by a bisection, so that the search ends.
        middle = _guess(low, high, cost, target) if high - low < 0.6 * width else (low + high) / 2
    keep = min(cost, key=lambda k: abs(cost[k] - target))
    if abs(cost[keep] - target) > CLOSE * target:
        above = counter.dense if high == 1 else cost[high]
        raise ConfigError(
            f"{_saved(target, counter)} of the FLOPs cannot be met within 1 % with this few tokens; next to it are "
            f"{_saved(above, counter)} and {_saved(cost[low], counter)}"
        )
    return build(keep)


def _guess(low: float, high: float, cost: dict[float, float], target: float) -> float:
    """Where the parabola through three counted shares meets the target, within the bracket; else its middle.

    A block costs a + b k + c k^2 with a share of k of the tokens (linear layers, attention), so the first guess is
    nearly right.
    """
    middle = (low + high) / 2
    if len(cost) < 3:
        # Two counted shares: a line, kept away from the ends of the bracket.
        (x, fx), (y, fy) = sorted(cost.items())
        guess = x + (target - fx) * (y - x) / max(fy - fx, 1e-9)
        return min(max(guess, low + 0.1 * (high - low)), high - 0.1 * (high - low))
    x, y, z = sorted(sorted(cost, key=lambda k: abs(k - middle))[:3])
    fx, fy, fz = cost[x], cost[y], cost[z]
    first, second = (fy - fx) / (y - x), (fz - fy) / (z - y)
    curve = (second - first) / (z - x)
    slope = first - curve * (x + y)
    inside = slope * slope - 4 * curve * (fx - slope * x - curve * x * x - target)
    if inside < 0 or abs(curve) < 1e-12:
        return middle
    guess = (-slope + inside**0.5) / (2 * curve)
    return guess if low < guess < high else middle


def _saved(flops: float, counter: Counter) -> str:
    return f"{1 - flops / counter.dense:.1%}"


def early_boundary(target: Any, early: float, steps: int) -> tuple[float | None, float]:
    """Where the early phase of a run ends, and its share of the calls.

    Args:
        target: a pipeline, whose scheduler says the timesteps; or a backbone, for which they are taken as
            evenly spaced over 1000 (FLUX: sigma, over 1).
        early: share of the steps that are early.
        steps: of a run.

    Returns:
        (boundary in the denoiser's unit or None for no early phase, share).
    """
    if not 0 <= early <= 1 or steps < 1:
        raise ConfigError(f"early {early} of {steps} steps; expected a share from 0 to 1 and at least 1 step")
    tau = round(early * steps)
    if tau == 0:
        return None, 0.0
    times = _timesteps(target, steps)
    share = tau / steps
    # Schedulers of higher order call the model more than once a step.
    place = round(share * len(times))
    if place >= len(times):
        return min(0.0, times[-1]), 1.0
    return (times[place - 1] + times[place]) / 2, place / len(times)


def _timesteps(target: Any, steps: int) -> list[float]:
    """What the denoiser gets as timesteps in a run, descending."""
    scheduler = getattr(target, "scheduler", None)
    # FLUX reads sigma where the others read timesteps.
    unit = 1e-3 if hasattr(unwrapped(denoiser_of(target)[1]), "single_transformer_blocks") else 1.0
    if scheduler is None:
        return [unit * 1000 * (steps - i) / steps for i in range(steps)]
    scheduler = copy.deepcopy(scheduler)
    if getattr(scheduler.config, "use_dynamic_shifting", False):
        # The pipeline's middle: between the shifts of the smallest and the largest picture.
        scheduler.set_timesteps(steps, mu=(scheduler.config.base_shift + scheduler.config.max_shift) / 2)
    else:
        scheduler.set_timesteps(steps)
    return [unit * float(t) for t in scheduler.timesteps]
