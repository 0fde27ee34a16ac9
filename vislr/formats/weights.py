"""Adapters worked on without a model: another rank, several into one, one minus another.

What is merged is what each layer does to its weight, not its factors: scales (rsLoRA's too) are in it, ranks and
kinds may differ, and DoRA's change is taken at the base weight. A sum of low-rank layers stays exact: their factors
stand side by side. Everything else is computed whole, layer by layer, and cut to a rank with the error reported.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vislr.core.errors import AdapterError, ConfigError, hint
from vislr.core.merging import (
    METHODS,
    LowRank,
    check_cut,
    check_density,
    low_rank_of,
    low_rank_sum,
    merge_deltas,
    resized,
)
from vislr.formats.canonical import NO_DELTA, CanonicalAdapter, Entry
from vislr.formats.factors import pair_of

WAYS = ("sum", "svd", *METHODS[1:])
Weights = Mapping[str, torch.Tensor]
NOT_ADDED = (*NO_DELTA, "qalora")


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        adapter: the result, scales folded into its tensors (alpha = rank).
        errors: layer -> relative Frobenius error of its low-rank form; only layers that were cut.
        norms: layer -> Frobenius norm of what was asked for, of the same layers.
        notes: what a user should know, a line each.
    """

    adapter: CanonicalAdapter
    errors: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Relative error of all cut layers together: root of the sum of squared errors over that of squared norms."""
        total = sum(norm**2 for norm in self.norms.values())
        lost = sum((self.errors[name] * norm) ** 2 for name, norm in self.norms.items())
        return math.sqrt(lost / total) if total else 0.0


def lora_entry(up: torch.Tensor, down: torch.Tensor, shape: Sequence[int]) -> Entry:
    """The LoRA or LoCon layer of a pair (Co, r), (r, n) on a weight of this shape, alpha = r, float32."""
    rank = down.shape[0]
    tensors = {
        "lora_down.weight": down.float().reshape(rank, *shape[1:]).contiguous(),
        "lora_up.weight": up.float().reshape(-1, rank, *(1,) * (len(shape) - 2)).contiguous(),
        "alpha": torch.tensor(float(rank)),
    }
    return Entry("lora", tensors, tuple(shape))


def merge_adapters(
    adapters: Sequence[CanonicalAdapter],
    weights: Sequence[float] | None = None,
    method: str = "sum",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float = 0.5,
    seed: int = 0,
    base: Weights | None = None,
) -> Outcome:
    """One adapter out of several; of one: another rank.

    A weight of -1 subtracts. A layer that only some adapters touch is merged from those.

    Args:
        adapters: of one family.
        weights: one an adapter; default 1 each.
        method: "sum"; "svd": the sum cut to `rank`; "magnitude", "dare", "ties", "dare_ties" as in
            `vislr.core.merging`, cut to `rank`.
        rank: the largest rank of a layer. None: of "sum" whatever holds it exactly; of other methods the largest
            rank that the layer has in the adapters, or the whole matrix where one of them has none.
        energy: share of each layer's squared norm that must stay, in (0, 1]; fewer ranks where that suffices.
        density: share of entries that "magnitude", "dare", "ties" and "dare_ties" keep.
        seed: of the entries that are dropped; each layer's draw depends on this and its name alone.
        base: full name of a layer -> its base weight; needed for DoRA.

    Raises:
        ConfigError: an unknown method, impossible rank, energy or density, or counts that differ.
        AdapterError: families or shapes differ, a kind that cannot be added, DoRA without base.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    _check(adapters, weights, method, rank, energy, density)
    task = _Task(method, rank, energy, density, seed, base)
    entries: dict[str, Entry] = {}
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.entries):
        parts = [(a.entries[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.entries]
        entries[name], cut = task.layer(name, parts)
        if cut is not None:
            errors[name], norms[name] = cut.error, cut.norm
    notes = []
    whole = sum(entry.kind == "diff" for entry in entries.values())
    if whole:
        notes.append(
            f"{whole} layers are whole matrices (diff): exact, large, and not read by diffusers; a rank cuts them"
        )
    if any(adapter.aux for adapter in adapters):
        notes.append("auxiliary heads are left out")
    family = next((adapter.family for adapter in adapters if adapter.family), "")
    result = CanonicalAdapter(entries, family, metadata=_metadata(adapters))
    return Outcome(result, errors, norms, tuple(notes))


def resize(adapter: CanonicalAdapter, rank: int | None = None, energy: float | None = None) -> Outcome:
    """The same adapter with other ranks: the best of at most `rank`, or of the fewest that keep `energy`.

    DoRA keeps its magnitude; its low-rank part is resized, and the error is that part's. Layers that are no
    matrix (norms, statistics) stay as they are.

    Raises:
        ConfigError: neither rank nor energy, or an impossible one.
        AdapterError: tensors and shape of a layer disagree.
    """
    if rank is None and energy is None:
        raise ConfigError("resizing needs a rank, or the energy to keep")
    check_cut(rank, energy)
    task = _Task("sum", rank, energy, 1.0, 0, None)
    entries: dict[str, Entry] = {}
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    for name, entry in adapter.entries.items():
        if entry.kind in (*NOT_ADDED, "norm"):
            entries[name] = entry
            continue
        low_rank_part = {key: value for key, value in entry.tensors.items() if key != "dora_scale"}
        entries[name], cut = task.layer(name, [(Entry(entry.kind, low_rank_part, entry.shape), 1.0)])
        if cut is not None:
            errors[name], norms[name] = cut.error, cut.norm
        if entry.dora:
            entries[name].tensors["dora_scale"] = entry.tensors["dora_scale"]
    kept = len(entries) - len(errors)
    notes = [f"{kept} layers have no rank and stay as they are"] if kept else []
    if any(entry.dora for entry in entries.values()):
        notes.append("DoRA keeps its magnitudes; errors are those of its low-rank parts")
    result = CanonicalAdapter(entries, adapter.family, metadata=_metadata([adapter]), aux=dict(adapter.aux))
    return Outcome(result, errors, norms, tuple(notes))


def _check(
    adapters: Sequence[CanonicalAdapter],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    energy: float | None,
    density: float,
) -> None:
    if method not in WAYS:
        raise ConfigError(f"no way of merging is called '{method}'{hint(method, WAYS)}")
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights; expected as many, at least one")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights are {list(weights)}; expected finite numbers")
    check_cut(rank, energy)
    check_density(density)
    families = sorted({adapter.family for adapter in adapters if adapter.family})
    if len(families) > 1:
        raise AdapterError(f"adapters of different families cannot be merged: {', '.join(families)}")
    for adapter in adapters:
        for name, entry in adapter.entries.items():
            if entry.kind in NOT_ADDED:
                raise AdapterError(f"'{name}' is of kind '{entry.kind}', which is no addition to a weight")


@dataclass(frozen=True)
class _Task:
    """How every layer is merged; fields as the arguments of `merge_adapters`."""

    method: str
    rank: int | None
    energy: float | None
    density: float
    seed: int
    base: Weights | None

    def layer(self, name: str, parts: list[tuple[Entry, float]]) -> tuple[Entry, LowRank | None]:
        """The entry of one layer, and its truncation; None: exact."""
        try:
            return self._layer(name, parts)
        except AdapterError as error:
            raise AdapterError(f"'{name}' {error}") from error

    def _layer(self, name: str, parts: list[tuple[Entry, float]]) -> tuple[Entry, LowRank | None]:
        entries = [entry for entry, _ in parts]
        shape = _shape(entries)
        bias = self.bias(name, parts)
        if any(entry.kind == "norm" for entry in entries):
            return Entry("norm", _present(w_norm=self.mix(name, parts, shape), b_norm=bias), shape), None
        pairs = [None if entry.dora else pair_of(entry) for entry in entries]
        cut: LowRank | None = None
        if self.method in ("sum", "svd") and None not in pairs:
            scaled = [weight * entry.scale for entry, weight in parts]
            up, down = low_rank_sum([pair for pair in pairs if pair is not None], scaled)
            wanted = self.rank if self.method == "sum" else self.rank or _largest_rank(entries)
            if wanted is not None or self.energy is not None or up.shape[1] > min(up.shape[0], down.shape[1]):
                cut = resized(up, down, wanted, self.energy)
                up, down = cut.up, cut.down
            made = lora_entry(up, down, shape)
        else:
            total = self.mix(name, parts, shape)
            wanted = self.rank if self.method == "sum" else self.rank or _largest_rank(entries)
            if len(shape) < 2 or (wanted is None and self.energy is None):
                made = Entry("diff", {"diff": total.float()}, shape)
            else:
                cut = low_rank_of(total, wanted, self.energy)
                made = lora_entry(cut.up, cut.down, shape)
        made.tensors |= _present(diff_b=bias)
        return made, cut

    def mix(self, name: str, parts: list[tuple[Entry, float]], shape: tuple[int, ...]) -> torch.Tensor:
        """The merged change of a layer's weight."""
        deltas = [_delta(name, entry, shape, self.base) for entry, _ in parts]
        return self.merged(name, deltas, [weight for _, weight in parts])

    def bias(self, name: str, parts: list[tuple[Entry, float]]) -> torch.Tensor | None:
        """The merged change of a layer's bias; None: nobody changes it."""
        found = [(entry.bias_delta(), weight) for entry, weight in parts]
        present = [(delta, weight) for delta, weight in found if delta is not None]
        return self.merged(f"{name}.bias", *map(list, zip(*present, strict=True))) if present else None

    def merged(self, name: str, deltas: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
        """`merge_deltas` with a draw that depends on seed and name, not on the order of layers."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        method = "sum" if self.method == "svd" else self.method
        return merge_deltas(deltas, weights, method, self.density, generator)


def _delta(name: str, entry: Entry, shape: tuple[int, ...], base: Weights | None) -> torch.Tensor:
    weight = None
    if entry.dora:
        if base is None or name not in base:
            what = "give the base model's weights" if base is None else f"the base has no weight '{name}'"
            raise AdapterError(f"is DoRA, whose change depends on the base: {what}")
        weight = base[name]
        if tuple(weight.shape) != shape:
            raise AdapterError(f"changes a weight {shape}; the base's is {tuple(weight.shape)}")
    return entry.delta(weight).reshape(shape)


def _shape(entries: Sequence[Entry]) -> tuple[int, ...]:
    """The layer's shape; 1 x 1 convs that are stored as matrices count as convs where anyone says so."""
    found = []
    for entry in entries:
        if entry.shape is not None:
            found.append(tuple(entry.shape))
        elif entry.kind == "lora" and "lora_mid.weight" not in entry.tensors:
            up, down = entry.tensors["lora_up.weight"], entry.tensors["lora_down.weight"]
            found.append((up.shape[0], *down.shape[1:]))
        else:
            found.append(tuple(entry.product().shape))
    shape = max(found, key=len)
    for other in found:
        if other[0] != shape[0] or math.prod(other) != math.prod(shape):
            raise AdapterError(f"has the shapes {other} and {shape}: the adapters are for different models")
    return shape


def _largest_rank(entries: Sequence[Entry]) -> int | None:
    ranks = [entry.rank for entry in entries]
    known = [rank for rank in ranks if rank is not None]
    return max(known) if len(known) == len(ranks) else None


def _present(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {key: value.float() for key, value in tensors.items() if value is not None}


def _metadata(adapters: Sequence[CanonicalAdapter]) -> dict[str, str]:
    """What all agree on, less what is no longer true."""
    first, *others = (adapter.metadata for adapter in adapters)
    stale = ("sshs_", "modelspec.hash", "ss_network_", "ss_output_name", "lora_adapter_metadata")
    return {
        key: value
        for key, value in first.items()
        if not key.startswith(stale) and all(other.get(key) == value for other in others)
    }
