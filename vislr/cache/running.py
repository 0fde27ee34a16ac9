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

    known = inspect.signature(pipe.__call__).parameters
    options: dict[str, Any] = {
        "num_inference_steps": steps, "guidance_scale": guidance, "generator": torch.Generator("cpu").manual_seed(seed),
    }  # fmt: skip
    # PixArt draws at the nearest size of its own list and wants a further library to clean captions.
    wanted = {"output_type": "latent", "use_resolution_binning": False, "clean_caption": False}
    if "class_labels" in known:
        wanted["output_type"] = "np"  # DiT decodes in any case
    if getattr(pipe, "text_encoder_3", None) is None and hasattr(pipe, "tokenizer_2"):
        # Without T5, SD3 attends to as many tokens of padding as it is told.
        wanted["max_sequence_length"] = min(256, pipe.tokenizer.model_max_length)
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
