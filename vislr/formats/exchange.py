"""Any adapter file to the canonical form and back, without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vislr.core.errors import ConfigError, FormatError, hint
from vislr.core.files import write_tensors
from vislr.core.versions import versions_of
from vislr.formats import comfy, diffusers_files, headers, kohya, peft_folders
from vislr.formats.canonical import CanonicalAdapter, Entry, split_name
from vislr.formats.container import read_header, read_tensors
from vislr.formats.factors import as_lora, as_tucker, dense, dims, fused, halves_swapped, scalar, squared
from vislr.formats.layouts import Piece
from vislr.formats.lora_metadata import config_values, packed
from vislr.formats.manifest import AUX, CANONICAL_SCHEMA, DIFFUSERS_METADATA, MANIFEST
from vislr.formats.parsing import parse

FORMATS = ("vislr", "kohya", "diffusers", "comfy", "peft")
DORA = ("keep", "bake", "diff")
_NAMED = {"kohya": kohya, "comfy": comfy}
__all__ = ["DORA", "FORMATS", "Conversion", "parse", "read_canonical", "render", "write_canonical"]


@dataclass
class Conversion:
    """What writing did.

    Attributes:
        path: the file or folder; None: rendered into memory.
        format: its format.
        tensors: how many it holds.
        errors: full name -> relative error (Frobenius) of its change, where that is not exact.
        dropped: full names of what the format cannot hold.
        notes: what a user should know, a line each.
    """

    path: Path | None
    format: str
    tensors: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What a user should know: notes, and the layers that are not exact."""
        found = list(self.notes)
        if self.worst > 1e-6:
            name = max(self.errors, key=lambda name: self.errors[name])
            found.append(
                f"{len(self.errors)} layers were written by SVD; largest relative error {self.worst:.2g} at '{name}'"
            )
        return found

    @property
    def worst(self) -> float:
        """The largest of `errors`; 0: everything is exact."""
        return max(self.errors.values(), default=0.0)


def read_canonical(path: str | os.PathLike, *, strict: bool = True, family: str | None = None) -> CanonicalAdapter:
    """Read a safetensors file of any format, or a folder of peft.

    Args:
        strict: every tensor is placed, or it fails; otherwise those without a place are in `unplaced`.
        family: of the model that the file is to go on, for files that do not tell.

    Raises:
        FormatError: no such file, damaged, or a tensor without a place; names the key.
    """
    path = Path(path)
    if path.is_dir():
        return peft_folders.read(path, strict, family)
    header = read_header(path)
    if not header.tensors:
        raise FormatError(f"'{path}' holds no tensors")
    return parse(read_tensors(path, header), header.metadata, strict=strict, family=family, where=str(path))


def write_canonical(
    adapter: CanonicalAdapter,
    path: str | os.PathLike,
    format: str,
    *,
    rank: int | None = None,
    dora: str = "keep",
    drop: bool = False,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Conversion:
    """Write an adapter in a format: exactly where the format can hold it, else by SVD with the error reported.

    Args:
        path: a file; for "peft" a folder.
        format: one of `FORMATS`.
        rank: bring every layer that is written as LoRA to at most this rank; None: no limit but exactness.
        dora: "keep"; "bake" DoRA into a LoRA (SVD), or write it as a "diff" (exact); both need `weights`.
        drop: leave out what the format cannot hold, and say what; otherwise that fails.
        dtype: of the tensors; None: as they are. Alphas are float32.
        weights: full name -> base weight, for `dora`.
        metadata: further entries of the header.

    Raises:
        FormatError: the format cannot hold the adapter; names the layer and what to do.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if format == "peft":
        parts, report = _prepared(adapter, format, rank, dora, drop, weights)
        split_parts: dict[str, dict[str, Entry]] = {}
        for name, entry in parts.items():
            component, inner = split_name(name)
            split_parts.setdefault(component, {})[inner] = _cast(entry, dtype)
        header = headers.describe(parts, adapter.family, path.name, {**adapter.metadata, **(metadata or {})})
        report.tensors = peft_folders.write(path, split_parts, header)
    else:
        tensors, header, report = render(
            adapter, format, rank=rank, dora=dora, drop=drop, dtype=dtype, weights=weights, metadata=metadata,
            title=path.stem,
        )  # fmt: skip
        write_tensors(path, tensors, header)
    report.path = path
    return report


def render(
    adapter: CanonicalAdapter,
    format: str,
    *,
    rank: int | None = None,
    dora: str = "keep",
    drop: bool = False,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    title: str = "adapter",
) -> tuple[dict[str, torch.Tensor], dict[str, str], Conversion]:
    """Tensors and header of `write_canonical`'s file, in memory; arguments as there, "peft" excepted."""
    if format == "peft":
        raise FormatError("peft's format is a folder; it cannot be rendered as one file")
    parts, report = _prepared(adapter, format, rank, dora, drop, weights)
    if format in _NAMED:
        keyed = _named(parts, adapter.family, format, drop, report)
    else:
        keyed = dict(parts)
    header = headers.describe(parts, adapter.family, title, {**adapter.metadata, **(metadata or {})})
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in keyed.items():
        entry = _cast(entry, dtype)
        if format == "diffusers":
            tensors |= diffusers_files.tensors_of(entry, f"{name}.")
        else:
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in entry.tensors.items()}
    if format == "vislr":
        tensors |= {f"{AUX}{key}": tensor for key, tensor in adapter.aux.items()}
        header[MANIFEST] = _manifest(adapter, parts)
    elif format == "diffusers":
        groups = _by_component(parts)
        for component, entries in groups.items():
            diffusers_files.check(entries, component)
        header[DIFFUSERS_METADATA] = packed({name: config_values(entries) for name, entries in groups.items()})
    if format != "vislr" and adapter.aux:
        report.notes.append(f"{len(adapter.aux)} tensors of auxiliary heads are vislr's alone and were left out")
    header |= headers.hashes(tensors)
    report.tensors = len(tensors)
    return tensors, header, report


def _by_component(parts: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    found: dict[str, dict[str, Entry]] = {}
    for name, entry in parts.items():
        component, path = split_name(name)
        found.setdefault(component, {})[path] = entry
    return found


def _manifest(adapter: CanonicalAdapter, parts: Mapping[str, Entry]) -> str:
    values = {
        "schema": CANONICAL_SCHEMA,
        "format": "vislr",
        "kind": "canonical",
        "component": "",
        "family": adapter.family,
        "architecture": "",
        "config": {},
        "sites": {name: entry.kind for name, entry in parts.items()},
        "shapes": {name: list(entry.shape) for name, entry in parts.items() if entry.shape is not None},
        "base": {},
        "versions": versions_of("vislr", "torch"),
    }
    return json.dumps(values, sort_keys=True)


def _cast(entry: Entry, dtype: torch.dtype | None) -> Entry:
    made = {
        key: tensor.to(dtype) if dtype is not None and key != "alpha" and tensor.is_floating_point() else tensor
        for key, tensor in entry.tensors.items()
    }
    return Entry(entry.kind, made, entry.shape)


# One entry into what a format holds.


def _prepared(
    adapter: CanonicalAdapter,
    format: str,
    rank: int | None,
    dora: str,
    drop: bool,
    weights: Mapping[str, torch.Tensor] | None,
) -> tuple[dict[str, Entry], Conversion]:
    if format not in FORMATS:
        raise FormatError(f"no format is called '{format}'{hint(format, FORMATS)}")
    if dora not in DORA:
        raise ConfigError(f"dora is '{dora}'{hint(dora, DORA)}")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; expected 1 or more")
    if format in _NAMED and not adapter.family:
        raise FormatError(f"the family of this adapter is not known, and format '{format}' names modules by family")
    if format == "diffusers" and "" in adapter.components():
        raise FormatError("format 'diffusers' is for components of pipelines; use 'vislr', 'peft' or 'kohya'")
    report = Conversion(None, format)
    made: dict[str, Entry] = {}
    biases = 0
    for name, entry in adapter.entries.items():
        if drop and format in ("diffusers", "peft") and "diff_b" in entry.tensors and len(entry.tensors) > 1:
            # The layer's weight has a place; its bias alone has none.
            entry = Entry(entry.kind, {k: v for k, v in entry.tensors.items() if k != "diff_b"}, entry.shape)
            biases += 1
        try:
            weight = (weights or {}).get(name)
            if entry.dora and dora != "keep" and weight is None:
                raise FormatError("DoRA can be baked only with the base weights; give the base model")
            made[name], error = _held(entry, format, rank, dora, weight)
        except FormatError as reason:
            if not drop:
                raise FormatError(f"'{name}': {reason}") from reason
            report.dropped.append(name)
            continue
        if error:
            report.errors[name] = error
    if biases:
        report.notes.append(f"left out, '{format}' cannot hold them: the changes of {biases} biases")
    if report.dropped:
        report.notes.append(f"left out, '{format}' cannot hold them: {len(report.dropped)} layers")
    if not made:
        raise FormatError(f"format '{format}' can hold none of the {len(adapter.entries)} layers")
    if any(entry.kind == "qalora" for entry in adapter.entries.values()) and format != "vislr":
        report.notes.append("QALoRA changes the weight before it is rounded; on another base the result differs")
    return made, report


def _held(entry: Entry, format: str, rank: int | None, dora: str, weight: torch.Tensor | None) -> tuple[Entry, float]:
    """An entry that `format` holds, and its relative error."""
    bake = bool(entry.dora) and dora == "bake"
    if entry.dora and dora == "diff" and format not in ("diffusers", "peft"):
        return dense(entry, weight), 0.0
    if format == "vislr":
        return as_lora(entry, rank, weight, bake) if bake or (rank is not None and entry.rank) else (entry, 0.0)
    if entry.kind in ("adabn", "oft"):
        what = "BatchNorm statistics" if entry.kind == "adabn" else "rotations (OFT)"
        raise FormatError(f"format '{format}' has no place for {what}; use 'vislr'")
    if format in ("diffusers", "peft"):
        if entry.kind == "norm" or (entry.shape is not None and len(entry.shape) == 1):
            raise FormatError(f"format '{format}' has no place for a norm's change; use 'kohya', or drop it")
        made, error = as_lora(entry, rank, weight, bake or (bool(entry.dora) and dora == "diff"))
        if "diff_b" in made.tensors:
            raise FormatError(f"format '{format}' has no place for a bias's change; use 'kohya', or drop it")
        return made, error
    if bake or entry.kind in ("convlora", "qalora") or (rank is not None and entry.kind in ("sara", "diff")):
        if entry.kind == "diff" and (entry.shape is None or len(entry.shape) < 2):
            return entry, 0.0
        return as_lora(entry, rank, weight, bake)
    if entry.kind == "sara":
        return dense(entry), 0.0
    if rank is not None and entry.rank is not None and entry.rank > rank:
        return as_lora(entry, rank)
    return squared(as_tucker(entry)), 0.0


def _named(parts: Mapping[str, Entry], family: str, format: str, drop: bool, report: Conversion) -> dict[str, Entry]:
    """File's module name -> entry: names of the format, rows fused and swapped as the original code has them."""
    module = _NAMED[format]
    groups: dict[str, dict[int, tuple[str, Entry]]] = {}
    pieces: dict[str, Piece] = {}
    for name, entry in parts.items():
        component, path = split_name(name)
        try:
            piece = module.piece(family, component, path)
        except FormatError:
            if not drop:
                raise
            report.dropped.append(name)
            continue
        pieces[piece.name] = piece
        groups.setdefault(piece.name, {})[piece.part] = (name, entry)
    made = {}
    for key, group in groups.items():
        row = pieces[key].row
        try:
            made[key] = _joined({part: entry for part, (_, entry) in group.items()}, row.sizes, row.swap)
        except FormatError as reason:
            first = next(iter(group.values()))[0]
            if not drop:
                raise FormatError(f"'{first}' is a part of '{key}' in this format: {reason}") from reason
            report.dropped += [name for name, _ in group.values()]
            continue
        if "alpha" not in made[key].tensors and made[key].rank:
            made[key].tensors = {**made[key].tensors, "alpha": scalar(made[key].scale * (made[key].rank or 1))}
    return made


def _joined(group: dict[int, Entry], sizes: tuple[int, ...], swap: str) -> Entry:
    if len(sizes) > 1:
        part, given = next(iter(group.items()))
        out = len(given.tensors["diff_b"]) if set(given.tensors) == {"diff_b"} else dims(given)[0]
        unit = out // sizes[part]
        return fused([group.get(n) for n in range(len(sizes))], [size * unit for size in sizes])
    entry = group[0]
    if swap == "halves" or (swap == "last" and entry.kind != "norm" and _doubled(entry)):
        return halves_swapped(entry)
    return entry


def _doubled(entry: Entry) -> bool:
    out, inside = dims(entry)
    return out == 2 * inside
