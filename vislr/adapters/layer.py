"""The layer and the tuner that ConvLoRA and FLoRA share: everything but the algebra.

A `DeltaLayer` is a peft tuner layer whose adapters add a weight: W' = W + sum of scaling * delta. It
knows names, scales, switching, merging and what a file stores; a method adds parameters and formulas.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn

from vislr.adapters.geometry import Geometry, geometry_of
from vislr.adapters.targets import resolve
from vislr.core.errors import AdapterError, FormatError
from vislr.core.quantizing import holds_codes

# What models, and peft's LoRA when it nests around us, read from a layer beside its weight and bias.
_FORWARDED = frozenset(
    ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
     "groups", "padding_mode")
)  # fmt: skip


def delta_dtype(dtype: torch.dtype) -> torch.dtype:
    """The number type in which deltas of a weight of `dtype` are made: float32, for float64 that."""
    # Not `promote_types`, which knows no 8-bit floats.
    return torch.float64 if dtype == torch.float64 else torch.float32


def chain(layer: Any) -> Iterator[nn.Module]:
    """The layer, then each `base_layer` below it: tuner layers of several kinds nest."""
    nested = True
    while nested:
        yield layer
        nested = isinstance(layer, BaseTunerLayer)
        layer = layer.base_layer if nested else layer


@dataclass
class Merged:
    """What is merged into one weight, kept by the innermost `DeltaLayer` of that weight.

    The merged weight is always `original` plus all parts, summed in float32 and rounded once, so
    parts come off in any order and the last one leaves the original tensor itself.
    """

    original: torch.Tensor | None = None
    parts: list[tuple[DeltaLayer, str, float]] = field(default_factory=list)
    stamp: int = 0

    def delta(self, own: DeltaLayer | None = None) -> torch.Tensor:
        """The sum of the parts (of `own` alone if given), in float32 or wider."""
        chosen = [part for part in self.parts if own is None or part[0] is own]
        return sum((layer.delta(name, scale) for layer, name, scale in chosen), torch.zeros(()))


class DeltaLayer(nn.Module, BaseTunerLayer):
    """A linear or conv and its additive adapters.

    Subclasses set `adapter_layer_names` (one ParameterDict each) and give `create`, `_delta`,
    `activation` and `unit_scale`.

    Attributes:
        base_layer: what was there before; a conv or linear, or a tuner layer of another kind.
        geometry: how the innermost layer applies its weight.
        r, alpha, scaling, dropout: per adapter name; `scaling` is what the delta is multiplied with now,
            `dropout` the probability with which an entry of the adapter's input is dropped in training.
    """

    other_param_names = ("r", "alpha", "scaling", "dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.geometry: Geometry = self.read_geometry()
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())
        self.r: dict[str, Any] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._merged: Merged | None = None
        self.add(adapter_name, config)

    def add(self, name: str, config: Any) -> None:
        """Make the parameters of adapter `name`: float32 (float64 on a float64 layer), where the weight is."""
        weight = self._base.weight
        tensors = self.create(name, config, dtype=delta_dtype(weight.dtype))
        for attribute, tensor in tensors.items():
            getattr(self, attribute)[name] = nn.Parameter(tensor.to(weight.device))
        self.scaling[name] = self.unit_scale(name)
        self.dropout[name] = getattr(config, "dropout", 0.0)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def read_geometry(self) -> Geometry:
        """How the innermost layer applies its weight."""
        return geometry_of(self.get_base_layer())

    def __getattr__(self, name: str) -> Any:
        if name in _FORWARDED:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)

    @property
    def _base(self) -> Any:
        return self.get_base_layer()

    @abstractmethod
    def create(self, name: str, config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Set `r` and `alpha` of the adapter and give the initial tensors, delta 0."""

    @abstractmethod
    def unit_scale(self, name: str) -> float:
        """What the delta is multiplied with at weight 1."""

    @abstractmethod
    def _delta(self, name: str, scale: float, dtype: torch.dtype) -> torch.Tensor:
        """The delta of the weight, computed in `dtype`: same shape as the weight."""

    @abstractmethod
    def activation(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the output, for a batched input `x` (N, Ci, *S) or (..., Ci)."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus what each active, unmerged adapter adds."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.scaling and name not in self.merged_adapters:
                single = self.geometry.dims > 0 and x.dim() == self.geometry.dims + 1
                inputs = F.dropout(x, self.dropout[name], self.training) if self.dropout[name] else x
                if single:
                    result = self.added(name, inputs[None], result[None])[0]
                else:
                    result = self.added(name, inputs, result)
        return result

    def added(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`result`, the layer's output so far for x, with the activation of one adapter."""
        return result + self.activation(name, x)

    def delta(self, name: str, scale: float | None = None) -> torch.Tensor:
        """The delta of adapter `name`: shape of the weight, float32 (float64 for float64 parameters).

        Args:
            scale: instead of the present `scaling`.
        """
        device = next(self._tensors(name)).device.type
        # Autocast knows no meta device, and there nothing is computed that it could round.
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            return self._delta(name, self.scaling[name] if scale is None else scale, self._wide())

    def _wide(self) -> torch.dtype:
        return delta_dtype(self._base.weight.dtype)

    def _tensors(self, name: str) -> Iterator[torch.Tensor]:
        return (tensor for _, tensor in self._named_tensors(name))

    def _named_tensors(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        for attribute in self.adapter_layer_names:
            if name in getattr(self, attribute):
                yield attribute, getattr(self, attribute)[name]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """peft's name for `delta`."""
        return self.delta(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter's parameters off this layer.

        Raises:
            AdapterError: it is merged into the weight.
        """
        if adapter_name in self.merged_adapters:
            raise AdapterError(f"adapter '{adapter_name}' is merged into the weights; unmerge (unfuse_lora) it first")
        super().delete_adapter(adapter_name)

    # Scales, with the meaning that peft's layers give these names.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Weight an adapter; 1 is as trained."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.unit_scale(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Take `scale_layer(scale)` back; None: back to weight 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.unit_scale(name) if scale is None else self.scaling[name] / scale

    # Merging.

    def _state(self) -> Merged:
        # Of several DeltaLayers on one weight, the innermost keeps the state for all of them.
        ground = [layer for layer in chain(self) if isinstance(layer, DeltaLayer)][-1]
        if ground._merged is None:
            ground._merged = Merged()
        return ground._merged

    def _write(self, state: Merged) -> None:
        base = self._base
        assert state.original is not None
        if state.parts:
            wide = state.original.to(base.weight.device, self._wide()) + state.delta()
            base.weight.data = wide.to(base.weight.dtype)
        else:
            base.weight.data = state.original.to(base.weight.device, base.weight.dtype)
        state.stamp = _stamp(base.weight.data)

    def _rebase(self, state: Merged) -> None:
        # Another kind (peft's LoRA adds in place) merged or unmerged since: carry its change over.
        weight = self._base.weight.data
        if state.original is not None and state.parts and _stamp(weight) != state.stamp:
            state.original = (weight.to(self._wide()) - state.delta()).to(weight.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep_base: bool = True) -> None:
        """Write adapters into the weight: summed in float32, rounded once.

        Args:
            safe_merge: look at the deltas first and refuse one that is not finite.
            adapter_names: which; None: the active ones.
            keep_base: keep the original weight, so that `unmerge` restores its bits (memory: the
                weight once more). False: `unmerge` subtracts, which is approximate, and says so.

        Raises:
            AdapterError: `safe_merge` found a delta that is not finite; nothing is changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.scaling]
        if not names:
            return
        if safe_merge:
            for name in names:
                if not torch.isfinite(self.delta(name)).all():
                    raise AdapterError(f"adapter '{name}' has weights that are not finite; nothing was merged")
        base, state = self._base, self._state()
        if holds_codes(base):
            raise AdapterError(
                f"cannot merge '{names[0]}' into a quantised weight: its values lie on a grid; keep the adapter "
                "unmerged, or merge before quantising"
            )
        self._rebase(state)
        added = [(self, name, self.scaling[name]) for name in names]
        if keep_base and not state.parts:
            state.original = base.weight.data
        state.parts += added
        self.merged_adapters += names
        if state.original is not None:
            self._write(state)
        else:
            wide = base.weight.data.to(self._wide()) + sum(layer.delta(name, scale) for layer, name, scale in added)
            base.weight.data = wide.to(base.weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take this layer's merged adapters out of the weight.

        Bit for bit where the base was kept. If another kind was merged into the same weight and
        taken out in between, as exact as that kind's own unmerging.
        """
        if not self.merged:
            return
        base, state = self._base, self._state()
        self._rebase(state)
        own = state.delta(self) if state.original is None else None
        state.parts = [part for part in state.parts if part[0] is not self]
        self.merged_adapters = []
        if own is None:
            self._write(state)
        else:
            base.weight.data = (base.weight.data.to(self._wide()) - own).to(base.weight.dtype)
            warnings.warn(
                "unmerged by subtraction: the weights are approximate (merged without keep_base)", stacklevel=2
            )
        if not state.parts:
            state.original = None

    def original_weight(self) -> torch.Tensor | None:
        """The weight without any merged adapter of vislr; None if it was not kept."""
        state = self._state()
        return state.original if state.parts else self._base.weight.data

    # Files.

    def file_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Suffix -> tensor, as the `vislr` format stores adapter `name`; `alpha` is a float32 scalar."""
        tensors = {attribute: tensor.detach() for attribute, tensor in self._named_tensors(name)}
        return {**tensors, "alpha": torch.tensor(self.alpha[name], dtype=torch.float32)}

    @torch.no_grad()
    def load_file_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Take the values of `file_tensors` (same suffixes, same shapes); the weight goes back to 1."""
        expected = self.file_tensors(name)
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in expected.items()}:
            raise FormatError(f"adapter '{name}' expects {sorted(expected)}, got {sorted(tensors)} or other shapes")
        for attribute, tensor in self._named_tensors(name):
            tensor.copy_(tensors[attribute])
        if tensors["alpha"] != expected["alpha"]:
            # Equal ones stay as the config says: float32 would round 0.1.
            self.alpha[name] = float(tensors["alpha"])
        self.scaling[name] = self.unit_scale(name)

    def extra_repr(self) -> str:
        return f"adapters={list(self.scaling)}, shape={self.geometry.shape}"


def _stamp(weight: torch.Tensor) -> int:
    """A number that changes with the bits, the same in any order of summation and on any device."""
    if weight.device.type == "meta":
        return 0
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(weight.contiguous().view(integers[weight.element_size()]).sum(dtype=torch.int64))


class DeltaTuner(BaseTuner):
    """Puts `DeltaLayer`s in; the targets are resolved once, against the model, before it is touched."""

    target_module_mapping = {}  # noqa: RUF012
    tuner_layer_cls: type[DeltaLayer]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        resolved = copy.copy(peft_config)
        resolved.sites = self._resolve(model, peft_config)
        # The user's own config object stays as written; peft reads this one from now on.
        name = next(name for name, config in self.peft_config.items() if config is peft_config)
        self.peft_config[name] = resolved
        self._sites = frozenset(resolved.sites)

    def _resolve(self, model: nn.Module, config: Any) -> list[str]:
        """The sites that this config touches."""
        return resolve(model, config)

    # peft has a static method here and calls it on the instance.
    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._sites

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = next((layer for layer in chain(target) if isinstance(layer, self.tuner_layer_cls)), None)
        self._place(layer, adapter_name, current_key, parent, target_name, target)

    def _place(self, layer: Any, name: str, site: str, parent: nn.Module, attribute: str, target: nn.Module) -> None:
        """Add adapter `name` to the layer of this kind that is at `site`, or put a new one in the place of `target`."""
        config = self.peft_config[name]
        if layer is None:
            self._replace_module(parent, attribute, self.tuner_layer_cls(target, name, config), target)
        else:
            layer.add(name, config)
