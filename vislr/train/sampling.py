"""Pictures from a pipeline at fixed prompts and seeds: a picture depends on its prompt and seed alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vislr.train.families import PixArt, family_of, sequence_length

if TYPE_CHECKING:
    from PIL import Image


@contextlib.contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**(before | {"disable": True}))
    try:
        yield
    finally:
        pipe._progress_bar_config = before


@contextlib.contextmanager
def _sliced(pipe: Any, size: int | None) -> Iterator[None]:
    """Large pictures leave the VAE one by one: a batch of them would need more memory than training."""
    on = (size or 0) >= 512 and hasattr(pipe.vae, "enable_slicing") and not pipe.vae.use_slicing
    if on:
        pipe.vae.enable_slicing()
    try:
        yield
    finally:
        if on:
            pipe.vae.disable_slicing()


def sample_images(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    size: int | None = None,
    batch: int = 8,
    progress: Callable[[int], Any] | None = None,
) -> list[Image.Image]:
    """One picture for each pair of prompt and seed.

    The first noise is drawn for each picture by itself, on the CPU, so neither the batch nor the
    device changes it.

    Args:
        prompts, seeds: of the same length; for a model of classes, their names.
        steps: denoising steps. guidance: classifier-free guidance scale.
        size: side in pixels; None: the pipeline's own.
        batch: pictures made at once.
        progress: called with the number of pictures after every batch.
    """
    import torch

    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    family = family_of(pipe)
    if size is not None and not family.labelled:
        options |= {"height": size, "width": size}
    if hasattr(pipe, "transformer") and not family.labelled:
        options["max_sequence_length"] = sequence_length(pipe)
    if isinstance(family, PixArt):
        # Otherwise the pipeline draws at the nearest size of its own list and scales; captions are not cleaned either.
        options |= {"use_resolution_binning": False, "clean_caption": False}
    images: list[Image.Image] = []
    pairs = list(zip(prompts, seeds, strict=True))
    with _quiet(pipe), _sliced(pipe, size), torch.no_grad():
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            rngs = [torch.Generator("cpu").manual_seed(seed) for _, seed in part]
            texts: list[Any] = [prompt for prompt, _ in part]
            if family.labelled:
                texts = family.encode(texts)["label"].tolist()
            images += pipe(texts, generator=rngs, **options).images
            if progress is not None:
                progress(len(part))
    return images
