"""The operators `vislr::attention_forward`, `attention_backward`, `attention_column_sum`, `attention_nearest`."""

from __future__ import annotations

from typing import Any

import torch

from vislr.kernels.attention import reference
from vislr.kernels.dispatch import INTERPRETED, tuned
from vislr.kernels.library import dot_precision, launcher, operator, split

FOLDER = "attention"
# Starting points for Hopper until `python -m vislr.kernels.tune` has run: {kernel: (widest D, configuration)}.
DEFAULTS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "forward": [
        (64, {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}),
        (128, {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}),
        (256, {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}),
    ],
    "column_sum": [
        (64, {"BLOCK_Q": 64, "BLOCK_K": 128, "HALF_EXP": False, "num_warps": 4, "num_stages": 3}),
        (256, {"BLOCK_Q": 64, "BLOCK_K": 128, "HALF_EXP": False, "num_warps": 8, "num_stages": 2}),
    ],
    "keys": [
        (64, {"BLOCK_Q": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2}),
        (256, {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}),
    ],
    "queries": [
        (64, {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}),
        (256, {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}),
    ],
    "nearest": [
        (64, {"BLOCK_Q": 64, "BLOCK_K": 64, "BLOCK_C": 128, "num_warps": 4, "num_stages": 3}),
        (256, {"BLOCK_Q": 64, "BLOCK_K": 64, "BLOCK_C": 128, "num_warps": 8, "num_stages": 2}),
    ],
}


def config_of(kernel: str, head: int, dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes, warps and stages of a kernel for a head size."""
    config = dict(next(config for widest, config in DEFAULTS[kernel] if head <= widest))
    if dtype == torch.float32 and not INTERPRETED:
        # Blocks of twice the bytes.
        config |= {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
        return config
    return config | tuned(FOLDER, kernel, f"D={head}")


def _shape(x: torch.Tensor, align: int) -> dict[str, Any]:
    first, second = split(x.shape[-1])
    return {
        "D": x.shape[-1],
        "D1": first,
        "D2": second,
        "ALIGN": align,
        "UPCAST": INTERPRETED and x.dtype == torch.bfloat16,
        "PRECISION": dot_precision(x.dtype, torch.backends.cuda.matmul.allow_tf32),
    }


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with its last axis dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """The largest of 8 and 1 that divides all strides of B, H and N, and the strides divided by it."""
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    align = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return align, tuple(stride // align for stride in strides)


def _empty(batch: int, heads: int, rows: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) that lies in memory as (B, N, H, D): joining the heads afterwards is a view."""
    return like.new_empty(batch, rows, heads, size).transpose(1, 2)


def _grid(rows: int, block: int, columns: int) -> tuple[int, int]:
    return -(-rows // block), columns


def _forward(q: Any, k: Any, v: Any, query_index: Any, key_index: Any, scale: float) -> Any:
    from vislr.kernels.attention.triton import forward_kernel

    out, lse = _forward_fake(q, k, v, query_index, key_index, scale)
    batch, heads, queries, _ = out.shape
    keys = k.shape[2] if key_index is None else key_index.shape[1]
    if keys == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if lse.numel() == 0:
        return out, lse
    if key_index is not None and tuned(FOLDER, "gather", f"D={q.shape[-1]}").get("copy"):
        k, v, key_index = reference.gather_tokens(k, key_index), reference.gather_tokens(v, key_index), None
    q, k, v = _rows(q), _rows(k), _rows(v)
    index_q = q if query_index is None else query_index.contiguous()
    index_k = q if key_index is None else key_index.contiguous()
    align, strides = _strides(q, k, v)
    config = config_of("forward", q.shape[-1], q.dtype)
    launcher(forward_kernel)[_grid(queries, config["BLOCK_Q"], batch * heads)](
        q, k, v, out, lse, index_q, index_k, scale, heads, queries, keys, index_q.stride(0), index_k.stride(0),
        *strides, *out.stride()[:3],
        GATHER_Q=query_index is not None, GATHER_K=key_index is not None, **_shape(q, align), **config,
    )  # fmt: skip
    return out, lse


def _forward_reference(q: Any, k: Any, v: Any, query_index: Any, key_index: Any, scale: float) -> Any:
    out, lse = _forward_fake(q, k, v, query_index, key_index, scale)
    values, sums = reference.gathered_attention(q, k, v, query_index, key_index, scale)
    return out.copy_(values), lse.copy_(sums)


def _forward_fake(q: Any, k: Any, v: Any, query_index: Any, key_index: Any, scale: float) -> Any:
    batch, heads, queries, size = q.shape
    if query_index is not None:
        queries = query_index.shape[1]
    lse = q.new_empty(batch, heads, queries, dtype=reference.accumulator(q.dtype))
    return _empty(batch, heads, queries, size, q), lse


def _forward_flops(q: Any, k: Any, v: Any, query_index: Any, key_index: Any, *args: Any, **kwargs: Any) -> int:
    queries = q[2] if query_index is None else query_index[1]
    keys = k[2] if key_index is None else key_index[1]
    return 4 * q[0] * q[1] * queries * keys * q[3]


forward = operator(
    "attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? query_index, Tensor? key_index, float scale) -> (Tensor, Tensor)",
    _forward,
    _forward_reference,
    _forward_fake,
    _forward_flops,
)


def _backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, scale: float) -> Any:
    from vislr.kernels.attention.triton_backward import keys_kernel, queries_kernel

    dq, dk, dv = _backward_fake(grad, q, k, v, out, lse, scale)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if queries == 0 or keys == 0 or batch * heads == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad)
    delta = (grad.float() * out.float()).sum(-1).contiguous()
    align, strides = _strides(q, k, v, grad)
    shape = _shape(q, align)
    config = config_of("keys", q.shape[-1], q.dtype)
    launcher(keys_kernel)[_grid(keys, config["BLOCK_K"], batch * heads)](
        q, k, v, grad, lse, delta, dk, dv, scale, heads, queries, keys, *strides, *dk.stride()[:3], **shape, **config
    )
    config = config_of("queries", q.shape[-1], q.dtype)
    launcher(queries_kernel)[_grid(queries, config["BLOCK_Q"], batch * heads)](
        q, k, v, grad, lse, delta, dq, scale, heads, queries, keys, *strides, *dq.stride()[:3], **shape, **config
    )
    return dq, dk, dv


def _backward_reference(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, scale: float) -> Any:
    dq, dk, dv = _backward_fake(grad, q, k, v, out, lse, scale)
    acc = reference.accumulator(q.dtype)
    queries, keys, values, change = (x.to(acc) for x in (q, k, v, grad))
    weights = ((queries @ keys.mT) * scale - lse.unsqueeze(-1)).exp()
    spread = weights * (change @ values.mT - (change * out.to(acc)).sum(-1, keepdim=True)) * scale
    return dq.copy_(spread @ keys), dk.copy_(spread.mT @ queries), dv.copy_(weights.mT @ change)


def _backward_fake(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, scale: float) -> Any:
    batch, heads, _, size = q.shape
    return tuple(_empty(batch, heads, x.shape[2], size, x) for x in (q, k, v))


def _backward_flops(grad: Any, q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    return 10 * q[0] * q[1] * q[2] * k[2] * q[3]


backward = operator(
    "attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_reference,
    _backward_fake,
    _backward_flops,
)


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, query_index, key_index, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, query_index, key_index, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Any, _: Any) -> tuple:
    q, k, v, query_index, key_index, out, lse = ctx.saved_tensors
    # Gathered copies: training on kept tokens is rare, and gradients of gathered rows are scattered anyway.
    rows_q = q if query_index is None else reference.gather_tokens(q, query_index)
    rows_k, rows_v = (x if key_index is None else reference.gather_tokens(x, key_index) for x in (k, v))
    grads = torch.ops.vislr.attention_backward(grad, rows_q, rows_k, rows_v, out, lse, ctx.scale)
    full = (_scattered(g, x, i) for g, x, i in zip(grads, (q, k, v), (query_index, key_index, key_index), strict=True))
    return (*full, None, None, None)


def _scattered(grad: torch.Tensor, full: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    if index is None:
        return grad
    place = index[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3])
    return torch.zeros_like(full).scatter_add(2, place, grad)


forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _column_sum(q: Any, k: Any, lse: Any, s: Any, scale: float) -> Any:
    from vislr.kernels.attention.triton import column_sum_kernel

    out = _column_sum_fake(q, k, lse, s, scale)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if queries == 0:
        return out.zero_()
    if out.numel() == 0:
        return out
    q, k = _rows(q), _rows(k)
    align, strides = _strides(q, k)
    config = config_of("column_sum", q.shape[-1], q.dtype)
    launcher(column_sum_kernel)[_grid(keys, config["BLOCK_K"], batch * heads)](
        q, k, lse.contiguous(), s.float().contiguous(), out, scale, heads, queries, keys,
        *strides, **_shape(q, align), **{"HALF_EXP": False} | config,
    )  # fmt: skip
    return out


def _column_sum_reference(q: Any, k: Any, lse: Any, s: Any, scale: float) -> Any:
    return reference.attention_column_sum(q, k, lse, s, scale)


def _column_sum_fake(q: Any, k: Any, lse: Any, s: Any, scale: float) -> Any:
    return q.new_empty(*k.shape[:3], dtype=reference.accumulator(q.dtype))


def _column_sum_flops(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + 1)


column_sum = operator(
    "attention_column_sum",
    "(Tensor q, Tensor k, Tensor lse, Tensor s, float scale) -> Tensor",
    _column_sum,
    _column_sum_reference,
    _column_sum_fake,
    _column_sum_flops,
)


def _nearest(kept: Any, keep: Any, q: Any, k: Any, lse: Any, scale: float) -> Any:
    from vislr.kernels.attention.triton import nearest_kernel

    out, nearest = _nearest_fake(kept, keep, q, k, lse, scale)
    batch, heads, tokens, _ = q.shape
    if nearest.numel() == 0:
        return out, nearest
    q, k, kept, keep = _rows(q), _rows(k), _rows(kept), keep.contiguous()
    place = torch.full_like(nearest, -1)
    place.scatter_(1, keep, torch.arange(keep.shape[1], device=keep.device).expand_as(keep))
    align, strides = _strides(q, k)
    config = config_of("nearest", q.shape[-1], q.dtype)
    launcher(nearest_kernel)[_grid(tokens, config["BLOCK_Q"], batch)](
        q, k, lse.contiguous(), keep, place, kept, nearest, out, scale, heads, tokens, keep.shape[1], kept.shape[2],
        *strides, *kept.stride()[:2],
        COPY=kept.shape[2] > 0, **_shape(q, align), **{"BLOCK_C": 128} | config,
    )  # fmt: skip
    return out, nearest


def _nearest_reference(kept: Any, keep: Any, q: Any, k: Any, lse: Any, scale: float) -> Any:
    nearest = reference.nearest_kept(q, k, lse, keep, scale)
    return reference.recover(kept, nearest), nearest


def _nearest_fake(kept: Any, keep: Any, q: Any, k: Any, lse: Any, scale: float) -> Any:
    out = kept.new_empty(q.shape[0], q.shape[2], kept.shape[2])
    return out, keep.new_empty(q.shape[0], q.shape[2])


def _nearest_flops(kept: Any, keep: Any, q: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * keep[1] * q[3]


nearest = operator(
    "attention_nearest",
    "(Tensor kept, Tensor keep, Tensor q, Tensor k, Tensor lse, float scale) -> (Tensor, Tensor)",
    _nearest,
    _nearest_reference,
    _nearest_fake,
    _nearest_flops,
)


def _keep_nearest(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[1])
    ctx.count = inputs[0].shape[1]
    ctx.mark_non_differentiable(output[1])


def _add_up(ctx: Any, grad: Any, _: Any) -> tuple:
    (nearest,) = ctx.saved_tensors
    total = grad.new_zeros(grad.shape[0], ctx.count, grad.shape[2])
    place = nearest.unsqueeze(-1).expand(-1, -1, grad.shape[2])
    return (total.scatter_add(1, place, grad), None, None, None, None, None)


nearest.register_autograd(_add_up, setup_context=_keep_nearest)
