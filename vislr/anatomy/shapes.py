"""Shapes remembered: what an operator gave on meta once, it gives again without being asked.

torch computes shapes on meta in Python, for most operators through several layers of decompositions; a counted
forward asks for the same few dozen hundreds of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operator and what went in -> shape, strides and dtype of every tensor that came out.
_known: dict[Any, tuple[tuple[Any, Any, torch.dtype], ...]] = {}
_MOST = 100_000


class RememberedShapes(TorchDispatchMode):
    """While it is on, operators on meta tensors that make new tensors are computed once for each set of arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not _makes_tensors(func):
            return func(*args, **kwargs)
        key = (func, _told(args), _told(tuple(kwargs.items())))
        try:
            found = _known.get(key)
        except TypeError:  # an argument without a hash
            return func(*args, **kwargs)
        if found is None:
            output = func(*args, **kwargs)
            made = output if isinstance(output, tuple) else (output,)
            if all(type(one) is torch.Tensor and one.is_meta for one in made):
                if len(_known) >= _MOST:
                    _known.clear()
                _known[key] = tuple((one.shape, one.stride(), one.dtype) for one in made)
            return output
        again = tuple(torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in found)
        return again if len(again) > 1 else again[0]


def _told(value: Any) -> Any:
    """All of an argument that shapes depend on."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple(map(_told, value))
    return (type(value), value)


_makers: dict[Any, bool] = {}


def _makes_tensors(func: Any) -> bool:
    """Whether all that the operator gives is new tensors: no views, nothing written in place."""
    if func not in _makers:
        schema = func._schema
        fresh = all(one.alias_info is None and str(one.type) == "Tensor" for one in schema.returns)
        _makers[func] = fresh and bool(schema.returns) and not schema.is_mutable
    return _makers[func]
