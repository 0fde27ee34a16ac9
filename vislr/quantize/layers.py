"""Linears and convs whose weights are integers; they are torch's own classes to everybody who asks.

A layer keeps codes and scales in buffers, the bias as it was. `weight` is computed when somebody reads it, and
refuses to be written. Scales stay float32 through any cast.

How a layer computes is its `way`: "dequantise" (the weight in the input's dtype, then torch's product), "integer"
(int8 products, sums exact in int32), "packed" (products that read packed weights), "onednn" (oneDNN's int8
linear on a CPU), "kept" (the dequantised weight stays in memory). All give the same numbers but for rounding of
sums. "auto": kernels for linears where a GPU has them, else "dequantise".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from vislr.core.errors import AdapterError
from vislr.core.quantizing import TINY, fake_quantize, merged_codes, merged_weight, round_through, to_codes
from vislr.kernels.dispatch import FLOATS, use_kernel
from vislr.kernels.integer_gemm import conv_w8a8, linear_w4a16, linear_w8a8
from vislr.quantize import onednn
from vislr.quantize.plan import WHOLE, QuantPlan
from vislr.quantize.steps import Steps, looked_up
from vislr.quantize.weights import (
    BLOCK,
    container,
    groups_of,
    nf4_table,
    pack,
    packed_shape,
    quantize_weight,
    unpack,
)

WAYS = ("auto", "dequantise", "integer", "packed", "onednn", "kept")
SCALES = ("weight_scale", "input_scale")


class Spec(NamedTuple):
    """What a plan says of one layer.

    Attributes:
        bits, input_bits: of the weight, and of the input (16: as it is).
        inputs, group, format: as in `QuantPlan`.
        symmetric: of the weight.
        entries: step sizes of the input: 0 (none or dynamic), 1, or one for each timestep.
    """

    bits: int
    input_bits: int
    inputs: str
    group: int | None
    format: str
    symmetric: bool
    entries: int

    @classmethod
    def of(cls, plan: QuantPlan, name: str) -> Spec:
        """The layer's part of a plan."""
        bits, input_bits = plan.layers[name]
        inputs = "none" if input_bits == WHOLE else plan.inputs
        entries = {"none": 0, "dynamic": 0, "static": 1, "timestep": len(plan.timesteps)}[inputs]
        return cls(bits, input_bits, inputs, plan.group, plan.format, plan.symmetric(bits), entries)


class _Dequantized(torch.Tensor):
    """A weight for reading: what is written to it would be lost, so it refuses."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise AdapterError(
            "cannot merge into a quantised weight: its values lie on a grid; keep the adapter unmerged, or merge "
            "before quantising"
        )


class QuantLayer(nn.Module):
    """What all quantised layers share; made by `quantized` or `empty`.

    Attributes:
        spec: what the plan says.
        shape: of the weight, (Co, ...).
        weight_count: entries of the weight, for those who count parameters.
        codes: packed (`vislr.quantize.weights.pack`).
        weight_scale: (Co, groups) float32. weight_zero: (Co, groups) uint8, or None.
        input_scale: (entries,) float32, input_zero: (entries,) int16; or None.
        steps: of the model, where step sizes depend on the timestep.
        way: how it computes.
    """

    spec: Spec
    shape: torch.Size
    weight_count: int
    codes: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_zero: torch.Tensor | None
    bias: Any
    steps: Steps | None
    way: str
    _kept: Any

    # Making.

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # peft makes a conv's adapter by the class of the conv: what has features given is one of torch's.
        if args or kwargs:
            plain = next(base for base in KINDS if issubclass(cls, base))
            return plain(*args, **kwargs)
        return super().__new__(cls)

    def take_over(self, layer: Any, spec: Spec) -> None:
        """Become a layer like `layer`, with empty codes."""
        nn.Module.__init__(self)
        # Strides, paddings and features are plain attributes of torch's layers.
        own = {key: value for key, value in vars(layer).items() if not key.startswith(("_parameters", "_buffers"))}
        plain = {key: value for key, value in own.items() if key not in vars(self) and "hook" not in key}
        self.__dict__.update(plain)
        weight = layer.weight
        self.spec, self.shape, self.weight_count = spec, weight.shape, weight.numel()
        self.compute_dtype: torch.dtype = weight.dtype
        self.steps, self.way, self._kept = None, "auto", None
        self.training = layer.training
        self.register_parameter("bias", layer.bias)
        rows, columns = self.rows, self.columns
        device, groups = weight.device, groups_of(columns, spec.group)
        kind = torch.int8 if container(spec.bits) == 8 else torch.uint8

        def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, there: bool = True) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device) if there else None)

        buffer("codes", packed_shape(rows, columns, spec.bits, self.block), kind)
        buffer("weight_scale", (rows, groups), torch.float32)
        buffer("weight_zero", (rows, groups), torch.uint8, not spec.symmetric)
        buffer("input_scale", (spec.entries,), torch.float32, spec.entries > 0)
        buffer("input_zero", (spec.entries,), torch.int16, spec.entries > 0)

    @property
    def rows(self) -> int:
        """Co."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """K: entries of a row of the weight."""
        return math.prod(self.shape[1:])

    @property
    def block(self) -> int:
        """Of packed four-bit codes."""
        if isinstance(self, nn.Linear):
            return BLOCK if self.spec.group is None or self.spec.format == "nf4" else self.spec.group
        return 2

    def set_codes(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> None:
        """Take codes (Co, K) uint8, scales and zeros (Co, groups)."""
        self.codes = pack(codes, self.spec.bits, self.block)
        self.weight_scale = scale.detach().float().clone()
        if self.weight_zero is not None:
            assert zero is not None
            self.weight_zero = zero
        self.forget()

    def forget(self) -> None:
        """Drop what was made from the codes."""
        self._kept = None
        onednn.forget(self.codes)

    def set_input(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Take step sizes and zeros of the input, (entries,) or one for all."""
        assert self.input_scale is not None
        device, shape = self.codes.device, (self.spec.entries,)
        self.input_scale = torch.empty(shape, device=device).copy_(scale.detach())
        self.input_zero = torch.empty(shape, dtype=torch.int16, device=device).copy_(zero.detach().round())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        scales = {name: self._buffers[name] for name in SCALES}
        self.forget()
        probe = torch.empty(0, dtype=self.compute_dtype, device=self.codes.device)
        super()._apply(fn, recurse)
        for name, before in scales.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != torch.float32:
                self._buffers[name] = before.to(after.device)
        self.compute_dtype = fn(probe).dtype
        return self

    # Reading.

    def integers(self) -> torch.Tensor:
        """The codes (Co, K) uint8, unpacked."""
        return unpack(self.codes, self.spec.bits, self.columns, self.block)

    def zeros(self) -> torch.Tensor:
        """Zeros of the codes, float32: (Co, groups)."""
        if self.weight_zero is not None:
            return self.weight_zero.float()
        return torch.full_like(self.weight_scale, 1 << (self.spec.bits - 1))

    def dequantized(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight that the codes stand for, computed in float32 and rounded once; default dtype: the model's."""
        spec, codes = self.spec, self.integers()
        if spec.format == "nf4":
            values = nf4_table().to(codes.device)[codes.int()]
        else:
            values = codes.float()
        group = spec.group or self.columns
        padded = F.pad(values, (0, -self.columns % group)).unflatten(1, (-1, group))
        if spec.format != "nf4":
            padded = padded - self.zeros().unsqueeze(2)
        weight = (padded * self.weight_scale.unsqueeze(2)).flatten(1)[:, : self.columns]
        return weight.to(dtype or self.compute_dtype).reshape(self.shape)

    @property
    def weight(self) -> torch.Tensor:
        """`dequantized()`, refusing to be written."""
        return self.dequantized().as_subclass(_Dequantized)

    # Inputs.

    def _affine(self, x: torch.Tensor, scale: Any, zero: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and whole zero that broadcast to x, float32, of a static or timestep-dependent input."""
        if self.spec.inputs == "timestep" and x.device.type != "meta":
            assert self.steps is not None
            scale, zero = looked_up(scale, zero, self.steps.now())
        else:
            scale, zero = scale[:1], round_through(zero[:1].float())
        if len(scale) > 1:
            scale, zero = (t.repeat_interleave(x.shape[0] // len(t), output_size=x.shape[0]) for t in (scale, zero))
        shape = (-1, *(1,) * (x.dim() - 1))
        return scale.view(shape), zero.view(shape)

    def _largest(self, x: torch.Tensor) -> torch.Tensor:
        axes = -1 if isinstance(self, nn.Linear) else tuple(range(1, x.dim()))
        half = (1 << (self.spec.input_bits - 1)) - 1
        return (x.float().abs().amax(axes, keepdim=True) / half).clamp_min(TINY)

    def rounded(self, x: torch.Tensor, scale: Any = None, zero: Any = None) -> torch.Tensor:
        """The input as its codes stand for it, in x's dtype."""
        spec = self.spec
        if spec.inputs == "none":
            return x
        if spec.inputs == "dynamic":
            size, half = self._largest(x.detach()), 1 << (spec.input_bits - 1)
            return fake_quantize(x.float(), size, torch.full_like(size, half), spec.input_bits).to(x.dtype)
        size, whole = self._affine(x, self.input_scale if scale is None else scale,
                                   self.input_zero if zero is None else zero)  # fmt: skip
        return fake_quantize(x.float(), size, whole, spec.input_bits).to(x.dtype)

    def input_codes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """int8 codes of the input, their scale and zero (int32), both broadcast to x."""
        spec = self.spec
        if spec.inputs == "dynamic":
            size, half = self._largest(x), 1 << (spec.input_bits - 1)
            codes = to_codes(x.float(), size, torch.full_like(size, half), spec.input_bits)
            return (codes - half).to(torch.int8), size, None
        size, whole = self._affine(x, self.input_scale, self.input_zero)
        shift = 128 if spec.input_bits == 8 else 0
        codes = to_codes(x.float(), size, whole, spec.input_bits)
        return (codes - shift).to(torch.int8), size, (whole - shift).to(torch.int32)

    def weight_codes(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight as int8 (Co, K), and its zeros (Co,) int32 or None."""
        spec = self.spec
        if container(spec.bits) == 8:
            if spec.symmetric and spec.bits == 8:
                return self.codes, None
            return self.codes, (self.zeros()[:, 0] - 128).to(torch.int32)
        return self.integers().view(torch.int8), self.zeros()[:, 0].to(torch.int32)

    # Computing.

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None = None, weight_scale: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None, input_zero: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The layer's output; with `delta`, an update of the weight that is merged before quantising (QALoRA).

        Args:
            x: (..., K) of a linear, (N, C, *S) of a conv.
            delta: shape of the weight.
            weight_scale, input_scale, input_zero: in place of the layer's own; differentiable, zeros are rounded.
        """
        if delta is not None:
            scale = self.weight_scale if weight_scale is None else weight_scale
            merged = merged_weight(self.integers(), self.zeros(), scale, delta.flatten(1).float(), self.spec.bits)
            weight = merged.reshape(self.shape).to(x.dtype)
            return self.product(self.rounded(x, input_scale, input_zero), weight)
        way = self.best_way(x) if self.way == "auto" else self.way
        if way == "integer":
            return self.integer(x)
        if way == "packed":
            return self.packed(x)
        if way == "onednn":
            return onednn.onednn_linear(self, x)
        if way == "kept":
            if self._kept is None or self._kept.dtype != x.dtype:
                self._kept = self.dequantized(x.dtype)
            return self.product(self.rounded(x), self._kept)
        return self.product(self.rounded(x), self.dequantized(x.dtype))

    def merged(self, delta: torch.Tensor, weight_scale: torch.Tensor | None = None) -> torch.Tensor:
        """The codes (Co, K) uint8 that `forward` computed with under this delta."""
        scale = self.weight_scale if weight_scale is None else weight_scale
        return merged_codes(self.integers(), scale, delta.flatten(1).float(), self.spec.bits).to(torch.uint8)

    def best_way(self, x: torch.Tensor) -> str:
        """What "auto" means for this input."""
        if x.device.type != "cuda" or not use_kernel(x, FLOATS) or (torch.is_grad_enabled() and x.requires_grad):
            return "dequantise"
        return next((way for way in ("integer", "packed") if way in self.ways()), "dequantise")

    def ways(self) -> tuple[str, ...]:
        """The ways in which this layer can compute, "auto" aside."""
        return ("dequantise", "kept")

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The layer with this weight."""
        raise NotImplementedError

    def integer(self, x: torch.Tensor) -> torch.Tensor:
        """By int8 products."""
        raise NotImplementedError

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        """By products that read packed weights."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        spec = self.spec
        inputs = "" if spec.inputs == "none" else f", inputs {spec.input_bits} bits {spec.inputs}"
        return f"shape={tuple(self.shape)}, {spec.bits} bits {spec.format}, group={spec.group}{inputs}"


class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[override]
    """A linear of integers."""

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, self.bias)

    def ways(self) -> tuple[str, ...]:
        spec, found = self.spec, ["dequantise", "kept"]
        if spec.inputs != "none":
            found.append("integer")
            fits = spec.bits == 8 and spec.symmetric and spec.inputs != "dynamic" and onednn.is_exact(spec.input_bits)
            if fits and self.codes.device.type == "cpu":
                found.append("onednn")
        elif spec.format == "uniform" and (
            spec.bits in (3, 4) or (spec.bits == 8 and spec.symmetric and spec.group is None)
        ):
            found.append("packed")
        return tuple(found)

    def integer(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale, zero = self.input_codes(x)
        weight, weight_zero = self.weight_codes()
        rows = x.shape[:-1]
        x_scale = scale.squeeze(-1).expand(rows)
        x_zero = None if zero is None else zero.squeeze(-1).expand(rows)
        return linear_w8a8(codes, weight, x_scale, self.weight_scale[:, 0], self.bias, x_zero, weight_zero, x.dtype)

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        if spec.bits == 8:
            rows = x.reshape(-1, x.shape[-1])
            out = _int8_packed(rows, self.codes, self.weight_scale[:, 0])
            out = out if self.bias is None else out + self.bias
            return out.view(*x.shape[:-1], self.rows)
        count = -(-self.columns // self.block)
        scale = self.weight_scale.expand(-1, count)
        zero = self.zeros().to(torch.uint8).expand(-1, count)
        return linear_w4a16(x, self.codes, scale.contiguous(), self.bias, zero.contiguous(), self.block)


# An op of its own: Inductor refuses torch's where the scale is computed in the graph.
@torch.library.custom_op("vislr::int8_packed", mutates_args=())
def _int8_packed(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch._weight_int8pack_mm(x, codes, scale.to(x.dtype))


@_int8_packed.register_fake
def _(x, codes, scale):
    return x.new_empty(x.shape[0], codes.shape[0])


class _QuantConv(QuantLayer):
    def best_way(self, x: torch.Tensor) -> str:
        # Quantising a map costs what its int8 conv saves; `choose_ways` says where it does not.
        return "dequantise"

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        conv: Any = self
        return conv._conv_forward(x, weight, self.bias)


class QuantConv1d(_QuantConv, nn.Conv1d):  # type: ignore[override]
    """A conv of one axis, of integers."""


class QuantConv2d(_QuantConv, nn.Conv2d):  # type: ignore[override]
    """A conv of two axes, of integers."""

    def ways(self) -> tuple[str, ...]:
        plain = self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        return ("dequantise", "kept", *(("integer",) if plain and self.spec.inputs != "none" else ()))

    def integer(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale, zero = self.input_codes(x)
        weight, weight_zero = self.weight_codes()
        samples = (x.shape[0],)
        x_scale = scale.flatten().expand(samples)
        x_zero = None if zero is None else zero.flatten().expand(samples)
        assert not isinstance(self.padding, str)
        return conv_w8a8(
            codes, weight.reshape(self.shape), x_scale, self.weight_scale[:, 0], self.bias, x_zero, weight_zero,
            self.stride, self.padding, self.dilation, x.dtype,
        )  # fmt: skip


KINDS: dict[type, type[QuantLayer]] = {nn.Linear: QuantLinear, nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d}


def kind_for(layer: nn.Module) -> type[QuantLayer] | None:
    """The quantised class in place of a layer, or None: a subclass may compute something else with its weight."""
    if layer._parameters.get("weight") is None:
        return None
    return KINDS.get(type(layer))


def empty(layer: nn.Module, spec: Spec) -> QuantLayer:
    """A quantised layer in the place of `layer`, on its device (also meta), with codes 0."""
    kind = kind_for(layer)
    assert kind is not None
    made = kind.__new__(kind)
    made.take_over(layer, spec)
    return made


def quantized(layer: Any, spec: Spec, observer: str) -> QuantLayer:
    """A quantised layer that stands for `layer`."""
    made = empty(layer, spec)
    found = quantize_weight(
        layer.weight, spec.bits, symmetric=spec.symmetric, group=spec.group, observer=observer, kind=spec.format
    )
    made.set_codes(*found)
    return made


def quant_layers(module: nn.Module) -> dict[str, QuantLayer]:
    """Name (without `.base_layer`) -> layer, of all quantised layers, adapters on them or not."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, QuantLayer):
            found[".".join(part for part in name.split(".") if part != "base_layer")] = layer
    return found
