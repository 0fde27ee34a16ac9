"""Which way of computing is fastest: measured once for every kind of layer and input, kept, and reported.

A quantised layer can be slower than the float one: on CPUs whose int8 products are not faster than their bf16
ones, with few rows, where rounding the input costs more than the product saves. The report says so, layer by layer,
and `without_slower` gives a plan that leaves such layers as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vislr.anatomy.site import columns
from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import ConfigError
from vislr.core.files import read_json, write_json
from vislr.measure import interleaved
from vislr.measure.record import device_name
from vislr.quantize.layers import QuantLayer, quant_layers
from vislr.quantize.plan import QuantPlan

FLOAT = "float"


@dataclass(frozen=True)
class LayerTime:
    """One layer's ways.

    Attributes:
        site: its name.
        shape: of its input.
        seconds: way -> median seconds of a call; "float": the layer before quantising, in the input's dtype.
        way: the fastest that the layer has now.
    """

    site: str
    shape: tuple[int, ...]
    seconds: dict[str, float]
    way: str

    @property
    def speedup(self) -> float:
        """Seconds of the float layer over those of the chosen way: above 1 = faster."""
        return self.seconds[FLOAT] / self.seconds[self.way]


@dataclass(frozen=True)
class Ways:
    """What was measured, layer by layer, and where.

    Attributes:
        layers: in the model's order. device: and dtype and threads that the figures are of.
        measured: kinds of layer and input that were timed now; the others came from the cache.
    """

    layers: tuple[LayerTime, ...]
    device: str
    measured: int

    @property
    def slower(self) -> tuple[str, ...]:
        """Layers that no way makes as fast as they were."""
        return tuple(one.site for one in self.layers if one.speedup < 1)

    def notes(self) -> tuple[str, ...]:
        """The result in a line or two."""
        before = sum(one.seconds[FLOAT] for one in self.layers)
        after = sum(one.seconds[one.way] for one in self.layers)
        used: dict[str, int] = {}
        for one in self.layers:
            used[one.way] = used.get(one.way, 0) + 1
        told = ", ".join(f"{count} {way}" for way, count in sorted(used.items()))
        lines = [
            f"quantised layers alone, on {self.device}: {before * 1e3:.2f} -> {after * 1e3:.2f} ms a call "
            f"({before / after:.2f}x); ways: {told}"
        ]
        if self.slower:
            lines.append(
                f"{len(self.slower)} of {len(self.layers)} layers are slower than before at these shapes, whichever "
                "way they compute: there quantising saves memory only"
            )
        return tuple(lines)

    def table(self) -> str:
        """A line for each layer."""
        head = ("layer", "input", "float ms", "ms", "way", "speed-up")
        body = [
            (one.site, "x".join(map(str, one.shape)), f"{one.seconds[FLOAT] * 1e3:.3f}",
             f"{one.seconds[one.way] * 1e3:.3f}", one.way, f"{one.speedup:.2f}")
            for one in self.layers
        ]  # fmt: skip
        return columns([head, *body], right=(2, 3, 5))


def choose_ways(
    module: nn.Module,
    inputs: Mapping[str, Any],
    *,
    allowed: Sequence[str] = ("dequantise", "integer", "packed", "onednn"),
    cache: Path | None = None,
    rounds: int = 7,
    compile: bool = False,
) -> Ways:
    """Time every quantised layer's ways at the shapes of one forward, and set each layer to its fastest.

    Args:
        module: quantised, on its device and in its dtype.
        inputs: keyword arguments of a forward, as large as those to come.
        allowed: ways that may be chosen; "kept" holds the float weight in memory beside the codes.
        cache: a JSON file that keeps figures by layer kind, shapes, dtype, device and threads.
        rounds: of every measurement, interleaved.
        compile: time compiled layers, for a model that will be compiled.

    Raises:
        ConfigError: the model has no quantised layer.
    """
    layers = quant_layers(unwrapped(module))
    if not layers:
        raise ConfigError(f"this {type(module).__name__} has no quantised layer to time")
    seen = _inputs_of(module, layers, inputs)
    known: dict[str, dict[str, float]] = {}
    if cache is not None and cache.is_file():
        known = read_json(cache)
    measured, found = 0, []
    first = next(iter(seen.values()))
    for site, layer in layers.items():
        if site not in seen:
            continue
        x = seen[site]
        key = _key(layer, x, compile)
        wanted = {FLOAT, *(way for way in allowed if way in layer.ways())}
        if not wanted <= set(known.get(key, {})):
            known[key] = _times(layer, x, sorted(wanted - {FLOAT}), rounds, compile)
            measured += 1
            # Compiled, a kind takes many seconds: what a stopped run has measured is kept.
            if cache is not None:
                write_json(cache, known)
        seconds = {way: known[key][way] for way in sorted(wanted)}
        layer.way = min((way for way in seconds if way != FLOAT), key=seconds.__getitem__)
        layer.forget()
        found.append(LayerTime(site, tuple(x.shape), seconds, layer.way))
    where = f"{device_name(first.device)}, {str(first.dtype).removeprefix('torch.')}"
    if first.device.type == "cpu":
        where += f", {torch.get_num_threads()} threads"
    return Ways(tuple(found), where, measured)


def _inputs_of(
    module: nn.Module, layers: Mapping[str, QuantLayer], inputs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Site -> an input like that of its largest call, of shape and layout alone."""
    seen: dict[str, torch.Tensor] = {}

    def watch(site: str) -> Any:
        def hook(layer: nn.Module, args: tuple) -> None:
            if site not in seen or args[0].numel() > seen[site].numel():
                seen[site] = torch.empty_like(args[0], device="meta")

        return hook

    handles = [layer.register_forward_pre_hook(watch(site)) for site, layer in layers.items()]
    try:
        with torch.no_grad():
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    device = next(iter(layers.values())).codes.device
    return {site: torch.empty_like(x, device=device).normal_() for site, x in seen.items()}


def _key(layer: QuantLayer, x: torch.Tensor, compile: bool) -> str:
    layout = "" if x.is_contiguous() else " channels_last"
    threads = f" {torch.get_num_threads()} threads" if x.device.type == "cpu" else ""
    conv: Any = layer
    how = f" stride {conv.stride} padding {conv.padding}" if hasattr(layer, "stride") else ""
    return json.dumps(
        f"{type(layer).__name__} {tuple(layer.shape)}{how} {tuple(layer.spec)} on {tuple(x.shape)}{layout} {x.dtype} "
        f"{device_name(x.device)}{threads}{' compiled' if compile else ''}"
    ).strip('"')


def _times(layer: QuantLayer, x: torch.Tensor, ways: Sequence[str], rounds: int, compile: bool) -> dict[str, float]:
    weight, before = layer.dequantized(x.dtype), layer.way

    def call(way: str) -> Any:
        def run() -> Any:
            return layer.product(x, weight) if way == FLOAT else forward(way)

        def forward(way: str) -> Any:
            layer.way = way
            return layer(x)

        return torch.compile(run, dynamic=False) if compile else run

    names = (FLOAT, *ways)
    try:
        with torch.no_grad(), _compiling_all() if compile else nullcontext():
            figures = interleaved({name: call(name) for name in names}, rounds=rounds, warmup=2, device=x.device.type)
    finally:
        layer.way = before
    return {name: float(figures[name].value) for name in names}


def _compiling_all() -> Any:
    """torch.compile leaves a function as it is after eight versions of it; here every layer is one."""
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20)


def without_slower(plan: QuantPlan, ways: Ways, *, least: float = 1.0) -> QuantPlan:
    """The plan without the layers that quantising makes slower: they stay as they are.

    Args:
        least: speed-up that a layer must reach to stay in the plan.

    Raises:
        ConfigError: no layer reaches it; says the best.
    """
    slow = {one.site for one in ways.layers if one.speedup < least}
    left = {name: bits for name, bits in plan.layers.items() if name not in slow}
    if not left:
        best = max(ways.layers, key=lambda one: one.speedup)
        raise ConfigError(
            f"quantising makes no layer {least:g}x as fast on {ways.device}; the best is '{best.site}' with "
            f"{best.speedup:.2f}x: quantise for memory, or leave the model as it is"
        )
    ranges = {name: pair for name, pair in plan.ranges.items() if name in left}
    return replace(plan, layers=left, ranges=ranges, settings={**plan.settings, "left out as slower": len(slow)})
