"""Cache plans put on a denoiser and taken off: `vislr.apply` and `vislr.remove` come here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vislr.anatomy import denoiser_of, meta_copy, sample_inputs
from vislr.anatomy.cost import count
from vislr.anatomy.wrapping import unwrapped
from vislr.cache.hooks import HOOK_NAME
from vislr.cache.plan import CachePlan
from vislr.cache.regions import moved, region_hooks
from vislr.cache.state import CacheState
from vislr.core.clock import Clock, scheduler_of
from vislr.core.context import context_of, remove_step_context, step_context
from vislr.core.errors import ConfigError, UndoError
from vislr.core.hooks import hook_of, put_on, take_off, tidy
from vislr.core.registry import Attached

OWNER = "cache"


class Schedule:
    """Which regions a call reuses, by the step of its run; asked once a call, outside of graphs.

    Where a composition evaluates several adapters in a call, it begins a pass for each of them; what
    this says is then what they may reuse.

    Attributes:
        wanted: the regions that the current step may reuse.
        branch: which call of the step it is (guidance may take two).
    """

    def __init__(self, plan: CachePlan, state: CacheState, clock: Clock):
        self.plan, self.state, self.clock = plan, state, clock
        self.wanted: frozenset[int] = frozenset()
        self.branch = 0
        self._steps: dict[int, list[frozenset[int]]] = {}

    def __call__(self, timestep: Any) -> frozenset[int]:
        if timestep is None:
            self.wanted = frozenset()
        else:
            moment = self.clock.tick(timestep)
            if moment.first:
                self.state.clear()
            total = moment.steps or self.plan.steps
            if total not in self._steps:
                self._steps[total] = reused_by_step(self.plan, total)
            table = self._steps[total]
            # A bare denoiser may run on beyond the steps that the plan names.
            self.wanted = table[moment.step] if moment.step < len(table) else frozenset()
            self.branch = moment.branch
        self.state.begin((self.branch,), self.wanted)
        return self.state.reused

    def restart(self) -> None:
        """As before the first call."""
        self.state.clear()
        self.wanted, self.branch = frozenset(), 0


def reused_by_step(plan: CachePlan, total: int) -> list[frozenset[int]]:
    """For each step of a run: the regions (places in the plan) that it reuses."""
    computed = [set(region.refresh.steps(total)) for region in plan.regions]
    return [frozenset(n for n, steps in enumerate(computed) if step not in steps) for step in range(total)]


def attach_to(target: Any) -> Callable[..., Attached]:
    """`attach` for the denoiser of a pipeline, whose scheduler says where a run is."""
    scheduler = scheduler_of(target)

    def attach_there(module: Any, change: CachePlan, name: str = "cache") -> Attached:
        return attach(module, change, name, scheduler)

    return attach_there


def attach(module: Any, change: CachePlan, name: str = "cache", scheduler: Callable[[], Any] | None = None) -> Attached:
    """Put a cache plan on a denoiser. No weight, buffer or class is touched.

    Args:
        module: UNet2DConditionModel, SD3, FLUX, PixArt or DiT transformer; adapters and layer plans may
            be on it.
        change: the plan.
        scheduler: gives the pipeline's scheduler; None: `change.steps` calls with falling timesteps are a run.

    Raises:
        ModelError: no denoiser. TargetError: a block is not there; names the nearest.
        ConfigError: regions that cannot be cached, a cache is on already, or tokens are missing in part of a region.
    """
    hooked = put_hooks(unwrapped(module), change, scheduler)
    return Attached(hooked, {"kind": "cache", "plan": change.to_dict()}, {"hooked": hooked})


def account(module: Any, change: CachePlan) -> tuple[tuple[int, int], tuple[str, ...]]:
    """FLOPs of a call without and, on average over a run, with a plan that is on; and notes."""
    dense, average = plan_flops(unwrapped(module), change)
    shares = [len(region.refresh.steps(change.steps)) for region in change.regions]
    region = change.regions[0]
    what = f"'{region.first}' to '{region.last}'" if len(shares) == 1 else f"{len(shares)} regions"
    times = str(shares[0]) if len(set(shares)) == 1 else f"{min(shares)} to {max(shares)}"
    notes = (
        f"{what} computed in {times} of {change.steps} steps",
        f"{average / dense:.1%} of the FLOPs, on average over a run of {change.steps} steps",
        *moved(module, change.regions),
    )
    return (dense, average), notes


def detach(module: Any, attached: Attached) -> None:
    """Take the plan off: every module's own forward is back, and nothing is kept.

    Raises:
        UndoError: no cache plan is on the model.
    """
    module = unwrapped(module)
    if schedule_of(module) is None:
        raise UndoError(f"no cache plan is on this {type(module).__name__} any more")
    take_hooks(module, attached.undo["hooked"])


def put_hooks(module: Any, plan: CachePlan, scheduler: Callable[[], Any] | None = None) -> tuple[str, ...]:
    """Check the plan against the model, then hook it; returns the names of the modules that carry a hook."""
    if schedule_of(module) is not None:
        raise ConfigError("a cache plan is on this model already; remove it first")
    state = CacheState(len(plan.regions))
    hooks = hooks_for(module, plan, state)
    for name, hook in hooks.items():
        put_on(module.get_submodule(name), hook, HOOK_NAME)
    context = step_context(module, OWNER)
    context.left_out[OWNER] = left_out(hooks)
    context.schedules[OWNER] = Schedule(plan, state, Clock(scheduler, plan.steps))
    return tuple(hooks)


def hooks_for(module: Any, plan: CachePlan, state: CacheState) -> dict[str, Any]:
    """The plan's hooks by module, checked against the model and what is on it."""
    hooks = region_hooks(module, plan.regions, state)
    for name in hooks:
        part = module.get_submodule(name)
        if hook_of(part, HOOK_NAME) is not None:
            raise ConfigError(f"'{name}' is cached by something else already; remove that first")
    context = context_of(module)
    if context is not None:
        context.check_stretches(left_out=left_out(hooks))
    return hooks


def left_out(hooks: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The modules that cached steps leave out, region by region."""
    groups: dict[int, list[str]] = {}
    for name, hook in hooks.items():
        if hook.outermost:
            groups.setdefault(hook.region, []).append(name)
    return tuple(map(tuple, groups.values()))


def take_hooks(module: nn.Module, hooked: tuple[str, ...]) -> None:
    """Take off what `put_hooks` put on."""
    for name in hooked:
        take_off(module.get_submodule(name), HOOK_NAME)
    remove_step_context(module, OWNER)
    tidy(module)


def schedule_of(module: Any) -> Schedule | None:
    """The schedule of the cache plan on this model, or None."""
    context = context_of(unwrapped(module))
    found = None if context is None else context.schedules.get(OWNER)
    return found if isinstance(found, Schedule) else None


def plan_flops(module: Any, plan: CachePlan, sample: dict[str, int] | None = None) -> tuple[int, int]:
    """FLOPs of one call of a hooked model: computed whole, and on average over a run of `plan.steps`."""
    twin = meta_copy(module)
    schedule = schedule_of(twin)
    assert schedule is not None
    inputs = sample_inputs(twin, sample)
    state = schedule.state
    state.clear()
    dense = count(twin, inputs).total
    total = 0
    for reused, times in Counter(reused_by_step(plan, plan.steps)).items():
        state.reused = reused
        total += times * (count(twin, inputs).total if reused else dense)
    return dense, round(total / plan.steps)


@contextmanager
def cached(target: Any, plan: CachePlan) -> Iterator[None]:
    """While inside, the pipeline runs with the plan; nothing is counted or recorded.

    Args:
        target: a pipeline or a bare denoiser.

    Raises:
        as `attach`.
    """
    module = unwrapped(denoiser_of(target)[1])
    hooked = put_hooks(module, plan, scheduler_of(target))
    try:
        yield
    finally:
        take_hooks(module, hooked)
