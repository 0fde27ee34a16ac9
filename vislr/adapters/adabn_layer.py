"""The layer under AdaBN: a BatchNorm that reads its statistics from the active adapter.

The statistics are the adapter's own buffers. While one is active they take the place of the BatchNorm's
running mean, variance and count, in training mode too: there they move by the layer's momentum and the
source's stay as they are, bit for bit. A weight has no meaning for them: they are used or not.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.func import functional_call

from vislr.core.errors import AdapterError, FormatError

_RUNNING = {"mean": "running_mean", "var": "running_var", "count": "num_batches_tracked"}
# What code outside reads from a BatchNorm beside its weight and bias.
_FORWARDED = frozenset(("num_features", "eps", "momentum", "affine", "track_running_stats"))


class Statistics(nn.Module):
    """One adapter's statistics of one BatchNorm of C channels; a copy of the source's at first.

    Attributes:
        mean, var: (C,), the dtype of the BatchNorm's own.
        count: () int64, batches that they come from: 0 until they are adapted.
    """

    mean: torch.Tensor
    var: torch.Tensor
    count: torch.Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.register_buffer("mean", norm.running_mean.detach().clone())
        self.register_buffer("var", norm.running_var.detach().clone())
        self.register_buffer("count", torch.zeros_like(norm.num_batches_tracked))


class AdaBnLayer(nn.Module, BaseTunerLayer):
    """A BatchNorm1d/2d/3d and the statistics of its adapters, of which at most one is in use.

    Attributes:
        base_layer: what was there before: the BatchNorm, or a tuner layer of another kind around it.
        adabn_statistics: adapter name -> Statistics.
        configs: adapter name -> AdaBnConfig.
    """

    adapter_layer_names = ("adabn_statistics",)
    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adabn_statistics = nn.ModuleDict()
        self.configs: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._source: dict[str, torch.Tensor] = {}

    def add(self, name: str, config: Any) -> None:
        """Give adapter `name` a copy of the source's statistics."""
        source = self.source()
        statistics = Statistics(self.get_base_layer())
        statistics.mean.copy_(source["running_mean"])
        statistics.var.copy_(source["running_var"])
        self.adabn_statistics[name], self.configs[name] = statistics, config
        for own in (self, self.adabn_statistics, statistics):
            own.training = self.base_layer.training

    def __getattr__(self, name: str) -> Any:
        if name in _FORWARDED:
            return getattr(self.get_base_layer(), name)
        if name in _RUNNING.values():
            return self._in_use()[name]
        return super().__getattr__(name)

    def statistics(self, name: str) -> Any:
        """The Statistics of adapter `name`."""
        return self.adabn_statistics[name]

    def carried(self) -> str | None:
        """The adapter whose statistics the forward reads; None: the base's own buffers are read."""
        if self.disable_adapters or self.merged:
            return None
        return next((name for name in self.active_adapters if name in self.adabn_statistics), None)

    def _in_use(self) -> dict[str, torch.Tensor]:
        """Name of the BatchNorm's buffer -> tensor that the forward reads."""
        name = self.carried()
        holder, keys = (self.get_base_layer(), None) if name is None else (self.statistics(name), _RUNNING)
        return {running: getattr(holder, key if keys else running) for key, running in _RUNNING.items()}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The BatchNorm, with the statistics of the active adapter."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.carried() is None:
            return self.base_layer(x, *args, **kwargs)
        inside = ""
        layer: Any = self.base_layer
        while layer is not self.get_base_layer():
            inside, layer = inside + "base_layer.", layer.base_layer
        buffers = {inside + running: tensor for running, tensor in self._in_use().items()}
        return functional_call(self.base_layer, buffers, (x, *args), kwargs)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters active.

        Raises:
            AdapterError: two of them carry statistics of this layer.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_one_carrier([name for name in names if name in self.adabn_statistics])
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        """Use the active adapter's statistics, or the source's."""
        self._disable_adapters = not enabled

    # peft and diffusers call these on every layer of a weighted adapter; statistics have no weight.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Nothing: statistics are used or not."""

    def scale_layer(self, scale: float) -> None:
        """Nothing: statistics are used or not."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Nothing: statistics are used or not."""

    # Merging: the statistics are copied into the BatchNorm's own buffers.

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Copy an adapter's statistics into the BatchNorm, and keep the source's for `unmerge`.

        Raises:
            AdapterError: they would be the second, or `safe_merge` finds values that are not finite;
                nothing is changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adabn_statistics]
        if not names:
            return
        check_one_carrier([*self.merged_adapters, *names])
        statistics, norm = self.statistics(names[0]), self.get_base_layer()
        if safe_merge and not (torch.isfinite(statistics.mean).all() and torch.isfinite(statistics.var).all()):
            raise AdapterError(f"adapter '{names[0]}' has statistics that are not finite; nothing was merged")
        self._source = {running: getattr(norm, running).clone() for running in _RUNNING.values()}
        for key, running in _RUNNING.items():
            getattr(norm, running).copy_(getattr(statistics, key))
        self.merged_adapters.append(names[0])

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the source's statistics back, bit for bit."""
        for running, tensor in self._source.items():
            getattr(self.get_base_layer(), running).copy_(tensor)
        self._source, self.merged_adapters = {}, []

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter's statistics.

        Raises:
            AdapterError: they are merged into the BatchNorm.
        """
        if adapter_name in self.merged_adapters:
            raise AdapterError(f"adapter '{adapter_name}' is merged into the weights; unmerge (unfuse_lora) it first")
        super().delete_adapter(adapter_name)

    def source(self) -> dict[str, torch.Tensor]:
        """The base's own running mean and variance, also while an adapter is merged."""
        norm = self.get_base_layer()
        return {key: self._source.get(key, getattr(norm, key)) for key in ("running_mean", "running_var")}

    # Files.

    def file_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Suffix -> tensor, as the `vislr` format stores them."""
        return {f"adabn_{key}": getattr(self.statistics(name), key).detach() for key in _RUNNING}

    def check_file_tensors(self, tensors: dict[str, torch.Tensor], site: str) -> None:
        """Refuse impossible values of the right shapes.

        Raises:
            FormatError: a negative variance, or a count that is no whole number of at least 0.
        """
        if (tensors["adabn_var"] < 0).any():
            raise FormatError(f"'{site}.adabn_var' has negative values; a variance has none")
        count = tensors["adabn_count"]
        if count.is_floating_point() or int(count) < 0:
            raise FormatError(f"'{site}.adabn_count' is {count.item()}; expected a whole number of at least 0")

    @torch.no_grad()
    def load_file_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Take the values of `file_tensors`."""
        for key in _RUNNING:
            getattr(self.statistics(name), key).copy_(tensors[f"adabn_{key}"])


def check_one_carrier(names: list[str]) -> None:
    """Refuse two adapters with statistics at a time.

    Raises:
        AdapterError: names both.
    """
    if len(names) > 1:
        raise AdapterError(
            f"adapters '{names[0]}' and '{names[1]}' both carry BatchNorm statistics; only one can be in use"
        )
