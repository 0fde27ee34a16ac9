"""Write one adapter of a model to a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vislr.adapters.adabn_layer import AdaBnLayer
from vislr.adapters.inject import adapter_layers, plain_config
from vislr.core.errors import FormatError, hint
from vislr.core.files import write_tensors
from vislr.formats.adapter_file import FORMATS, make_manifest, remember_base
from vislr.formats.kinds import kind_of_config, stored
from vislr.formats.manifest import AUX, DIFFUSERS_METADATA, MANIFEST


def write_adapter(
    module: Any,
    name: str,
    path: str | os.PathLike,
    format: str = "vislr",
    component: str = "",
    metadata: Mapping[str, str] | None = None,
    aux: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write adapter `name`; the file is the same whether the adapter is merged or not.

    Args:
        module: the model that carries it.
        path: the file, written beside and renamed.
        format: "vislr" (every kind) or "diffusers" (plain LoRA).
        component: the module's name in its pipeline ("unet", "transformer"); "": of `diffusers` files,
            "unet" for a UNet, else "transformer".
        metadata: further entries of the header, text to text.
        aux: tensors of a head that belongs to the adapter's training and is not attached on load; stored as
            `aux.<name>`, in format "vislr" alone.

    Raises:
        AdapterError: no such adapter, or a foreign adapter is merged into its layers.
        FormatError: unknown format, or the format cannot hold this kind.
        OutputError: the file cannot be written.
    """
    if format not in FORMATS:
        raise FormatError(f"no format is called '{format}'{hint(format, FORMATS)}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise FormatError(f"metadata is text to text; got {key!r}: {value!r}")
        if key in ("format", MANIFEST, DIFFUSERS_METADATA):
            raise FormatError(f"metadata '{key}' belongs to the format")
    layers = adapter_layers(module, name)
    config: Any = module.peft_config[name]
    kind, kinds = kind_of_config(config), _kinds(module, name)
    tensors = {site: stored(layer, name, kinds[site]) for site, layer in layers.items()}
    statistics = None
    if kind != "adabn":
        statistics = next((layer.configs[name] for layer in layers.values() if isinstance(layer, AdaBnLayer)), None)
    header = dict(metadata or {})
    if format == "diffusers":
        if aux:
            raise FormatError("format 'diffusers' holds no auxiliary head; use format 'vislr'")
        component = component or ("unet" if "UNet" in type(module).__name__ else "transformer")
        flat = _diffusers_tensors(tensors, kind if statistics is None else f"{kind} and adabn", component)
        packed = {f"{component}.{key}": value for key, value in plain_config(config).items()}
        header[DIFFUSERS_METADATA] = json.dumps(packed, indent=2, sort_keys=True)
    else:
        flat = {f"{site}.{suffix}": tensor for site, parts in tensors.items() for suffix, tensor in parts.items()}
        flat |= {f"{AUX}{key}": tensor for key, tensor in (aux or {}).items()}
    header[MANIFEST] = make_manifest(
        module, format=format, kind=kind, component=component, config=config, sites=kinds, statistics=statistics
    )
    write_tensors(path, flat, header)
    return Path(path)


def remember_adapters_base(module: Any, name: str) -> None:
    """Keep the hash of what adapter `name` sits on: once the weights are divided over processes nobody has them."""
    remember_base(module, _kinds(module, name))


def _kinds(module: Any, name: str) -> dict[str, str]:
    """Site -> kind of what adapter `name` has there."""
    kind = kind_of_config(module.peft_config[name])
    layers = adapter_layers(module, name)
    return {site: "adabn" if isinstance(layer, AdaBnLayer) else kind for site, layer in layers.items()}


def _diffusers_tensors(
    tensors: dict[str, dict[str, torch.Tensor]], kind: str, component: str
) -> dict[str, torch.Tensor]:
    flat = {}
    for site, parts in tensors.items():
        if kind != "lora" or "dora_scale" in parts:
            given = "dora" if kind == "lora" else kind
            raise FormatError(f"format 'diffusers' holds plain LoRA, not {given}; use format 'vislr'")
        flat[f"{component}.{site}.lora_A.weight"] = parts["lora_down.weight"]
        flat[f"{component}.{site}.lora_B.weight"] = parts["lora_up.weight"]
    return flat
