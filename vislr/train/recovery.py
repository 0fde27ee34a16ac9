"""Recovery as one call: teacher, objective, what is trained and how fast, on the one training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from vislr.anatomy import denoiser_of
from vislr.core.errors import ConfigError
from vislr.data import key_seed
from vislr.data.config import DataConfig
from vislr.train.checks import at_least
from vislr.train.config import (
    HeldOutConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    OutputConfig,
    SampleConfig,
    TrainConfig,
)
from vislr.train.distill import Distillation, DistillConfig, make_teacher, taps_of
from vislr.train.distill_parts import SENSITIVE_FROM, after_first_cut, kept_taps, sensitivity_rates, with_rates
from vislr.train.loop import fit

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vislr.prune import LayerPlan

ADAPTER = "recovery"


@dataclass
class RecoverySection:
    """Distillation of the pruned model from the whole one, by the trainer of `vislr train`."""

    train: Literal["none", "all", "after-cut", "lora"] = "all"
    """none: prune only. all: every weight. after-cut: what is computed from the first cut on (positional weight
    preservation). lora: an adapter of rank `rank` alone, the cheap way."""
    steps: int = 400
    """Updates."""
    rank: int = 16
    """lora: its rank."""
    task: float = 1.0
    """Weight of the task's own loss."""
    output: float = 1.0
    """Weight of the distance from the teacher's output."""
    features: float = 1.0
    """Weight of the distance from the teacher's features; 0: they are not computed."""
    normalise: Literal["relative", "first", "none"] = "relative"
    """How the features of several places are weighed; relative: each term a relative error."""
    sensitivity: float | None = None
    """hierarchical, ratio .25 and more: exponent of the learning rates by drop of quality (the paper: 1); null: off."""
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number type of the teacher; null: as the model."""
    teacher_offload: bool = False
    """Keep the teacher in main memory and move its layers to the device as they are used."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of forward and backward."""
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    """What is never trained on."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The task's own loss."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-4, weight_decay=1e-4, betas=(0.9, 0.999)))
    """How it is trained."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Pictures made on the way."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        at_least(1, recovery__steps=self.steps, recovery__rank=self.rank)
        at_least(0, recovery__sensitivity=self.sensitivity, recovery__checkpoint_every=self.checkpoint_every)
        DistillConfig(self.task, self.output, self.features, self.normalise)


def recover(
    pipe: Any,
    teacher: nn.Module,
    plan: LayerPlan,
    wanted: RecoverySection,
    *,
    data: DataConfig,
    folder: Path,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    resume: bool = False,
    base: str = "emoji-unet",
    put_on: Callable[[Any, str], Any] | None = None,
    stop: Callable[[int], bool] | None = None,
) -> dict[str, Any]:
    """Train a pruned pipeline towards the model that it was cut from.

    Args:
        pipe: the pruned pipeline, changed in place.
        teacher: its denoiser before the cut.
        plan: what was removed; its `settings["drops"]` guide the learning rates where asked for.
        wanted: how.
        data: captioned pictures. folder: of the run's checkpoints and curves.
        resume: go on from the newest checkpoint.
        base: for the record of the run.
        put_on: applies an adapter config under a name, for `train: lora`.

    Returns:
        steps, seconds, trained parameters, and "held_out": name -> (before, after).

    Raises:
        as `vislr.train.fit`; ConfigError: sensitivity without drops.
    """
    from vislr.data import open_pool

    model = denoiser_of(pipe)[1]
    device = accelerator.device if accelerator is not None else next(model.parameters()).device
    dtype = None if wanted.teacher_dtype is None else getattr(torch, wanted.teacher_dtype)
    teacher = make_teacher(teacher, dtype=dtype, device=device, offload=wanted.teacher_offload)
    trainable, rates, taps = _chosen(model, plan, wanted, seed, put_on)
    config = TrainConfig(
        model=ModelConfig(base=base), data=data, held_out=wanted.held_out, objective=wanted.objective,
        optim=wanted.optim, sample=wanted.sample, steps=wanted.steps, seed=seed, precision=wanted.precision,
        output=OutputConfig(
            folder=str(folder), resume=resume, overwrite=not resume, checkpoint_every=wanted.checkpoint_every
        ),
    )  # fmt: skip
    pool = open_pool(data)
    train, held_out = pool, None
    if wanted.held_out.folder is not None:
        held_out = open_pool(DataConfig(folder=wanted.held_out.folder, size=data.size))
    elif wanted.held_out.fraction:
        train, held_out = pool.split(wanted.held_out.fraction)
    losses = DistillConfig(wanted.task, wanted.output, wanted.features, wanted.normalise)
    with Distillation(pipe, teacher, losses, taps) as extra:
        result = fit(
            pipe, None if trainable else ADAPTER, config, train, held_out, accelerator=accelerator, stop=stop,
            trainable=trainable, rates=rates, extra=extra,
        )  # fmt: skip
    model.requires_grad_(False)
    curves = result.history.held_out
    return {
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "trainable": result.trainable,
        "held_out": {name: (points[0][1], points[-1][1]) for name, points in curves.items()},
    }


def _chosen(
    model: nn.Module, plan: LayerPlan, wanted: RecoverySection, seed: int, put_on: Callable[[Any, str], Any] | None
) -> tuple[dict[str, nn.Parameter] | None, dict[str, float] | None, list[str]]:
    """What is trained (None: the adapter), its rates, and where features are compared."""
    taps = taps_of(model)
    if wanted.train == "lora":
        from peft import LoraConfig

        if put_on is None:
            raise ConfigError("train: lora needs a way to put an adapter on")
        # Whatever this process has drawn before: a run that goes on must begin as one that was not stopped.
        torch.manual_seed(key_seed(seed, "adapter"))
        put_on(LoraConfig(r=wanted.rank, lora_alpha=wanted.rank), ADAPTER)
        return None, None, taps
    trainable = after_first_cut(model) if wanted.train == "after-cut" else dict(model.named_parameters())
    rates = None
    if wanted.sensitivity is not None:
        drops = dict(plan.settings.get("drops") or {})
        if not drops:
            raise ConfigError("recovery.sensitivity needs the drops of a hierarchical plan; this plan has none")
        removed = 1.0 if not plan.total else (plan.saved or 0) / plan.total
        if removed >= SENSITIVE_FROM:
            trainable, rates = with_rates(trainable, sensitivity_rates(trainable, drops, gamma=wanted.sensitivity))
    return trainable, rates, kept_taps(model, taps, trainable)
