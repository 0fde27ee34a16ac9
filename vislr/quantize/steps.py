"""Step sizes that depend on the timestep (TALSQ, EfficientDM section 3.4): where a call lies in the table.

The published code counts calls of each layer, so an extra forward, guidance in two calls or another sampler
puts it out of step. Here the timestep itself is looked up, for every sample, once a call of the denoiser: between
two entries step sizes are interpolated linearly in the timestep, outside of the table its ends hold.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import nn

from vislr.core.context import StepContext, remove_step_context, step_context
from vislr.core.errors import ModelError
from vislr.core.quantizing import round_through

OWNER = "quantize"


class Position(NamedTuple):
    """Places of B timesteps in a table: value = table[low] + weight (table[high] - table[low]); (B,) each."""

    low: torch.Tensor
    high: torch.Tensor
    weight: torch.Tensor


def locate(timesteps: tuple[float, ...], timestep: torch.Tensor) -> Position:
    """Where timesteps lie among ascending `timesteps`; an entry's own timestep has weight 0 exactly."""
    t = timestep.detach().reshape(-1).to(torch.float64 if timestep.device.type != "mps" else torch.float32)
    table = torch.tensor(timesteps, dtype=t.dtype, device=t.device)
    last = len(timesteps) - 1
    low = (torch.searchsorted(table, t, right=True) - 1).clamp(0, last)
    high = (low + 1).clamp_max(last)
    gap = table[high] - table[low]
    weight = torch.where(gap > 0, (t - table[low]) / gap.clamp_min(1e-30), 0).clamp(0, 1)
    return Position(low, high, weight.float())


class Steps:
    """Shared by a model's quantised layers: the timesteps of their tables, and where the present call lies.

    Args:
        timesteps: of the tables' entries, ascending.
        context: of the denoiser.
        owner: of the look-up in the context; every plan on a model has its own.
    """

    def __init__(self, timesteps: tuple[float, ...], context: StepContext, owner: str) -> None:
        self.timesteps, self.context, self.owner = timesteps, context, owner

    def __call__(self, timestep: torch.Tensor) -> Position:
        return locate(self.timesteps, timestep)

    def now(self) -> Position:
        """Where the present call lies.

        Raises:
            ModelError: the layer runs outside of a call of its denoiser.
        """
        found: Any = self.context.phases.get(self.owner)
        if found is None:
            raise ModelError("step sizes by timestep are known inside of a call of the denoiser alone")
        return found


def put_steps(module: nn.Module, timesteps: tuple[float, ...]) -> Steps:
    """Have the denoiser's one hook look every call's timestep up."""
    context = step_context(module)
    owner = next(name for n in itertools.count() if (name := f"{OWNER}.{n}") not in context.schedules)
    context.owners.add(owner)
    context.schedules[owner] = steps = Steps(timesteps, context, owner)
    return steps


def take_steps(module: nn.Module, steps: Steps) -> None:
    """The inverse of `put_steps`."""
    remove_step_context(module, steps.owner)


def looked_up(scale: torch.Tensor, zero: torch.Tensor, at: Position) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and whole zero (B,) at a position, from tables (T,); differentiable in both tables."""
    low, high, weight = (part.to(scale.device) for part in at)
    whole = round_through(zero.float())
    return (
        scale[low] * (1 - weight) + scale[high] * weight,
        round_through(whole[low] * (1 - weight) + whole[high] * weight),
    )
