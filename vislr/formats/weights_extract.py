"""What a fine-tuned model changed, as an adapter: LoRA by SVD, or SaRA, which holds the changed entries exactly."""

from __future__ import annotations

import torch

from vislr.core.errors import AdapterError, ConfigError
from vislr.core.merging import check_cut, check_density, keep_largest, low_rank_of
from vislr.formats.canonical import CanonicalAdapter, Entry
from vislr.formats.weights import Outcome, lora_entry
from vislr.formats.weights_base import Checkpoint, shared

# Lookups, not matrix products: no tool applies a LoRA to them.
_TABLES = ("embedding", "embeddings", "embed_tokens", "shared", "embedding_table", "pos_embed")


def extract_lora(
    base: Checkpoint, tuned: Checkpoint, rank: int | None = None, energy: float | None = None, rest: bool = False
) -> Outcome:
    """The best LoRA (LoCon on convs) of each layer's difference `tuned - base`.

    Args:
        rank, energy: as `vislr.formats.weights.resize`.
        rest: keep the changes of biases (`diff_b`), norms (`w_norm`, `b_norm`) and tables (`diff`) too, exactly;
            diffusers does not read those.

    Raises:
        ConfigError: neither rank nor energy, or an impossible one.
        AdapterError: nothing differs, or a difference is not finite.
        ModelError: the models have no layer in common or differ in shape.
    """
    if rank is None and energy is None:
        raise ConfigError("extracting a LoRA needs a rank, or the energy to keep")
    check_cut(rank, energy)
    entries: dict[str, Entry] = {}
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    left_out = 0
    for name in shared(base, tuned):
        change, bias = _difference(base, tuned, name, torch.float32)
        matrix = change is not None and change.dim() > 1 and not name.endswith(_TABLES)
        others = [part for part in (None if matrix else change, bias) if part is not None]
        if not rest:
            left_out += len(others)
        if matrix and change is not None:
            cut = low_rank_of(change, rank, energy)
            errors[name], norms[name] = cut.error, cut.norm
            entries[name] = lora_entry(cut.up, cut.down, change.shape)
            if rest and bias is not None:
                entries[name].tensors["diff_b"] = bias
        elif others and rest:
            entries[name] = _exact(change, bias, base.weights.places[name].shape)
    notes = [f"{left_out} changes of biases, norms and tables are left out (rest keeps them)"] if left_out else []
    return Outcome(_adapter(base, tuned, entries), errors, norms, tuple(notes))


def extract_sara(base: Checkpoint, tuned: Checkpoint, density: float = 1.0) -> Outcome:
    """The changed entries of every layer, weight and bias, in float64: base plus change is `tuned`, bit for bit.

    Args:
        density: below 1, only the largest changes: this share of the entries of each layer's changed weight and
            bias; the outcome's errors say what that costs.

    Raises:
        ConfigError: density outside (0, 1].
        AdapterError: nothing differs, or a difference is not finite.
        ModelError: the models have no layer in common or differ in shape.
    """
    check_density(density)
    entries: dict[str, Entry] = {}
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    for name in shared(base, tuned):
        parts = _difference(base, tuned, name, torch.float64)
        shape = base.weights.places[name].shape
        if parts == (None, None):
            continue
        weight = torch.zeros(shape, dtype=torch.float64) if parts[0] is None else parts[0]
        flat = weight.flatten() if parts[1] is None else torch.cat([weight.flatten(), parts[1].flatten()])
        if density < 1:
            kept = keep_largest(flat, density)
            norms[name] = float(flat.norm())
            errors[name] = float((flat - kept).norm()) / norms[name]
            flat = kept
        index = flat.nonzero().flatten()
        tensors = {
            "sara_index": index.to(torch.int32),
            "sara_delta": flat[index],
            "sara_shape": torch.tensor(shape, dtype=torch.int64),
        }
        entries[name] = Entry("sara", tensors, shape)
    return Outcome(_adapter(base, tuned, entries), errors, norms)


def _difference(
    base: Checkpoint, tuned: Checkpoint, name: str, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Changes of weight and bias of one layer; None where nothing changed."""
    found: list[torch.Tensor | None] = []
    for one, two in ((base.weights, tuned.weights), (base.biases, tuned.biases)):
        if name not in one.places or name not in two.places:
            found.append(None)
            continue
        before, after = one[name], two[name]
        change = None if torch.equal(before, after) else after.to(dtype) - before.to(dtype)
        if change is not None and not bool(torch.isfinite(change).all()):
            raise AdapterError(f"the difference at '{name}' has NaN or infinite values")
        found.append(change if change is not None and bool(change.any()) else None)
    return found[0], found[1]


def _exact(change: torch.Tensor | None, bias: torch.Tensor | None, shape: tuple[int, ...]) -> Entry:
    kind, names = ("norm", ("w_norm", "b_norm")) if len(shape) == 1 else ("diff", ("diff", "diff_b"))
    parts = zip(names, (change, bias), strict=True)
    return Entry(kind, {key: value for key, value in parts if value is not None}, shape)


def _adapter(base: Checkpoint, tuned: Checkpoint, entries: dict[str, Entry]) -> CanonicalAdapter:
    if not entries:
        raise AdapterError(f"'{tuned.path}' does not differ from '{base.path}' in any layer that could be extracted")
    return CanonicalAdapter(entries, base.family or tuned.family)
