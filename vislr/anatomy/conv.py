"""Convolutional nets that take an image: timm's, torchvision's, and others of that form."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from vislr.anatomy.families import Layout, Reader, has_config
from vislr.anatomy.residual import residual_names
from vislr.anatomy.vit import image_inputs, image_sample
from vislr.anatomy.wrapping import original, walk


def _matches(model: nn.Module) -> bool:
    if has_config(model) or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return False
    arguments = inspect.signature(type(model).forward.__get__(model)).parameters.values()
    positional = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    return len([a for a in positional if a.default is a.empty]) == 1


def _layout(model: nn.Module, inputs: dict[str, Any]) -> Layout:
    residual = residual_names(model, inputs)
    modules = {name: original(module) for name, module in walk(model)}
    # Blocks of the same class belong to the list even where they have no skip: they are not removable.
    classes = {type(modules[name]) for name in residual}
    units = {name: name in residual for name, module in modules.items() if type(module) in classes}
    return Layout(_stages(list(units), modules), units)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _stages(units: list[str], modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """What holds the units, or the units themselves if one list holds all, or the top-level modules if none."""
    if not units:
        return tuple(name for name, _ in modules[""].named_children())
    parents = dict.fromkeys(_parent(name) for name in units)
    if len(parents) == 1:
        found = list(units)
    else:
        # "stages.0.blocks" -> "stages.0", which also holds the stage's downsampling.
        found = [_parent(p) if not _ends_in_number(p) and _ends_in_number(_parent(p)) else p for p in parents]
    # Blocks without a skip lie in the same numbered list as those with one.
    lists = {_parent(name) for name in found if _ends_in_number(name)}
    return tuple(
        name
        for name, module in modules.items()
        if name in found or (_parent(name) in lists and _ends_in_number(name) and _holds_block(module))
    )


def _ends_in_number(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def _holds_block(module: nn.Module) -> bool:
    return any(any(True for _ in child.parameters()) and any(child.children()) for child in module.children())


READERS = (Reader("conv", "convolutional nets of timm and torchvision", _matches, image_sample, image_inputs, _layout),)
