"""Which step of which run a call of a denoiser is: for schedules that change over a run.

diffusers' pipelines tell a denoiser a timestep and nothing else. Every run begins with
`scheduler.set_timesteps`, which makes a new tensor: its identity tells runs apart, also after a run that
was stopped half way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Pipelines with true guidance call twice a step, some three times; more is somebody calling by hand.
BRANCHES = 4


@dataclass(frozen=True)
class Moment:
    """The place of one call.

    Attributes:
        step: of the run, from 0.
        steps: calls of the run (one a step; more with schedulers of higher order); None: not known.
        branch: which call of the step: 0, or 1 for the second where guidance takes two calls.
        first: whether the run begins with it.
    """

    step: int
    steps: int | None
    branch: int
    first: bool


class Clock:
    """Counts the steps of a run; asked once a call, outside of compiled graphs.

    Args:
        scheduler: gives the scheduler of the pipeline, or None for a bare denoiser.
        steps: of a run, where no scheduler says it.
    """

    def __init__(self, scheduler: Callable[[], Any] | None = None, steps: int | None = None):
        self._scheduler, self._given = scheduler, steps
        self._times: Any = None
        self._last, self._start, self._step, self._branch = float("inf"), 0, -1, 0

    def tick(self, timestep: Any) -> Moment:
        """A call with this timestep (a tensor; a batch's first value counts)."""
        now = float(timestep.flatten()[0])
        scheduler = None if self._scheduler is None else self._scheduler()
        times = getattr(scheduler, "timesteps", None)
        listed = times is not None and len(times) > 0
        restarted = now > self._last or (now == self._last and not listed)
        if self._step < 0 or times is not self._times or restarted:
            return self._begin(now, times, listed)
        if now == self._last and not self._twice(times):
            self._branch = (self._branch + 1) % BRANCHES
            return Moment(self._step, self._total(), self._branch, False)
        self._last, self._step, self._branch = now, self._step + 1, 0
        return Moment(self._step, self._total(), 0, False)

    def _begin(self, now: float, times: Any, listed: bool) -> Moment:
        self._times, self._last, self._step, self._branch = times, now, 0, 0
        self._start = 0
        if listed:
            # FLUX reads sigma, a thousandth of the timestep; image to image begins in the middle.
            unit = 1000.0 if now <= 1 < float(times[0]) else 1.0
            self._start = int((times.float() - now * unit).abs().argmin())
        return Moment(0, self._total(), 0, True)

    def _total(self) -> int | None:
        if self._times is not None and len(self._times) > 0:
            return max(len(self._times) - self._start, self._step + 1)
        return self._given

    def _twice(self, times: Any) -> bool:
        """Whether the run's own list has this timestep again as the next one."""
        place = self._start + self._step
        return place + 1 < len(times) and bool(times[place + 1] == times[place])


def scheduler_of(target: Any) -> Callable[[], Any] | None:
    """How to find the scheduler of a pipeline, without keeping the pipeline alive; None: it has none.

    The pipeline's present scheduler counts, so one that is replaced is noticed. Other pipelines made of the
    same parts share scheduler and denoiser.
    """
    scheduler = getattr(target, "scheduler", None)
    if scheduler is None:
        return None
    whole, part = weakref.ref(target), weakref.ref(scheduler)

    def find() -> Any:
        pipe = whole()
        return part() if pipe is None else pipe.scheduler

    return find
