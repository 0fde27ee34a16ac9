"""`vislr convert IN OUT --format kohya`: an adapter file in another tool's format, without a model.

vislr convert style.safetensors style-kohya.safetensors --format kohya
vislr convert style-kohya.safetensors folder --format peft --rank 16
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vislr.core.arguments import parse_config


@dataclass
class ConvertConfig:
    """What to convert, into what."""

    input: str
    """A safetensors file of any format that vislr reads, or a folder of peft."""
    output: str
    """The file to write; for peft a folder."""
    format: Literal["vislr", "kohya", "diffusers", "comfy", "peft"]
    """kohya: A1111, Forge, ComfyUI, sd-scripts, LyCORIS. comfy: ComfyUI's and BFL's own names.
    diffusers: load_lora_weights. peft: a folder. vislr: every kind, exact."""
    rank: int | None = None
    """Bring every layer that is written as LoRA to at most this rank, by SVD. Left out: as exact as the
    format allows."""
    dora: Literal["keep", "bake", "diff"] = "keep"
    """DoRA: keep it, bake it into plain LoRA (SVD), or write whole differences (exact; kohya, comfy).
    The last two need base."""
    base: str | None = None
    """The base model, for dora: a pipeline's folder, a component's, or a single file."""
    drop: bool = False
    """Leave out what the format cannot hold, and say what. Otherwise that is an error."""
    components: list[str] | None = None
    """Only these: unet, transformer, text_encoder, text_encoder_2, text_encoder_3. Left out: all."""
    family: str | None = None
    """sd15, sd2, sdxl, sd3, flux, pixart, dit or timm, for files that do not tell. Left out: found in the file."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Store the tensors in this type. Left out: as they are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, and print what was written and how exact it is."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for place, flag in enumerate(("--input", "--output")):
        if len(arguments) > 2 * place and not arguments[2 * place].startswith("-"):
            arguments.insert(2 * place, flag)
        else:
            break
    config = parse_config(
        ConvertConfig,
        arguments,
        prog="vislr convert",
        description="An adapter file in another format. `vislr convert IN OUT` is short for --input IN --output OUT.",
    )
    import torch

    from vislr.formats import read_canonical, write_canonical
    from vislr.formats.weights_base import open_checkpoint

    adapter = read_canonical(config.input, family=config.family)
    if config.family:
        adapter.family = config.family
    if config.components:
        adapter = adapter.only(config.components)
    weights = open_checkpoint(config.base).weights if config.base else None
    done = write_canonical(
        adapter,
        config.output,
        config.format,
        rank=config.rank,
        dora=config.dora,
        drop=config.drop,
        dtype=getattr(torch, config.dtype) if config.dtype else None,
        weights=weights,
    )
    layers = len(adapter.entries) - len(done.dropped)
    print(f"{config.input} ({adapter.format}, {adapter.family or 'family not known'}) -> {config.output}")
    print(f"{layers} layers, {done.tensors} tensors, format {config.format}; " + _exactness(done.worst))
    for note in (*adapter.notes, *done.lines()):
        print(note)
    for name in done.dropped:
        print(f"left out: {name}")
    return 0


def _exactness(worst: float) -> str:
    return "exact" if worst == 0 else f"largest relative error of a layer {worst:.2g}"


if __name__ == "__main__":
    from vislr.core.cli_guard import run

    sys.exit(run(main))
