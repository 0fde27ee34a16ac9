"""Uniform affine quantisation: codes, the gradients of rounding, and how ranges become step sizes.

A code q in 0 ... L, L = 2^bits - 1, stands for (q - zero) * scale. All scales, zeros and inputs broadcast.
Source: EfficientDM (arXiv 2310.03270), equations 3 and 6; the gradients are those of LSQ+ (arXiv 2004.09576)
without its factor 1 / sqrt(n L).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vislr.core.errors import ConfigError

BITS = range(2, 9)
# Smallest scale: the range of an input or channel that is 0 everywhere has no size.
TINY = 1e-8


def check_bits(bits: int, what: str = "bits") -> None:
    """Raises ConfigError unless 2 <= bits <= 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise ConfigError(f"{what} is {bits!r}; expected a whole number from 2 to 8")


def top(bits: int) -> int:
    """The largest code, L."""
    return (1 << bits) - 1


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def round_through(x: torch.Tensor) -> torch.Tensor:
    """Rounded to whole numbers, halves to even; the gradient passes as if it were not."""
    return _Round.apply(x)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, scale: Any, zero: Any, limit: int) -> torch.Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.limit = limit
        return ((x / scale).round_().add_(zero).clamp_(0, limit) - zero) * scale

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, scale, zero = ctx.saved_tensors
        ratio = x / scale
        code = ratio.round() + zero
        inside = (code >= 0) & (code <= ctx.limit)
        wanted = ctx.needs_input_grad
        grad_x = grad * inside if wanted[0] else None
        grad_scale = grad_zero = None
        if wanted[1]:
            slope = code.clamp(0, ctx.limit) - zero - ratio * inside
            grad_scale = (grad * slope).sum_to_size(scale.shape)
        if wanted[2]:
            grad_zero = (grad * ~inside * -scale).sum_to_size(zero.shape)
        return grad_x, grad_scale, grad_zero, None


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """(clip(round(x / scale) + zero, 0, L) - zero) * scale, differentiable.

    ===========  ==========  =============================  ==========
    where x is   d / d x     d / d scale                    d / d zero
    ===========  ==========  =============================  ==========
    in range     1           round(x / scale) - x / scale   0
    above        0           L - zero                       -scale
    below        0           -zero                          -scale
    ===========  ==========  =============================  ==========

    Args:
        x: floating.
        scale, zero: broadcast to x, of its dtype; zero a whole number (`round_through` of a learned one).
    """
    return _FakeQuantize.apply(x, scale, zero, top(bits))


class _MergedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, delta: Any, scale: Any, codes: Any, zero: Any, limit: int) -> torch.Tensor:
        ctx.save_for_backward(delta, scale, codes, zero)
        ctx.limit = limit
        return ((delta / scale).round_().add_(codes).clamp_(0, limit) - zero) * scale

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        delta, scale, codes, zero = ctx.saved_tensors
        ratio = delta / scale
        code = ratio.round() + codes
        inside = (code >= 0) & (code <= ctx.limit)
        grad_delta = grad * inside if ctx.needs_input_grad[0] else None
        grad_scale = None
        if ctx.needs_input_grad[1]:
            slope = code.clamp(0, ctx.limit) - zero - ratio * inside
            grad_scale = (grad * slope).sum_to_size(scale.shape)
        return grad_delta, grad_scale, None, None, None


def merged_weight(
    codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, delta: torch.Tensor, bits: int
) -> torch.Tensor:
    """The weight of a quantised layer with an update merged before quantising, differentiable in scale and delta.

    With the base on its own grid, (codes - zero) * scale, quantising base + delta is exact in codes::

        codes' = clip(codes + round(delta / scale), 0, L)        weight = (codes' - zero) * scale

    The base moves with its scale: there is one scale, updated once.

    Args:
        codes, zero: whole numbers in a floating dtype. scale: of the same; broadcast to codes.
        delta: shape of codes.
    """
    return _MergedWeight.apply(delta, scale, codes, zero, top(bits))


def merged_codes(codes: torch.Tensor, scale: torch.Tensor, delta: torch.Tensor, bits: int) -> torch.Tensor:
    """codes' of `merged_weight`: the very numbers that training saw."""
    return ((delta / scale).round() + codes).clamp(0, top(bits))


def affine_of(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero (whole, in 0 ... L, floating) whose codes cover low ... high; 0 is always a code.

    Symmetric: zero is 2^(bits - 1) and the range is the larger side, both ways.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    if symmetric:
        half = 1 << (bits - 1)
        scale = (torch.maximum(-low, high) / (half - 1)).clamp_min(TINY)
        return scale, torch.full_like(scale, half)
    scale = ((high - low) / top(bits)).clamp_min(TINY)
    return scale, (-low / scale).round().clamp(0, top(bits))


def to_codes(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """clip(round(x / scale) + zero, 0, L), in x's dtype."""
    return ((x / scale).round() + zero).clamp(0, top(bits))


def holds_codes(layer: object) -> bool:
    """Whether a layer's weight is kept as integers (a layer of `vislr.quantize`, below any adapter)."""
    return getattr(layer, "weight_count", None) is not None


def parameter_count(module: nn.Module) -> int:
    """All parameters of a module; weights that are kept as codes count like any others."""
    codes = sum(layer.weight_count for layer in module.modules() if holds_codes(layer))  # type: ignore[misc]
    return codes + sum(p.numel() for p in module.parameters())
