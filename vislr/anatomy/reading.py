"""From a model to its sites."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vislr.anatomy.cost import Counts, count, denoiser_of, meta_copy, sample_inputs, sample_of
from vislr.anatomy.families import Layout, reader_of
from vislr.anatomy.site import LEAVES, Anatomy, Site
from vislr.anatomy.wrapping import original, unwrapped, walk
from vislr.core.quantizing import parameter_count


def describe(target: Any, sample: dict[str, int] | None = None) -> Anatomy:
    """Read a model into named sites, with what each costs.

    Nothing of the model is changed, moved or computed: a copy without memory runs once on meta.

    Args:
        target: a supported model, or a pipeline, whose denoiser is read.
        sample: shapes to count at, as in `vislr.anatomy.sample_of`; default: the model's own.

    Raises:
        ModelError: no reader for this model; lists the supported ones.
        ConfigError: a wrong sample.
    """
    module = unwrapped(denoiser_of(target)[1])
    reader = reader_of(module)
    sample = sample_of(module, sample)
    twin = meta_copy(module)
    inputs = sample_inputs(twin, sample)
    counts = count(twin, inputs)
    layout = reader.layout(twin, inputs)
    return Anatomy(
        family=reader.family,
        sites=_sites(twin, layout, counts),
        sample=sample,
        parameters=parameter_count(twin),
        flops=counts.total,
    )


def _sites(model: nn.Module, layout: Layout, counts: Counts) -> tuple[Site, ...]:
    modules = dict(walk(model))
    kinds: dict[str, str] = {}
    for name, module in modules.items():
        outer = kinds.get(_holder(name, kinds))
        kind = _kind(name, original(module), layout)
        # Nothing lies inside a layer, and an attention module has no second one inside.
        if kind is not None and outer not in LEAVES and not (outer == kind == "attention"):
            kinds[name] = kind
    places = {name: counts.order.get(modules[name], math.inf) for name in modules}
    stages = _Stages(layout.stages, places)
    found = []
    # Sorting is stable: what the forward does not call keeps the order of definition.
    for depth, name in enumerate(sorted(kinds, key=places.__getitem__)):
        layer = original(modules[name])
        found.append(
            Site(
                name=name,
                kind=kinds[name],
                type=type(layer).__name__,
                stage=stages.of(name),
                depth=depth,
                shape=_shape(layer),
                parameters=parameter_count(modules[name]),
                flops=counts.flops.get(modules[name], 0),
                removable=kinds[name] not in LEAVES and layout.units.get(name, False),
            )
        )
    return tuple(found)


def _holder(name: str, kinds: dict[str, str]) -> str:
    """The innermost module above `name` that is an attention or a layer."""
    while name:
        name = name.rpartition(".")[0]
        if kinds.get(name, "unit") != "unit":
            return name
    return ""


def _kind(name: str, layer: nn.Module, layout: Layout) -> str | None:
    if isinstance(layer, nn.modules.conv._ConvNd):
        return "conv"
    if isinstance(layer, nn.Linear):
        return "linear"
    weighted = any(isinstance(part, (nn.Linear, nn.modules.conv._ConvNd)) for part in layer.modules())
    kind = type(layer).__name__
    if weighted and "Attention" in kind:
        return "attention"
    if not weighted and "Norm" in kind and "Head" not in kind:
        return "norm"
    return "unit" if name in layout.units else None


def _shape(layer: nn.Module) -> tuple[int, ...]:
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if torch.is_tensor(weight) else ()


class _Stages:
    """Names the stage of a site: the block that holds it, or where it lies before, between and after blocks."""

    def __init__(self, blocks: Any, places: dict[str, float]):
        self.blocks = tuple(blocks)
        self.places = places
        inside = [place for name, place in places.items() if self._block(name) and place < math.inf]
        self.first, self.last = min(inside, default=0), max(inside, default=0)

    def _block(self, name: str) -> str | None:
        return next((b for b in self.blocks if name == b or name.startswith(f"{b}.")), None)

    def of(self, name: str) -> str:
        block = self._block(name)
        if block is not None:
            return block
        if self.places[name] < self.first:
            return "stem"
        if self.places[name] > self.last:
            return "head"
        return ".".join(name.split(".")[: self.blocks[0].count(".") + 1])
