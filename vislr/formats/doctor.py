"""What is in an adapter file, what is wrong with it, and what each tool will do with it; no model is needed."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from vislr.core.arguments import plain_data
from vislr.core.errors import FormatError
from vislr.core.hashing import content_hash
from vislr.formats.canonical import NO_DELTA, CanonicalAdapter, Entry, split_name
from vislr.formats.container import Header, is_finite, read_header, read_tensors, shown
from vislr.formats.doctor_traits import Verdict, traits_of, verdicts
from vislr.formats.exchange import read_canonical
from vislr.formats.factors import pair_of
from vislr.formats.manifest import SCHEMA
from vislr.formats.parsing import parse
from vislr.formats.weights_base import Checkpoint

_BASE_KEYS = ("ss_base_model_version", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash",
              "modelspec.architecture")  # fmt: skip
_FOLDER = re.compile(r"(?:[A-Za-z]:\\|/home/|/Users/|/root/|\\Users\\)")
_BLOCK = re.compile(r"(\w+\.\d+|mid_block|middle_block)(?:\.|$)")
HALF_MAX = 65504.0
# A layer whose entries are this many times the median layer's is called exploding.
EXPLODING = 30.0


@dataclass
class Diagnosis:
    """Everything that `examine` found.

    Attributes:
        path: the file or folder.
        format: as read.
        family: a key of `families.FAMILIES`, or "".
        kinds: kind -> layers ("lora", "tucker", "dora", ...).
        components: component -> layers.
        ranks, scales: value -> layers.
        dtypes: type of the file -> tensors.
        parameters: values in the file.
        bytes: of all tensors.
        made_for: what the header says of the base, a line each.
        layers: layer -> Frobenius norm of its change.
        relative: the same divided by the norm of the base's weight; with a base only.
        blocks: block -> norm of its layers together, in the order of the file.
        problems: what is wrong, a line each.
        notes: what is worth knowing, a line each.
        traits: trait of `doctor_rules.TRAITS` -> how many.
        verdicts: one a tool.
    """

    path: Path
    format: str
    family: str
    kinds: Counter[str] = field(default_factory=Counter)
    components: Counter[str] = field(default_factory=Counter)
    ranks: Counter[int] = field(default_factory=Counter)
    scales: Counter[float] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    parameters: int = 0
    bytes: int = 0
    made_for: list[str] = field(default_factory=list)
    layers: dict[str, float] = field(default_factory=dict)
    relative: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    traits: Counter[str] = field(default_factory=Counter)
    verdicts: list[Verdict] = field(default_factory=list)


def examine(path: str | os.PathLike, base: Checkpoint | None = None) -> Diagnosis:
    """Examine an adapter file, or a folder of peft.

    Args:
        base: the model that it is to go on; its shapes are compared, norms become relative.

    Raises:
        FormatError: no such file, damaged as a container, or nothing in it is an adapter's.
    """
    path = Path(path)
    if path.is_dir():
        headers = [read_header(file) for file in sorted(path.rglob("adapter_model.safetensors"))]
        adapter = read_canonical(path, strict=False)
        tensors: dict[str, torch.Tensor] = {}
        for header in headers:
            tensors |= read_tensors(header.path, header)
    else:
        headers = [read_header(path)]
        tensors = read_tensors(path, headers[0])
        adapter = parse(tensors, headers[0].metadata, strict=False, where=str(path))
    found = Diagnosis(path, adapter.format, adapter.family)
    _count(found, headers, adapter)
    _check_values(found, tensors)
    _measure(found, adapter, base)
    found.notes += adapter.notes
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    _read_metadata(found, adapter, metadata)
    if base is not None:
        _compare(found, adapter, base)
    found.traits = traits_of(tensors, metadata, adapter) + found.traits
    found.verdicts = verdicts(found.traits, str(path), "BASE" if base is None else str(base.path))
    return found


def block_of(name: str) -> str:
    """The block of the model that a layer is in: "unet.down_blocks.1", "text_encoder.layers.3", "unet.other"."""
    component, path = split_name(name)
    path = path.removeprefix("text_model.").removeprefix("encoder.")
    match = _BLOCK.match(path)
    return f"{component}.{match[1] if match else 'other'}".removeprefix(".")


def norm_of(entry: Entry, weight: torch.Tensor | None = None) -> float | None:
    """Frobenius norm of what a layer does to its weight and bias; None: the kind has none, or DoRA without weight.

    Factors are never multiplied out where they are small: |U D|^2 = sum (U^T U) * (D D^T).
    """
    if entry.kind in NO_DELTA or (entry.dora and weight is None):
        return None
    pair = None if entry.dora or entry.kind == "convlora" else pair_of(entry)
    if pair is not None and pair[0].shape[1] <= min(pair[0].shape[0], pair[1].shape[1]):
        up, down = pair[0].double(), pair[1].double()
        squared = float(((up.T @ up) * (down @ down.T)).sum()) * entry.scale**2
    else:
        squared = float(entry.delta(weight).double().square().sum())
    bias = entry.bias_delta()
    if bias is not None:
        squared += float(bias.double().square().sum())
    return math.sqrt(squared) if squared > 0 else squared


def _count(found: Diagnosis, headers: list[Header], adapter: CanonicalAdapter) -> None:
    for header in headers:
        for info in header.tensors.values():
            found.dtypes[info.dtype] += 1
            found.parameters += info.numel
            found.bytes += info.bytes
    for name, entry in adapter.entries.items():
        found.kinds["tucker" if "lora_mid.weight" in entry.tensors else entry.kind] += 1
        if entry.dora:
            found.kinds["dora"] += 1
        found.components[split_name(name)[0] or "model"] += 1
        if entry.rank is not None:
            found.ranks[entry.rank] += 1
            found.scales[round(entry.scale, 6)] += 1


def _check_values(found: Diagnosis, tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            found.traits["not finite"] += 1
            found.problems.append(f"'{shown(key)}' has NaN or infinite values")
        elif tensor.dtype in (torch.float32, torch.float64, torch.bfloat16) and tensor.numel():
            largest = float(tensor.float().abs().max())
            if largest > HALF_MAX:
                found.traits["beyond half"] += 1
                found.problems.append(f"'{shown(key)}' has values up to {largest:.3g}, beyond float16's {HALF_MAX:g}")


def _measure(found: Diagnosis, adapter: CanonicalAdapter, base: Checkpoint | None) -> None:
    sizes: dict[str, int] = {}
    for name, entry in adapter.entries.items():
        weight = base.weights[name] if base is not None and name in base.weights.places else None
        if weight is not None and entry.shape is not None and tuple(weight.shape) != tuple(entry.shape):
            weight = None
        try:
            norm = norm_of(entry, weight)
        except (FormatError, RuntimeError, KeyError, IndexError) as error:
            found.problems.append(f"'{shown(name)}' has no meaning: {shown(error)}")
            continue
        if norm is None:
            continue
        found.layers[name] = norm
        sizes[name] = max(1, math.prod(entry.shape or (1,)))
        if weight is not None:
            size = float(weight.double().norm())
            found.relative[name] = norm / size if size else math.inf
        block = block_of(name)
        found.blocks[block] = math.hypot(found.blocks.get(block, 0.0), norm)
    blind = sum(bool(entry.dora) and name not in found.layers for name, entry in adapter.entries.items())
    if blind:
        found.notes.append(f"how much {blind} DoRA layers change depends on the base: give it (--base)")
    dead = [name for name, norm in found.layers.items() if norm == 0]
    if dead:
        found.problems.append(f"{len(dead)} of {len(found.layers)} layers do nothing, '{shown(dead[0])}' for one")
    spread = {n: norm / math.sqrt(sizes[n]) for n, norm in found.layers.items() if 0 < norm < math.inf}
    if len(spread) >= 4:
        usual = median(spread.values())
        for name, value in spread.items():
            if value > EXPLODING * usual:
                found.problems.append(f"'{shown(name)}' explodes: {value / usual:.0f} times the median layer's change")


def _read_metadata(found: Diagnosis, adapter: CanonicalAdapter, metadata: Mapping[str, str]) -> None:
    for key in _BASE_KEYS:
        if metadata.get(key):
            found.made_for.append(f"{key} = {shown(metadata[key])}")
    manifest = adapter.manifest
    if manifest is not None:
        if manifest["architecture"]:
            found.made_for.append(f"architecture {shown(manifest['architecture'])}")
        if manifest["base"].get("sha256"):
            found.made_for.append(f"weights sha256 {shown(manifest['base']['sha256'])[:16]}...")
    leaks = [key for key, value in metadata.items() if _FOLDER.search(value)]
    if leaks:
        found.notes.append(f"the header names folders of a machine: {', '.join(map(shown, leaks[:4]))}")
    for key, reason in list(adapter.unplaced.items())[:8]:
        found.problems.append(f"'{shown(key)}' {reason}")
    if len(adapter.unplaced) > 8:
        found.problems.append(f"{len(adapter.unplaced) - 8} more tensors have no place")


def _compare(found: Diagnosis, adapter: CanonicalAdapter, base: Checkpoint) -> None:
    places = base.weights.places
    missing = [name for name in adapter.entries if name not in places]
    if missing:
        if adapter.family and base.family and adapter.family != base.family:
            found.problems.append(f"it is for the family '{adapter.family}', the base is '{base.family}'")
        found.problems.append(
            f"the base has no layer for {len(missing)} of {len(adapter.entries)}, '{shown(missing[0])}' for one"
        )
    other = [
        name for name, entry in adapter.entries.items()
        if name in places and entry.shape is not None and not _fits(entry.shape, places[name].shape)
    ]  # fmt: skip
    if other:
        name = other[0]
        found.problems.append(
            f"{len(other)} layers have another shape in the base: '{shown(name)}' "
            f"{adapter.entries[name].shape}, there {places[name].shape}"
        )
    manifest = adapter.manifest
    if manifest is None or manifest["schema"] != SCHEMA or missing or "adabn" in manifest["sites"].values():
        return
    wanted = manifest["base"].get("sha256")
    dtype = getattr(torch, str(manifest["base"].get("dtype")), None)
    if not wanted or not isinstance(dtype, torch.dtype):
        return
    # Half precision on disk widens exactly to what was trained on.
    prefix = f"{manifest['component']}." if manifest["component"] else ""
    weights = {site: base.weights[prefix + site].to(dtype) for site in manifest["sites"] if prefix + site in places}
    same = content_hash(weights) == wanted
    found.notes.append(
        "the base is the one that it was made on, bit for bit"
        if same
        else "the base has other weights than the one that it was made on"
    )


def _fits(own: tuple[int, ...], base: tuple[int, ...]) -> bool:
    return own[0] == base[0] and math.prod(own) == math.prod(base)


def as_data(found: Diagnosis) -> str:
    """A diagnosis as JSON text."""
    return json.dumps(plain_data(found), indent=2, ensure_ascii=False)
