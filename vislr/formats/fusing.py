"""Adapters made part of the weights for good, with their files kept: what was fused can be replayed and undone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vislr.adapters import inject
from vislr.adapters.layer import chain
from vislr.adapters.targets import innermost
from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import AdapterError, UndoError, hint
from vislr.core.quantizing import holds_codes
from vislr.core.registry import Attached
from vislr.formats.writing import write_adapter


@dataclass(frozen=True)
class FusePlan:
    """Which adapters become part of the weights, at the weights that they have.

    Attributes:
        adapters: their names; (): all that are on the model.
        component: of the pipeline; "": the denoiser.
    """

    adapters: tuple[str, ...] = ()
    component: str = ""


def attach_to(target: Any) -> Callable[..., Attached]:
    """`attach` for a pipeline, whose other parts must not carry the adapters too."""

    def attach_there(module: Any, change: FusePlan, name: str = "fused") -> Attached:
        for component, part in getattr(target, "components", {}).items():
            if isinstance(part, nn.Module) and part is not module:
                both = set(inject.adapter_names(part)) & set(change.adapters or inject.adapter_names(module))
                if both:
                    raise AdapterError(f"adapter '{min(both)}' has layers in '{component}' too, which stays as it is")
        return attach(module, change, name)

    return attach_there


def attach(module: Any, change: FusePlan, name: str = "fused") -> Attached:
    """Merge the adapters into the weights and put the layers themselves back in the places of their tuner layers.

    Args:
        module: with the adapters on it, all of them on and among the plan's.

    Raises:
        AdapterError: no such adapter, one is off, another would stay, one is merged by peft already, or a weight
            is quantised. The model is as it was.
    """
    module = unwrapped(module)
    weights = _checked(module, change)
    with tempfile.TemporaryDirectory() as place:
        files = {one: write_adapter(module, one, Path(place) / f"{one}.safetensors").read_bytes() for one in weights}
    layers = list(inject.tuner_layers(module))
    # Of several kinds on one layer the outer one is in the layer's place.
    outer = {path: layer for path, layer in layers if path == inject.plain_name(path)}
    before = {path: _state(innermost(layer)) for path, layer in outer.items()}
    with torch.no_grad():
        for _, layer in layers:
            layer.merge(adapter_names=[one for one in weights if one in layer._get_available_adapters()])
    _put(module, {path: innermost(layer) for path, layer in outer.items()})
    return Attached(
        sites=tuple(outer),
        change={"kind": "fuse", "adapters": weights},
        undo={"layers": outer, "before": before, "peft": inject.take_traces(module)},
        files=files,
    )


def _checked(module: Any, change: FusePlan) -> dict[str, float]:
    """Name -> weight of what is fused."""
    on, names = inject.active_adapters(module), inject.adapter_names(module)
    chosen = list(change.adapters) or names
    if not chosen:
        raise AdapterError(f"this {type(module).__name__} carries no adapter to fuse")
    for name in chosen:
        if name not in names:
            raise AdapterError(f"no adapter is called '{name}'{hint(name, names)}")
        if name not in on:
            raise AdapterError(f"adapter '{name}' is off; switch it on (set_adapters), or remove it")
    others = [name for name in names if name not in chosen]
    if others:
        raise AdapterError(f"adapter '{others[0]}' would stay on changed weights; remove it first, or fuse it too")
    inject.check_unmerged(module)
    for path, layer in inject.tuner_layers(module):
        if holds_codes(innermost(layer)):
            raise AdapterError(f"the weight of '{inject.plain_name(path)}' is quantised; fuse first, then quantise")
    return {name: on[name] for name in names}


def _state(layer: Any) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in layer.state_dict().items()}


def _put(module: nn.Module, layers: dict[str, Any]) -> None:
    for path, layer in layers.items():
        parent, _, child = path.rpartition(".")
        setattr(module.get_submodule(parent), child, layer)


@torch.no_grad()
def detach(module: nn.Module, attached: Attached) -> None:
    """The weights bit for bit as before, and the adapters on them again.

    Raises:
        UndoError: something else stands on a layer whose weight was fused.
    """
    module = unwrapped(module)
    undo = attached.undo
    modules = dict(module.named_modules())
    for path, layer in undo["layers"].items():
        if modules.get(path) is not innermost(layer):
            raise UndoError(f"'{path}' is not the layer that was fused; undo what came after it first")
    for path, layer in undo["layers"].items():
        for one in chain(layer):
            if isinstance(one, BaseTunerLayer):
                one.unmerge()
        # The model may have moved; and peft subtracts what it added, or divides, which is not exact.
        own = innermost(layer).state_dict()
        layer.to(next(iter(own.values())).device)
        for key, value in undo["before"][path].items():
            own[key].copy_(value)
    _put(module, undo["layers"])
    inject.give_traces(module, undo["peft"])
