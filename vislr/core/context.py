"""One owner of step state: which timestep, which phase, which adapter per sample.

A single hook on the denoiser fills a `StepContext` at every call. Run-time changes (token plans,
caches, composition) read it and keep no step counters of their own: a Python counter makes
`torch.compile` recompile at every step, a phase of few values makes as many graphs as phases.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vislr.core.errors import ConfigError
from vislr.core.hooks import hook_of, put_on, take_off

if TYPE_CHECKING:
    import torch
    from torch import nn

HOOK_NAME = "vislr_step_context"


class Phase(enum.Enum):
    """What the current call does. Small on purpose: one compiled graph per value."""

    FULL = "full"
    REDUCED = "reduced"


@dataclass
class StepContext:
    """State of one call of a denoiser.

    Attributes:
        timestep: the timestep as the denoiser got it, a tensor; never `.item()` inside of the model.
        phase: set by a schedule before the call; FULL unless one says otherwise.
        adapter_ids: per sample, which adapter applies: (batch,) int64, or None.
        schedule: optional callable `(timestep) -> Phase`, asked once a call, outside of graphs.
        schedules: by owner ("tokens", "cache"), where several changes have schedules of their own:
            `(timestep) -> phase` with any few-valued phase, asked once a call, outside of graphs.
        phases: by owner, what its schedule said last.
        held: by owner, a phase that every call is of in place of what its schedule would say (counting, comparing).
        owners: who uses the context; the hook goes with the last one.
        left_out: by owner, groups of modules that it leaves out of some calls, each group as a whole (caches).
        joined: by owner, groups of modules of which a call runs all or none (blocks that tokens are missing in).
        inputs: what the denoiser got, by name, its latent always as "sample"; only while schedules are asked.
    """

    timestep: torch.Tensor | None = None
    phase: Phase = Phase.FULL
    adapter_ids: torch.Tensor | None = None
    schedule: Any = None
    schedules: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    phases: dict[str, Any] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=dict)
    owners: set[str] = field(default_factory=set)
    left_out: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    joined: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget the last call; schedules and owners stay."""
        self.timestep, self.phase, self.adapter_ids = None, Phase.FULL, None
        self.phases.clear()

    def restart(self) -> None:
        """As before the first call of all, also schedules that remember calls (their `restart`)."""
        self.reset()
        for schedule in self.schedules.values():
            getattr(schedule, "restart", lambda: None)()

    def check_stretches(self, left_out: Iterable[Sequence[str]] = (), joined: Iterable[Sequence[str]] = ()) -> None:
        """Refuse modules that would be left out of a call without others that must run with them.

        Args:
            left_out, joined: further groups, beside those that are noted.

        Raises:
            ConfigError: names the group and what is left out of it.
        """
        out = [*itertools.chain(*self.left_out.values()), *left_out]
        for group in (*itertools.chain(*self.joined.values()), *joined):
            for names in out:
                inside = [one for one in group if any(one == name or one.startswith(f"{name}.") for name in names)]
                if inside and len(inside) < len(group):
                    raise ConfigError(
                        f"tokens leave in '{group[0]}' and come back after '{group[-1]}'; a cache leaves "
                        f"'{inside[0]}' to '{inside[-1]}' out in some steps, where other tokens are missing than in "
                        "the step that it kept. It can leave out all of these blocks or none: plan the second on the "
                        "model that carries the first, which chooses so, or remove one of the two"
                    )

    def enter(self, timestep: torch.Tensor | None, inputs: dict[str, Any] | None = None) -> None:
        """A call begins: note its timestep and ask the schedules, which may look at the inputs."""
        adapter_ids = self.adapter_ids
        self.reset()
        self.timestep, self.adapter_ids = timestep, adapter_ids
        self.phases.update(self.held)
        if timestep is not None and timestep.is_meta:
            # A counted forward has no values to ask about.
            return
        self.inputs = inputs or {}
        try:
            if self.schedule is not None:
                self.phase = self.schedule(timestep)
            for owner, schedule in self.schedules.items():
                if owner not in self.held:
                    self.phases[owner] = schedule(timestep)
        finally:
            self.inputs = {}


def step_context(denoiser: nn.Module, owner: str | None = None) -> StepContext:
    """The context of this denoiser; the first call puts the one hook on it.

    The context is filled in a forward pre-hook that `torch.compile` does not trace: schedules may read
    values there, and a compiled model has one graph for each phase, without breaks.

    Args:
        denoiser: the model that runs at every step.
        owner: noted as a user of the context, for `remove_step_context`.
    """
    import torch
    from diffusers.hooks import ModelHook

    class StepContextHook(ModelHook):
        def __init__(self) -> None:
            super().__init__()
            self.context = StepContext()
            self.handle: Any = None

        def initialize_hook(self, module: nn.Module) -> nn.Module:
            context = self.context

            @torch.compiler.disable
            def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
                if timestep is not None and not torch.is_tensor(timestep):
                    timestep = torch.tensor(timestep)
                latent = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
                context.enter(timestep, {**kwargs, "sample": latent})

            self.handle = module.register_forward_pre_hook(enter, with_kwargs=True)
            return module

        def deinitalize_hook(self, module: nn.Module) -> nn.Module:
            self.handle.remove()
            return module

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            # The handle belongs to the original's module; a copy is put on anew.
            import copy

            twin = StepContextHook()
            memo[id(self)] = twin
            twin.context = copy.deepcopy(self.context, memo)
            return twin

        def reset_state(self, module: nn.Module) -> nn.Module:
            self.context.restart()
            return module

    hook: Any = hook_of(denoiser, HOOK_NAME)
    if hook is None:
        hook = StepContextHook()
        put_on(denoiser, hook, HOOK_NAME)
    if owner is not None:
        hook.context.owners.add(owner)
    return hook.context


def context_of(denoiser: nn.Module) -> StepContext | None:
    """The context of this denoiser, or None if nobody uses one."""
    hook: Any = hook_of(denoiser, HOOK_NAME)
    return None if hook is None else hook.context


def remove_step_context(denoiser: nn.Module, owner: str | None = None) -> None:
    """Take the hook off; the denoiser's forward is what it was.

    Args:
        denoiser: the model.
        owner: leaves the context; the hook stays for other owners. None: the hook goes in any case.
    """
    hook: Any = hook_of(denoiser, HOOK_NAME)
    if hook is None:
        return
    if owner is not None:
        hook.context.owners.discard(owner)
        hook.context.schedules.pop(owner, None)
        for table in (hook.context.phases, hook.context.held, hook.context.left_out, hook.context.joined):
            table.pop(owner, None)
        if hook.context.owners:
            return
    take_off(denoiser, HOOK_NAME)
