"""peft's folders: `adapter_config.json` and `adapter_model.safetensors`; of pipelines one folder a component.

===========================================================  ========================================
key                                                          shape
===========================================================  ========================================
`base_model.model.<path>.lora_A.weight`, `.lora_B.weight`    as in `vislr.formats.diffusers_files`
`base_model.model.<path>.lora_magnitude_vector`              the same
`base_model.model.<path>.hada_*`, `.lokr_*`                  as in `vislr.formats.canonical`
===========================================================  ========================================

Ranks and alphas are in the config (`r`, `lora_alpha` or `alpha`, `rank_pattern`, `alpha_pattern`). Written are
LoRA and DoRA; LoHa and LoKr are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vislr.core.errors import FormatError
from vislr.core.files import atomic_path, read_json, write_json, write_tensors
from vislr.formats import diffusers_files
from vislr.formats.canonical import COMPONENTS, CanonicalAdapter, Entry
from vislr.formats.container import check_finite, read_header, read_tensors
from vislr.formats.lora_metadata import config_values, packed
from vislr.formats.manifest import DIFFUSERS_METADATA
from vislr.formats.naming import PEFT
from vislr.formats.parsing import parse

KINDS = ("lora",)
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_READ = ("LORA", "LOHA", "LOKR")
# peft loads the text encoders as transformers names their modules now.
_PREFIX = PEFT


def folders(path: Path) -> dict[str, Path]:
    """Component -> its folder with a config; {"": path} of a folder of one model."""
    if (path / CONFIG).is_file():
        return {"": path}
    return {name: path / name for name in COMPONENTS if (path / name / CONFIG).is_file()}


def read(path: Path, strict: bool = True, family: str | None = None) -> CanonicalAdapter:
    """Read a folder of one model, or of a pipeline's components.

    Raises:
        FormatError: no such folder, a config of another kind, or as `parse`.
    """
    found = folders(path)
    if not found:
        raise FormatError(f"'{path}' is no folder of peft: no {CONFIG} in it or in its parts")
    merged: CanonicalAdapter | None = None
    for component, folder in found.items():
        config = _config(folder / CONFIG)
        header = read_header(folder / TENSORS)
        tensors = read_tensors(folder / TENSORS, header)
        if strict:
            check_finite(tensors, folder / TENSORS)
        metadata = dict(header.metadata)
        owner = component or _component(config)
        metadata[DIFFUSERS_METADATA] = packed(
            {owner: config | {"lora_alpha": config.get("lora_alpha", config.get("alpha"))}}
        )
        part = parse(tensors, metadata, strict=strict, family=family, where=str(folder / TENSORS), component=owner)
        if owner == "" and part.family:
            part.entries = {name.partition(".")[2] if _prefixed(name) else name: e for name, e in part.entries.items()}
        if merged is None:
            merged = part
            continue
        merged.entries |= part.entries
        merged.unplaced |= part.unplaced
        merged.notes += [note for note in part.notes if note not in merged.notes]
        merged.family = merged.family or part.family
    assert merged is not None
    merged.format = "peft"
    return merged


def _prefixed(name: str) -> bool:
    return name.partition(".")[0] in COMPONENTS


def _component(config: Mapping[str, Any]) -> str:
    """The component that a lone folder is for, from the class that peft noted."""
    mapping = config.get("auto_mapping") or {}
    name = str(mapping.get("base_model_class", "")) if isinstance(mapping, dict) else ""
    if "UNet" in name:
        return "unet"
    return "transformer" if "Transformer2D" in name else ""


def _config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
    except (ValueError, OSError, RecursionError) as error:
        raise FormatError(f"'{path}' is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") not in _READ:
        given = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise FormatError(f"'{path}' is of type {given!r}; vislr reads {', '.join(_READ)} from peft's folders")
    return config


def write(path: Path, parts: Mapping[str, Mapping[str, Entry]], metadata: Mapping[str, str]) -> int:
    """Write component -> path -> LoRA entry as folders; a lone "" is `path` itself. Returns the tensors written."""
    count = 0
    with atomic_path(path) as temporary:
        temporary.mkdir()
        for component, entries in parts.items():
            diffusers_files.check(entries, component or "the model")
            folder = temporary / component if component else temporary
            folder.mkdir(exist_ok=True)
            tensors: dict[str, torch.Tensor] = {}
            for name, entry in entries.items():
                tensors |= diffusers_files.tensors_of(entry, f"{_PREFIX}{name}.")
            write_tensors(folder / TENSORS, tensors, dict(metadata))
            write_json(folder / CONFIG, config_values(entries) | {"task_type": None, "base_model_name_or_path": None})
            count += len(tensors)
    return count
