"""The accelerator of a run, and the check that as many processes take part as were asked for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vislr.core.errors import LaunchError

if TYPE_CHECKING:
    from accelerate import Accelerator

# `accelerate launch --cpu --num_processes 2` starts one process and says nothing.
_HOW = (
    "on CPUs: ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node {count} pipelines/train_adapter.py ...; "
    "on GPUs: accelerate launch --num_processes {count} pipelines/train_adapter.py ..."
)


def make_accelerator(precision: str = "fp32", processes: int | None = None) -> Accelerator:
    """The accelerator of this process.

    Args:
        precision: "fp32", or mixed with "bf16" or "fp16".
        processes: how many processes must take part; None: as many as were started.

    Raises:
        LaunchError: another number takes part, the launcher started more processes than found each other, or
            the model is to be sharded over them.
    """
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
    except ValueError as error:
        raise LaunchError(f"precision {precision} is not possible here: {error}") from error
    kind = str(accelerator.distributed_type.value)
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise LaunchError(
            f"accelerate's config asks for {kind}; expected one process a device without sharding: adapters leave "
            "little to shard, and model.storage (fp8, int8, nf4) makes the base smaller"
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
