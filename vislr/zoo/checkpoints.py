"""The embedded pipelines: small diffusers folders that come with vislr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.errors import ModelError, hint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WEIGHTS = Path(__file__).with_name("weights")


def pipeline_names() -> list[str]:
    """Names that `pipeline` takes."""
    return sorted(folder.name for folder in WEIGHTS.iterdir() if (folder / "model_index.json").is_file())


def pipeline_folder(name: str) -> Path:
    """The diffusers folder of an embedded pipeline; stock `from_pretrained` loads it too.

    Raises:
        ModelError: no such pipeline is embedded.
    """
    if name not in pipeline_names():
        raise ModelError(f"no embedded pipeline is called '{name}'{hint(name, pipeline_names())}")
    return WEIGHTS / name


def pipeline(name: str, **options: Any) -> DiffusionPipeline:
    """Load an embedded pipeline, in float32 unless `dtype` says otherwise.

    Args:
        name: one of `pipeline_names()`, for example "emoji-unet".
        options: passed on to `DiffusionPipeline.from_pretrained`.
    """
    import torch
    from diffusers import DiffusionPipeline

    options.setdefault("dtype", torch.float32)
    return DiffusionPipeline.from_pretrained(str(pipeline_folder(name)), local_files_only=True, **options)
