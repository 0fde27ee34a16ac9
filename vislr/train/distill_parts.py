"""What of a pruned model is trained, and how fast: HierarchicalPrune's two answers.

*Positional weight preservation* freezes everything that is computed before the first cut: it is as
it was, so its features are the teacher's. *Sensitivity-guided distillation* gives the units that
matter most the smallest learning rates. (arXiv 2508.04663.)
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from vislr.anatomy import Anatomy, describe
from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import ConfigError, TargetError

# The share that the paper's ablation needs before sensitivity guidance pays.
SENSITIVE_FROM = 0.25
# Rates below this are no training.
_FROZEN = 0.05


def first_cut(model: nn.Module, anatomy: Anatomy | None = None) -> int:
    """Depth (place in the forward) of the first block or resnet that lost something.

    Raises:
        TargetError: nothing was removed from the model.
    """
    model = unwrapped(model)
    anatomy = anatomy or describe(model)
    removed = [name for name, module in model.named_modules() if getattr(module, "removed_unit", None) is not None]
    depths = []
    for name in removed:
        inside = [site.depth for site in anatomy.sites if site.name == name or site.name.startswith(f"{name}.")]
        holder = name.rpartition(".")[0]
        around = [site.depth for site in anatomy.sites if site.kind == "unit" and site.name == holder]
        depths += around or inside
    if not depths:
        raise TargetError(f"nothing was removed from this {type(model).__name__}; expected a pruned model")
    return min(depths)


def after_first_cut(model: nn.Module) -> dict[str, nn.Parameter]:
    """Positional weight preservation: name -> parameter of what is computed from the first cut on.

    Tables of a block go with the block; what lies outside of all blocks (positions, classes) stays
    frozen, except a final modulation table.

    Raises:
        TargetError: nothing was removed from the model.
    """
    model = unwrapped(model)
    anatomy = describe(model)
    cut = first_cut(model, anatomy)
    depths = {site.name: site.depth for site in anatomy.sites}
    chosen = {}
    for name, parameter in model.named_parameters():
        depth = _depth(name, depths)
        if depth is None:
            depth = cut if name.endswith("scale_shift_table") else -1
        if depth >= cut:
            chosen[name] = parameter
    return chosen


def _depth(name: str, depths: Mapping[str, int]) -> int | None:
    """Of the innermost site that holds the parameter."""
    while name:
        if name in depths:
            return depths[name]
        name = name.rpartition(".")[0]
    return None


def kept_taps(model: nn.Module, taps: Sequence[str], trainable: Mapping[str, nn.Parameter]) -> list[str]:
    """Taps at or behind the first trained parameter: before it, features are the teacher's and their terms are 0."""
    model = unwrapped(model)
    depths = {site.name: site.depth for site in describe(model).sites}
    first = min((d for d in (_depth(name, depths) for name in trainable) if d is not None), default=0)
    inside = {tap: [d for name, d in depths.items() if name.startswith(f"{tap}.")] for tap in taps}
    return [tap for tap in taps if not inside[tap] or max(inside[tap]) >= first]


def sensitivity_rates(
    trainable: Mapping[str, torch.Tensor],
    drops: Mapping[str, float],
    *,
    gamma: float = 1.0,
    mode: Literal["continuous", "binary"] = "continuous",
) -> dict[str, float]:
    """Sensitivity-guided distillation: name of a parameter -> factor of its learning rate, in [0, 1].

    m = (delta_0 / max(drop, delta_0))^gamma with delta_0 the median of the positive drops; below .05
    the unit is frozen (0). Parameters of no scored unit have 1. "binary", as the reference code:
    frozen above delta_0, else 1.

    Args:
        trainable: names of parameters. drops: unit -> drop of quality without it (`plan.settings["drops"]`).

    Raises:
        ConfigError: gamma below 0.
    """
    if gamma < 0:
        raise ConfigError(f"gamma is {gamma}; expected 0 or more")
    positive = [drop for drop in drops.values() if drop > 0]
    if not positive:
        return dict.fromkeys(trainable, 1.0)
    middle = statistics.median(positive)
    factors = {}
    for unit, drop in drops.items():
        if mode == "binary":
            factors[unit] = 1.0 if drop <= middle else 0.0
        else:
            factor = (middle / max(drop, middle)) ** gamma
            factors[unit] = factor if factor >= _FROZEN else 0.0
    rates = {}
    for name in trainable:
        holders = [unit for unit in factors if name.startswith(f"{unit}.")]
        rates[name] = factors[max(holders, key=len)] if holders else 1.0
    return rates


def with_rates(
    trainable: Mapping[str, nn.Parameter], rates: Mapping[str, float]
) -> tuple[dict[str, nn.Parameter], dict[str, float]]:
    """What is left to train once units at rate 0 are frozen, and its rates: the two arguments of `fit`.

    Raises:
        ConfigError: every rate is 0.
    """
    kept = {name: parameter for name, parameter in trainable.items() if rates.get(name, 1.0) > 0}
    if not kept:
        raise ConfigError(f"all {len(trainable)} parameters have rate 0; nothing is left to train")
    return kept, {name: rates.get(name, 1.0) for name in kept}
