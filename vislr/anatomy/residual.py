"""Which modules add something to their own input: found in the graph, not by class name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vislr.anatomy.wrapping import original, walk


def residual_names(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """Names of the modules whose output is their input plus something, shape unchanged.

    One forward records the autograd graph. A module is residual if its output leads back to its
    input through additions and one-argument operations (activations, scaling by a number, views)
    only: everything with weights has more arguments, so the way round the weights is a skip.
    Only innermost modules are named: a chain of residual blocks also adds to its input.

    Args:
        model: on meta and in eval mode; all its parameters end up requiring a gradient.
        inputs: keyword arguments of one forward, on meta.
    """
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(False)  # a checkpoint hides the graph inside it
    for parameter in model.parameters():
        # A frozen weight would leave a convolution with one argument in the graph.
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    found: list[str] = []
    handles = []
    for name, module in walk(model):
        if name and _may_add(original(module)):
            handles += _watch(name, module, found)
    try:
        with torch.enable_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _may_add(module: nn.Module) -> bool:
    plain_chain = type(module).forward is nn.Sequential.forward
    return not plain_chain and any(module.children()) and any(True for _ in module.parameters())


def _watch(name: str, module: nn.Module, found: list[str]) -> list[Any]:
    entered: list[tuple[Any, torch.Size] | None] = []

    def enter(module: nn.Module, args: tuple) -> None:
        first = args[0] if args and torch.is_tensor(args[0]) else None
        entered.append(None if first is None or first.grad_fn is None else (first.grad_fn, first.shape))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        start = entered.pop()
        if start is None or not torch.is_tensor(output) or output.shape != start[1] or name in found:
            return
        if _leads_back(output.grad_fn, start[0]):
            found.append(name)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _leads_back(node: Any, start: Any) -> bool:
    """Whether `start` is reached from `node` over at least one addition."""
    waiting, seen = [(node, False)], set()
    while waiting:
        node, added = waiting.pop()
        if node is None or (node, added) in seen:
            continue
        if node is start:
            if added:
                return True
            continue
        seen.add((node, added))
        before = [other for other, _ in node.next_functions if other is not None]
        adds = node.name().startswith("AddBackward")
        if adds or len(before) == 1:
            waiting += [(other, added or adds) for other in before]
    return False
