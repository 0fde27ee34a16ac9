"""Cache plans: by interval (DeepCache), or by what was measured (Block Caching)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vislr.anatomy import denoiser_of
from vislr.anatomy.wrapping import unwrapped
from vislr.cache.plan import CachePlan, Refresh, Region
from vislr.cache.regions import backbone_of, fitting_region, stretches_missed
from vislr.cache.running import run_once
from vislr.core.errors import ConfigError


def interval_plan(target: Any, every: int = 3, boundary: str | None = None, *, steps: int = 25) -> CachePlan:
    """Compute the deep part of a denoiser in every k-th step (DeepCache, arXiv 2312.00858).

    Of a transformer with a token plan on it, the cached blocks hold all that tokens are missing in, or none of it: the
    nearest such stretch is taken, and the report says so.

    Args:
        target: a pipeline or a denoiser, with what is on it.
        every: k; 1 computes always, bit for bit as without a cache.
        boundary: of a UNet, the up block that the cached features enter (None: the last); of a transformer,
            the block before which the cached ones end (None: a sixth of the blocks runs at both ends).
        steps: of a run, for the averages of the report.

    Raises:
        ConfigError: `every` below 1, or tokens are missing in a part of what ends before the boundary (names the
            nearest that fits). TargetError, ModelError: as `region_at`.
    """
    if every < 1:
        raise ConfigError(f"every is {every}; expected 1 or more")
    return CachePlan((fitting_region(denoiser_of(target)[1], boundary, Refresh(every=every)),), steps)


def measured_plan(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    steps: int = 25,
    threshold: float = 0.15,
    guidance: float = 4.0,
    **call: Any,
) -> CachePlan:
    """Compute each block when it has changed enough since it was last computed (Block Caching, arXiv 2312.03209).

    A block's change between two steps is |L_s - L_(s-1)|_1 / |L_s|_1 of what it adds to its input (section
    3.2), averaged over runs. It is computed anew where these changes add up to more than `threshold`. The
    paper's fine-tuned scale and shift of kept features is left out. Blocks that tokens miss together, under a token
    plan that is on, are measured and kept as one.

    Args:
        pipe: a pipeline; UNets are measured by resnet and attention, transformers by block.
        prompts, seeds: every pair is run once, without a cache.
        steps, guidance: of the runs; plans fit runs of other lengths proportionally.
        threshold: larger saves more and changes more.
        call: further arguments of the pipeline's call.

    Raises:
        ConfigError: no prompts, or nothing changes so little that it could be kept.
    """
    if not prompts or not seeds or threshold < 0 or steps < 2:
        raise ConfigError(
            f"{len(prompts)} prompts, {len(seeds)} seeds, {steps} steps, threshold {threshold}; expected at least one "
            "prompt and seed, 2 steps and a threshold of 0 or more"
        )
    changes = measured_changes(pipe, prompts, seeds, steps=steps, guidance=guidance, **call)
    regions = []
    for (first, last), curve in changes.items():
        chosen = refreshes(curve, threshold)
        if len(chosen) <= len(curve):
            regions.append(Region(first, last, Refresh(chosen=chosen, of=len(curve) + 1)))
    if not regions:
        least = min(min(curve) for curve in changes.values())
        raise ConfigError(f"with threshold {threshold} nothing is kept: the least change of a block is {least:.3f}")
    return CachePlan(tuple(regions), steps, "measured")


def refreshes(changes: Sequence[float], threshold: float) -> tuple[int, ...]:
    """The steps to compute, given the change from each step to the next: 0, and where the sum passes the threshold."""
    chosen, total = [0], 0.0
    for step, change in enumerate(changes, 1):
        total += change
        if total > threshold:
            chosen.append(step)
            total = 0.0
    return tuple(chosen)


def measured_changes(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float, **call: Any
) -> dict[tuple[str, str], list[float]]:
    """(first, last) module of what can be kept -> its change from each call to the next, averaged over runs."""
    module = unwrapped(denoiser_of(pipe)[1])
    sums: dict[tuple[str, str], list[float]] = {}
    runs = [(prompt, seed) for prompt in prompts for seed in seeds]
    for prompt, seed in runs:
        with _recording(module) as curves:
            run_once(pipe, prompt, seed, steps=steps, guidance=guidance, **call)
        for name, curve in curves.items():
            before = sums.get(name, [0.0] * len(curve))
            sums[name] = [a + b / len(runs) for a, b in zip(before, curve, strict=True)]
    return sums


def _stretches(module: Any) -> list[tuple[str, str]]:
    """First and last module of what is measured by itself: lone units, or those that tokens miss together."""
    units = backbone_of(module).units
    found: list[tuple[int, int]] = []
    for first, last in sorted([*stretches_missed(module, units), *((n, n) for n in range(len(units)))]):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return [(units[first], units[last]) for first, last in found]


@contextmanager
def _recording(module: Any) -> Iterator[dict[tuple[str, str], list[float]]]:
    """While inside, every stretch's change between its calls is noted."""
    curves: dict[tuple[str, str], list[float]] = {}
    entered: dict[tuple[str, str], torch.Tensor] = {}
    last: dict[tuple[str, str], torch.Tensor] = {}
    handles = []

    def watch(name: tuple[str, str]) -> None:
        def enter(unit: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            entered[name] = args[0] if args else kwargs["hidden_states"]

        def note(unit: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            made, before = output[-1] if isinstance(output, tuple) else output, entered.pop(name)
            added = (made - before if made.shape == before.shape else made).detach().float()
            if name in last and last[name].shape == added.shape:
                change = (added - last[name]).abs().sum() / added.abs().sum().clamp(min=1e-12)
                curves.setdefault(name, []).append(float(change))
            last[name] = added

        handles.append(module.get_submodule(name[0]).register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.get_submodule(name[1]).register_forward_hook(note, with_kwargs=True))

    for name in _stretches(module):
        watch(name)
    try:
        yield curves
    finally:
        for handle in handles:
            handle.remove()
