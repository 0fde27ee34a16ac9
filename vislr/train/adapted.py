"""The parts of a model that belong to an adapter: what is trained, switching it off, its training mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from vislr.core.errors import AdapterError


def trainable_parameters(model: nn.Module, adapter_name: str, also: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Freeze everything but the adapter (and the module `also`, a new classifier's head).

    Parameters of an adapter carry its name as a part of theirs, as in all of peft's layers.

    Returns:
        name -> parameter, of what is trained.

    Raises:
        AdapterError: the model has no parameter of that adapter.
    """
    extra = {id(parameter) for parameter in also.parameters()} if also is not None else set()
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if adapter_name in name.split(".") or id(parameter) in extra
    }
    if len(chosen) <= len(extra):
        raise AdapterError(f"the model carries no adapter '{adapter_name}' with parameters to train")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def adapter_training(model: nn.Module, on: bool) -> None:
    """Training mode for adapters alone: their dropout works, the base's BatchNorm and dropout do not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.eval()
    if not on:
        return
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.training = True
            for name, part in layer.named_children():
                if name != "base_layer":
                    part.train()


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model, inside the block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    # Not `enable_adapters`: that also changes which parameters are trained.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
