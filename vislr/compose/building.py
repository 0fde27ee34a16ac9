"""Plans of composition, one function a method; every name is checked against the pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from vislr.adapters.inject import adapter_layers, adapter_names
from vislr.anatomy import denoiser_of
from vislr.anatomy.wrapping import unwrapped
from vislr.cache.plan import Refresh
from vislr.cache.regions import backbone_of, region_at
from vislr.compose.plan import MERGED, METHODS, ComposePlan, Dominance, LayerWeights, Merging, Switching
from vislr.compose.prompts import prompt_weights
from vislr.core.errors import AdapterError, ConfigError, hint

if TYPE_CHECKING:
    from vislr.compose.profiles import Profile

NON_UNIFORM = Refresh(edges=2, middle=3)


def compose_plan(
    pipe: Any, adapters: Sequence[str], weights: Sequence[float] | None = None, method: str = "merge", **options: Any
) -> ComposePlan:
    """A plan of any method.

    Args:
        pipe: a pipeline, or a bare denoiser, with the adapters on it.
        adapters: their names, in the order of turns and of the lead.
        weights: of their deltas, 1 as trained; None: 1 each.
        method: one of `METHODS`.
        options: of the method's own function (`switch_plan`, `cmlora_plan`, ...).

    Raises:
        ConfigError: an unknown method, or an option that the method does not have. AdapterError: an
            adapter is not there.
    """
    if method not in METHODS:
        raise ConfigError(f"no way of composing is called '{method}'{hint(method, METHODS)}")
    build = _BUILDERS[method]
    known = [name for name, one in inspect.signature(build).parameters.items() if one.kind is one.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise ConfigError(f"method '{method}' has no option '{name}'{hint(name, known)}")
    if method == "merge" or method in MERGED:
        return merge_plan(pipe, adapters, weights, method, **options)
    return build(pipe, adapters, weights, **options)


def merge_plan(
    pipe: Any,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    method: str = "merge",
    *,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
    layers: Mapping[str, Sequence[float | Sequence[float]]] | None = None,
    text_adapters: Sequence[str] | None = None,
    steps: int = 25,
) -> ComposePlan:
    """All adapters at once: "merge" (exact sum, nothing is computed beforehand) or a merged method.

    Args:
        density: share of entries that "ties", "dare", "dare_ties", "magnitude" keep.
        rank: largest rank of a merged layer; None: whole.
        seed: of what DARE drops.
        layers: pattern of layer names -> weights there, one an adapter; of the merged methods a weight may be a
            list, one number an input of the layer.
        text_adapters: adapters that are on in the text encoders; None: all.
        steps: of a run, for the averages of the report.

    Raises:
        AdapterError: an adapter is not there. ConfigError: an impossible value.
    """
    names = _checked(pipe, adapters)
    special = tuple(
        LayerWeights(pattern, tuple(float(w) if isinstance(w, (int, float)) else tuple(map(float, w)) for w in own))
        for pattern, own in (layers or {}).items()
    )
    return ComposePlan(
        names,
        _weights(weights),
        method,
        _texts(text_adapters),
        merging=Merging(density, rank, seed, special),
        steps=steps,
    )


def switch_plan(
    pipe: Any,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    every: int = 5,
    off_by_one: bool = False,
    text_adapters: Sequence[str] | None = None,
    steps: int = 25,
) -> ComposePlan:
    """LoRA Switch (arXiv 2402.16843): one adapter at a time, in turns of `every` steps; the paper's tau is 5.

    Args:
        off_by_one: as the published code runs: the first turn is a step longer.
        text_adapters, steps: as `merge_plan`.

    Raises:
        AdapterError, ConfigError: as `merge_plan`.
    """
    names = _checked(pipe, adapters)
    turns = Switching(every, off_by_one)
    return ComposePlan(names, _weights(weights), "switch", _texts(text_adapters), switching=turns, steps=steps)


def composite_plan(
    pipe: Any,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    mix: Sequence[float] | None = None,
    cache: str | None = None,
    refresh: str | int | Refresh = "non-uniform",
    passes: str = "auto",
    text_adapters: Sequence[str] | None = None,
    steps: int = 25,
) -> ComposePlan:
    """LoRA Composite (arXiv 2402.16843): the mean of the guided predictions that each adapter makes alone.

    Args:
        mix: coefficients of the predictions, summing to 1; None: 1/N each.
        cache: None; "auto" or the name of a boundary: each adapter's deep features are kept between refreshes.
        refresh: of the cache: "non-uniform" (2 at both ends, 3 between), a number of steps, or a Refresh.
        passes: "auto", "batched" or "separate".
        text_adapters, steps: as `merge_plan`.

    Raises:
        AdapterError, ConfigError: as `merge_plan`. TargetError: no such boundary.
    """
    names = _checked(pipe, adapters)
    return ComposePlan(
        names, _weights(weights), "composite", _texts(text_adapters), passes, mix=tuple(map(float, mix or ())),
        cache=_boundary(pipe, names, cache), refresh=_refresh(refresh), steps=steps,
    )  # fmt: skip


def cmlora_plan(
    pipe: Any,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    profiles: Sequence[Profile] | None = None,
    high: Sequence[str] | None = None,
    low: Sequence[str] | None = None,
    mode: str = "offline",
    boundary: float = 6 / 11,
    threshold: float = 0.4,
    eta: float = 0.2,
    low_phase: str = "lo",
    beta: float | None = None,
    decay: str = "none",
    cache: str | None = "auto",
    refresh: str | int | Refresh = "non-uniform",
    passes: str = "auto",
    text_adapters: Sequence[str] | None = None,
    steps: int = 25,
) -> ComposePlan:
    """CMLoRA (arXiv 2502.04923): Composite in which one adapter leads, first those of high frequencies, then the rest.

    Args:
        profiles: of the adapters (`profile_adapters`); they say who is high and who is low.
        high, low: say it directly; one of the two is enough. Without profiles and these all are high: the
            lead goes round.
        mode, boundary, threshold, eta, low_phase, beta, decay: as `vislr.compose.plan.Dominance`.
        cache: "auto": the last boundary at which a cached pass still runs every adapter; a boundary's name;
            None: no cache.
        refresh: when the lead passes on and the new leader's features are computed anew: "non-uniform"
            (every 2 steps at both ends, 3 between), a number of steps, or a Refresh.
        passes: "auto", "batched" or "separate".
        text_adapters, steps: as `merge_plan`.

    Raises:
        AdapterError, ConfigError: as `merge_plan`; a profile is missing. TargetError: no such boundary.
    """
    names = _checked(pipe, adapters)
    first, second = _split(names, profiles, high, low)
    lead = Dominance(first, second, mode, boundary, threshold, eta, False, low_phase, beta, decay)
    return ComposePlan(
        names, _weights(weights), "cmlora", _texts(text_adapters), passes, dominance=lead,
        cache=_boundary(pipe, names, cache), refresh=_refresh(refresh), steps=steps,
    )  # fmt: skip


def w_switch_plan(
    pipe: Any,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    prompt: str,
    triggers: Sequence[str],
    last: str | None = None,
    last_steps: int = 5,
    text_adapters: Sequence[str] | None = None,
    steps: int = 25,
) -> ComposePlan:
    """Switch with turns by the prompt (arXiv 2606.03792): shares are 1 - cos(prompt, prompt without the trigger).

    Args:
        prompt: what will be drawn. triggers: of each adapter, a part of the prompt.
        last: adapter of the last steps (a character's); None: whoever is due.
        last_steps: how many these are.
        text_adapters, steps: as `merge_plan`.

    Raises:
        ConfigError: a trigger is not in the prompt, counts differ. AdapterError: an adapter is not there.
    """
    names = _checked(pipe, adapters)
    shares = _normalised(prompt_weights(pipe, prompt, _triggers(names, triggers)).absence)
    turns = Switching(shares=shares, last=last, last_steps=last_steps)
    return ComposePlan(names, _weights(weights), "w_switch", _texts(text_adapters), switching=turns, steps=steps)


def w_composite_plan(
    pipe: Any,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    prompt: str,
    triggers: Sequence[str],
    cache: str | None = None,
    refresh: str | int | Refresh = "non-uniform",
    passes: str = "auto",
    text_adapters: Sequence[str] | None = None,
    steps: int = 25,
) -> ComposePlan:
    """Composite weighted by the prompt (arXiv 2606.03792): coefficients are cos(trigger, prompt), over their sum.

    Args:
        prompt: what will be drawn. triggers: of each adapter, a part of the prompt.
        cache, refresh, passes: as `composite_plan`. text_adapters, steps: as `merge_plan`.

    Raises:
        ConfigError: a trigger is not in the prompt, counts differ. AdapterError: an adapter is not there.
    """
    names = _checked(pipe, adapters)
    mix = _normalised(prompt_weights(pipe, prompt, _triggers(names, triggers)).trigger)
    return ComposePlan(
        names, _weights(weights), "w_composite", _texts(text_adapters), passes, mix=mix,
        cache=_boundary(pipe, names, cache), refresh=_refresh(refresh), steps=steps,
    )  # fmt: skip


_BUILDERS: dict[str, Any] = {
    **dict.fromkeys(("merge", *MERGED), merge_plan),
    "switch": switch_plan,
    "composite": composite_plan,
    "cmlora": cmlora_plan,
    "w_switch": w_switch_plan,
    "w_composite": w_composite_plan,
}


def options_of(method: str) -> list[str]:
    """Names of the options that `compose_plan` takes for a method.

    Raises:
        ConfigError: an unknown method.
    """
    if method not in METHODS:
        raise ConfigError(f"no way of composing is called '{method}'{hint(method, METHODS)}")
    return [
        name for name, one in inspect.signature(_BUILDERS[method]).parameters.items() if one.kind is one.KEYWORD_ONLY
    ]


def _checked(pipe: Any, adapters: Sequence[str]) -> tuple[str, ...]:
    if isinstance(adapters, str):
        raise ConfigError(f"adapters is the text '{adapters}'; expected a list of names")
    parts = [part for part in getattr(pipe, "components", {"": pipe}).values() if isinstance(part, nn.Module)]
    known = list(dict.fromkeys(name for part in parts for name in adapter_names(part)))
    for name in adapters:
        if name not in known:
            raise AdapterError(f"no adapter is called '{name}'{hint(name, known) or '; the pipeline has none'}")
    return tuple(adapters)


def _weights(weights: Sequence[float] | None) -> tuple[float, ...]:
    return () if weights is None else tuple(map(float, weights))


def _texts(names: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def _refresh(refresh: str | int | Refresh) -> Refresh:
    if isinstance(refresh, Refresh):
        return refresh
    if refresh == "non-uniform":
        return NON_UNIFORM
    if isinstance(refresh, bool) or not isinstance(refresh, int):
        raise ConfigError(f"refresh is {refresh!r}; expected 'non-uniform', a number of steps, or a Refresh")
    return Refresh(every=refresh)


def _triggers(names: tuple[str, ...], triggers: Sequence[str]) -> Sequence[str]:
    if isinstance(triggers, str) or len(triggers) != len(names):
        raise ConfigError(f"{len(names)} adapters and triggers {triggers!r}; expected a list of as many")
    return triggers


def _normalised(values: Sequence[float]) -> tuple[float, ...]:
    positive = [max(0.0, value) for value in values]
    total = sum(positive)
    return tuple(value / total for value in positive) if total else (1 / len(values),) * len(values)


def _split(
    names: tuple[str, ...], profiles: Sequence[Profile] | None, high: Sequence[str] | None, low: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Who is high and who is low, each in the order of the plan."""
    if high is None and low is None and profiles is not None:
        from vislr.compose.profiles import split_profiles

        found = {profile.adapter: profile for profile in profiles}
        for name in names:
            if name not in found:
                raise ConfigError(f"there is no profile of '{name}'{hint(name, found)}")
        high = split_profiles([found[name] for name in names])[0]
    for name in (*(high or ()), *(low or ())):
        if name not in names:
            raise ConfigError(f"'{name}' in high or low is none of the plan's adapters{hint(name, names)}")
    if high is None:
        high = [name for name in names if name not in (low or ())]
    if low is None:
        low = [name for name in names if name not in high]
    return tuple(name for name in names if name in high), tuple(name for name in names if name in low)


def _boundary(pipe: Any, names: tuple[str, ...], cache: str | None) -> str | None:
    """The boundary's name; of "auto", the last one at which a cached pass still runs a layer of every adapter."""
    module = unwrapped(denoiser_of(pipe)[1])
    if cache is None or len(names) == 1:
        return None
    if cache != "auto":
        region_at(module, cache or None)  # there is such a boundary
        return cache
    backbone = backbone_of(module)
    if backbone.family != "unet":
        region_at(module)
        return ""
    sites = {name: list(adapter_layers(module, name)) for name in names if name in adapter_names(module)}
    for boundary in reversed(backbone.ups):
        region = region_at(module, boundary)
        start, end = backbone.blocks.index(region.first), backbone.blocks.index(region.last)
        running = [f"{block}." for block in (*backbone.blocks[:start], *backbone.blocks[end + 1 :])]
        if all(any(site.startswith(tuple(running)) for site in own) for own in sites.values()):
            return boundary
    return backbone.ups[-1]
