"""The frozen base divided over the processes of a run (FSDP2); the adapter stays whole on each.

An adapter is small and its base is not, so only the base is divided: a block's weights are gathered while it runs and
dropped after it. Gradients, optimiser state, averages and checkpoints are those of a run that is not sharded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from vislr.core.errors import ModelError


def shard_base(model: nn.Module, trainable: Collection[nn.Parameter], device: torch.device, world: int) -> int:
    """Divide the frozen weights of a model's blocks over all processes.

    Args:
        model: on this process's device, the same on every process.
        trainable: parameters that stay whole.
        world: number of processes; with one there is nothing to do.

    Returns:
        the number of blocks that were divided.

    Raises:
        ModelError: the model has no lists of blocks.
    """
    if world == 1:
        return 0
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = list(_blocks(model))
    if not blocks:
        raise ModelError(f"model.shard: a {type(model).__name__} has no lists of blocks to divide")
    mesh = init_device_mesh(device.type, (world,))
    whole = set(trainable)
    for block in blocks:
        for parameter in block.parameters():
            # FSDP takes no channels_last weights.
            parameter.data = parameter.data.contiguous()
        # Each block is a root of its own: the model keeps its class, by which files name it.
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[Any]:
    """Elements of the outermost lists of modules, and middle blocks of UNets."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif name == "mid_block":
            yield child
        else:
            yield from _blocks(child)
