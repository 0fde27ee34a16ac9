"""The trained entries of a linear layer's weight gradient, for SaRA.

There is no Triton kernel: single entries at 5 to 20 % density need two rows of P numbers each from memory for P
multiply-adds outside of tensor cores, which on a Hopper chip takes longer than all entries do on them
(`docs/kernels.md` has the arithmetic). On a CPU the entries alone win below a tenth.
"""

from __future__ import annotations

import torch

from vislr.kernels.errors import KernelError
from vislr.kernels.sparse_gradient import reference


def sparse_weight_gradient(grad: torch.Tensor, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of grad^T x, the gradient of W in y = x W^T, at row-major places. Without gradient itself.

    Args:
        grad: (..., O), gradient of y.
        x: (..., I), the layer's input, dtype of grad.
        index: (n,) int32 or int64, increasing, places in (O, I).

    Returns:
        (n,), dtype of grad.

    Raises:
        KernelError: the shapes or dtypes do not fit.
    """
    if grad.shape[:-1] != x.shape[:-1] or grad.dtype != x.dtype or index.dim() != 1 or grad.dim() < 2:
        given = f"grad {tuple(grad.shape)} {grad.dtype}, x {tuple(x.shape)} {x.dtype}, index {tuple(index.shape)}"
        raise KernelError(f"{given}; expected (..., O), (..., I) of one dtype and (n,)")
    if index.dtype not in (torch.int32, torch.int64):
        raise KernelError(f"index is {index.dtype}; expected int32 or int64")
    return reference.sparse_weight_gradient(grad.detach().flatten(0, -2), x.detach().flatten(0, -2), index)


__all__ = ["sparse_weight_gradient"]
