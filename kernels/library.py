"""Operators of torch around Triton kernels.

On a GPU an operator is a `triton_op`: inductor sees the kernel, and it goes into compiled packages. In
Triton's interpreter it is a `custom_op`, since interpreted kernels cannot be traced. On a device without
Triton the same operator runs the reference, so an exported program runs anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from vislr.kernels.dispatch import INTERPRETED, runs_kernel


def operator(
    name: str,
    schema: str,
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
) -> Any:
    """Register `vislr::name`.

    Args:
        schema: arguments and results in torch's notation.
        launch: runs the kernel; the first argument is a tensor that tells the device.
        reference: the same without Triton.
        fake: gives empty results of the right shapes, dtypes and strides.
        flops: FLOPs of a call from the shapes of its arguments, as `register_flop_formula` asks.

    Returns:
        The operator; its `register_autograd` adds a gradient.
    """

    def body(*args: Any) -> Any:
        return launch(*args) if runs_kernel(args[0].device) else reference(*args)

    qualified = f"vislr::{name}"
    op = _make(qualified, body, schema)
    op.register_fake(fake)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.vislr, name))(flops)
    return op


# Whether operators show their kernels to torch.compile. Cleared at the first one that torch refuses.
_visible = not INTERPRETED


def _make(qualified: str, body: Callable[..., Any], schema: str) -> Any:
    global _visible
    if _visible:
        try:
            return torch.library.triton_op(qualified, body, mutates_args=(), schema=schema)
        except (ValueError, TypeError):
            # Some versions of torch infer the schema from annotations even if it is given one.
            _visible = False
    return torch.library.custom_op(qualified, body, mutates_args=(), schema=schema)


def launcher(kernel: Any) -> Any:
    """`launcher(kernel)[grid](...)` starts a Triton kernel, visibly to torch.compile where that works."""
    return torch.library.wrap_triton(kernel) if _visible else kernel


def dot_precision(dtype: torch.dtype, tf32: bool) -> str:
    """How Triton multiplies float32 blocks: in tf32 if torch may, else exactly."""
    return "tf32" if dtype != torch.float32 or tf32 else "ieee"


def split(size: int) -> tuple[int, int]:
    """Two block widths, each a power of two or 0, that together cover `size` with little waste.

    Blocks of Triton are powers of two from 16 on: 80 as 64 + 16 takes 5/8 of the work of 128.
    """
    whole = max(16, 1 << (size - 1).bit_length())
    if whole == 16:
        return 16, 0
    half = whole // 2
    rest = max(16, 1 << (size - half - 1).bit_length())
    return (half, rest) if half + rest < whole else (whole, 0)
