"""What the tensors of one layer mean: each kind's change of the weight, as plain formulas.

Shapes: weight (Co, Cg, *K), r rank. "Flat" is (Co, Cg prod K). Suffixes are those of adapter files.

========  ==================================================================================
lora      up (Co, r, 1...) @ flat down (r, Cg, *K); with `lora_mid.weight` (r_out, r_in, *K) the
          Tucker product sum_mn mid[m, n] up[o, m] down[n, i]
loha      (w1_a @ w1_b) * (w2_a @ w2_b); Tucker: sum t[p, q] a[p, o] b[q, i] for each factor
lokr      kron(w1, w2), each whole, a product, or (w2) a Tucker product
convlora  reshape(B A); `shape` is needed
flora     core times one factor per mode
sara      scattered values
========  ==================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from vislr.core.errors import FormatError

Tensors = Mapping[str, torch.Tensor]
Shape = tuple[int, ...]


def lora(t: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """(Co, Cg, *K), unscaled."""
    down, up = t["lora_down.weight"].to(dtype), t["lora_up.weight"].to(dtype).flatten(1)
    mid = t.get("lora_mid.weight")
    if mid is None:
        return (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    return tucker(mid.to(dtype), up, down.flatten(1).T)


def tucker(core: torch.Tensor, out: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """core (p, q, *K), out (Co, p), inside (Cg, q) -> (Co, Cg, *K)."""
    return torch.einsum("pq...,op,iq->oi...", core, out, inside)


def _loha_factor(t: Tensors, n: int, dtype: torch.dtype) -> torch.Tensor:
    a, b, core = t[f"hada_w{n}_a"].to(dtype), t[f"hada_w{n}_b"].to(dtype), t.get(f"hada_t{n}")
    return a @ b if core is None else tucker(core.to(dtype), a.T, b.T)


def loha(t: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """Flat, or (Co, Cg, *K) of the Tucker form; unscaled."""
    return _loha_factor(t, 1, dtype) * _loha_factor(t, 2, dtype)


def lokr_w1(t: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """The left factor (a, c)."""
    if "lokr_w1" in t:
        return t["lokr_w1"].to(dtype)
    return t["lokr_w1_a"].to(dtype) @ t["lokr_w1_b"].to(dtype)


def lokr_w2(t: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """The right factor (b, d, *K), or (b, d prod K) where it is a plain product."""
    if "lokr_w2" in t:
        return t["lokr_w2"].to(dtype)
    a, b = t["lokr_w2_a"].to(dtype), t["lokr_w2_b"].to(dtype)
    return tucker(t["lokr_t2"].to(dtype), a.T, b.T) if "lokr_t2" in t else a @ b


def lokr(t: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """(a b, c d, *K) or flat, unscaled. Row-major order makes both the same numbers."""
    w1, w2 = lokr_w1(t, dtype), lokr_w2(t, dtype)
    return torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.dim() - 2)), w2.contiguous())


def convlora(t: Tensors, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """`shape`, unscaled."""
    return (t["convlora_B"].to(dtype) @ t["convlora_A"].to(dtype)).reshape(shape)


def flora_core(t: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """The core with the kernel's factors applied: (r_out, r_in, *K)."""
    core = t["flora_core"].to(dtype)
    for axis in range(2, core.dim()):
        core = torch.tensordot(core, t[f"flora_k{axis - 1}"].to(dtype), ([2], [1]))
    return core


def flora(t: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """(Co, Cg, *K), unscaled."""
    return tucker(flora_core(t, dtype), t["flora_out"].to(dtype), t["flora_in"].to(dtype))


def qalora(t: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """(Co, Cg, *K): A (r, Cg, *K), B (Co, r, ...)."""
    return lora({"lora_down.weight": t["qalora_A"], "lora_up.weight": t["qalora_B"]}, dtype)


def sara(t: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight's delta, bias's delta or None). The bias's places follow those of the weight."""
    shape = tuple(int(n) for n in t["sara_shape"].flatten())
    index, values = t["sara_index"].long(), t["sara_delta"].to(dtype)
    size = math.prod(shape)
    weight = torch.zeros(size, dtype=dtype, device=values.device)
    inside = index < size
    weight[index[inside]] = values[inside]
    if bool(inside.all()):
        return weight.reshape(shape), None
    bias = torch.zeros(shape[0], dtype=dtype, device=values.device)
    bias[index[~inside] - size] = values[~inside]
    return weight.reshape(shape), bias


def per_input(magnitude: torch.Tensor) -> bool:
    """Whether a `dora_scale` is one number per input channel: the place of its 1-axes says so, never a size."""
    return magnitude.dim() > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] != 1


def dora(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """The change that DoRA makes: magnitude * (W + delta) / norm(W + delta) - W.

    Args:
        weight, delta: (Co, Cg, *K), of one dtype; delta is scaled.
        magnitude: (Co, 1, ...), the norm over everything but the output axis; or (1, Cg, 1...), over
            everything but the input axis. (Co,) means per output.

    Raises:
        FormatError: the magnitude fits neither axis.
    """
    changed, magnitude = weight + delta, magnitude.to(weight.dtype)
    axis = 1 if per_input(magnitude) else 0
    if magnitude.numel() != weight.shape[axis]:
        raise FormatError(f"dora_scale {tuple(magnitude.shape)} fits no axis of a weight {tuple(weight.shape)}")
    others = [n for n in range(weight.dim()) if n != axis]
    norm = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
    return magnitude.reshape(norm.shape) * changed / norm - weight
