"""How long each unit takes, measured on this machine: the third budget."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vislr.anatomy import denoiser_of
from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import ConfigError
from vislr.prune import surgery
from vislr.prune.scoring import answer, as_batches
from vislr.prune.units import Bonus, Inventory


def with_latency(
    target: Any, inventory: Inventory, inputs: Mapping[str, Any], *, rounds: int = 10, warmup: int = 2,
    removal: str = "skip",
) -> Inventory:  # fmt: skip
    """The inventory with measured nanoseconds a forward, for `plan_layers(..., budget="latency")`.

    A unit's latency is the time between entering and leaving it, less what stays of it (shortcuts):
    the shortest of the rounds, eager, one call at a time; the model's is the sum of its units and of
    the shortest rest, so that what a busy machine adds to a forward counts nowhere. Times depend on the
    machine, its threads and the shapes; what a plan really saves is measured by `vislr.measure.interleaved`.

    Args:
        target: pipeline or model, where it will run. inputs: keyword arguments of one forward.
        rounds: timed forwards. warmup: untimed ones before.

    Raises:
        ConfigError: no rounds.
    """
    if rounds < 1 or warmup < 0:
        raise ConfigError(f"cannot time units in {rounds} rounds after {warmup} warm-up forwards")
    module = unwrapped(denoiser_of(target)[1])
    (batch,) = as_batches(module, [inputs])
    kept: dict[str, list[str]] = {}
    for name in [*(unit.name for unit in inventory.units), *(bonus.name for bonus in inventory.bonuses)]:
        new = surgery.replacements(module, name, removal)[name]
        kept[name] = [f"{name}.{child}" for child, _ in new.named_children() if not hasattr(new, "norm1")]
    watched = ["", *kept, *(child for children in kept.values() for child in children)]
    training = module.training
    module.eval()
    samples: dict[str, list[int]] = {name: [] for name in watched}
    try:
        with _clocks(module, watched) as read:
            for number in range(warmup + rounds):
                answer(module, batch)
                for name, value in read().items():
                    if number >= warmup:
                        samples[name].append(value)
    finally:
        module.train(training)
    own = {
        name: [spent - sum(rest) for spent, *rest in zip(samples[name], *(samples[c] for c in kept[name]), strict=True)]
        for name in kept
    }
    bonuses: list[Bonus] = []
    beyond: list[list[int]] = []
    for bonus in inventory.bonuses:
        inside = [own[name] for name in bonus.units]
        inside += [part for other, part in zip(bonuses, beyond, strict=True) if set(other.units) <= set(bonus.units)]
        beyond.append(_less(own[bonus.name], inside))
        bonuses.append(replace(bonus, latency=max(0, min(beyond[-1]))))
    units = tuple(replace(unit, latency=max(1, min(own[unit.name]))) for unit in inventory.units)
    rest = min(_less(samples[""], [own[unit.name] for unit in units] + beyond))
    total = sum(unit.latency for unit in units) + sum(bonus.latency for bonus in bonuses) + max(0, rest)
    return replace(inventory, units=units, bonuses=tuple(bonuses), latency=total)


def _less(times: list[int], parts: list[list[int]]) -> list[int]:
    """Round by round what is left of `times` without the parts."""
    return [time - sum(part[i] for part in parts) for i, time in enumerate(times)]


@contextlib.contextmanager
def _clocks(module: nn.Module, names: list[str]) -> Iterator[Callable[[], dict[str, int]]]:
    """Hooks that note when modules are entered and left; gives a function that reads and clears one forward."""
    cuda = next(module.parameters()).device.type == "cuda"
    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    open_: dict[str, list[Any]] = {name: [] for name in names}

    def now() -> Any:
        if not cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read() -> dict[str, int]:
        if cuda:
            torch.cuda.synchronize()
        found = {}
        for name, pairs in spans.items():
            found[name] = sum(int(a.elapsed_time(b) * 1e6) if cuda else b - a for a, b in pairs)
            pairs.clear()
        return found

    handles = []
    for name in names:
        part = module.get_submodule(name)
        handles.append(part.register_forward_pre_hook(lambda m, a, name=name: open_[name].append(now())))
        handles.append(
            part.register_forward_hook(lambda m, a, o, name=name: spans[name].append((open_[name].pop(), now())))
        )
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()
