"""Pictures from a pipeline at fixed prompts and seeds: a picture depends on its prompt and seed alone."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vislr.anatomy.text import sequence_length
from vislr.core.errors import ConfigError
from vislr.train.families import PixArt, family_of

if TYPE_CHECKING:
    from PIL import Image


class _Steps:
    """Stands in for a pipeline's progress bar: silent, and calls `on_step` after every denoising step."""

    def __init__(self, on_step: Callable[[], Any] | None, iterable: Iterable[Any] | None):
        self.on_step = on_step or (lambda: None)
        self.iterable = iterable

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def __iter__(self) -> Iterator[Any]:
        for item in () if self.iterable is None else self.iterable:
            yield item
            self.on_step()

    def update(self, count: int = 1) -> None:
        self.on_step()


@contextlib.contextmanager
def stepping(pipe: Any, on_step: Callable[[], Any] | None = None) -> Iterator[None]:
    """Inside, a pipeline of diffusers shows no progress bar and calls `on_step` after every denoising step."""
    # The one thing that the loops of all diffusers pipelines call at every step; callbacks differ, and DiT has none.
    pipe.progress_bar = lambda iterable=None, total=None: _Steps(on_step, iterable)
    try:
        yield
    finally:
        del pipe.progress_bar


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
    negative: str | Sequence[str] = "",
    on_step: Callable[[], Any] | None = None,
    image: Image.Image | None = None,
    strength: float = 0.6,
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
        negative: what the pictures should not show, for all or one a picture; "": nothing.
        on_step: called after every denoising step; what it raises ends the run.
        image: what every picture starts from, for a pipeline of image to image; already of its size.
        strength: how far `image` is changed, above 0 and at most 1: the share of the steps that run.

    Raises:
        ConfigError: `negative` or `image` for a pipeline that takes none.
    """
    import torch

    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    family = family_of(pipe)
    taken = inspect.signature(pipe.__call__).parameters
    if size is not None and not family.labelled and "height" in taken:
        options |= {"height": size, "width": size}
    if hasattr(pipe, "transformer") and not family.labelled:
        options["max_sequence_length"] = sequence_length(pipe)
    if isinstance(family, PixArt):
        # Otherwise the pipeline draws at the nearest size of its own list and scales; captions are not cleaned either.
        options |= {"use_resolution_binning": False, "clean_caption": False}
    pairs = list(zip(prompts, seeds, strict=True))
    negatives = [negative] * len(pairs) if isinstance(negative, str) else list(negative)
    # FLUX's pipeline reads one only under a second kind of guidance, which doubles its work and is off.
    if any(negatives) and ("negative_prompt" not in taken or "true_cfg_scale" in taken):
        raise ConfigError(f"a {type(pipe).__name__} takes no negative prompt; leave it empty")
    if image is not None and not {"image", "strength"} <= set(taken):
        raise ConfigError(f"a {type(pipe).__name__} starts from no picture; expected one of image to image")
    images: list[Image.Image] = []
    with stepping(pipe, on_step), _sliced(pipe, size), torch.no_grad():
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            rngs = [torch.Generator("cpu").manual_seed(seed) for _, seed in part]
            texts: list[Any] = [prompt for prompt, _ in part]
            if any(negatives):
                options["negative_prompt"] = negatives[start : start + batch]
            if image is not None:
                options |= {"image": [image] * len(part), "strength": strength}
            if family.labelled:
                texts = family.encode(texts)["label"].tolist()
            images += pipe(texts, generator=rngs, **options).images
            if progress is not None:
                progress(len(part))
    return images
