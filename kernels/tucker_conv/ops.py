"""The operator `vislr::tucker_conv` and its gradient."""

from __future__ import annotations

from typing import Any

import torch

from vislr.kernels.dispatch import INTERPRETED, tuned
from vislr.kernels.library import dot_precision, launcher, operator, split
from vislr.kernels.tucker_conv import reference, roofline
from vislr.kernels.tucker_conv.reference import is_channels_last, pointwise

FOLDER = "tucker_conv"
# Starting points for Hopper until `python -m vislr.kernels.tune` has run, by rank S.
_TILE = {"TILE_Y": 8, "TILE_X": 16, "BLOCK_CO": 64, "num_stages": 3}
DEFAULTS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "full": [
        (32, _TILE | {"BLOCK_P": 64, "BLOCK_C": 64, "num_warps": 4}),
        (160, _TILE | {"BLOCK_P": 64, "BLOCK_C": 64, "num_warps": 8}),
    ],
    "tail": [(64, _TILE | {"num_warps": 4}), (160, _TILE | {"num_warps": 8})],
}


def config_of(kernel: str, shape: roofline.Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Tiles, warps and stages of a kernel for a shape."""
    config = dict(next(config for widest, config in DEFAULTS[kernel] if shape.rank_out <= widest))
    if dtype == torch.float32 and not INTERPRETED:
        return config | {"TILE_Y": 4, "TILE_X": 16, "BLOCK_CO": 32, "num_stages": 2} | _only("full", kernel, BLOCK_C=32)
    if shape.pixels < 128 * 132:
        # Tiles for every multiprocessor of a Hopper chip.
        config |= {"TILE_X": 8}
    return config | tuned(FOLDER, kernel, roofline.key(shape))


def _only(wanted: str, kernel: str, **values: int) -> dict[str, int]:
    return values if kernel == wanted else {}


def piece(rank: int) -> int:
    """How many channels of R a step of the core takes: little padding, but no tiny steps."""
    return min((16, 32, 64), key=lambda size: -(-rank // size) * size * (1 + 8 / size))


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output positions of a convolution along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def shape_of(x: Any, base: Any, down: Any, core: Any, up: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """The sizes of a call, as the roofline reads them."""
    height, width = (out_size(x.shape[2 + i], core.shape[2 + i], stride[i], padding[i], dilation[i]) for i in range(2))
    return roofline.Shape(
        pixels_in=x.shape[0] * x.shape[2] * x.shape[3],
        pixels=x.shape[0] * height * width,
        channels_in=x.shape[1],
        rank_in=core.shape[1],
        rank_out=core.shape[0],
        channels_out=up.shape[0],
        taps=core.shape[2] * core.shape[3],
        has_down=down is not None,
        has_base=base is not None and base.dim() == 4,
    )


def _empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _fake(x: Any, base: Any, down: Any, core: Any, up: Any, scale: float, s: Any, p: Any, d: Any, keep: bool) -> Any:
    height, width = (out_size(x.shape[2 + i], core.shape[2 + i], s[i], p[i], d[i]) for i in range(2))
    like = base if base is not None and base.dim() == 4 else x
    y = _empty(like, x.shape[0], up.shape[0], height, width)
    if not keep:
        return y, x.new_empty(0), x.new_empty(0)
    layout = torch.channels_last
    mid = torch.empty((x.shape[0], core.shape[0], height, width), dtype=x.dtype, device=x.device, memory_format=layout)
    if down is None:
        return y, x.new_empty(0), mid
    low = torch.empty((x.shape[0], core.shape[1], *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=layout)
    return y, low, mid


def _strides(base: torch.Tensor | None, like: torch.Tensor) -> tuple[int, ...]:
    if base is None:
        return (0, 0, 0, 0)
    return (0, base.stride(0), 0, 0) if base.dim() == 1 else tuple(base.stride())


def _launch(x: Any, base: Any, down: Any, core: Any, up: Any, scale: float, s: Any, p: Any, d: Any, keep: bool) -> Any:
    y, low, mid = _fake(x, base, down, core, up, scale, s, p, d, keep)
    if y.numel() == 0:
        return y, low.zero_(), mid.zero_()
    shape = shape_of(x, base, down, core, up, s, p, d)
    path = roofline.choose(shape, x.element_size())
    if path == "chain":
        return _chain(x, base, down, core, up, scale, s, p, d, keep)
    if path == "full" and not keep:
        _full(shape, x, base, down, core, up, scale, s, p, d, y)
        return y, low, mid
    narrow = x if down is None else pointwise(x, down)
    if keep and down is not None:
        low.copy_(narrow)
    _tail(shape, narrow, base, core, up, scale, s, p, d, y, mid if keep else None)
    return y, low, mid


def _common(shape: roofline.Shape, x: Any, core: Any, s: Any, p: Any, d: Any, config: dict[str, Any]) -> dict[str, Any]:
    first, second = split(shape.rank_out)
    return {
        "R": shape.rank_in, "S": shape.rank_out, "S1": first, "S2": second, "KH": core.shape[2], "KW": core.shape[3],
        "STRIDE_Y": s[0], "STRIDE_X": s[1], "PAD_Y": p[0], "PAD_X": p[1], "STEP_Y": d[0], "STEP_X": d[1],
        "UPCAST": INTERPRETED and x.dtype == torch.bfloat16,
        "PRECISION": dot_precision(x.dtype, torch.backends.cudnn.allow_tf32),
        "BLOCK_R": piece(shape.rank_in), **config,
    }  # fmt: skip


def _tail(
    shape: Any, h: Any, base: Any, core: Any, up: Any, scale: float, s: Any, p: Any, d: Any, y: Any, mid: Any
) -> None:
    from vislr.kernels.tucker_conv.triton import tail_kernel

    config = config_of("tail", shape, h.dtype)
    core = core.contiguous(memory_format=torch.channels_last)
    tiles_y, tiles_x = -(-y.shape[2] // config["TILE_Y"]), -(-y.shape[3] // config["TILE_X"])
    launcher(tail_kernel)[(tiles_y * tiles_x, y.shape[0])](
        h, y if base is None else base, core, up.contiguous(), y, y if mid is None else mid, scale,
        h.shape[2], h.shape[3], y.shape[2], y.shape[3], y.shape[1], tiles_x,
        *h.stride(), *_strides(base, y), *y.stride(),
        HAS_BASE=base is not None, KEEP=mid is not None, **_common(shape, h, core, s, p, d, config),
    )  # fmt: skip


def _full(
    shape: Any, x: Any, base: Any, down: Any, core: Any, up: Any, scale: float, s: Any, p: Any, d: Any, y: Any
) -> None:
    from vislr.kernels.tucker_conv.triton import full_kernel

    config = config_of("full", shape, x.dtype)
    core = core.contiguous(memory_format=torch.channels_last)
    first, second = split(shape.rank_in)
    tiles_y, tiles_x = -(-y.shape[2] // config["TILE_Y"]), -(-y.shape[3] // config["TILE_X"])
    tiles = y.shape[0] * tiles_y * tiles_x
    programs = min(tiles, 2 * _multiprocessors(x.device))
    sides = [(config[f"TILE_{n}"] - 1) * s[i] + (core.shape[2 + i] - 1) * d[i] + 1 for i, n in enumerate("YX")]
    room = -(-sides[0] * sides[1] // config["BLOCK_P"]) * config["BLOCK_P"]
    strip = x.new_empty(programs, room, first + second)
    launcher(full_kernel)[(programs,)](
        x, y if base is None else base, down.contiguous(), core, up.contiguous(), y, strip, scale,
        x.shape[1], x.shape[2], x.shape[3], y.shape[2], y.shape[3], y.shape[1], tiles, tiles_y, tiles_x,
        *x.stride(), *_strides(base, y), *y.stride(),
        HAS_BASE=base is not None, R1=first, R2=second, **_common(shape, x, core, s, p, d, config),
    )  # fmt: skip


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _chain(x: Any, base: Any, down: Any, core: Any, up: Any, scale: float, s: Any, p: Any, d: Any, keep: bool) -> Any:
    y, low, mid = _fake(x, base, down, core, up, scale, s, p, d, keep)
    if not keep:
        return y.copy_(reference.tucker_conv(x, base, down, core, up, scale, s, p, d)), low, mid
    narrow = x if down is None else low.copy_(pointwise(x, down))
    mid.copy_(torch.nn.functional.conv2d(narrow, core, None, s, p, d))
    wide = pointwise(mid, up)
    if base is None:
        return torch.mul(wide, scale, out=y), low, mid
    return torch.add(base if base.dim() == 4 else base[:, None, None], wide, alpha=scale, out=y), low, mid


def _flops(
    x: Any, base: Any, down: Any, core: Any, up: Any, scale: Any, s: Any, p: Any, d: Any, *args: Any, **kwargs: Any
) -> int:
    height, width = (out_size(x[2 + i], core[2 + i], s[i], p[i], d[i]) for i in range(2))
    first = 0 if down is None else x[0] * x[2] * x[3] * x[1] * core[1]
    return 2 * (first + x[0] * height * width * core[0] * (core[1] * core[2] * core[3] + up[0]))


op = operator(
    "tucker_conv",
    "(Tensor x, Tensor? base, Tensor? down, Tensor core, Tensor up, float scale, int[] stride, int[] padding, "
    "int[] dilation, bool keep) -> (Tensor, Tensor, Tensor)",
    _launch,
    _chain,
    _fake,
    _flops,
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, base, down, core, up, ctx.scale, ctx.stride, ctx.padding, ctx.dilation, _ = inputs
    _, low, mid = output
    ctx.base_dim = 0 if base is None else base.dim()
    ctx.mark_non_differentiable(low, mid)
    ctx.save_for_backward(x, down, core, up, low, mid)


def _differentiate(ctx: Any, grad: Any, *_: Any) -> tuple:
    """With g the gradient of y: of mid scale up^T g; of low that through the transposed core; of x through down^T."""
    x, down, core, up, low, mid = ctx.saved_tensors
    need_x, need_base, need_down, need_core, need_up = ctx.needs_input_grad[:5]
    narrow = x if down is None else low
    grad_mid = pointwise(grad, up.mT * ctx.scale)
    grad_base = grad_up = grad_core = grad_x = grad_down = None
    grad_low: Any = None
    if need_base:
        grad_base = grad if ctx.base_dim == 4 else grad.sum((0, 2, 3))
    if need_up:
        grad_up = _outer(grad, mid) * ctx.scale
    need_low = need_x or need_down
    back = [d * (k - 1) - p for d, k, p in zip(ctx.dilation, core.shape[2:], ctx.padding, strict=True)]
    fused = need_x and down is not None and ctx.stride == [1, 1] and min(back) >= 0
    if need_core or (need_low and not fused):
        grad_low, grad_core, _ = torch.ops.aten.convolution_backward(
            grad_mid, narrow, core, None, ctx.stride, ctx.padding, ctx.dilation, False, [0, 0], 1,
            [need_low and not fused, need_core, False],
        )  # fmt: skip
    if fused:
        # The same operation backwards: the core transposed and turned around, then down^T.
        turned = core.flip(2, 3).transpose(0, 1)
        grad_x, _, grad_low = torch.ops.vislr.tucker_conv(
            grad_mid, None, None, turned, down.mT.contiguous(), 1.0, [1, 1], back, ctx.dilation, True
        )
    elif need_x:
        grad_x = grad_low if down is None else pointwise(grad_low, down.mT)
    if need_down:
        grad_down = _outer(grad_low, x)
    return grad_x, grad_base, grad_down, grad_core, grad_up, None, None, None, None, None


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """sum over samples and pixels: (N, A, H, W), (N, B, H, W) -> (A, B)."""
    left, right = left.permute(0, 2, 3, 1).flatten(0, 2), right.permute(0, 2, 3, 1).flatten(0, 2)
    return left.mT @ right


op.register_autograd(_differentiate, setup_context=_save)
