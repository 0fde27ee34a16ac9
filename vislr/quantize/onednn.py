"""W8A8 linears by oneDNN's int8 product, which PyTorch's x86 quantisation uses: for CPUs with VNNI or AMX.

Without these instructions oneDNN adds pairs of products in 16 bits, which overflow at full-range codes: there the
results are wrong by several per cent, so the way is not offered.
"""

from __future__ import annotations

from typing import Any

import torch

from vislr.core.quantizing import to_codes

_FLOATS = (torch.float32, torch.bfloat16)


def onednn_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's output; the weight is repacked once and kept beside its codes.

    Args:
        layer: a `QuantLinear` with symmetric 8-bit weights and 8-bit inputs.
        x: (..., K). One step size for all samples; samples of several timesteps go the "integer" way.
    """
    scale, zero = layer._affine(x, layer.input_scale, layer.input_zero)
    if scale.numel() > 1:
        return layer.integer(x)
    if layer._kept is None:
        zeros = torch.zeros(layer.rows, dtype=torch.int32)
        layer._kept = (torch.ops.onednn.qlinear_prepack(layer.codes, None), zeros)
    packed, zeros = layer._kept
    codes = to_codes(x.float(), scale, zero, 8).to(torch.uint8).reshape(-1, x.shape[-1])
    dtype = x.dtype if x.dtype in _FLOATS else torch.float32
    bias = None if layer.bias is None else layer.bias.float()
    out = torch.ops.onednn.qlinear_pointwise(
        codes, scale.reshape(1), zero.reshape(1).to(torch.int32), packed, layer.weight_scale[:, 0], zeros, bias,
        1.0, 0, dtype, "none", [], "",
    )  # fmt: skip
    return out.to(x.dtype).view(*x.shape[:-1], layer.rows)
