"""`vislr generate`: pictures from a pipeline and adapters, the same for the same prompt and seed.

vislr generate --model emoji-unet --adapter style.safetensors:0.8 --prompts "a red car" "a cat" --seeds 0 1
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vislr.core.arguments import parse_config, plain_data
from vislr.core.cli_guard import run
from vislr.core.errors import AdapterError, ConfigError, ModelError
from vislr.core.files import check_output, write_picture


@dataclass
class GenerateConfig:
    """What to make."""

    model: str = "emoji-unet"
    """Name of an embedded pipeline, a diffusers folder or a hub id."""
    adapter: list[str] = field(default_factory=list)
    """Adapter files, each with a weight behind a colon if it is not 1: style.safetensors:0.8."""
    prompts: list[str] = field(default_factory=list)
    """Prompts; a picture is made for each prompt and seed. Must be given."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 4.0
    """Classifier-free guidance scale."""
    size: int | None = None
    """Side in pixels; null: the pipeline's own."""
    batch: int = 4
    """Pictures made at once."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the pipeline."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; null: a GPU if there is one."""
    out: str = "generated"
    """Folder for the pictures: PROMPT-SEED.png, with the way they were made in each file."""
    grid: bool = False
    """Write grid.png too: a row for each seed, a column for each prompt."""
    any_base: bool = False
    """Accept adapters that were trained on a base with other weights."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("prompts is empty; give at least one")
        if not self.seeds:
            raise ConfigError("seeds is empty; give at least one")
        for name in ("steps", "batch", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr generate` with these arguments; returns the exit code."""
    config = parse_config(GenerateConfig, argv, prog="vislr generate", description="Make pictures.")
    adapters = [adapter_file(text) for text in config.adapter]
    pairs = [(prompt, seed) for seed in config.seeds for prompt in config.prompts]
    folder = check_output(config.out, needed=len(pairs) * 3 * (config.size or 64) ** 2)

    import torch
    from tqdm import tqdm

    from vislr import folders, recipe
    from vislr.data import make_grid
    from vislr.train import sample_images
    from vislr.train.prompts import check_prompts

    pipe = folders.load(config.model, dtype=getattr(torch, config.dtype))
    if not hasattr(pipe, "components"):
        raise ModelError(f"'{config.model}' is one model; expected a whole pipeline")
    check_prompts(pipe, [("prompts", prompt) for prompt in config.prompts])
    names: list[str] = []
    for path, weight in adapters:
        name = f"{len(names)}_{path.stem}".replace(".", "_").replace(" ", "_")
        recipe.load_adapter(pipe, path, name=name, weight=weight, any_base=config.any_base)
        names.append(name)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from error
    with tqdm(total=len(pairs), desc="generating", unit="picture") as bar:
        images = sample_images(
            pipe, [prompt for prompt, _ in pairs], [seed for _, seed in pairs], steps=config.steps,
            guidance=config.guidance, size=config.size, batch=config.batch, progress=bar.update,
        )  # fmt: skip
    made = plain_data(config)
    for image, (prompt, seed) in zip(images, pairs, strict=True):
        index = config.prompts.index(prompt)
        path = folder / f"{index:03d}-{slug(prompt)}-{seed}.png"
        write_picture(path, image, made | {"prompts": [prompt], "seeds": [seed]})
    if config.grid:
        count = len(config.prompts)
        rows = [images[i * count : (i + 1) * count] for i in range(len(config.seeds))]
        labels = [f"seed {seed}" for seed in config.seeds]
        cell = max(128, min(images[0].width, 512))
        grid = make_grid(rows, row_labels=labels, column_labels=config.prompts, cell=cell)
        write_picture(folder / "grid.png", grid, made)
    print(f"{len(images)} pictures -> {folder}")
    return 0


def adapter_file(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:WEIGHT`."""
    path, colon, number = text.rpartition(":")
    weight = 1.0
    if colon and path:
        # Else it is a colon of the path itself.
        with contextlib.suppress(ValueError):
            weight, text = float(number), path
    if not Path(text).is_file():
        raise AdapterError(f"there is no adapter file '{text}'; expected FILE or FILE:WEIGHT")
    return Path(text), weight


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())[:60] or "prompt"


if __name__ == "__main__":
    sys.exit(run(main))
