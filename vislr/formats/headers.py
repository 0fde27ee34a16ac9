"""The header that tools look at: kohya's `ss_*`, Stability's `modelspec.*`, the hash of A1111.

==================================  ==============================================================
key                                 who needs it
==================================  ==============================================================
`ss_base_model_version`, `ss_v2`    A1111 and Forge sort by it; sd-scripts
`ss_network_module`, `_dim`,        viewers, sd-scripts' tools
`_alpha`, `_args`
`ss_output_name`                    A1111: the name in `<lora:name:1>`
`sshs_model_hash`                   A1111: sha256 of the tensors' bytes as they stand in the file
`modelspec.sai_model_spec`,         SwarmUI, managers of ComfyUI: the keys that the standard demands
`.architecture`, `.implementation`,
`.title`, `.resolution`
`modelspec.hash_sha256`             the same hash, with "0x" before it
==================================  ==============================================================

What a training tool wrote is kept, without folders and without the names of users in them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping

import torch

from vislr.formats.canonical import Entry
from vislr.formats.container import DTYPES
from vislr.formats.families import FAMILIES

_RESOLUTION = {"sd15": "512x512", "sd2": "768x768", "pixart": "1024x1024", "sdxl": "1024x1024", "sd3": "1024x1024",
               "flux": "1024x1024", "dit": "256x256"}  # fmt: skip
# Windows drives, home folders and absolute paths: everything up to the last separator goes.
_FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:(?:\\\\?|/)|\\\\\\\\|~/|/)(?:[^\\/\"'\n:*?<>|]+(?:\\\\?|/))+")
_PERSONAL = ("ss_training_host", "ss_user", "ss_username", "ss_hostname")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The order in which safetensors lays tensors out: the last of these first, then by key.
_ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")


def scrubbed(metadata: Mapping[str, str]) -> dict[str, str]:
    """The header without folders (the file's name in a path stays) and without the keys that name people."""
    kept = {key: value for key, value in metadata.items() if key not in _PERSONAL}
    return {key: value if "://" in value else _FOLDERS.sub("", value) for key, value in kept.items()}


def describe(entries: Mapping[str, Entry], family: str, title: str, given: Mapping[str, str]) -> dict[str, str]:
    """The `ss_*` and `modelspec.*` keys for these entries; what `given` says stays where it is no matter of layout."""
    header = scrubbed(given)
    ranks = Counter(entry.rank for entry in entries.values() if entry.rank)
    rank = ranks.most_common(1)[0][0] if ranks else None
    scales = Counter(entry.scale for entry in entries.values() if entry.rank == rank)
    kinds = sorted({entry.kind for entry in entries.values()})
    conv = any(entry.shape is not None and len(entry.shape) > 2 for entry in entries.values())
    plain = kinds == ["lora"] and not any("lora_mid.weight" in e.tensors for e in entries.values())
    algo = next((kind for kind in ("loha", "lokr") if kind in kinds), "locon" if "lora" in kinds else "full")
    if rank is not None:
        header["ss_network_dim"] = str(rank)
        header["ss_network_alpha"] = f"{scales.most_common(1)[0][0] * rank:g}"
    header["ss_network_module"] = "networks.lora" if plain else "lycoris.kohya"
    header["ss_network_args"] = json.dumps(
        ({} if plain else {"algo": algo}) | ({"conv_dim": str(rank)} if conv else {})
    )
    header.setdefault("ss_output_name", title)
    header["modelspec.sai_model_spec"] = "1.0.1"
    header.setdefault("modelspec.title", title)
    header.setdefault("modelspec.implementation", "https://github.com/huggingface/diffusers")
    known = FAMILIES.get(family)
    if known is not None:
        if header.get("ss_base_model_version") not in known.base_versions:
            header["ss_base_model_version"] = known.base_versions[0]
        header["ss_v2"] = str(family == "sd2")
        if header.get("modelspec.architecture") not in known.architectures:
            header["modelspec.architecture"] = known.architectures[0]
        if family in _RESOLUTION:
            header.setdefault("modelspec.resolution", _RESOLUTION[family])
    return header


def hashes(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """sha256 over the tensors' bytes in the order in which safetensors writes them."""
    digest = hashlib.sha256()
    ordered = sorted(tensors, key=lambda key: (-_ORDER.index(_DTYPE_NAMES[tensors[key].dtype]), key))
    for key in ordered:
        tensor = tensors[key].detach().cpu().contiguous()
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    value = digest.hexdigest()
    return {"sshs_model_hash": value, "modelspec.hash_sha256": f"0x{value}"}
