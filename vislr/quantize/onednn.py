"""Linears of 8-bit weights by oneDNN's int8 product, which PyTorch's x86 quantisation uses.

Without VNNI or AMX oneDNN adds pairs of products in 16 bits, which overflow when both have 8 bits and give results that
are wrong by several per cent: on such a CPU the way is offered for inputs of 7 bits and fewer, whose pairs fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from vislr.core.quantizing import to_codes
from vislr.kernels.dispatch import cpu_has

# Codes -> the count of writes to them when they were repacked, and the packed weight with its zeros.
_packed: Any = WeakTensorKeyDictionary()


def is_exact(input_bits: int) -> bool:
    """Whether this CPU sums 8-bit weights times inputs of these bits without overflow."""
    return input_bits < 8 or cpu_has("int8")


def forget(codes: torch.Tensor) -> None:
    """Drop what was packed of these codes."""
    _packed.pop(codes, None)


def onednn_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's output; the weight is repacked once and kept beside its codes.

    Args:
        layer: a `QuantLinear` with symmetric 8-bit weights and inputs of 8 bits or fewer, static or by timestep.
        x: (..., K). One step size for all samples; samples of several timesteps go the "integer" way.
    """
    scale, zero = layer._affine(x, layer.input_scale, layer.input_zero)
    if scale.numel() > 1:
        return layer.integer(x)
    codes = to_codes(x.float(), scale, zero, layer.spec.input_bits).to(torch.uint8).reshape(-1, x.shape[-1])
    # Without instructions for it oneDNN writes bfloat16 in scalar loops.
    dtype = x.dtype if x.dtype == torch.bfloat16 and cpu_has("bfloat16") else torch.float32
    out = _product(
        codes, scale.reshape(1), zero.reshape(1).to(torch.int32), layer.codes, layer.weight_scale[:, 0],
        None if layer.bias is None else layer.bias.float(), dtype,
    )  # fmt: skip
    return out.to(x.dtype).view(*x.shape[:-1], layer.rows)


# An op of its own: Inductor takes oneDNN's only with frozen weights.
@torch.library.custom_op("vislr::onednn_linear", mutates_args=())
def _product(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, codes: torch.Tensor, weight_scale: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    writes = 0 if codes.is_inference() else codes._version
    if _packed.get(codes, (None,))[0] != writes:
        zeros = torch.zeros(codes.shape[0], dtype=torch.int32)
        _packed[codes] = (writes, torch.ops.onednn.qlinear_prepack(codes, None), zeros)
    _, packed, zeros = _packed[codes]
    return torch.ops.onednn.qlinear_pointwise(
        x, scale, zero, packed, weight_scale, zeros, bias, 1.0, 0, dtype, "none", [], ""
    )


@_product.register_fake
def _(x, scale, zero, codes, weight_scale, bias, dtype):
    return x.new_empty(x.shape[0], codes.shape[0], dtype=dtype)
