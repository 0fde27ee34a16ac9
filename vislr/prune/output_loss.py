"""LAPTOP-Diff's criterion: how much the output changes when a unit alone is removed, and whether that adds up.

Zhang et al., LAPTOP-Diff (arXiv 2404.11098): c_l = E ||eps without l - eps||^2 over pictures, texts,
uniform timesteps and noise; the set with the least sum of c under the constraint on size
(`vislr.prune.solve.knapsack`) is removed in one shot. That the sum stands for the loss of the joint
removal is empirical: the triangle inequality behind it holds for norms, not for their squares.
`additivity` measures it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vislr.anatomy import denoiser_of
from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import DataError
from vislr.core.hashing import content_hash
from vislr.measure import Measurement
from vislr.prune.plan import LayerPlan
from vislr.prune.scoring import (
    Batches,
    answer,
    as_batches,
    data_hash,
    plan_layers,
    processes,
    samples_in,
    score_units,
    scoring_cost,
    timed_forward,
)
from vislr.prune.units import Inventory, without


class OutputLoss:
    """The criterion.

    Args:
        data: calibration batches: keyword arguments of the denoiser, as `vislr.train.calibration_inputs`
            or `vislr.anatomy.sample_inputs` makes them. 256 to 1024 samples, timesteps uniform, without
            classifier-free guidance.
        removal: as in `LayerPlan`.
        folder: scores are kept there as they come; the next run goes on.
        progress: say the cost before the start, and show a bar.
    """

    name = "laptop"
    solver = "knapsack"

    def __init__(
        self,
        data: Iterable[Mapping[str, Any]],
        *,
        removal: str = "skip",
        folder: str | os.PathLike | None = None,
        progress: bool = True,
    ) -> None:
        self.data, self.removal, self.folder, self.progress = data, removal, folder, progress
        self.used: dict[str, Any] = {}

    def score(self, target: Any, inventory: Inventory) -> dict[str, float]:
        """unit -> mean squared change of the output, in float32."""
        module = unwrapped(denoiser_of(target)[1])
        batches = as_batches(module, self.data)
        training, hashed = module.training, data_hash(batches)
        module.eval()
        try:
            rank, world = processes()
            seconds = timed_forward(module, batches[0]) / world
            cost = scoring_cost(inventory, samples_in(batches), samples_in(batches[:1]), seconds)
            if self.progress and rank == 0:
                shared = f" over {world} processes" if world > 1 else ""
                print(f"scoring: {cost}{shared}", file=sys.stderr)
            self.used = {"calibration": hashed, "samples": samples_in(batches)}
            teacher = [answer(module, batch).float() for batch in batches]
            key = content_hash(module.state_dict(), f"output loss {hashed} {self.removal} {inventory.granularity}")
            names = [unit.name for unit in inventory.units]
            return score_units(
                names, lambda name: output_loss(module, [name], batches, teacher, self.removal), key=key,
                folder=self.folder, progress=self.progress,
            )  # fmt: skip
        finally:
            module.train(training)

    def settings(self) -> dict[str, Any]:
        """Hash and number of the calibration samples."""
        return self.used


def output_loss(
    module: nn.Module, removed: Sequence[str], batches: Batches, teacher: Sequence[torch.Tensor], removal: str = "skip"
) -> float:
    """Mean squared change of the output without these units, over all numbers of all batches.

    Args:
        batches: as `as_batches` gives them. teacher: the whole model's answers to them, float32.
    """
    total, count = 0.0, 0
    with without(module, removed, removal):
        for batch, reference in zip(batches, teacher, strict=True):
            error = answer(module, batch).float() - reference
            total += float(error.square().sum(dtype=torch.float64 if error.device.type == "cpu" else torch.float32))
            count += error.numel()
    return total / count


def laptop_plan(
    target: Any,
    data: Iterable[Mapping[str, Any]],
    ratio: float,
    *,
    budget: str = "parameters",
    granularity: str = "block",
    solver: str | None = None,
    folder: str | os.PathLike | None = None,
    inventory: Inventory | None = None,
    progress: bool = True,
) -> LayerPlan:
    """LAPTOP-Diff: the set of units whose summed output loss is least, for a ratio.

    Args:
        target: a pipeline or a denoiser, on the device where it is to be scored.
        data: as in `OutputLoss`.
        ratio: share of the budget to remove at least.
        budget, granularity, inventory, solver: as in `plan_layers`.
        folder: where scores are kept, for a run that may stop.

    Raises:
        ConfigError: a ratio beyond what is prunable. DataError: no data, or scores that are not finite.
    """
    criterion = OutputLoss(data, folder=folder, progress=progress)
    return plan_layers(
        target, criterion, ratio, budget=budget, granularity=granularity, solver=solver, inventory=inventory
    )


@dataclass(frozen=True)
class Additivity:
    """How well sums of one-unit losses stand for the loss of a joint removal.

    Attributes:
        points: (share of the parameters removed, sum of c, joint loss) a random subset.
        pearson: correlation of sum and joint loss, with a bootstrap interval over subsets.
        slope: of joint loss = slope x sum, through 0, by least squares; 1 = additive.
    """

    points: tuple[tuple[float, float, float], ...]
    pearson: Measurement
    slope: Measurement

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "points": [list(p) for p in self.points],
            "pearson": self.pearson.to_dict(),
            "slope": self.slope.to_dict(),
        }


def additivity(
    target: Any,
    data: Iterable[Mapping[str, Any]],
    scores: Mapping[str, float],
    inventory: Inventory,
    *,
    subsets: int = 64,
    largest: float = 0.5,
    seed: int = 0,
    removal: str = "skip",
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> Additivity:
    """Joint losses of random subsets against sums of the scores.

    Args:
        data: as in `OutputLoss`, the same as the scores were made with.
        scores: unit -> output loss.
        subsets: random subsets of two or more units; their sizes are spread evenly.
        largest: share of the units in the largest subset.
        folder: where joint losses are kept, for a run that may stop.

    Raises:
        DataError: fewer than three subsets or units.
    """
    import numpy as np

    from vislr.measure.measurement import bootstrap_interval

    module = unwrapped(denoiser_of(target)[1])
    batches, names = as_batches(module, data), [unit.name for unit in inventory.units]
    if subsets < 3 or len(names) < 3:
        raise DataError(f"additivity of {len(names)} units on {subsets} subsets; expected three or more of both")
    rng, most = np.random.default_rng(seed), max(2, round(largest * len(names)))
    sizes = np.linspace(2, most, subsets).round().astype(int)
    chosen = {f"{i}": [names[j] for j in sorted(rng.choice(len(names), int(size), replace=False))]
              for i, size in enumerate(sizes)}  # fmt: skip
    training = module.training
    module.eval()
    try:
        teacher = [answer(module, batch).float() for batch in batches]
        key = content_hash(module.state_dict(), f"additivity {data_hash(batches)} {seed} {subsets} {largest} {removal}")
        joint = score_units(
            list(chosen), lambda i: output_loss(module, chosen[i], batches, teacher, removal), key=key,
            folder=None if folder is None else Path(folder) / "additivity", progress=progress, describe="joint losses",
        )  # fmt: skip
    finally:
        module.train(training)
    x = np.array([sum(scores[name] for name in chosen[i]) for i in chosen])
    y = np.array([joint[i] for i in chosen])

    def pearson(counts: Any) -> Any:
        n = counts.sum(1)
        mx, my = counts @ x / n, counts @ y / n
        cov = counts @ (x * y) / n - mx * my
        spread = (counts @ x**2 / n - mx**2) * (counts @ y**2 / n - my**2)
        return cov / np.sqrt(np.maximum(spread, 1e-300))

    def slope(counts: Any) -> Any:
        return (counts @ (x * y)) / np.maximum(counts @ x**2, 1e-300)

    def measured(statistic: Any, how: str) -> Measurement:
        value = float(statistic(np.ones((1, subsets)))[0])
        interval = bootstrap_interval(statistic, subsets, seed)
        return Measurement(value, interval, subsets, seed, "ratio", f"{how}; interval: bootstrap over subsets, 95 %")

    shares = [inventory.saved(chosen[i]) / inventory.parameters for i in chosen]
    points = tuple((float(share), float(a), float(b)) for share, a, b in zip(shares, x, y, strict=True))
    return Additivity(
        points,
        measured(pearson, "Pearson correlation of summed and joint output loss"),
        measured(slope, "least-squares slope of joint over summed output loss, through 0"),
    )
