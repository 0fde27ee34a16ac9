"""One run of a pipeline for what happens inside it: the pictures themselves are not wanted."""

from __future__ import annotations

import inspect
from typing import Any


def run_once(pipe: Any, prompt: str, seed: int, *, steps: int, guidance: float, **call: Any) -> None:
    """Denoise one picture at the pipeline's own size, without decoding it where the pipeline allows that.

    Args:
        prompt: for a model of classes, a class's name.
        call: further arguments of the pipeline's call.
    """
    import torch

    from vislr.anatomy.text import sequence_length

    known = inspect.signature(pipe.__call__).parameters
    options: dict[str, Any] = {
        "num_inference_steps": steps, "guidance_scale": guidance, "generator": torch.Generator("cpu").manual_seed(seed),
    }  # fmt: skip
    # PixArt draws at the nearest size of its own list and wants a further library to clean captions.
    wanted = {"output_type": "latent", "use_resolution_binning": False, "clean_caption": False}
    if "class_labels" in known:
        wanted["output_type"] = "np"  # DiT decodes in any case
    if "max_sequence_length" in known:
        wanted["max_sequence_length"] = sequence_length(pipe)
    options |= {key: value for key, value in wanted.items() if key in known} | call
    first: Any = [prompt]
    if "class_labels" in known:
        first = pipe.get_label_ids([prompt])
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**(bar | {"disable": True}))
    try:
        with torch.no_grad():
            pipe(first, **options)
    finally:
        pipe._progress_bar_config = bar
