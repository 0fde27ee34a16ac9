"""One owner of step state: which timestep, which phase, which adapter per sample.

A single hook on the denoiser fills a `StepContext` at every call. Run-time changes (token plans,
caches, composition) read it and keep no step counters of their own: a Python counter makes
`torch.compile` recompile at every step, a phase of few values makes as many graphs as phases.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        timestep: the timestep as the denoiser got it, a tensor; never `.item()`.
        phase: set by a schedule before the call; FULL unless one says otherwise.
        adapter_ids: per sample, which adapter applies: (batch,) int64, or None.
        schedule: optional callable `(timestep) -> Phase`, asked once a call, outside of graphs.
    """

    timestep: torch.Tensor | None = None
    phase: Phase = Phase.FULL
    adapter_ids: torch.Tensor | None = None
    schedule: Any = None

    def reset(self) -> None:
        """Forget the last call; the schedule stays."""
        self.timestep, self.phase, self.adapter_ids = None, Phase.FULL, None


def step_context(denoiser: nn.Module) -> StepContext:
    """The context of this denoiser; the first call puts the one hook on it."""
    import torch
    from diffusers.hooks import HookRegistry, ModelHook

    class StepContextHook(ModelHook):
        def __init__(self) -> None:
            super().__init__()
            self.context = StepContext()

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
            timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            if timestep is not None and not torch.is_tensor(timestep):
                timestep = torch.tensor(timestep)
            adapter_ids = self.context.adapter_ids
            self.context.reset()
            self.context.timestep, self.context.adapter_ids = timestep, adapter_ids
            if self.context.schedule is not None:
                self.context.phase = self.context.schedule(timestep)
            return args, kwargs

        def reset_state(self, module: nn.Module) -> nn.Module:
            self.context.reset()
            return module

    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    hook: Any = registry.get_hook(HOOK_NAME)
    if hook is None:
        hook = StepContextHook()
        registry.register_hook(hook, HOOK_NAME)
    return hook.context


def remove_step_context(denoiser: nn.Module) -> None:
    """Take the hook off; the denoiser's forward is what it was."""
    from diffusers.hooks import HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    if registry.get_hook(HOOK_NAME) is not None:
        registry.remove_hook(HOOK_NAME, recurse=False)
