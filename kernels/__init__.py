"""Kernels: fast on a GPU through Triton, the same numbers in plain torch everywhere.

Every operation is a folder: `reference.py` is the definition in plain torch, `triton.py` the kernel, `ops.py`
the operator of torch around it, and the folder's own functions check their input and choose. Needs torch
alone; Triton where a GPU is. `dispatch.use("reference")` or VISLR_KERNELS=reference switch kernels off.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vislr.kernels.attention import (
        attention_column_sum,
        attention_with_lse,
        gathered_attention,
        nearest_kept,
        recover,
        recover_by_attention,
    )
    from vislr.kernels.dispatch import set_mode, use
    from vislr.kernels.errors import KernelError
    from vislr.kernels.integer_gemm import (
        conv_w8a8,
        linear_w4a8,
        linear_w4a16,
        linear_w8a8,
        pack_int4,
        quantize_rows,
        unpack_int4,
    )
    from vislr.kernels.sparse_gradient import sparse_weight_gradient
    from vislr.kernels.tucker_conv import tucker_convolution

_NAMES = {
    "KernelError": "errors",
    "attention_column_sum": "attention",
    "attention_with_lse": "attention",
    "conv_w8a8": "integer_gemm",
    "gathered_attention": "attention",
    "linear_w4a16": "integer_gemm",
    "linear_w4a8": "integer_gemm",
    "linear_w8a8": "integer_gemm",
    "nearest_kept": "attention",
    "pack_int4": "integer_gemm",
    "quantize_rows": "integer_gemm",
    "recover": "attention",
    "recover_by_attention": "attention",
    "set_mode": "dispatch",
    "sparse_weight_gradient": "sparse_gradient",
    "tucker_convolution": "tucker_conv",
    "unpack_int4": "integer_gemm",
    "use": "dispatch",
}

__all__ = [
    "KernelError",
    "attention_column_sum",
    "attention_with_lse",
    "conv_w8a8",
    "gathered_attention",
    "linear_w4a16",
    "linear_w4a8",
    "linear_w8a8",
    "nearest_kept",
    "pack_int4",
    "quantize_rows",
    "recover",
    "recover_by_attention",
    "set_mode",
    "sparse_weight_gradient",
    "tucker_convolution",
    "unpack_int4",
    "use",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"vislr.kernels.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'vislr.kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
