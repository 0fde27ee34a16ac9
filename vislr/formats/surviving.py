"""Adapters of a whole model on a pruned one: what lay on removed units is dropped, and how much that was."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from vislr.adapters.inject import exactly, plain_name
from vislr.core.errors import AdapterError, FormatError
from vislr.formats.adapter_file import AdapterFile
from vislr.formats.canonical import CanonicalAdapter, Entry, join_name
from vislr.formats.live import parts_of


@dataclass(frozen=True)
class Survival:
    """What of an adapter found its place on a pruned model.

    Attributes:
        kept, dropped: full names of layers.
        lost: Frobenius norm of the dropped changes over that of all changes, in [0, 1].
        unknown: dropped layers of kinds whose change has no norm of its own (OFT, BatchNorm statistics).
    """

    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    lost: float
    unknown: int = 0

    def __str__(self) -> str:
        text = (
            f"pruned model: {len(self.kept)} layers of the adapter kept, {len(self.dropped)} on removed units dropped, "
            f"{self.lost:.1%} of the change's norm lost"
        )
        return text + (f" ({self.unknown} dropped layers have no norm to count)" if self.unknown else "")


def without_removed(
    file: AdapterFile | CanonicalAdapter, target: Any
) -> tuple[AdapterFile | CanonicalAdapter, Survival | None]:
    """The adapter without its layers on removed units; the adapter itself and None where nothing was removed.

    Args:
        file: as read, made for the whole model. target: the pipeline or model that it shall go on.

    Raises:
        AdapterError: every layer of it lay on removed units.
    """
    parts = parts_of(target)
    if isinstance(file, AdapterFile):
        whole = parts.get(file.manifest["component"]) or next(iter(parts.values()))
        entries = {site: _entry(file, site) for site in file.tensors}
        survival = _survival(entries, _removed_sites(whole, entries))
        return (file, None) if survival is None else (_cut(file, survival.kept), survival)
    gone: set[str] = set()
    for component in file.components():
        module = parts.get(component) or (next(iter(parts.values())) if len(parts) == 1 else None)
        if module is not None:
            gone |= {join_name(component, path) for path in _removed_sites(module, file.of(component))}
    survival = _survival(file.entries, gone)
    if survival is None:
        return file, None
    kept = {name: entry for name, entry in file.entries.items() if name not in gone}
    return dataclasses.replace(file, entries=kept), survival


def _removed_sites(module: nn.Module, sites: Collection[str]) -> set[str]:
    """Those that are gone with a removed unit; what stays of it (a shortcut) is no longer inside in this sense."""
    modules = {plain_name(name): part for name, part in module.named_modules()}
    removed = tuple(f"{name}." for name, part in modules.items() if getattr(part, "removed_unit", None) is not None)
    marks = {name.rstrip(".") for name in removed}
    return {s for s in sites if s in marks or (s not in modules and bool(removed) and s.startswith(removed))}


def _survival(entries: dict[str, Entry], gone: Collection[str]) -> Survival | None:
    if not gone:
        return None
    if len(gone) == len(entries):
        raise AdapterError(f"all {len(entries)} layers of the adapter lie on units that were removed from this model")
    squares = {name: _square(entry) for name, entry in entries.items()}
    total = sum(value for value in squares.values() if value is not None)
    lost = sum(squares[name] or 0.0 for name in gone)
    return Survival(
        kept=tuple(name for name in entries if name not in gone),
        dropped=tuple(name for name in entries if name in gone),
        lost=math.sqrt(lost / total) if total else 0.0,
        unknown=sum(squares[name] is None for name in gone),
    )


def _square(entry: Entry) -> float | None:
    """Squared Frobenius norm of the change; of DoRA, of its direction's."""
    try:
        return float(entry.product().double().square().sum())
    except FormatError:
        return None


def _entry(file: AdapterFile, site: str) -> Entry:
    """A layer's tensors with a shape that gives the change its norm: ConvLoRA's product is shaped by the weight."""
    kind, tensors = file.kind_of(site), file.tensors[site]
    shape = None
    if kind == "convlora":
        a, b = tensors["convlora_A"], tensors["convlora_B"]
        k1 = max(1, a.shape[0] // int(file.config.r))
        shape = (b.shape[0] // k1, a.shape[1], k1) if k1 > 1 else (b.shape[0], a.shape[1])
    return Entry(kind, tensors, shape)


def _cut(file: AdapterFile, kept: Collection[str]) -> AdapterFile:
    """The file on these sites alone."""

    def fitted(config: Any, kind: str) -> Any:
        own = [site for site in kept if (file.kind_of(site) == "adabn") == (kind == "adabn")]
        config = copy.deepcopy(config)
        if hasattr(config, "sites"):
            config.sites = own
        else:
            config.target_modules = exactly(own)
        return config if own else None

    manifest = {**file.manifest, "sites": {site: file.kind_of(site) for site in kept}}
    config = fitted(file.config, file.kind)
    if config is None:
        raise AdapterError("only BatchNorm statistics of the adapter are left on this pruned model")
    statistics = None if file.statistics is None else fitted(file.statistics, "adabn")
    tensors = {site: file.tensors[site] for site in kept}
    return dataclasses.replace(file, tensors=tensors, config=config, manifest=manifest, statistics=statistics)
