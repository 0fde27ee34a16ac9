"""What a read adapter file is, and the manifest in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vislr.adapters.adabn_layer import AdaBnLayer
from vislr.adapters.inject import plain_config
from vislr.adapters.layer import DeltaLayer, chain
from vislr.adapters.sara_layer import SaraLayer
from vislr.adapters.targets import innermost, modules_outside
from vislr.core.errors import AdapterError, ModelError
from vislr.core.hashing import content_hash
from vislr.core.versions import versions_of
from vislr.formats.manifest import SCHEMA

FORMATS = ("vislr", "diffusers")
# Where a model that is to be divided keeps the "base" entry of its adapter's manifest, with the sites that it is of.
_REMEMBERED = "_vislr_base"


@dataclass(frozen=True)
class AdapterFile:
    """One adapter, read and checked, not yet on a model.

    Attributes:
        kind: "convlora", "flora", "sara", "adabn", "lora" (DoRA too), "loha", "lokr" or "oft".
        config: what `attach` takes to make the same layers: a config of vislr or peft.
        tensors: module path -> suffix of the `vislr` format -> tensor.
        manifest: the header's manifest; of a file without one, what could be read from its keys.
        format: "vislr" or "diffusers".
        notes: what a user should know about the file, a line each.
        statistics: the AdaBnConfig of BatchNorm statistics that stand beside deltas; None without.
        aux: tensors of a head that belongs to the adapter's training; never attached.
    """

    kind: str
    config: Any
    tensors: dict[str, dict[str, torch.Tensor]]
    manifest: dict[str, Any]
    format: str
    notes: tuple[str, ...] = ()
    statistics: Any = None
    aux: dict[str, torch.Tensor] = field(default_factory=dict)

    def kind_of(self, site: str) -> str:
        """The kind of one site: "adabn" where BatchNorm statistics stand beside another kind."""
        return str(self.manifest["sites"].get(site, self.kind))


def base_weights(layers: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Site -> the weight without any adapter, also while adapters of vislr are merged into it.

    Raises:
        AdapterError: an adapter of another kind is merged, or one of vislr was merged without keep_base.
    """
    found = {}
    for site, outer in layers.items():
        nest: list[Any] = list(chain(outer))
        ours = [layer for layer in nest if isinstance(layer, DeltaLayer)]
        # Statistics are no part of a weight.
        known = (DeltaLayer, SaraLayer, AdaBnLayer)
        others = [layer for layer in nest if isinstance(layer, BaseTunerLayer) and not isinstance(layer, known)]
        weight = ours[-1].original_weight() if ours else nest[-1].weight.data
        if weight is None or any(layer.merged for layer in others):
            raise AdapterError(f"an adapter is merged into '{site}' and its base was not kept; unmerge it first")
        for layer in nest:
            if isinstance(layer, SaraLayer):
                weight = layer.restored(weight)
        found[site] = weight
    return found


def source_statistics(layers: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The BatchNorms' own running means and variances, also while an adapter's are merged into them."""
    found = {}
    for site, outer in layers.items():
        holder = next((layer for layer in chain(outer) if isinstance(layer, AdaBnLayer)), None)
        norm: Any = innermost(outer)
        own = {"running_mean": norm.running_mean, "running_var": norm.running_var}
        found.update({f"{site}.{key}": value for key, value in (holder.source() if holder else own).items()})
    return found


def base_entry(module: nn.Module, sites: Mapping[str, str]) -> dict[str, str]:
    """The manifest's "base": sha256 over names, dtypes, shapes and bytes of the weights touched, and their dtype.

    Args:
        sites: site -> kind; of "adabn" the source's statistics count.

    Raises:
        AdapterError: the weights are divided over processes, and `remember_base` was not called before that.
    """
    modules = modules_outside(module)
    weights = base_weights({site: modules[site] for site, kind in sites.items() if kind != "adabn"})
    weights |= source_statistics({site: modules[site] for site, kind in sites.items() if kind == "adabn"})
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    if any(hasattr(weight, "full_tensor") for weight in weights.values()):
        # No process has the whole weights; they are frozen, so what was found before they were divided holds.
        of, entry = module.__dict__.get(_REMEMBERED, (None, {}))
        if of != dict(sites):
            raise AdapterError(
                "the base is divided over processes, and its hash was not kept: remember_base before that"
            )
        return dict(entry)
    return {"sha256": content_hash(weights), "dtype": ", ".join(dtypes)}


def remember_base(module: nn.Module, sites: Mapping[str, str]) -> None:
    """Keep on the model what `base_entry` gives, for when its weights are divided over processes."""
    module.__dict__[_REMEMBERED] = (dict(sites), base_entry(module, sites))


def family_of(module: nn.Module) -> str:
    """The family that anatomy reads the model as, or ""."""
    from vislr.anatomy.families import reader_of

    try:
        return reader_of(module).family
    except ModelError:
        return ""


def make_manifest(
    module: nn.Module,
    *,
    format: str,
    kind: str,
    component: str,
    config: Any,
    sites: Mapping[str, str],
    statistics: Any = None,
) -> str:
    """The manifest as JSON text, the same bytes for the same adapter."""
    manifest = {
        "schema": SCHEMA,
        "format": format,
        "kind": kind,
        "component": component,
        "family": family_of(module),
        "architecture": type(module).__name__,
        "config": plain_config(config),
        "sites": dict(sites),
        "base": base_entry(module, sites),
        "versions": versions_of("vislr", "torch", "peft", "diffusers"),
    }
    if kind == "convlora":
        # Its factors alone do not tell a kernel's axes from channels.
        modules = modules_outside(module)
        # A BatchNorm beside them may have no weight; statistics need no shape.
        weights = {site: getattr(innermost(modules[site]), "weight", None) for site in sites}
        manifest["shapes"] = {site: list(weight.shape) for site, weight in weights.items() if weight is not None}
    if statistics is not None:
        manifest["statistics"] = plain_config(statistics)
    return json.dumps(manifest, sort_keys=True)
