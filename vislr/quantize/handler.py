"""Apply and undo of a QuantPlan: layers of integers take the places of torch's."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vislr.anatomy.wrapping import original, put_inside, unwrapped, walk, wrappers
from vislr.core.errors import ModelError, TargetError, UndoError, hint
from vislr.core.quantizing import affine_of, holds_codes
from vislr.core.registry import Attached
from vislr.quantize.layers import KINDS, QuantLayer, Spec, empty, kind_for, quant_layers, quantized
from vislr.quantize.plan import QuantPlan
from vislr.quantize.steps import put_steps, take_steps


def attach(module: nn.Module, plan: QuantPlan, name: str = "default") -> Attached:
    """Quantise the plan's layers. Inputs start at the calibrated ranges, the same for every timestep.

    Args:
        module: the model that the plan was made for; layer plans may be on it, and adapters that add to a layer's
            output: they stay, around the quantised layer.
        plan: layers, bits, ranges.
        name: for the record.

    Raises:
        ModelError: the plan is for another model, an adapter is in the weight of a layer, or a layer is quantised
            already.
        TargetError: the model has no such layer, or it is none that can be quantised. The model is as it was.
    """
    module = unwrapped(module)
    layers = checked(module, plan)
    made: dict[str, QuantLayer] = {}
    errors: dict[str, float] = {}
    before = stored_bytes(module)
    for path, layer in layers.items():
        spec = Spec.of(plan, path)
        # A model without weights gets the structure alone.
        on_meta = layer.weight.device.type == "meta"
        made[path] = new = empty(layer, spec) if on_meta else quantized(layer, spec, plan.observer)
        if spec.entries:
            low, high = (torch.tensor(edge) for edge in plan.ranges[path])
            new.set_input(*affine_of(low, high, spec.input_bits))
        errors[path] = weight_error(layer.weight, new)
    _swap(module, made)
    steps = put_steps(module, plan.timesteps) if plan.timesteps else None
    for new in made.values():
        new.steps = steps
    return Attached(
        sites=tuple(layers),
        change={"kind": "quant", "plan": plan.to_dict()},
        undo={"old": layers, "new": made, "steps": steps},
        notes=_notes(before, stored_bytes(module), errors),
    )


def detach(module: nn.Module, attached: Attached) -> None:
    """Put the layers back that were taken out, moved to where the model is now.

    Raises:
        UndoError: something else stands in the place of a quantised layer.
    """
    module = unwrapped(module)
    layers = {name: original(outer) for name, outer in walk(module)}
    for path, new in attached.undo["new"].items():
        if layers.get(path) is not new:
            raise UndoError(f"'{path}' is not the layer that the plan put there; undo what came after the plan first")
    for path, old in attached.undo["old"].items():
        new = attached.undo["new"][path]
        old.to(device=new.codes.device, dtype=new.compute_dtype)
        old.train(new.training)
    _swap(module, attached.undo["old"])
    if attached.undo["steps"] is not None:
        take_steps(module, attached.undo["steps"])


def rebuild(module: nn.Module, plan: QuantPlan) -> None:
    """The structure of a quantised model, from a freshly built one, with codes 0; tensors may lie on meta.

    Raises:
        as `attach`.
    """
    made = {path: empty(layer, Spec.of(plan, path)) for path, layer in checked(module, plan).items()}
    _swap(module, made)
    if plan.timesteps:
        steps = put_steps(module, plan.timesteps)
        for new in made.values():
            new.steps = steps


def checked(module: nn.Module, plan: QuantPlan) -> dict[str, Any]:
    """Name -> layer of what a plan quantises, in the model's order; everything that can be wrong is looked at.

    Raises:
        ModelError, TargetError: as `attach`.
    """
    if not isinstance(plan, QuantPlan):
        raise ModelError(f"expected a QuantPlan, not a {type(plan).__name__}")
    own = type(module).__name__
    if plan.architecture and plan.architecture != own:
        raise ModelError(f"the plan is for a {plan.architecture}; this is a {own}")
    if plan.timesteps and "timestep" not in inspect.signature(type(module).forward).parameters:
        raise ModelError(f"a {own} is told no timestep; expected inputs 'dynamic', 'static' or 'none'")
    found = dict(walk(module))
    modules = {name: original(outer) for name, outer in found.items()}
    for name in plan.layers:
        layer = modules.get(name)
        if layer is None:
            raise TargetError(f"this {own} has no layer '{name}'{hint(name, quantizable(module))}")
        for wrapper in wrappers(found[name]):
            if getattr(wrapper, "in_weight", False) or getattr(wrapper, "merged_adapters", ()):
                raise ModelError(
                    f"an adapter is in the weight of '{name}', in whose place integers go; fuse it for good "
                    "(vislr.fuse) or remove it, then quantise"
                )
        if holds_codes(layer):
            raise ModelError(f"'{name}' is quantised already; remove that plan first")
        if kind_for(layer) is None:
            kinds = ", ".join(kind.__name__ for kind in KINDS)
            raise TargetError(f"'{name}' is a {type(layer).__name__}, which cannot be quantised; expected {kinds}")
    _check_shared(modules, plan)
    return {name: modules[name] for name in modules if name in plan.layers}


def _check_shared(modules: dict[str, nn.Module], plan: QuantPlan) -> None:
    owners: dict[int, str] = {}
    for name, layer in modules.items():
        weight = layer._parameters.get("weight")
        if weight is not None:
            first = owners.setdefault(id(weight), name)
            if first != name and (first in plan.layers or name in plan.layers):
                raise ModelError(f"'{first}' and '{name}' share one weight, which only both of them could give up")


def quantizable(module: nn.Module) -> list[str]:
    """Names of the layers that a plan can name, in the model's order."""
    return [name for name, outer in walk(module) if kind_for(original(outer)) is not None]


def _swap(module: nn.Module, layers: dict[str, Any]) -> None:
    for path, layer in layers.items():
        put_inside(module, path, layer)


def weight_error(weight: torch.Tensor, layer: QuantLayer) -> float:
    """|w - w_hat| / |w| of one layer; 0 on meta."""
    if weight.device.type == "meta":
        return 0.0
    whole = weight.detach().float()
    norm = float(whole.norm())
    return float((whole - layer.dequantized(torch.float32)).norm()) / norm if norm else 0.0


def stored_bytes(module: nn.Module) -> int:
    """Bytes of everything that a state dict of the module holds: what a file takes but for its header."""
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def _notes(before: int, after: int, errors: dict[str, float]) -> tuple[str, ...]:
    lines = [f"{before / 1e6:.2f} -> {after / 1e6:.2f} MB ({before / after:.2f}x smaller)"]
    worst = sorted(errors, key=lambda name: -errors[name])[:3]
    if errors and errors[worst[0]]:
        told = ", ".join(f"{name} {errors[name]:.3f}" for name in worst)
        lines.append(f"relative error of the weights, largest: {told}")
    return tuple(lines)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model: parameters and buffers as they are kept, and of its quantised layers alone."""

    total: int
    quantized: int
    layers: int


def sizes(module: nn.Module) -> Sizes:
    """Where the bytes of a model are."""
    layers = quant_layers(unwrapped(module))
    return Sizes(stored_bytes(module), sum(stored_bytes(layer) for layer in layers.values()), len(layers))
