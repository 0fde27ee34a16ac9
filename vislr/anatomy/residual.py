"""Which modules add something to their own input: found in the graph, not by class name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vislr.anatomy.cost import meta_copy
from vislr.anatomy.wrapping import strip, walk

# What timm and torchvision call the branch that changes channels beside the main one.
_SHORTCUTS = ("downsample", "shortcut", "proj")


def residual_names(model: nn.Module, inputs: dict[str, Any]) -> dict[str, bool]:
    """The modules whose output is their input, or a shortcut of it, plus something.

    One forward records the autograd graph. A module adds to its input if its output leads back to
    it through additions and one-argument operations (activations, scaling by a number, views)
    only: everything with weights has more arguments, so the way round the weights is a skip. Where
    a shortcut with weights stands in for the skip, the output is a sum and the branch has a name.

    Args:
        model: on meta and in eval mode. Adapters on it do not matter: they are sums too.
        inputs: keyword arguments of one forward, on meta.

    Returns:
        name -> whether the input itself is added (else a shortcut of it). Innermost modules only:
        a chain of residual blocks also adds to its input.
    """
    model = strip(meta_copy(model))
    uncheckpoint: Any = getattr(model, "set_grad_checkpointing", None)
    if uncheckpoint is not None:
        uncheckpoint(False)  # a checkpoint hides the graph inside it
    for parameter in model.parameters():
        # A frozen weight would leave a convolution with one argument in the graph.
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    found: dict[str, bool] = {}
    handles = []
    for name, module in walk(model):
        if name and _may_add(module):
            handles += _watch(name, module, found)
    try:
        with torch.enable_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: plain for name, plain in found.items() if not any(other.startswith(f"{name}.") for other in found)}


def _may_add(module: nn.Module) -> bool:
    plain_chain = type(module).forward is nn.Sequential.forward
    return not plain_chain and any(module.children()) and any(True for _ in module.parameters())


def _has_shortcut(module: nn.Module) -> bool:
    branches = (getattr(module, name, None) for name in _SHORTCUTS)
    return any(isinstance(branch, nn.Module) and not isinstance(branch, nn.Identity) for branch in branches)


def _watch(name: str, module: nn.Module, found: dict[str, bool]) -> list[Any]:
    entered: list[tuple[Any, torch.Size] | None] = []
    shortcut = _has_shortcut(module)

    def enter(module: nn.Module, args: tuple) -> None:
        first = args[0] if args and torch.is_tensor(args[0]) else None
        entered.append(None if first is None or first.grad_fn is None else (first.grad_fn, first.shape))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        start = entered.pop()
        if start is None or not torch.is_tensor(output):
            return
        if output.shape == start[1] and _leads_back(output.grad_fn, start[0]):
            found[name] = True
        elif shortcut and _is_sum(output.grad_fn):
            found[name] = False

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _before(node: Any) -> list[Any]:
    return [other for other, _ in node.next_functions if other is not None]


def _adds(node: Any) -> bool:
    return node.name().startswith("AddBackward")


def _is_sum(node: Any) -> bool:
    while node is not None and not _adds(node):
        before = _before(node)
        node = before[0] if len(before) == 1 else None
    return node is not None


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
        before = _before(node)
        if _adds(node) or len(before) == 1:
            waiting += [(other, added or _adds(node)) for other in before]
    return False
