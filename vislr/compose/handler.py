"""Compose plans put on a pipeline and taken off: `vislr.apply` and `vislr.remove` come here."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vislr.adapters.adabn_layer import check_one_carrier
from vislr.adapters.inject import adapter_layers, adapter_names, carriers
from vislr.anatomy import denoiser_of
from vislr.anatomy.wrapping import unwrapped
from vislr.cache.handler import hooks_for, left_out
from vislr.cache.hooks import HOOK_NAME as CACHE_HOOK
from vislr.cache.plan import CachePlan
from vislr.cache.regions import region_at
from vislr.cache.state import CacheState
from vislr.compose.costing import Cost, plan_cost
from vislr.compose.evaluate import OWNER, ComposeHook, Conductor, check_adapters, compose_hook
from vislr.compose.merged import check_patterns, merged_changes
from vislr.compose.plan import MERGED, MIXED, ComposePlan
from vislr.compose.routing import HOOK_NAME, Route, put_layer_hooks, separable, take_layer_hooks
from vislr.core.clock import Clock, scheduler_of
from vislr.core.context import remove_step_context, step_context
from vislr.core.errors import ConfigError, ModelError, UndoError
from vislr.core.hooks import put_on, take_off, tidy
from vislr.core.registry import Attached
from vislr.tokens.handler import applied


def attach_to(target: Any) -> Callable[..., Attached]:
    """`attach` for a pipeline: with its scheduler and its text encoders."""

    def attach_there(module: Any, change: ComposePlan, name: str = "compose") -> Attached:
        return attach(module, change, name, target)

    return attach_there


def attach(module: Any, change: ComposePlan, name: str = "compose", target: Any = None) -> Attached:
    """Put a composition on a denoiser and its pipeline. No weight, buffer, class or active adapter is changed.

    Args:
        module: the denoiser, with the plan's adapters on it; other run-time plans may be on it, too.
        change: the plan.
        target: the pipeline; None: a bare denoiser, for which `change.steps` falling timesteps are a run.

    Raises:
        AdapterError: an adapter is not there, is merged, or of a kind that the method cannot use.
        ConfigError: a composition is on already, or caches meet. TargetError: no such boundary or layer.
    """
    module = unwrapped(module)
    put_plan(module, change, target)
    own = [name for name in change.adapters if name in adapter_names(module)]
    sites = tuple(dict.fromkeys(site for name in own for site in adapter_layers(module, name)))
    return Attached(sites, {"kind": "compose", "plan": change.to_dict()}, {"put": True})


def account(module: Any, change: ComposePlan) -> tuple[tuple[int, int], tuple[str, ...]]:
    """FLOPs of a call with one adapter and, on average over a run, with a plan that is on; and notes."""
    module, plan = unwrapped(module), change
    cost = plan_cost(module, plan)
    hook = compose_hook(module)
    assert hook is not None
    notes = list(cost.lines())
    why = separable(module, plan.adapters) if plan.method in MIXED and not plan.alone else ""
    if why:
        notes.append(f"adapters run one after another: {why}")
    errors = [change.error for change in hook.changes.values() if change.error]
    if errors:
        notes.append(f"cut to a rank: relative error up to {max(errors):.3f} on a layer")
    for other in (name for name in plan.adapters if name not in adapter_names(module)):
        notes.append(f"'{other}' is on the text encoders alone")
    return (cost.whole, cost.flops), tuple(notes)


def detach(module: Any, attached: Attached) -> None:
    """Take the composition off: every module's own forward is back.

    Raises:
        UndoError: no composition is on the model.
    """
    module = unwrapped(module)
    if compose_hook(module) is None:
        raise UndoError(f"no composition is on this {type(module).__name__} any more")
    take_plan(module)


def put_plan(module: Any, plan: ComposePlan, target: Any = None) -> None:
    """Check everything, then hook denoiser, tuner layers and text encoders.

    Raises:
        as `attach`; the pipeline is untouched.
    """
    if not hasattr(module, "config"):
        raise ModelError(f"a {type(module).__name__} is no denoiser: there are no steps to compose adapters over")
    if compose_hook(module) is not None:
        raise ConfigError("a composition is on this pipeline already; remove it first")
    others = [part for part in getattr(target, "components", {}).values()
              if isinstance(part, nn.Module) and part is not module and adapter_names(part)]  # fmt: skip
    check_adapters(module, plan, others)
    check_patterns(module, plan)
    if plan.method == "merge" or plan.method in MERGED:
        check_one_carrier([name for name in carriers(module) if name in plan.adapters])
    state, hooks = _caches(module, plan)
    texts = plan.adapters if plan.text_adapters is None else plan.text_adapters
    merged = plan.method in MERGED and not plan.alone
    changes = merged_changes(module, plan, plan.adapters) if merged else {}
    text_changes = [merged_changes(part, plan, texts) if merged and len(texts) > 1 else {} for part in others]

    tokens = applied(module)
    # Masks that the two halves of a guided batch share would be shared by other halves.
    shared = tokens is not None and tokens.plan.guidance == "shared"
    why = separable(module, plan.adapters) or (
        "a token plan shares masks between halves of the batch" if shared else ""
    )
    if plan.passes == "batched" and why:
        raise ConfigError(f"passes 'batched' cannot be: {why}; choose 'separate'")

    route = Route()
    context = step_context(module, OWNER)
    conductor = Conductor(plan, Clock(scheduler_of(target), plan.steps), context, state)
    conductor.channels = channels_of(module)
    hook = ComposeHook(plan, conductor, route, state, not why and plan.passes != "separate")
    hook.changes, hook.others, hook.cached = changes, tuple(map(weakref.ref, others)), tuple(hooks)

    # Of a copied model the arguments are copies, which those of a closure would not be.
    conductor.ready = functools.partial(_ready, module, hook)
    put_on(module, hook, HOOK_NAME)
    put_layer_hooks(module, plan, route, changes)
    for path, cache_hook in hooks.items():
        put_on(module.get_submodule(path), cache_hook, CACHE_HOOK)
    for part, own in zip(others, text_changes, strict=True):
        constant = Route()
        constant.parts, constant.merged = (texts,), merged and bool(own)
        put_layer_hooks(part, plan, constant, own)
    context.left_out[OWNER] = left_out(hooks)
    context.schedules[OWNER] = conductor


def _ready(module: Any, hook: ComposeHook) -> None:
    """Adapters may have come or gone since the plan went on."""
    parts = [part for other in hook.others if (part := other()) is not None]
    check_adapters(module, hook.plan, parts)
    put_layer_hooks(module, hook.plan, hook.route, hook.changes)


def _caches(module: Any, plan: ComposePlan) -> tuple[CacheState | None, dict[str, Any]]:
    if plan.cache is None or plan.refresh.always or plan.alone:
        return None, {}
    state = CacheState()
    region = region_at(module, plan.cache or None, plan.refresh)
    return state, hooks_for(module, CachePlan((region,), plan.steps), state)


def channels_of(module: Any) -> int:
    """Channels of the latent itself that a denoiser gets."""
    config = module.config
    made = getattr(config, "out_channels", None) or config.in_channels
    # FLUX packs 2 x 2 latents; PixArt also predicts a variance; inpainting gets mask and picture.
    packed = hasattr(module, "single_transformer_blocks")
    return config.in_channels // 4 if packed else min(config.in_channels, made)


def take_plan(module: Any) -> None:
    """Take off what `put_plan` put on."""
    hook = compose_hook(module)
    assert hook is not None
    for path in hook.cached:
        take_off(module.get_submodule(path), CACHE_HOOK)
    for part in (module, *(other() for other in hook.others)):
        if part is not None:
            take_layer_hooks(part)
    take_off(module, HOOK_NAME)
    remove_step_context(module, OWNER)
    tidy(module)


@contextmanager
def composed(target: Any, plan: ComposePlan) -> Iterator[None]:
    """While inside, the pipeline composes; nothing is counted or recorded, and all of it is off again behind it.

    Args:
        target: a pipeline or a bare denoiser.

    Raises:
        as `attach`.
    """
    module = unwrapped(denoiser_of(target)[1])
    put_plan(module, plan, target)
    try:
        yield
    finally:
        take_plan(module)


def cost(target: Any, plan: ComposePlan, steps: int | None = None) -> Cost:
    """What a plan costs on a pipeline, counted on meta; the plan goes on for the count and off again.

    Args:
        target: a pipeline or a bare denoiser, with the plan's adapters.
        steps: of a run; None: the plan's.

    Raises:
        as `attach`.
    """
    import dataclasses

    module = unwrapped(denoiser_of(target)[1])
    chosen = plan if steps is None else dataclasses.replace(plan, steps=steps)
    with composed(target, chosen):
        return plan_cost(module, chosen)
