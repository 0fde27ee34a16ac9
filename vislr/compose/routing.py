"""Which adapters a layer runs in the current pass: one shared route, read by a hook on every adapted layer.

Changing the route changes all layers at once: no walk over the model, no flag set on any of them. Outside of
a pass there is no route, and layers are as the user left them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import ModelHook
from peft.tuners.lora import LoraLayer
from torch import nn

from vislr.adapters.inject import plain_name, tuner_layers, unit_scale
from vislr.adapters.layer import chain
from vislr.adapters.sara_layer import SaraLayer
from vislr.adapters.targets import innermost
from vislr.compose.live import is_additive
from vislr.compose.merged import Change, layer_weights
from vislr.compose.plan import ComposePlan
from vislr.core.hooks import hook_of, put_on, take_off

HOOK_NAME = "vislr_compose"


class Route:
    """What the layers of one module run now.

    Attributes:
        parts: adapters for each equal part of the batch; None: as the user left the layers.
        factor: of all weights (a call's own LoRA scale).
        merged: the merged change, not the adapters.
    """

    def __init__(self) -> None:
        self.parts: tuple[tuple[str, ...], ...] | None = None
        self.factor = 1.0
        self.merged = False

    @contextmanager
    def on(self, parts: tuple[tuple[str, ...], ...], factor: float = 1.0, merged: bool = False) -> Iterator[None]:
        """While inside, every layer runs this."""
        before = self.parts, self.factor, self.merged
        self.parts, self.factor, self.merged = parts, factor, merged
        try:
            yield
        finally:
            self.parts, self.factor, self.merged = before


class LayerHook(ModelHook):
    """On a tuner layer: runs what the route says, whatever is active; leaves the layer as it was.

    Attributes:
        scalings: adapter -> its scale on this layer at the plan's weight; None: the kind has none.
        change: the merged change of this site; on the outermost of several tuner layers alone.
    """

    def __init__(self, route: Route, scalings: dict[str, float | None], change: Change | None):
        super().__init__()
        self.route, self.scalings, self.change = route, scalings, change

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward: Any = self.fn_ref.original_forward
        route = self.route
        if route.parts is None:
            return forward(*args, **kwargs)
        if route.merged and self.change is not None:
            with _base_weights(module):
                return self.change(innermost(module), *args, **kwargs)
        if len(route.parts) == 1:
            return self._run(module, forward, route.parts[0], args, kwargs)
        result = self._run(module, forward, (), args, kwargs)
        parts = [names for names in route.parts if any(name in self.scalings for name in names)]
        return self._added(module, args[0], result) if parts else result

    def _run(self, module: Any, forward: Any, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
        own = [name for name in names if name in self.scalings]
        active = module._active_adapter
        scales = self._scale(module, own)
        module._active_adapter = own
        try:
            return forward(*args, **kwargs)
        finally:
            module._active_adapter = active
            if scales:
                module.scaling.update(scales)
            if isinstance(module, SaraLayer):
                module.sync()  # its weight itself holds what is active

    def _scale(self, module: Any, names: list[str]) -> dict[str, float]:
        """Set the plan's scales; returns what was there."""
        before = {}
        for name in names:
            value = self.scalings[name]
            if value is not None:
                before[name] = module.scaling[name]
                module.scaling[name] = value * self.route.factor
        return before

    def _added(self, module: Any, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Each part of the batch with the activations of its own adapters on top of the base's output."""
        assert self.route.parts is not None
        count = len(self.route.parts)
        pieces = []
        inputs, bases = x.chunk(count), result.chunk(count)
        for names, piece, base in zip(self.route.parts, inputs, bases, strict=True):
            own = [name for name in names if name in self.scalings]
            scales = self._scale(module, own)
            try:
                for name in own:
                    base = _added(module, name, piece, base)
            finally:
                module.scaling.update(scales)
            pieces.append(base)
        return torch.cat(pieces)


@contextmanager
def _base_weights(layer: Any) -> Iterator[None]:
    """While inside, sparse adapters of a nest of layers are out of the weight that they live in."""
    sparse: list[Any] = [inner for inner in chain(layer) if isinstance(inner, SaraLayer)]
    before = [inner._active_adapter for inner in sparse]
    try:
        for inner in sparse:
            inner._active_adapter = []
            inner.sync()
        yield
    finally:
        for inner, active in zip(sparse, before, strict=True):
            inner._active_adapter = active
            inner.sync()


def _added(layer: Any, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, LoraLayer):
        down: Any = layer.lora_A[name]
        up: Any = layer.lora_B[name]
        x = layer._cast_input_dtype(x, down.weight.dtype)
        return (result + up(down(x)) * layer.scaling[name]).to(result.dtype)
    return layer.added(name, x, result)


def put_layer_hooks(module: nn.Module, plan: ComposePlan, route: Route, changes: dict[str, Change]) -> None:
    """Put the hook on every tuner layer that has none yet; adapters outside the plan are off there, too."""
    seen: set[str] = set()
    for path, layer in tuner_layers(module):
        site = plain_name(path)
        outermost = site not in seen
        seen.add(site)
        if hook_of(layer, HOOK_NAME) is not None:
            continue
        # Merged methods have weights by layer in their changes.
        special = plan.merging.layers and plan.method == "merge"
        weights = layer_weights(plan, site) if special else dict(zip(plan.adapters, plan.weights, strict=True))
        scalings = {name: _scaling(layer, name, weights[name]) for name in plan.adapters
                    if name in layer._get_available_adapters()}  # fmt: skip
        put_on(layer, LayerHook(route, scalings, changes.get(site) if outermost else None), HOOK_NAME)


def _scaling(layer: Any, name: str, weight: float) -> float | None:
    """What the layer itself would hold at this weight, to the last bit."""
    if unit_scale(layer, name) is None:
        return None
    before = layer.scaling[name]
    try:
        layer.set_scale(name, weight)
        return layer.scaling[name]
    finally:
        layer.scaling[name] = before


def take_layer_hooks(module: nn.Module) -> None:
    """Take the hooks off all tuner layers."""
    for _, layer in list(tuner_layers(module)):
        take_off(layer, HOOK_NAME)


def separable(module: nn.Module, names: tuple[str, ...]) -> str:
    """Why these adapters cannot share a forward, each on its own part of the batch; "" if they can."""
    for path, layer in tuner_layers(module):
        for name in names:
            if name in layer._get_available_adapters() and not is_additive(layer, name):
                return f"'{name}' on '{plain_name(path)}' ({type(layer).__name__}) has no form per sample"
    return ""
