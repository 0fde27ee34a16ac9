"""What happens in each step: who runs, in full or from the cache, and with what coefficient. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vislr.compose.plan import MIXED, TURNS, ComposePlan


@dataclass(frozen=True)
class Turn:
    """One step.

    Attributes:
        full: adapters (places in the plan) that are evaluated whole, each alone.
        cached: adapters that are evaluated from their own kept features, where there are some.
        mix: coefficient of each adapter's prediction, in the plan's order, summing to 1; those that do not
            run have 0.
        together: all adapters at once, in one forward.
    """

    full: tuple[int, ...]
    cached: tuple[int, ...]
    mix: tuple[float, ...]
    together: bool = False

    @property
    def running(self) -> tuple[int, ...]:
        """The adapters that are evaluated, in the plan's order."""
        # Not sorted(): torch.compile reads this and does not trace a sort of numbers that it watches.
        return tuple(place for place in range(len(self.mix)) if place in self.full or place in self.cached)


def switch_turns(plan: ComposePlan, total: int) -> list[int]:
    """LoRA Switch: the adapter of each of `total` steps.

    The paper's i(t) = floor(((t - 1) mod k tau) / tau) + 1 for t from 1 (arXiv 2402.16843, section 3.1). With
    shares, the adapter that is furthest behind its share is next (the first of several), and `last` has the
    last steps.
    """
    turns, count = plan.switching, len(plan.adapters)
    if turns.shares:
        had = [0] * count
        order = []
        for step in range(total):
            behind = [share * (step + 1) - done for share, done in zip(turns.shares, had, strict=True)]
            chosen = max(range(count), key=lambda i: (behind[i], -i))
            had[chosen] += 1
            order.append(chosen)
    else:
        # The published callback runs after a step, so its first switch comes one step late.
        shift = 1 if turns.off_by_one else 0
        order = [max(0, step - shift) // turns.every % count for step in range(total)]
    if turns.last is not None:
        tail = min(turns.last_steps, total)
        order[total - tail :] = [plan.adapters.index(turns.last)] * tail
    return order


def lead_mix(beta: float, count: int, leading: int) -> tuple[float, ...]:
    """CMLoRA's coefficients: w_other = N / (beta + N - 1), w_lead = beta w_other, both over N."""
    other = 1 / (beta + count - 1)
    return tuple(beta * other if place == leading else other for place in range(count))


def betas(plan: ComposePlan, refreshes: int) -> list[float]:
    """The beta that holds from each refresh on: N - 0.5, or decayed by 0.5^j at the j-th, at least 1."""
    beta = len(plan.adapters) - 0.5 if plan.dominance.beta is None else plan.dominance.beta
    held = []
    for j in range(refreshes):
        if plan.dominance.decay == "geometric" and j:
            beta = max(1.0, beta - 0.5**j) if beta > 1 else beta
        held.append(beta)
    return held


class Lead:
    """Who leads in CMLoRA, step by step.

    At each refresh the lead passes on: in the high phase to Hi[j mod |Hi|], in the low phase to Lo[j mod |Lo|]
    ("lo"), or to pi[1 + j mod |Hi|] of pi = Hi then Lo ("all_but_first"), j counting refreshes of the run.
    Without low adapters every step is of the high phase.
    """

    def __init__(self, plan: ComposePlan, total: int):
        lead = plan.dominance
        self.plan, self.total = plan, total
        self.steps = frozenset(plan.refresh.steps(total))
        self.high = [plan.adapters.index(name) for name in lead.high]
        self.low = [plan.adapters.index(name) for name in lead.low]
        self.betas = betas(plan, len(self.steps))
        self.refreshes = 0
        self.leading = self.high[0]
        self.beta = self.betas[0]

    def is_high(self, step: int, share: float | None = None) -> bool:
        """Whether a step is of the high phase; online, by the high-frequency share of the latent."""
        lead = self.plan.dominance
        if not self.low:
            return True
        if lead.mode == "online":
            return share is None or share >= lead.threshold
        # The published constant: steps up to and including 120 of 220.
        return step <= lead.boundary * self.total

    def at(self, step: int, share: float | None = None) -> tuple[int, float, bool]:
        """(leading adapter, beta, whether it took over now) of the next step; steps come in order."""
        if step not in self.steps:
            return self.leading, self.beta, False
        j = self.refreshes
        if self.is_high(step, share):
            self.leading = self.high[j % len(self.high)]
        elif self.plan.dominance.low_phase == "lo":
            self.leading = self.low[j % len(self.low)]
        else:
            order = [*self.high, *self.low]
            self.leading = order[1 + j % len(self.high)] if len(order) > 1 else order[0]
        self.beta = self.betas[min(j, len(self.betas) - 1)]
        self.refreshes += 1
        return self.leading, self.beta, True


class Program:
    """The turns of one run. Asked step by step, because an online lead depends on the latent.

    Args:
        plan: the plan.
        total: steps of the run.
    """

    def __init__(self, plan: ComposePlan, total: int):
        self.plan, self.total = plan, total
        self.count = len(plan.adapters)
        self.order = switch_turns(plan, total) if plan.method in TURNS else []
        self.lead = Lead(plan, total) if plan.method == "cmlora" else None
        caching = plan.cache is not None and not plan.refresh.always and not plan.alone
        self.kept = frozenset(plan.refresh.steps(total)) if caching else None

    @property
    def reads_latent(self) -> bool:
        """Whether the next turn depends on the latent."""
        lead = self.plan.dominance
        return self.lead is not None and lead.mode == "online" and bool(lead.low) and not self.plan.alone

    def turn(self, step: int, share: float | None = None) -> Turn:
        """The turn of a step; steps come in order, each once."""
        everyone = tuple(range(self.count))
        if self.plan.alone:
            return Turn((0,), (), (1.0,))
        if self.plan.method not in (*TURNS, *MIXED):
            return Turn(everyone, (), (1 / self.count,) * self.count, together=True)
        if self.order:
            chosen = self.order[min(step, self.total - 1)]
            return Turn((chosen,), (), tuple(float(place == chosen) for place in everyone))
        if self.lead is None:
            mix = self.plan.mix or (1 / self.count,) * self.count
            whole = self.kept is None or step in self.kept
            return Turn(everyone, (), mix) if whole else Turn((), everyone, mix)
        leading, beta, _ = self.lead.at(step, share)
        mix = lead_mix(beta, self.count, leading)
        if self.kept is None or step == 0:
            return Turn(everyone, (), mix)
        full = (leading,) if step in self.kept else ()
        return Turn(full, tuple(place for place in everyone if place not in full), mix)


def turns(plan: ComposePlan, total: int, shares: Iterable[float] | None = None) -> list[Turn]:
    """All turns of a run.

    Args:
        shares: of an online lead, the latent's high-frequency share at each step; None: always high.
    """
    program = Program(plan, total)
    values: list[float | None] = [None] * total if shares is None else list(shares)
    return [program.turn(step, value) for step, value in zip(range(total), values, strict=True)]
