"""What may lie around a layer or a model without changing its names: adapters, compilation, processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """The module inside `torch.compile`, `DistributedDataParallel` or a `PeftModel`."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def original(module: Any) -> Any:
    """The layer inside any number of peft layers; the module itself if there are none."""
    # peft takes seconds to import; where nobody imported it, nothing is wrapped by it.
    layers, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    while True:
        if layers is not None and isinstance(module, layers.BaseTunerLayer):
            module = module.base_layer
        elif other is not None and isinstance(module, other.AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def strip(model: nn.Module) -> nn.Module:
    """Put the layers themselves in the place of what wraps them, in place; returns the model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if original(child) is not child:
                setattr(module, name, original(child))
    return model


def wrappers(module: Any) -> list[Any]:
    """What lies around a layer, the outermost first; [] of a layer itself."""
    found = []
    while original(module) is not module:
        found.append(module)
        module = module.base_layer if hasattr(module, "base_layer") else module.original_module
    return found


def put_inside(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Put a layer in the place of the one of this name, inside of whatever wraps it; returns the old one."""
    parent, _, attribute = name.rpartition(".")
    holder: Any = model.get_submodule(parent)
    around = wrappers(getattr(holder, attribute))
    if around:
        holder = around[-1]
        attribute = "base_layer" if hasattr(holder, "base_layer") else "original_module"
    old = getattr(holder, attribute)
    setattr(holder, attribute, layer)
    return old


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under its name in the model without adapters, in order of definition.

    Yields:
        (name, module): `module` is the outermost wrapper of the layer; `original` gives the layer.
        What an adapter added is not visited. A module with several names comes under the first.
    """
    yield from _walk(module, name, set())


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for child_name, child in original(module).named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)
