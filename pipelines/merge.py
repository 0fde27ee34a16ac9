"""`vislr merge`: adapter files without a model: several into one, one to another rank, one out of two checkpoints.

vislr merge style.safetensors:0.8 subject.safetensors:0.5 --out both.safetensors --method ties --rank 32
vislr merge style.safetensors --rank 8 --out small.safetensors
vislr merge both.safetensors style.safetensors:-1 --out subject.safetensors --rank 16
vislr merge --tuned path/to/tuned --base path/to/base --extract lora --rank 32 --out style.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vislr.core.arguments import parse_config
from vislr.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from vislr.formats.canonical import CanonicalAdapter
    from vislr.formats.weights import Outcome


@dataclass
class MergeConfig:
    """What to make one adapter of."""

    out: str
    """The file to write (of format peft: the folder)."""
    files: list[str] = field(default_factory=list)
    """Adapter files or folders of peft, of any format; "FILE:WEIGHT" gives a weight (default 1; -1 subtracts)."""
    method: Literal["sum", "svd", "magnitude", "dare", "ties", "dare_ties"] = "sum"
    """sum: exact; svd: the sum cut to a rank; magnitude, dare, ties, dare_ties: sparse merges of the whole
    changes, cut to a rank."""
    rank: int | None = None
    """The largest rank of a layer. Left out: of sum whatever is exact, else the largest in the files."""
    energy: float | None = None
    """Share of each layer's squared norm that must stay, above 0 and at most 1: fewer ranks where that suffices."""
    density: float = 0.5
    """Share of entries that magnitude, dare, ties and dare_ties keep; of an extracted SaRA 1 keeps all changes."""
    seed: int = 0
    """Of the entries that dare and dare_ties drop."""
    extract: Literal["lora", "sara"] = "lora"
    """With tuned: a LoRA by SVD (needs rank or energy), or SaRA, the changed entries themselves."""
    tuned: str | None = None
    """A fine-tuned model; what it changed against base becomes the adapter. Diffusers folder or checkpoint file."""
    base: str | None = None
    """The model before; needed with tuned, and to merge DoRA."""
    rest: bool = False
    """With tuned and lora: keep changes of biases, norms and tables too (diffusers does not read those)."""
    format: Literal["vislr", "kohya", "diffusers", "comfy", "peft"] | None = None
    """The format of the result. Left out: that of the first file; of extracted adapters diffusers, for SaRA vislr."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the result. Left out: the widest type in the files; of extracted LoRAs float16."""


def split_weight(text: str) -> tuple[str, float]:
    """ "style.safetensors:0.8" -> ("style.safetensors", 0.8); without a weight 1.

    Raises:
        ConfigError: what stands behind the last colon is no number.
    """
    from pathlib import Path

    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise ConfigError(f"'{text}': '{weight}' is no weight; expected FILE or FILE:NUMBER") from None


def _check(config: MergeConfig) -> None:
    if bool(config.files) == bool(config.tuned):
        raise ConfigError("give adapter files, or --tuned and --base; not both, not neither")
    if config.tuned and config.base is None:
        raise ConfigError("--tuned needs --base: the model before it was tuned")
    if len(config.files) == 1 and ":" not in config.files[0] and config.rank is None and config.energy is None:
        raise ConfigError("one file alone: give a rank, the energy to keep, or FILE:WEIGHT")


def _widest(adapters: Sequence[CanonicalAdapter]) -> torch.dtype:
    import torch

    found = torch.float16
    types = {
        tensor.dtype
        for adapter in adapters
        for entry in adapter.entries.values()
        for key, tensor in entry.tensors.items()
        if tensor.is_floating_point() and key not in ("alpha", "sara_delta")
    }
    if types and not types <= {torch.float16}:
        found = torch.bfloat16 if types <= {torch.bfloat16} else torch.float32
    return found


def _made(config: MergeConfig) -> tuple[Outcome, str, torch.dtype | None]:
    """The result, its format and its type."""
    import torch

    from vislr.formats.exchange import read_canonical
    from vislr.formats.weights import merge_adapters, resize
    from vislr.formats.weights_base import open_checkpoint
    from vislr.formats.weights_extract import extract_lora, extract_sara

    base = None if config.base is None else open_checkpoint(config.base)
    if config.tuned is not None and base is not None:
        tuned = open_checkpoint(config.tuned)
        if config.extract == "sara":
            return extract_sara(base, tuned, config.density), "vislr", None
        outcome = extract_lora(base, tuned, config.rank, config.energy, config.rest)
        known = bool(outcome.adapter.family) and not config.rest
        return outcome, "diffusers" if known else "kohya" if outcome.adapter.family else "vislr", torch.float16
    named = [split_weight(text) for text in config.files]
    adapters = [read_canonical(path) for path, _ in named]
    if len(adapters) == 1 and named[0][1] == 1 and config.method == "sum":
        outcome = resize(adapters[0], config.rank, config.energy)
    else:
        outcome = merge_adapters(
            adapters, [weight for _, weight in named], config.method, rank=config.rank, energy=config.energy,
            density=config.density, seed=config.seed, base=None if base is None else base.weights,
        )  # fmt: skip
    return outcome, adapters[0].format or "vislr", _widest(adapters)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the result; print what it is and what was lost."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--files")
    config = parse_config(
        MergeConfig,
        arguments,
        prog="vislr merge",
        description="Several adapter files into one, one to another rank, or one out of two checkpoints. "
        "`vislr merge A B:0.5 --out C` is short for --files A B:0.5.",
    )
    _check(config)
    import torch

    from vislr.formats.exchange import write_canonical

    outcome, form, dtype = _made(config)
    dtype = dtype if config.dtype is None else getattr(torch, config.dtype)
    written = write_canonical(outcome.adapter, config.out, config.format or form, dtype=dtype)
    ranks = [entry.rank for entry in outcome.adapter.entries.values() if entry.rank is not None]
    span = f", ranks {min(ranks)} to {max(ranks)}" if ranks else ""
    print(f"{len(outcome.adapter.entries)} layers{span} -> {config.out} ({written.format}, {written.tensors} tensors)")
    if outcome.errors:
        worst = max(outcome.errors, key=lambda name: outcome.errors[name])
        print(f"  relative error {outcome.error:.3g}; of the worst layer {outcome.errors[worst]:.3g} ('{worst}')")
    else:
        print("  exact, up to rounding")
    if written.worst:
        print(f"  writing as {written.format}: relative error up to {written.worst:.3g}")
    for note in (*outcome.notes, *written.notes):
        print(f"  {note}")
    return 0


if __name__ == "__main__":
    from vislr.core.cli_guard import run

    sys.exit(run(main))
