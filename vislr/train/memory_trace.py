"""Live bytes of one training step, counted on tensors that have shapes and no values.

Fake tensors take the same kernels' paths as the device they stand for (a fused attention stays fused), so what
autograd keeps is what it would keep there.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Trace:
    """What a step needs beside the weights, in bytes.

    Attributes:
        kept: alive at the end of the forward pass: activations that the backward pass needs.
        peak: most that was alive at once, gradients included.
        workspace: inputs and outputs of the largest single operation: what kernels may copy into a layout of their own.
    """

    kept: int = 0
    peak: int = 0
    workspace: int = 0


@dataclass
class _Live(TorchDispatchMode):
    """Counts storages from the operation that makes them to their end."""

    ignored: set[int] = field(default_factory=set)
    now: int = 0
    trace: Trace = field(default_factory=Trace)

    def __post_init__(self) -> None:
        super().__init__()
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = list(_tensors(out))
        for tensor in made:
            self._add(tensor)
        if made and not func.is_view:
            size = sum(_bytes(tensor) for tensor in made + list(_tensors(args)))
            self.trace.workspace = max(self.trace.workspace, size)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.ignored or key in self._seen:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.trace.peak = max(self.trace.peak, self.now)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def fake(model: nn.Module, device: torch.device) -> Iterator[FakeTensorMode]:
    """The model's tensors without values on `device`, inside the block; they stay so after it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    known: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            if hasattr(module, "module_dropout"):
                # In training peft's LoHa and LoKr look at a number that they draw, also for a dropout of 0.
                module.training = False
            for store in (module._parameters, module._buffers):
                for name, value in list(store.items()):
                    if value is None:
                        continue
                    if id(value) not in known:
                        empty: Any = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
                        if isinstance(value, nn.Parameter):
                            empty = nn.Parameter(empty, requires_grad=value.requires_grad)
                        known[id(value)] = (value, empty)
                    store[name] = known[id(value)][1]
    yield mode


def trace_step(model: nn.Module, call: Callable[[Callable[[torch.Tensor], Any]], torch.Tensor], device: torch.device,
               dtype: torch.dtype | None = None) -> Trace:  # fmt: skip
    """Count one forward and backward.

    Args:
        model: its values are lost: give a copy on the meta device.
        call: given a function that makes fake tensors of real ones, runs the forward pass and gives a loss.
        device: that the tensors stand for.
        dtype: of autocast; None: none.
    """
    with fake(model, device) as mode:
        live = _live(model)
        autocast = torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
        with mode, live:
            with autocast:
                loss = call(lambda value: torch.empty_like(value, device=device))
            live.trace.kept = live.now
            loss.backward()
    return live.trace


def trace_forward(
    model: nn.Module, call: Callable[[Callable[[torch.Tensor], Any]], Any], device: torch.device
) -> Trace:
    """Count one forward without gradients; arguments as for `trace_step`."""
    with fake(model, device) as mode:
        live = _live(model)
        with mode, live, torch.no_grad():
            call(lambda value: torch.empty_like(value, device=device))
    return live.trace


def _live(model: nn.Module) -> _Live:
    return _Live(ignored={value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())})
