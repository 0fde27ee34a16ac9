"""Mixed precision: what quantising each layer alone costs, and the bits that fit a budget at the least cost.

Errors of single layers are taken to add, as in layer pruning by output loss; one layer at a time gets codes, the
denoiser answers the same questions, and the squared distance from its own answer counts. Then a knapsack with
one choice a layer is solved to proven optimality (`scipy.optimize.milp`, re-checked in integers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import ConfigError, FormatError
from vislr.core.files import read_json, write_json
from vislr.quantize.handler import attach, checked, detach
from vislr.quantize.plan import WHOLE, QuantPlan
from vislr.quantize.weights import BLOCK, stored_bits

Pair = tuple[int, int]


@dataclass(frozen=True)
class Choice:
    """One way to keep one layer: its bits, the error that it alone makes, what it takes on disk."""

    bits: Pair
    error: float
    size: int


def sensitivity(
    module: nn.Module,
    plan: QuantPlan,
    choices: Sequence[Pair],
    inputs: Sequence[Mapping[str, Any]],
    *,
    folder: Path | None = None,
    progress: bool = False,
) -> dict[str, list[Choice]]:
    """Layer -> its choices, with the error of each alone: |y - y_0|^2 / |y_0|^2 over all inputs.

    Args:
        module: the model in full precision; the same again afterwards.
        plan: names the layers, ranges and everything else; its bits do not count.
        choices: (weight, input) bits; an input of 16 in a plan with inputs is not possible.
        inputs: keyword arguments of forwards (`trajectory_inputs`).
        folder: keeps errors as they are found; a run that was stopped goes on.

    Raises:
        FormatError: the folder's errors are of another run.
    """
    module = unwrapped(module)
    layers = checked(module, plan)
    file = None if folder is None else folder / "sensitivity.json"
    told = {"base": plan.base, "inputs": len(inputs), "observer": plan.observer, "format": plan.format}
    kept: dict[str, float] = {}
    if file is not None and file.is_file():
        stored = read_json(file)
        if stored["of"] != told:
            raise FormatError(f"'{file}' holds errors of another run; give a new folder, or remove it")
        kept = stored["errors"]
    answers = _answers(module, inputs)
    norm = sum(float(y.double().square().sum()) for y in answers)
    found: dict[str, list[Choice]] = {}
    for name in tqdm(layers, "sensitivity", disable=not progress):
        for bits in choices:
            key = f"{name} W{bits[0]}A{bits[1]}"
            if key not in kept:
                alone = replace(
                    plan, layers={name: bits}, ranges={name: plan.ranges[name]} if name in plan.ranges else {}
                )
                attached = attach(module, alone)
                try:
                    changed = _answers(module, inputs)
                finally:
                    detach(module, attached)
                kept[key] = sum(
                    float((a - b).double().square().sum()) for a, b in zip(changed, answers, strict=True)
                ) / max(norm, 1e-30)
            found.setdefault(name, []).append(Choice(bits, kept[key], _bits_on_disk(layers[name], plan, bits)))
        if file is not None:
            write_json(file, {"of": told, "errors": kept})
    return found


def _bits_on_disk(layer: Any, plan: QuantPlan, bits: Pair) -> int:
    block = BLOCK if isinstance(layer, nn.Linear) and plan.group is None else (plan.group or 2)
    block = block if isinstance(layer, nn.Linear) else 2
    return stored_bits(tuple(layer.weight.shape), bits[0], plan.group, plan.symmetric(bits[0]), block)


@torch.no_grad()
def _answers(module: nn.Module, inputs: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    answers = []
    for kwargs in inputs:
        answer = module(**kwargs)
        answers.append((answer if torch.is_tensor(answer) else answer[0]).float())
    return answers


def mixed_plan(
    plan: QuantPlan, choices: Mapping[str, Sequence[Choice]], *, size: int | None = None, error: float | None = None
) -> QuantPlan:
    """The plan with the bits that fit a budget.

    Args:
        plan: whose layers get new bits.
        choices: of `sensitivity`.
        size: bytes that codes, scales and zeros may take: the least summed error within.
        error: summed error that may be made: the smallest size within. Give one of the two.

    Raises:
        ConfigError: both or none given, or the budget cannot be met; names the nearest that can.
    """
    if (size is None) == (error is None):
        raise ConfigError(f"size is {size} and error is {error}; expected one of them")
    names = list(choices)
    limit: float
    if size is not None:
        picked = choose([[(c.error, c.size) for c in choices[name]] for name in names], 8 * size)
        limit = size
    else:
        assert error is not None
        picked = choose([[(float(c.size), c.error) for c in choices[name]] for name in names], error)
        limit = error
    if picked is None:
        least = sum(min(c.size if size is not None else c.error for c in choices[name]) for name in names)
        reachable = f"{least / 8e6:.3f} MB" if size is not None else f"an error of {least:.4g}"
        raise ConfigError(f"no choice of bits stays within {limit:g}; the least possible is {reachable}")
    chosen = {name: choices[name][index] for name, index in zip(names, picked, strict=True)}
    layers = {name: chosen[name].bits for name in plan.layers if name in chosen}
    return replace(
        plan,
        layers=layers,
        ranges={name: pair for name, pair in plan.ranges.items() if layers.get(name, (0, WHOLE))[1] != WHOLE},
        criterion="mixed precision",
        scores={name: one.error for name, one in chosen.items()},
        settings={
            **plan.settings, "budget bytes": size, "budget error": error,
            "bytes": sum(one.size for one in chosen.values()) // 8,
        },
    )  # fmt: skip


def choose(options: Sequence[Sequence[tuple[float, float]]], limit: float) -> list[int] | None:
    """One option of every list: the least sum of first entries whose second entries sum to at most `limit`.

    Returns:
        indices, or None if nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if sum(min(weight for _, weight in one) for one in options) > limit:
        return None
    flat = [pair for one in options for pair in one]
    cost = np.array([pair[0] for pair in flat], dtype=float)
    scale = float(np.abs(cost).max()) or 1.0
    top = max(abs(limit), max(abs(pair[1]) for pair in flat), 1e-30)
    one_each = np.zeros((len(options), len(flat)))
    place = 0
    for row, one in enumerate(options):
        one_each[row, place : place + len(one)] = 1
        place += len(one)
    weights = np.array([[pair[1] / top for pair in flat]])
    limits: list[Any] = [LinearConstraint(one_each, 1, 1), LinearConstraint(weights, -np.inf, limit / top)]
    while True:
        solved = milp(
            cost / scale, constraints=limits, integrality=np.ones(len(flat)), bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        if solved.x is None:
            return None
        taken = [i for i in range(len(flat)) if solved.x[i] > 0.5]
        if sum(flat[i][1] for i in taken) <= limit:
            starts = np.cumsum([0, *(len(one) for one in options)])
            return [i - int(starts[row]) for row, i in enumerate(taken)]
        # A double let through what misses the limit by less than it can tell: forbid this set.
        same = np.zeros((1, len(flat)))
        same[0, taken] = 1
        limits.append(LinearConstraint(same, -np.inf, len(options) - 1))
