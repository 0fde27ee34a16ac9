"""From a criterion's scores to a plan; scoring that shows progress, resumes, and is shared by processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from vislr.anatomy import denoiser_of
from vislr.anatomy.site import figure
from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import ConfigError, DataError, ModelError, hint
from vislr.core.files import read_json, write_json
from vislr.core.hashing import content_hash
from vislr.prune import solve
from vislr.prune.plan import BUDGETS, LayerPlan, check_ratio, structure_hash
from vislr.prune.units import Inventory, units_of

SOLVERS = ("knapsack", "greedy", "ranked")


class Criterion(Protocol):
    """What scores units. A learned criterion (gates trained with the model) returns its gates here.

    Attributes:
        name: for plans and listings.
        solver: how scores become a set, unless the user says otherwise: "knapsack" (the least sum),
            "greedy" (the least score per weight) or "ranked" (the least score first).
    """

    name: str
    solver: str

    def score(self, target: Any, inventory: Inventory) -> Mapping[str, float]:
        """unit -> score, finite; higher is worse to remove. Every unit, or those that may go ("ranked" alone)."""

    def settings(self) -> dict[str, Any]:
        """What the scores depend on, as plain data."""


def plan_layers(
    target: Any,
    criterion: Criterion,
    ratio: float,
    *,
    budget: str = "parameters",
    granularity: str = "block",
    removal: str = "skip",
    solver: str | None = None,
    inventory: Inventory | None = None,
) -> LayerPlan:
    """The units to remove for a ratio, by any criterion.

    Args:
        target: a pipeline or a model.
        criterion: scores the units.
        ratio: share of the budget that must go at least.
        budget: "parameters", "flops", or "latency" (then `inventory` comes from `with_latency`).
        granularity: as in `units_of`.
        removal: as in `LayerPlan`.
        solver: in place of the criterion's own.
        inventory: in place of `units_of(target, granularity, removal=removal)`.

    Raises:
        ConfigError: a ratio beyond what is prunable; says the most. An unknown budget or solver.
        ModelError, TargetError: as `units_of`.
    """
    solver = solver or criterion.solver
    for key, given, known in (("budget", budget, BUDGETS), ("solver", solver, SOLVERS)):
        if given not in known:
            raise ConfigError(f"no {key} '{given}'{hint(given, known)}")
    check_ratio(ratio)
    component, module = denoiser_of(target)
    module = unwrapped(module)
    inventory = inventory or units_of(module, granularity, removal=removal)
    if budget == "latency" and not inventory.latency:
        raise ConfigError("budget latency needs measured units; expected inventory=with_latency(...)")
    needed = solve.needed_for(inventory, ratio, budget)
    # Before anything is scored.
    solve.check_reachable(inventory, needed, budget)
    scores = dict(criterion.score(target, inventory))
    _check_scores(criterion, scores, inventory, solver)
    if solver == "ranked":
        removed = solve.first_enough(inventory, sorted(scores, key=scores.__getitem__), needed, budget)
    else:
        removed = (solve.knapsack if solver == "knapsack" else solve.greedy)(inventory, scores, needed, budget)
    return make_plan(
        module, component, inventory, removed, criterion=criterion.name, ratio=ratio, budget=budget, removal=removal,
        scores=scores, settings={"granularity": inventory.granularity, "solver": solver, **criterion.settings()},
    )  # fmt: skip


def make_plan(
    module: nn.Module,
    component: str,
    inventory: Inventory,
    removed: Sequence[str],
    *,
    criterion: str,
    ratio: float | None,
    budget: str,
    removal: str,
    scores: Mapping[str, float],
    settings: Mapping[str, Any],
) -> LayerPlan:
    """A plan with everything that `apply` checks and that a reader wants to know."""
    on_meta = any(p.is_meta for p in module.parameters())
    return LayerPlan(
        removed=tuple(removed),
        architecture=type(module).__name__,
        structure=structure_hash(module),
        removal=removal,
        component=component,
        criterion=criterion,
        ratio=ratio,
        budget=budget,
        saved=inventory.saved(removed, budget),
        total=getattr(inventory, budget),
        scores=scores,
        settings={"sample": inventory.sample, **settings},
        base="" if on_meta else content_hash(module.state_dict()),
    )


def _check_scores(criterion: Criterion, scores: Mapping[str, float], inventory: Inventory, solver: str) -> None:
    names = {unit.name for unit in inventory.units}
    for name, value in scores.items():
        if name not in names:
            raise ConfigError(f"criterion '{criterion.name}' scored '{name}', which is no unit{hint(name, names)}")
        if not torch.isfinite(torch.tensor(float(value))):
            raise DataError(f"criterion '{criterion.name}' scored '{name}' {value}; expected a finite number")
    missing = sorted(names.difference(scores))
    if missing and solver != "ranked":
        raise ConfigError(f"criterion '{criterion.name}' gave no score for '{missing[0]}' ({len(missing)} units)")


@dataclass(frozen=True)
class ScoringCost:
    """What scoring takes, known before it starts.

    Attributes:
        units: to be scored. forwards: of the model, over all batches. flops: in all.
        seconds: estimated from one timed forward; None: not timed.
    """

    units: int
    forwards: int
    flops: int
    seconds: float | None = None

    def __str__(self) -> str:
        text = f"{self.units} units, {self.forwards} forwards, {figure(self.flops)}FLOP"
        return text if self.seconds is None else f"{text}, about {_clock(self.seconds)}"


def scoring_cost(inventory: Inventory, samples: int, batch: int = 1, seconds: float | None = None) -> ScoringCost:
    """Of scoring every unit by one forward a batch without it; on meta or real, nothing is run.

    Args:
        samples: calibration samples in all. batch: of them in one forward.
        seconds: of one forward of a batch, over the number of processes.

    The FLOPs left out with each unit are counted as left out.
    """
    batches = -(-samples // batch)
    per_sample = inventory.flops // max(1, inventory.sample.get("batch", 1))
    saved = sum(unit.flops for unit in inventory.units) // max(1, inventory.sample.get("batch", 1))
    forwards = batches * (len(inventory.units) + 1)
    flops = samples * ((len(inventory.units) + 1) * per_sample - saved)
    return ScoringCost(len(inventory.units), forwards, flops, None if seconds is None else forwards * seconds)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def processes() -> tuple[int, int]:
    """(rank, number) of the processes that a launcher started; (0, 1) without one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or torch.distributed.is_initialized():
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        return state.process_index, state.num_processes
    return 0, 1


def score_units(
    names: Sequence[str],
    measure: Callable[[str], float],
    *,
    key: str,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
    describe: str = "scoring units",
) -> dict[str, float]:
    """`measure` of every name; every process takes its share, and all get the whole.

    Args:
        names: of the units, or whatever is measured.
        key: what the values depend on, as a hash.
        folder: values are kept there as they come, and are not measured again.
        progress: show a bar on the first process.

    Raises:
        ConfigError: the folder holds values with another key.
    """
    from tqdm import tqdm

    rank, world = processes()
    kept = _kept(Path(folder), key) if folder is not None else {}
    if world > 1:
        from accelerate import PartialState

        # Nobody writes before all have read: shares are cut from the same list on every process.
        PartialState().wait_for_everyone()
    todo = [name for name in names if name not in kept]
    mine = todo[rank::world]
    found: dict[str, float] = {}
    # Kept values count as done: a bar that starts at 60 of 100 says that the run was taken up again.
    with tqdm(total=len(names), initial=len(names) - len(todo), desc=describe, disable=not progress or rank > 0,
              mininterval=0.5) as bar:  # fmt: skip
        for name in mine:
            found[name] = float(measure(name))
            if folder is not None:
                own = {name: kept[name] for name in names if name in kept} | found if rank == 0 else found
                write_json(Path(folder) / f"scores-{rank}.json", {"key": key, "values": own})
            bar.update(min(world, len(names) - bar.n))
    if world > 1:
        from accelerate.utils import gather_object

        for part in gather_object([found]):
            found |= part
    return {name: kept[name] if name in kept else found[name] for name in names}


def _kept(folder: Path, key: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for path in sorted(folder.glob("scores-*.json")):
        try:
            stored = read_json(path)
            found, own = stored["key"], {str(name): float(value) for name, value in stored["values"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"'{path}' holds no scores: {error}; expected another folder") from error
        if found != key:
            raise ConfigError(f"'{folder}' holds scores of another model, data or settings; expected another folder")
        values |= own
    return values


Batches = Sequence[Mapping[str, Any]]


def as_batches(module: nn.Module, data: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calibration batches on the model's device, floats in its dtype (timesteps stay as they are).

    Raises:
        DataError: no batches, or not keyword arguments of the model.
    """
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    if first is None:
        raise ModelError(f"a {type(module).__name__} without weights cannot be scored")

    def place(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: place(key, item) for key, item in value.items()}
        if not torch.is_tensor(value):
            return value
        keep = name == "timestep" or not value.is_floating_point()
        return value.to(first.device, None if keep else first.dtype)

    batches = []
    for batch in data:
        if not isinstance(batch, Mapping):
            raise DataError(
                f"calibration data are keyword arguments of the model, a table a batch; got a {type(batch).__name__}"
            )
        batches.append({key: place(key, value) for key, value in batch.items()})
    if not batches:
        raise DataError("no calibration data: expected at least one batch of the model's keyword arguments")
    return batches


def data_hash(batches: Batches) -> str:
    """sha256 over all tensors of calibration batches."""

    def flat(prefix: str, value: Any) -> dict[str, torch.Tensor]:
        if torch.is_tensor(value):
            return {prefix: value}
        if isinstance(value, Mapping):
            return {k: v for key, item in value.items() for k, v in flat(f"{prefix}.{key}", item).items()}
        return {}

    return content_hash({k: v for i, batch in enumerate(batches) for k, v in flat(str(i), dict(batch)).items()})


def samples_in(batches: Batches) -> int:
    """Samples over all batches: the first axis of each batch's first tensor."""
    return sum(next(len(v) for v in batch.values() if torch.is_tensor(v) and v.ndim > 1) for batch in batches)


@torch.no_grad()
def answer(module: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The prediction of one batch; of models that also predict a variance, without it."""
    output: Any = module(**batch)
    output = output if torch.is_tensor(output) else output[0]
    channels = getattr(getattr(module, "config", None), "in_channels", None)
    if output.ndim == 4 and channels is not None and output.shape[1] == 2 * channels:
        output = output[:, :channels]
    return output


def timed_forward(module: nn.Module, batch: Mapping[str, Any]) -> float:
    """Seconds of one forward, the faster of two."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        answer(module, batch).sum().item()
        times.append(time.perf_counter() - start)
    return min(times)
