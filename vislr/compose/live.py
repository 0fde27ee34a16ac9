"""What each adapter does to each weight, read off the live layers at weight 1: one way for every kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from torch import nn

from vislr.adapters.adabn_layer import AdaBnLayer
from vislr.adapters.inject import plain_name, tuner_layers, unit_scale
from vislr.adapters.layer import DeltaLayer
from vislr.adapters.sara_layer import SaraLayer
from vislr.core.errors import AdapterError
from vislr.core.merging import Factors, wide


@dataclass(frozen=True)
class Delta:
    """What one adapter adds to one layer at weight 1.

    Attributes:
        weight: shape of the layer's weight; float32 (float64 on a float64 layer).
        bias: (Co,), or None.
        factors: (up, down) with up @ down the weight's change, kernel axes with the input; None: not low-rank.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    factors: Factors | None = None


def is_additive(layer: Any, name: str) -> bool:
    """Whether this adapter adds an activation of its own on this layer, whatever else is active there."""
    if isinstance(layer, LoraLayer):
        plain = isinstance(layer.get_base_layer(), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return plain and name not in layer.lora_variant and name in layer.lora_A
    return isinstance(layer, DeltaLayer)


@torch.no_grad()
def delta_of(layer: Any, name: str, site: str) -> Delta:
    """The change that adapter `name` makes on a layer, at weight 1.

    Raises:
        AdapterError: the kind is no addition to a weight (rotations, scalings of activations).
    """
    if isinstance(layer, DeltaLayer):
        # Layers out of files may change a bias, too.
        entry = getattr(layer, "entry", None)
        return Delta(layer.delta(name, layer.unit_scale(name)), None if entry is None else entry(name).bias_delta())
    if isinstance(layer, SaraLayer):
        with _at_one(layer, name):
            after, before = layer.tensors_with([name]), layer.tensors_with()
        changes = {key: wide(after[key]) - wide(before[key]) for key in after}
        bias = changes.get("bias")
        return Delta(changes["weight"], bias if bias is not None and bool(bias.any()) else None)
    if isinstance(layer, (LoraLayer, LycorisLayer)):
        with _at_one(layer, name):
            change = wide(cast(Any, layer).get_delta_weight(name))
            if isinstance(layer, LoraLayer) and name in layer.lora_variant:
                return Delta(_dora(layer, name, change, site))
            factors = _factors(layer, name) if isinstance(layer, LoraLayer) else None
        return Delta(change, None, factors)
    raise AdapterError(f"'{name}' on '{site}' is a {type(layer).__name__}, which is no addition to a weight")


class _at_one:
    """While inside, the adapter's weight on this layer is 1."""

    def __init__(self, layer: Any, name: str):
        self.layer, self.name = layer, name

    def __enter__(self) -> None:
        self.before = self.layer.scaling[self.name]
        self.layer.scaling[self.name] = unit_scale(self.layer, self.name)

    def __exit__(self, *_: object) -> None:
        self.layer.scaling[self.name] = self.before


def _factors(layer: Any, name: str) -> Factors | None:
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    if getattr(layer.get_base_layer(), "groups", 1) != 1 or getattr(layer, "fan_in_fan_out", False):
        return None
    return wide(up.detach()).flatten(1) * layer.scaling[name], wide(down.detach()).flatten(1)


def _dora(layer: Any, name: str, change: torch.Tensor, site: str) -> torch.Tensor:
    """DoRA's change of the weight: rows of W + D brought to the learned lengths, less W."""
    if not layer.use_dora.get(name):
        raise AdapterError(f"'{name}' on '{site}' is a variant of LoRA that is no addition to a weight")
    weight = wide(layer.get_base_layer().weight)
    turned = weight + change
    length = layer.lora_magnitude_vector[name].weight.flatten() / turned.flatten(1).norm(dim=1)
    return turned * length.reshape(-1, *(1,) * (weight.dim() - 1)) - weight


def deltas(module: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Delta]]]:
    """(site, adapter -> its change there) of every layer that any of these adapters changes.

    BatchNorm statistics are no change of a weight and are left out.

    Raises:
        AdapterError: as `delta_of`.
    """
    sites: dict[str, list[Any]] = {}
    for path, layer in tuner_layers(module):
        if not isinstance(layer, AdaBnLayer):
            sites.setdefault(plain_name(path), []).append(layer)
    for site, layers in sites.items():
        found = {
            name: delta_of(layer, name, site)
            for name in names
            for layer in layers
            if name in layer._get_available_adapters()
        }
        if found:
            yield site, found
