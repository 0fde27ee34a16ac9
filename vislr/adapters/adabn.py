"""AdaBN: a network's BatchNorm statistics are replaced by those of the target's images.

Source: AdaBN as in section "AdaBN" of ConvLoRA (arXiv 2402.04964), first in arXiv 1603.04779. Scale and
shift (gamma, beta) and all weights stay; per channel, over all images and positions of the target::

    y = gamma * (x - mean_target) / sqrt(var_target + eps) + beta

Two steps, as with any adapter: `vislr.apply(model, AdaBnConfig(), name="target")` gives every BatchNorm
statistics of the adapter's own, equal to the source's, so nothing changes yet; then
`vislr.adapt_statistics(model, batches)` computes them from images. The config stays plain data, and the
images are needed once. Put on under the name of an adapter that is there (a ConvLoRA), the statistics
become part of that adapter: one name, one file.

In files: `.adabn_mean` (C,), `.adabn_var` (C,), `.adabn_count` () int64.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft import PeftConfig
from torch import nn

from vislr.adapters import inject
from vislr.adapters.adabn_layer import AdaBnLayer, check_one_carrier
from vislr.adapters.adabn_passes import Adaptation, adapt_statistics
from vislr.adapters.layer import DeltaTuner, chain
from vislr.adapters.targets import batch_norms, check_shared, innermost, modules_outside
from vislr.core.errors import AdapterError
from vislr.core.registry import Attached

__all__ = ["AdaBnConfig", "AdaBnLayer", "AdaBnModel", "Adaptation", "adapt_statistics", "attach"]

PEFT_TYPE = "ADABN"


@dataclass
class AdaBnConfig(PeftConfig):
    """Config of an AdaBN adapter: all BatchNorms of the model that keep running statistics.

    Attributes:
        mode: how `adapt_statistics` computes them. "exact": the pooled moments of all images, each
            BatchNorm's taken with all earlier ones already on target statistics; one pass over the images
            for every BatchNorm in the longest chain; independent of batch size and order. "ema": one
            pass in which BatchNorms normalise with the batch and their running statistics follow by the
            layer's momentum, as in the ConvLoRA authors' training.
        sites: names of the BatchNorms; filled in when the adapter goes on.

    Raises:
        AdapterError: another mode.
    """

    mode: Literal["exact", "ema"] = "exact"
    sites: list[str] | None = field(default=None)
    # peft asks every config for its targets; here it is always all of them.
    target_modules: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.mode not in ("exact", "ema"):
            raise AdapterError(f"mode is {self.mode!r}; choose 'exact' or 'ema'")


def _sites(model: nn.Module) -> list[str]:
    """Names of the model's BatchNorms.

    Raises:
        AdapterError: there are none, one is held twice, or its statistics are not finite.
    """
    norms = batch_norms(model)
    if not norms:
        layers = [type(innermost(module)).__name__ for module in modules_outside(model).values()]
        others = Counter(name for name in layers if "Norm" in name)
        found = ", ".join(f"{count} {name}" for name, count in others.items()) or "none"
        raise AdapterError(
            f"nothing to adapt: this {type(model).__name__} has no BatchNorm with running statistics (norms: {found}); "
            "GroupNorm, LayerNorm and RMSNorm keep no statistics of a data set"
        )
    check_shared(model, list(norms))
    for name, norm in norms.items():
        if not (torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()):
            raise AdapterError(f"the source statistics of '{name}' have NaN or infinite values")
    return list(norms)


def attach(module: Any, change: AdaBnConfig, name: str = "default") -> Attached:
    """Give every BatchNorm statistics of adapter `name`, equal to the source's: the output stays as it is.

    Under a new name the adapter is the only active one. Under the name of an adapter without
    statistics they become part of it, and what is active stays. Nothing becomes trainable or frozen.

    Raises:
        AdapterError: the model has no BatchNorm; the name is impossible or has statistics; another
            adapter with statistics is active beside this one. The model is untouched.
    """
    inject.check_unmerged(module)
    sites = _sites(module)
    beside = name in inject.adapter_names(module)
    if not beside or name in inject.carriers(module):
        inject.check_name(module, name)
    own = inject.adapter_layers(module, name) if beside else {}
    shared = next((site for site in sites if site in own), None)
    if shared is not None:
        raise AdapterError(f"adapter '{name}' changes '{shared}' itself; give the statistics a name of their own")
    active = inject.chosen_names(module)
    if name in active:
        check_one_carrier([*(other for other in inject.carriers(module) if other in active), name])
    before = inject.opening(module)
    config = AdaBnConfig(mode=change.mode, sites=sites)
    found = modules_outside(module)
    switched_off = any(layer.disable_adapters for _, layer in inject.tuner_layers(module))
    for site in sites:
        layer = next((layer for layer in chain(found[site]) if isinstance(layer, AdaBnLayer)), None)
        if layer is None:
            layer = AdaBnLayer(found[site])
            layer.set_adapter(active)
            layer.enable_adapters(not switched_off)
            parent, _, child = site.rpartition(".")
            setattr(_inside(module, parent), child, layer)
        layer.add(name, config)
    if not beside:
        inject.announce(module, name, config)
        inject.set_adapters(module, [name])
    inject.remember(module, before, name)
    undo = {"name": name, "active": active, "part": "statistics"}
    return Attached(tuple(sites), {"kind": "adabn", "config": inject.plain_config(config)}, undo)


def _inside(module: nn.Module, path: str) -> nn.Module:
    """The module at a path of the model without adapters."""
    for part in path.split(".") if path else ():
        module = getattr(innermost(module), part)
    return module


class AdaBnModel(DeltaTuner):
    """peft's tuner of AdaBN."""

    prefix: str = "adabn_"
    tuner_layer_cls = AdaBnLayer  # type: ignore[assignment]

    def _resolve(self, model: nn.Module, config: Any) -> list[str]:
        return _sites(model)

    def _place(self, layer: Any, name: str, site: str, parent: nn.Module, attribute: str, target: nn.Module) -> None:
        if layer is None:
            layer = AdaBnLayer(target)
            # peft's own way of replacing asks the layer for a weight, which a norm may lack.
            setattr(parent, attribute, layer)
        layer.add(name, self.peft_config[name])
