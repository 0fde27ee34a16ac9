"""Tucker convolution: 1x1 down, k x k core, 1x1 up, added to what is there, in one operation.

It serves FLoRA adapters, convolutions compressed by a Tucker decomposition (base = the bias) and LoCon
(down = None: its first factor is the k x k one).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vislr.kernels.dispatch import use_kernel
from vislr.kernels.errors import KernelError
from vislr.kernels.tucker_conv import ops, reference


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def tucker_convolution(
    x: torch.Tensor,
    down: torch.Tensor | None,
    core: torch.Tensor,
    up: torch.Tensor,
    base: torch.Tensor | None = None,
    scale: float = 1.0,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> torch.Tensor:
    """y = base + scale up (core * (down x)), zeros around x; differentiable in all tensors.

    Fused on a GPU where that pays (`roofline.choose`), three convolutions elsewhere. Any memory format; y has
    that of base, or of x. Under autocast all tensors are cast to its dtype.

    Args:
        x: (N, C, H, W).
        down: (R, C), or None: R = C and the core acts on x itself.
        core: (S, R, kh, kw). Fastest in torch.channels_last.
        up: (Co, S).
        base: (N, Co, H', W'), or a bias (Co,), or None for 0.
        scale: factor of the product.
        stride, padding, dilation: of the core, one number or (vertical, horizontal).

    Returns:
        (N, Co, H', W') in x's dtype.

    Raises:
        KernelError: the shapes or dtypes do not fit, or there is no output position.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, core, up = x.to(dtype), core.to(dtype), up.to(dtype)
        down, base = (None if tensor is None else tensor.to(dtype) for tensor in (down, base))
    given = [_pair(stride), _pair(padding), _pair(dilation)]
    _check(x, down, core, up, base, *given)
    if not use_kernel(x):
        return reference.tucker_conv(x, base, down, core, up, scale, *given)
    tensors = [tensor for tensor in (x, base, down, core, up) if tensor is not None]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return ops.op(x, base, down, core, up, scale, *given, keep)[0]


def _check(
    x: torch.Tensor,
    down: torch.Tensor | None,
    core: torch.Tensor,
    up: torch.Tensor,
    base: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    shapes = {"x": x, "down": down, "core": core, "up": up, "base": base}
    given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in shapes.items() if tensor is not None)
    if x.dim() != 4 or core.dim() != 4 or up.dim() != 2 or (down is not None and down.dim() != 2):
        raise KernelError(f"{given}; expected x (N, C, H, W), down (R, C), core (S, R, kh, kw), up (Co, S)")
    entering = x.shape[1] if down is None else down.shape[0]
    if core.shape[1] != entering or up.shape[1] != core.shape[0] or (down is not None and down.shape[1] != x.shape[1]):
        raise KernelError(f"{given}; expected down (R, C), core (S, R, kh, kw), up (Co, S) for x (N, C, H, W)")
    if any(len(pair) != 2 for pair in (stride, padding, dilation)):
        raise KernelError(f"stride {stride}, padding {padding}, dilation {dilation}; expected one or two numbers each")
    if min(stride) < 1 or min(padding) < 0 or min(dilation) < 1:
        raise KernelError(f"stride {stride}, padding {padding}, dilation {dilation}; expected at least 1, 0 and 1")
    size = [ops.out_size(x.shape[2 + i], core.shape[2 + i], stride[i], padding[i], dilation[i]) for i in range(2)]
    if min(size) < 1:
        raise KernelError(f"{given}, padding {padding}, dilation {dilation}: no output position")
    if base is not None and tuple(base.shape) not in ((up.shape[0],), (x.shape[0], up.shape[0], *size)):
        raise KernelError(f"{given}; expected base ({up.shape[0]},) or {(x.shape[0], up.shape[0], *size)}")
    dtypes = {tensor.dtype for tensor in shapes.values() if tensor is not None}
    if len(dtypes) != 1 or not x.dtype.is_floating_point:
        raise KernelError(f"dtypes {sorted(map(str, dtypes))}; expected one floating dtype")


__all__ = ["tucker_convolution"]
