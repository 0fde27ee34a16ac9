"""Calibration batches from captioned pictures: what a denoiser is called with in training, as keyword arguments."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from vislr.core.errors import DataError
from vislr.data import ImageFolder, Pool, as_pool
from vislr.data.config import DataConfig
from vislr.train.config import ObjectiveConfig, OutputConfig, TrainConfig
from vislr.train.diffusion import Diffusion


class _Recorder:
    """Stands in for a denoiser: keeps the keyword arguments of a call."""

    def __init__(self, denoiser: Any) -> None:
        self.names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self.kwargs: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        self.kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        self.kwargs.pop("return_dict", None)
        return (next(value for value in self.kwargs.values() if torch.is_tensor(value)),)


@torch.no_grad()
def calibration_inputs(
    pipe: Any,
    pictures: ImageFolder | Pool,
    *,
    samples: int = 256,
    batch: int = 16,
    seed: int = 0,
    size: int | None = None,
) -> list[dict[str, Any]]:
    """Noisy latents, timesteps and captions of a pipeline's denoiser, batch first.

    Timesteps (or sigmas) are uniform, there is no classifier-free guidance, and every draw follows from
    (seed, position): the same pictures and seed give the same batches.

    Args:
        pipe: a pipeline that can be trained. pictures: with captions.
        samples: in all; pictures are repeated with other noise if there are fewer.
        batch: samples in one batch.
        size: side of the pictures in pixels; None: the pipeline's own.

    Raises:
        DataError: no samples are asked for. ModelError: the pipeline is of no family that can be trained.
    """
    if samples < 1 or batch < 1:
        raise DataError(f"{samples} calibration samples in batches of {batch}; expected 1 or more")
    config = TrainConfig(
        data=DataConfig(folder="given", size=size), output=OutputConfig(folder="none"), seed=seed,
        objective=ObjectiveConfig(flow_times="uniform"),
    )  # fmt: skip
    pool = as_pool(pictures, config.data) if isinstance(pictures, ImageFolder) else pictures
    task = Diffusion(pipe, config, pool, None, quiet=True)
    recorder: Any = _Recorder(task.model)
    found: list[dict[str, Any]] = []
    for items in task.train.source.batches(0, -(-samples // batch), batch, 1, 0, 1):
        left = samples - sum(len(next(iter(one.values()))) for one in found)
        task.forward(recorder, task.train[items[:left]], plain=True)
        found.append(recorder.kwargs)
    return found
