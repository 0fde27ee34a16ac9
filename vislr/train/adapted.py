"""The parts of models that belong to an adapter: what is trained, switching it off, its training mode, its average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vislr.core.errors import AdapterError, FormatError


def trainable_parameters(
    models: Mapping[str, nn.Module], adapter_name: str, also: nn.Module | None = None
) -> dict[str, nn.Parameter]:
    """Freeze everything but the adapter (and the module `also`, a new classifier's head).

    Args:
        models: prefix of names -> model; the first, whose prefix is "", must carry the adapter.

    Returns:
        name -> parameter, of what is trained.

    Raises:
        AdapterError: a model has no parameter of that adapter.
    """
    from vislr.adapters import adapter_names, adapter_parameters

    extra = {id(parameter) for parameter in also.parameters()} if also is not None else set()
    chosen: dict[str, nn.Parameter] = {}
    for prefix, model in models.items():
        # Not by names: a layer of the base may be called like the adapter.
        held = adapter_parameters(model, adapter_name) if adapter_name in adapter_names(model) else {}
        if not held:
            where = f"the {prefix}" if prefix else "the model"
            raise AdapterError(f"{where} carries no adapter '{adapter_name}' with parameters to train")
        wanted = extra | {id(parameter) for parameter in held.values()}
        own = {
            f"{prefix}.{name}" if prefix else name: parameter
            for name, parameter in model.named_parameters()
            if id(parameter) in wanted
        }
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        chosen |= own
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def adapter_training(models: Sequence[nn.Module], on: bool) -> None:
    """Training mode for adapters alone: their dropout works, the base's BatchNorm and dropout do not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for model in models:
        model.eval()
        if not on:
            continue
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.training = True
                for name, part in layer.named_children():
                    if name != "base_layer":
                        part.train()


@contextlib.contextmanager
def adapters_off(models: Sequence[nn.Module]) -> Iterator[None]:
    """The base models, inside the block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    # Not `enable_adapters`: that also changes which parameters are trained.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


class Average:
    """Exponential moving average of trained parameters, in float32.

    After update n (from 1) the rate is min(rate, (1 + n) / (10 + n)), so that the first values are soon forgotten.

    Args:
        trainable: name -> parameter. rate: in (0, 1).
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter], rate: float) -> None:
        self.trainable, self.rate = trainable, rate
        self.values = {name: value.detach().float().clone() for name, value in trainable.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after update number `step` (from 1)."""
        rate = min(self.rate, (1 + step) / (10 + step))
        for name, value in self.trainable.items():
            if self.values[name].shape != value.shape:
                # SaRA trains fewer entries from a step on: what is left starts from itself.
                self.values[name] = value.detach().float().clone()
        now = [value.detach().float() for value in self.trainable.values()]
        torch._foreach_lerp_(list(self.values.values()), now, 1 - rate)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """The average in place of the parameters, inside the block."""
        kept = {name: value.detach().clone() for name, value in self.trainable.items()}
        self.settle()
        try:
            yield
        finally:
            _put(self.trainable, kept)

    def settle(self) -> None:
        """Put the average in place of the parameters."""
        _put(self.trainable, self.values)

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Go on from stored averages."""
        for name, value in self.trainable.items():
            self.values[name] = torch.empty_like(value, dtype=torch.float32).copy_(values[name])


@torch.no_grad()
def _put(trainable: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in trainable.items():
        value.copy_(values[name])


def sparse_state(models: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """What SaRA layers hold beside their vectors once they train fewer entries than they change; {} before."""
    return {
        f"{path}/{adapter}/{key}": tensor
        for path, layer in _sparse_layers(models)
        for adapter, entries in layer.entries.items()
        if entries.kept is not None
        for key, tensor in layer.file_tensors(adapter).items()
    }


def load_sparse(models: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `sparse_state` back: the vectors get their shorter length.

    Raises:
        FormatError: it is of other layers.
    """
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        path, adapter, key = name.rsplit("/", 2)
        found.setdefault((path, adapter), {})[key] = tensor
    layers = dict(_sparse_layers(models))
    for (path, adapter), parts in found.items():
        if path not in layers or adapter not in layers[path].entries:
            raise FormatError(f"the checkpoint is of an adapter with a layer '{path}' that the model has not")
        layers[path].check_file_tensors(parts, path)
        layers[path].load_file_tensors(adapter, parts)


def let_resize(models: Mapping[str, nn.Module]) -> None:
    """Allow SaRA's vectors to become shorter while several processes train: their gradients are shared one by one."""
    for _, layer in _sparse_layers(models):
        for entries in layer.entries.values():
            entries.resizable = True


def _sparse_layers(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    from vislr.adapters.sara_layer import SaraLayer

    for prefix, model in models.items():
        for name, layer in model.named_modules():
            if isinstance(layer, SaraLayer):
                yield f"{prefix}.{name}" if prefix else name, layer
