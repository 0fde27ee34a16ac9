"""The accelerator of a run, and the check that as many processes take part as were asked for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vislr.core.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vislr.train.config import TrainConfig

# `accelerate launch --cpu --num_processes 2` starts one process and says nothing.
_HOW = (
    "on CPUs: ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node {count} pipelines/train_adapter.py ...; "
    "on GPUs: accelerate launch --num_processes {count} pipelines/train_adapter.py ..."
)


def shard_if_asked(config: TrainConfig) -> None:
    """Set `model.shard` where accelerate's config asks for FSDP, and refuse what does not go with a divided base.

    accelerate would divide the adapter and its optimiser, too, so its request is taken out of the environment.

    Raises:
        ConfigError: base in fewer bits, compiled, or something that leaves the device; or SaRA, which trains the base.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes"):
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        config.model.shard = True
    model = config.model
    if not model.shard:
        return
    if config.adapter.kind == "sara":
        raise ConfigError("model.shard: sara trains entries of the base in place; expected convlora, flora or lora")
    for key, value, expected in (
        ("storage", model.storage, "plain"),
        ("compile", model.compile, False),
        ("offload", model.offload, "none"),
        ("offload_activations", model.offload_activations, False),
    ):
        if value != expected:
            raise ConfigError(f"model.shard goes with model.{key} {str(expected).lower()}, not {str(value).lower()}")


def make_accelerator(precision: str = "fp32", processes: int | None = None) -> Accelerator:
    """The accelerator of this process.

    Args:
        precision: "fp32", or mixed with "bf16" or "fp16".
        processes: how many processes must take part; None: as many as were started.

    Raises:
        LaunchError: another number takes part, the launcher started more processes than found each other, or
            DeepSpeed is asked for.
    """
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    except ValueError as error:
        raise LaunchError(f"precision {precision} is not possible here: {error}") from error
    kind = str(accelerator.distributed_type.value)
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise LaunchError(
            f"accelerate's config asks for {kind}; expected one process a device, and model.shard to divide the base: "
            "adapters leave nothing else to divide"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    real = accelerator.num_processes
    if started != real:
        raise LaunchError(
            f"{started} processes were started, but each trains alone ({real} in its group); "
            + _HOW.format(count=started)
        )
    if processes is not None and processes != real:
        raise LaunchError(f"processes is {processes}, but {real} took part; " + _HOW.format(count=processes))
    return accelerator
