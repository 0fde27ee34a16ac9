"""Token plans put on a model and taken off: `vislr.apply` and `vislr.remove` come here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from vislr.anatomy.wrapping import unwrapped
from vislr.core.context import StepContext, context_of, remove_step_context, step_context
from vislr.core.errors import ConfigError, TargetError, UndoError, hint
from vislr.core.hooks import hook_of, put_on, take_off, tidy
from vislr.core.registry import Attached
from vislr.tokens.hooks import OWNER, BlockHook, GridHook, PartHook, Work
from vislr.tokens.layout import Layout, beside_caches, token_layout
from vislr.tokens.plan import EARLY, LATE, Span, TokenPlan
from vislr.tokens.processors import switch_back, switch_to_torch
from vislr.tokens.routes import Kept, Route

HOOK_NAME = "vislr_tokens"


@dataclass
class Applied:
    """A token plan on a model, as its hooks know it.

    Attributes:
        plan: what was applied.
        hooked: names of the modules that carry a hook.
        routes: every span of every phase.
        context: the denoiser's step state.
        switched: attentions whose processor is torch's while the plan is on: (attention, before, now).
    """

    plan: TokenPlan
    hooked: tuple[str, ...]
    routes: tuple[Route, ...]
    context: StepContext
    switched: list[tuple[nn.Module, Any, Any]]


class _Schedule:
    """Early or late, by timestep; asked once a call, outside of graphs."""

    def __init__(self, boundary: float | None, routes: list[Route]):
        self.boundary, self.routes = boundary, routes
        self.last = float("inf")

    def __call__(self, timestep: Any) -> str:
        if timestep is None:
            return LATE
        now = float(timestep.float().mean())
        if now > self.last:
            # Noise goes up again: another run, whose first steps must not see this one's values.
            for route in self.routes:
                route.memory = None
        self.last = now
        return EARLY if self.boundary is not None and now >= self.boundary else LATE

    def restart(self) -> None:
        """As before the first call."""
        self.last = float("inf")
        for route in self.routes:
            route.memory = None


class TokenHook(GridHook):
    """On the backbone: what `applied` finds, beside the grid of backbones whose own input is the image."""

    def __init__(self, routes: list[Route], patch: int):
        super().__init__(routes, patch)
        self.applied: Applied | None = None


def attach(module: Any, change: TokenPlan, name: str = "tokens") -> Attached:
    """Put a token plan on a backbone. No weight, buffer or class is touched.

    Args:
        module: UNet2DConditionModel, SD3, FLUX, PixArt or DiT transformer, or timm VisionTransformer;
            adapters, quantised layers and layer plans may be on it.
        change: the plan.
        name: for the record.

    Raises:
        ModelError: this model has no tokens to prune.
        TargetError: a block or part of the plan is not in the model; names the nearest.
        ConfigError: the plan does not fit this kind of model, or a token plan is on already.
    """
    module = unwrapped(module)
    hooked = put_hooks(module, change)
    layout = token_layout(module)
    blocks = {cut.after for span in (*change.early, *change.late) for cut in span.cuts}
    return Attached(
        sites=tuple(block for run in layout.runs for block in run.blocks if block in blocks),
        change={"kind": "tokens", "plan": change.to_dict()},
        undo={"hooked": hooked},
    )


def account(module: Any, change: TokenPlan) -> tuple[tuple[int, int], tuple[str, ...]]:
    """FLOPs of a call without and, on average over a run, with a plan that is on; and notes."""
    from vislr.tokens.solving import plan_flops

    counts = plan_flops(module, change)
    return (counts.dense, round(counts.average)), (*counts.notes(), *_narrowed(module))


def _narrowed(module: Any) -> tuple[str, ...]:
    """A line for a report where a cache has the plan keep to a part of the blocks."""
    found, layout = applied(module), token_layout(module)
    assert found is not None
    touched = {block for group in found.context.joined[OWNER] for block in group}
    return tuple(
        f"tokens miss blocks from '{part.blocks[0]}' to '{part.blocks[-1]}' alone: cached steps leave out or "
        "run these together"
        for run, part in zip(layout.runs, beside_caches(module, layout).runs, strict=True)
        if part != run and touched.intersection(run.blocks) <= set(part.blocks)
    )


def detach(module: Any, attached: Attached) -> None:
    """Take the plan off: every module's own forward is back.

    Raises:
        UndoError: no token plan is on the model.
    """
    module = unwrapped(module)
    if applied(module) is None:
        raise UndoError(f"no token plan is on this {type(module).__name__} any more")
    take_hooks(module, attached.undo["hooked"])


def timing(module: Any, attached: Attached) -> tuple[str, ...]:
    """The measured time without and with the plan, as lines for a report (`vislr.apply(..., measure=True)`)."""
    from vislr.tokens.timing import time_plan, timing_notes

    return timing_notes(module, time_plan(module))


def put_hooks(module: Any, plan: TokenPlan) -> tuple[str, ...]:
    """Check the plan against the model, then hook it; returns the names of the modules that carry a hook.

    Raises:
        ModelError, TargetError, ConfigError: as `attach`; the model is untouched.
    """
    if applied(module) is not None:
        raise ConfigError("a token plan is on this model already; remove it first")
    layout = token_layout(module)
    _check(plan, layout, module)
    joined = joined_blocks(plan, layout)
    other = context_of(module)
    if other is not None:
        other.check_stretches(joined=joined)
    context = step_context(module, OWNER)
    context.joined[OWNER] = joined
    routes: list[Route] = []
    hooks = _hooks(plan, layout, context, routes)
    for target, hook in hooks.items():
        put_on(module.get_submodule(target), hook, HOOK_NAME)
    switched = switch_to_torch([module.get_submodule(block) for block in looked_into(plan, layout)])
    hooks[""].applied = Applied(plan, tuple(hooks), tuple(routes), context, switched)
    if plan.boundary is not None or plan.recovery == "cached":
        context.schedules[OWNER] = _Schedule(plan.boundary, routes)
    return tuple(hooks)


def take_hooks(module: nn.Module, hooked: tuple[str, ...]) -> None:
    """Take off what `put_hooks` put on."""
    found = applied(module)
    if found is not None:
        switch_back(found.switched)
    for target in hooked:
        take_off(module.get_submodule(target), HOOK_NAME)
    remove_step_context(module, OWNER)
    tidy(module)


def applied(module: Any) -> Applied | None:
    """The token plan on this model, or None."""
    hook = hook_of(unwrapped(module), HOOK_NAME)
    return getattr(hook, "applied", None)


@contextmanager
def watching(module: Any) -> Iterator[list[Kept]]:
    """While inside, every choice of tokens is noted in the list given, in order. Not for compiled models.

    Raises:
        ConfigError: no token plan is on the model.
    """
    found = applied(module)
    if found is None:
        raise ConfigError("no token plan is on this model; apply one before watching")
    seen: list[Kept] = []
    for route in found.routes:
        route.watcher = seen
    try:
        yield seen
    finally:
        for route in found.routes:
            route.watcher = None


@contextmanager
def held_in(module: Any, phase: str | None) -> Iterator[None]:
    """While inside, every call is of this phase; None: the plan does nothing (a model to compare with)."""
    found = applied(module)
    assert found is not None
    held = found.context.held
    before = held.get(OWNER)
    held[OWNER] = phase or "off"
    try:
        yield
    finally:
        held.pop(OWNER)
        if before is not None:
            held[OWNER] = before


def _hooks(plan: TokenPlan, layout: Layout, context: StepContext, routes: list[Route]) -> dict[str, Any]:
    """module name -> its hook, for everything that the plan touches; fills `routes`."""
    works: dict[str, dict[str, Work]] = {}
    parts: dict[str, dict[str, Route]] = {}
    holders: dict[str, tuple[list[Route], int]] = {"": ([], layout.runs[0].patch)}
    for phase in plan.phases():
        for span in plan.spans(phase):
            route = Route(plan, span, layout.image, layout.prefix, context)
            routes.append(route)
            run = layout.run_of(span.cuts[0].after)
            assert run is not None
            holders.setdefault(run.holder, ([], run.patch))[0].append(route)
            keeps = {cut.after: cut.keep for cut in span.cuts}
            first = span.cuts[0].after
            for block in _touched(span, layout):
                works.setdefault(block, {})[phase] = Work(
                    route, block, keeps.get(block), block == first, block == span.until
                )
            for part in span.parts:
                parts.setdefault(f"{first}.{part}", {})[phase] = route
    hooks: dict[str, Any] = {}
    for name, (own, patch) in holders.items():
        hooks[name] = TokenHook(own, patch) if name == "" else GridHook(own, patch)
    hooks |= {name: BlockHook(context, own) for name, own in works.items()}
    hooks |= {name: PartHook(context, own) for name, own in parts.items()}
    return hooks


def joined_blocks(plan: TokenPlan, layout: Layout) -> tuple[tuple[str, ...], ...]:
    """The blocks of every span: tokens that are missing in one of them are missing in all."""
    return tuple(_inside(span, layout) for span in (*plan.early, *plan.late))


def _inside(span: Span, layout: Layout) -> tuple[str, ...]:
    run = layout.run_of(span.cuts[0].after)
    assert run is not None
    blocks = run.blocks
    start = blocks.index(span.cuts[0].after)
    end = len(blocks) - 1 if span.until is None else blocks.index(span.until)
    return blocks[start : end + 1]


def looked_into(plan: TokenPlan, layout: Layout) -> list[str]:
    """Blocks whose attention is looked at as it is computed: those that rank, and FLUX's with their own positions."""
    found: dict[str, None] = {}
    for span in (*plan.early, *plan.late):
        ranking = [] if plan.criterion == "tome" else [cut.after for cut in span.cuts]
        found |= dict.fromkeys(_touched(span, layout) if layout.family == "flux" else ranking)
    return list(found)


def _touched(span: Span, layout: Layout) -> list[str]:
    """Blocks of the span that need a hook: where tokens leave or come back; all where positions are passed on."""
    inside = _inside(span, layout)
    if layout.family == "flux":
        return list(inside)
    marks = {cut.after for cut in span.cuts} | {span.until}
    return [block for block in inside if block in marks]


def _check(plan: TokenPlan, layout: Layout, module: nn.Module) -> None:
    """Everything that can be wrong between a plan and a model, before anything changes."""
    known = [block for run in layout.runs for block in run.blocks]
    family = layout.family
    if plan.ranking == "cross" and (family in ("dit", "vit") or plan.criterion != "g-wpr"):
        raise ConfigError(f"ranking 'cross' needs text and criterion 'g-wpr'; this is '{plan.criterion}' on a {family}")
    if plan.recovery == "interpolate" and family == "flux":
        raise ConfigError("recovery 'interpolate' needs the image's rows and columns, which FLUX does not tell")
    if layout.recovers is False and (plan.boundary is not None or plan.guidance != "separate"):
        raise ConfigError("a classifier has no denoising steps: no boundary, and guidance 'separate'")
    for phase in plan.phases():
        taken: set[str] = set()
        for span in plan.spans(phase):
            names = [cut.after for cut in span.cuts] + ([] if span.until is None else [span.until])
            for block in names:
                if block not in known:
                    raise TargetError(f"this {family} has no transformer block '{block}'{hint(block, known)}")
            run = layout.run_of(names[0])
            assert run is not None
            places = [run.blocks.index(b) if b in run.blocks else -1 for b in names]
            single = span.until == span.cuts[0].after
            ascending = all(a < b for a, b in itertools.pairwise(places))
            if -1 in places or not (ascending or single):
                raise ConfigError(f"a span runs {' -> '.join(names)}; expected ascending blocks of one run")
            if (span.until is None) == layout.recovers:
                ends = "must name the block where tokens come back" if layout.recovers else "must be null"
                raise ConfigError(f"'until' of a span of a {family} {ends}; it is {span.until!r}")
            end = len(run.blocks) - 1 if span.until is None else places[-1]
            inside = set(run.blocks[places[0] : end + 1])
            if inside & taken:
                raise ConfigError(f"two spans of the {phase} phase meet at '{sorted(inside & taken)[0]}'")
            taken |= inside
            _check_parts(plan, span, layout, module)


def _check_parts(plan: TokenPlan, span: Span, layout: Layout, module: nn.Module) -> None:
    block = module.get_submodule(span.cuts[0].after)
    for part in span.parts:
        if part not in layout.parts or not isinstance(getattr(block, part, None), nn.Module):
            has = [one for one in layout.parts if isinstance(getattr(block, one, None), nn.Module)]
            raise TargetError(f"'{span.cuts[0].after}' has no part '{part}' that tokens can miss{hint(part, has)}")
        if part == "attn1" and plan.criterion != "tome":
            raise ConfigError("tokens cannot miss the 'attn1' that ranks them; only criterion 'tome' allows that")
        if part == "attn2" and plan.ranking == "cross":
            raise ConfigError("tokens cannot miss the 'attn2' that ranks them")
