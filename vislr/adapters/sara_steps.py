"""What SaRA does around an optimiser's step: the rank term before, write-back and re-selection after.

Source: SaRA (arXiv 2409.06633): equation 4 (nuclear norm of the masked values) and section 4.3 (progressive
adjustment). Both hang on the hooks that torch calls around every optimiser's step, so they work with any
`torch.optim.Optimizer`, 8-bit ones too, under clipping, accumulation and accelerate: once per real step.
The rank term is added after clipping, as in the published training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from vislr.adapters.sara_layer import LIVE, SaraLayer
from vislr.core.errors import AdapterError, hint


def suggested_lr(threshold: float) -> float:
    """The paper's learning rate (equation 12): 1e-3 exp(-350 threshold)."""
    return 1e-3 * math.exp(-350 * threshold)


def polar(matrix: torch.Tensor, floor: float = 1e-4) -> torch.Tensor:
    """U V^T of a matrix U S V^T (m, n), the gradient of its nuclear norm, by products of matrices alone.

    Newton-Schulz steps x -> a x (3 - a^2 x^2) / 2 on the singular values, with the scaling of Chen and Chow
    (2014): a^2 = 3 / (1 + l + l^2) takes the interval [l, 1] to [l', 1] with the largest l'.

    Args:
        floor: singular values above `floor` times a bound of the largest end at 1 (to the dtype's rounding),
            smaller ones between 0 and 1: the gradient of a norm that is smooth near 0. Zeros stay 0. The
            bound, the 4-norm of the singular values, is at most m^(1/4) times the largest.
    """
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    bound = 1.0001 * torch.linalg.matrix_norm(x @ x.T).sqrt()
    x = torch.where(bound > 0, x / bound, x)
    low, near = floor, 1 - 4 * torch.finfo(matrix.dtype).eps
    while low < near:
        a2 = 3 / (1 + low + low * low)
        a = math.sqrt(a2)
        x = (0.5 * a) * (3 * x - a2 * ((x @ x.T) @ x))
        low, before = min(a * low * (3 - a2 * low * low) / 2, 1.0), low
        if low <= before:
            break
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@torch.no_grad()
def rank_gradient(layer: SaraLayer, name: str) -> torch.Tensor:
    """Gradient of the nuclear norm of the trained entries of the weight, at those entries.

    The matrix is the weight as (outputs, everything else), zero where it is not trained.
    """
    entries = layer.entries[name]
    cut = entries.trained_cut
    place, weight, values = entries.trained[:cut].long(), layer.parts()["weight"], layer.sara_values[name].detach()
    matrix = torch.zeros(weight.numel(), dtype=values.dtype, device=values.device)
    matrix[place] = values[:cut]
    return polar(matrix.reshape(weight.shape[0], -1)).reshape(-1)[place]


def reselect(module: nn.Module, name: str, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Progressive adjustment now: train on only the entries that are still below the threshold.

    The others stay at what they have learned. The weights do not change. Moments of plain optimisers go on
    for what is left; states in another form (8-bit) start anew.

    Args:
        module: the model.
        name: of a SaRA adapter on it.
        optimizer: that trains it; its state is shortened with the vectors.

    Returns:
        the number of entries trained on.

    Raises:
        AdapterError: there is no SaRA adapter of this name.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, SaraLayer)]
    found = [layer for layer in layers if name in layer.entries]
    if not found:
        known = sorted({each for layer in layers for each in layer.entries})
        raise AdapterError(f"no SaRA adapter is called '{name}'{hint(name, known)}")
    return sum(_reselect(layer, name, optimizer) for layer in found)


def _reselect(layer: SaraLayer, name: str, optimizer: torch.optim.Optimizer | None) -> int:
    vector = layer.sara_values[name]
    old = vector.shape
    keep = layer.reselect(name)
    if optimizer is not None and vector in optimizer.state:
        state = optimizer.state[vector]
        tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
        plain = all(type(value) is torch.Tensor and value.is_floating_point() for value in tensors.values())
        if plain and all(value.shape == old or value.dim() == 0 for value in tensors.values()):
            for key, value in tensors.items():
                state[key] = value[keep] if value.dim() else value
        else:
            del optimizer.state[vector]
    return len(keep)


def _owned(optimizer: torch.optim.Optimizer) -> dict[str, list[tuple[nn.Parameter, SaraLayer]]]:
    """Adapter name -> the vectors that this optimiser steps, in its order, and their layers."""
    owners = {id(vector): (name, layer) for layer in LIVE for name, vector in layer.sara_values.items()}
    found: dict[str, list[tuple[nn.Parameter, SaraLayer]]] = {}
    if owners:
        for vector in (vector for group in optimizer.param_groups for vector in group["params"]):
            if id(vector) in owners:
                name, layer = owners[id(vector)]
                found.setdefault(name, []).append((vector, layer))
    return found


def _steps(optimizer: torch.optim.Optimizer, vector: nn.Parameter, layer: SaraLayer, name: str) -> int:
    # The optimiser's own count comes back with its state when a run goes on.
    counted = optimizer.state.get(vector, {}).get("step")
    return layer.entries[name].steps if counted is None else int(counted)


def _several() -> bool:
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return known and torch.distributed.get_world_size() > 1


@torch.no_grad()
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # Fused optimisers get gradients that are still multiplied with the scaler's factor.
    factor = getattr(optimizer, "grad_scale", None)
    for name, pairs in _owned(optimizer).items():
        entries = pairs[0][1].entries[name]
        if entries.reselect_after is not None and entries.kept is None and not entries.resizable and _several():
            raise AdapterError(
                "reselect_after changes the size of gradients, which processes share in buckets of fixed size; "
                "expected one process, or `vislr train`, which shares them one by one"
            )
        matrices = [
            (vector, layer)
            for vector, layer in pairs
            if vector.grad is not None
            and layer.entries[name].rank_weight
            and layer.parts()["weight"].dim() > 1
            and layer.entries[name].trained_cut
        ]
        if not matrices:
            continue
        turn = matrices[0][1].entries[name].rank_matrices
        count = len(matrices) if turn is None else min(turn, len(matrices))
        first = _steps(optimizer, *pairs[0], name) * count
        for number in range(first, first + count):
            vector, layer = matrices[number % len(matrices)]
            added = layer.entries[name].rank_weight * rank_gradient(layer, name)
            assert vector.grad is not None
            vector.grad[: len(added)] += added if factor is None else added * factor


@torch.no_grad()
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for name, pairs in _owned(optimizer).items():
        for _, layer in pairs:
            layer.entries[name].steps += 1
            layer.write_back()
        entries = pairs[0][1].entries[name]
        due = entries.reselect_after is not None and entries.kept is None
        if due and _steps(optimizer, *pairs[0], name) >= entries.reselect_after:  # type: ignore[operator]
            for _, layer in pairs:
                _reselect(layer, name, optimizer)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
