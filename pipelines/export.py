"""`vislr export`: a pipeline for tools without vislr.

vislr export runs/pruned/pipeline --plain plain-folder
vislr export runs/pruned/pipeline --single-file unet.safetensors --onnx unet.onnx
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vislr.core.arguments import parse_config
from vislr.core.cli_guard import run
from vislr.core.errors import ConfigError
from vislr.core.files import check_output


@dataclass
class ExportConfig:
    """What to write."""

    model: str = ""
    """A folder of vislr.save, any diffusers folder, or the name of an embedded pipeline. Must be given."""
    plain: str | None = None
    """Folder: a diffusers folder that needs no vislr, where stock configs can express the plan."""
    single_file: str | None = None
    """File: the denoiser in its release's layout, for ComfyUI's "Load Diffusion Model"."""
    onnx: str | None = None
    """File: the denoiser as ONNX, any plan, shapes fixed to the sample."""
    sample: dict[str, int] = field(default_factory=dict)
    """onnx: height, width (latent units), tokens, batch; left out: the model's own. As flags: --sample.height 64"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of what is written."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is not given; expected a folder or the name of an embedded pipeline")
        if not (self.plain or self.single_file or self.onnx):
            raise ConfigError("nothing to write; give plain, single_file or onnx")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr export` with these arguments; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--model")
    config = parse_config(
        ExportConfig, arguments, prog="vislr export",
        description="Write a pipeline for tools without vislr. `vislr export MODEL` is short for --model MODEL.",
    )  # fmt: skip
    for path in (config.single_file, config.onnx):
        if path is not None:
            check_output(Path(path).resolve().parent)

    import torch

    from vislr import exporting, folders

    target = folders.load(config.model, dtype=getattr(torch, config.dtype))
    if config.plain is not None:
        print(f"plain diffusers folder -> {exporting.export_plain(target, config.plain)}")
    if config.single_file is not None:
        print(f"single file -> {exporting.export_single_file(target, config.single_file)}")
    if config.onnx is not None:
        print(f"ONNX -> {exporting.export_onnx(target, config.onnx, sample=config.sample)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
