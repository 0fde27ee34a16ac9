"""Which layers SaRA goes on and which of their entries it trains, before anything is changed.

Source: SaRA (arXiv 2409.06633), equation 2: the entries whose magnitude is below one threshold for the
whole model. Magnitudes are compared in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vislr.adapters.layer import chain
from vislr.adapters.sara_layer import INDEX_LIMIT, SaraLayer
from vislr.adapters.targets import _matches, _more, _near, backbone, innermost, modules_outside, select_names
from vislr.core.errors import AdapterError, TargetError


@dataclass(frozen=True)
class Selection:
    """What is trained.

    Attributes:
        index: layer name -> (n,) int32, increasing, in the layer's index space; in the model's order.
        threshold: every selected magnitude is below it, every other one of these layers is not (of equal
            ones at the limit of a count, the first in the model's order are taken).
        total: entries of the layers chosen.
        left_alone: parameters of the model that are no layer's weight or bias.
    """

    index: dict[str, torch.Tensor]
    threshold: float
    total: int
    left_alone: tuple[str, ...]

    def notes(self) -> tuple[str, ...]:
        """Lines for the report."""
        count = sum(len(index) for index in self.index.values())
        share = f"{count:,} of {self.total:,} entries ({count / max(self.total, 1):.2%})"
        lines = [f"trains {share}, magnitude below {self.threshold:.3g}"]
        if self.left_alone:
            names = list(self.left_alone)
            lines.append(f"left alone, no layer's weight or bias: {', '.join(names[:3])}{_more(names)}")
        return tuple(lines)


def why_not(layer: nn.Module) -> str:
    """Why the weight of a layer cannot be trained in place, or ""."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return "has no weight of its own, or one that is computed"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "is used by its attention module without its forward"
    for name in ("weight", "bias"):
        part = layer._parameters.get(name)
        if part is not None and (not part.is_floating_point() or type(part.data) is not torch.Tensor):
            return f"has a {name} that is quantised or sharded ({type(part.data).__name__} of {part.dtype})"
    if any(True for child in layer.children() for _ in child.parameters()):
        return "holds other layers"
    if sum(part.numel() for part in layer._parameters.values() if part is not None) > INDEX_LIMIT:
        return f"has more than {INDEX_LIMIT:,} entries"
    return ""


def sparse_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer as it stands in the model (a tuner layer of another kind stays around it)."""
    return {name: layer for name, layer in modules_outside(model).items() if not why_not(innermost(layer))}


def select(model: nn.Module, config: Any) -> Selection:
    """The entries that a SaraConfig trains. Changes nothing.

    Raises:
        TargetError: a pattern matches nothing; names the nearest.
        AdapterError: nothing is below the threshold, fewer entries than the count, a tied weight, weights
            without values, or a layer that cannot be adapted.
    """
    layers = sparse_layers(model)
    sites = chosen_layers(model, config)
    for site in sites:
        if innermost(layers[site]).weight.is_meta:
            raise AdapterError(f"'{site}' is on the meta device: there are no values to select from")
    total = sum(part.numel() for site in sites for part in _own(layers[site]))
    if config.threshold is not None:
        limit, ties = config.threshold, 0
    else:
        count = wanted_count(config, total)
        limit, ties = _kth(lambda: (m for site in sites for m in magnitudes(layers[site])), count)
    index = {}
    for site in sites:
        offset, found = 0, []
        for magnitude in magnitudes(layers[site]):
            places = (magnitude < limit).nonzero().flatten()
            if ties:
                equal = (magnitude == limit).nonzero().flatten()[:ties]
                ties -= len(equal)
                places = torch.cat([places, equal]).sort().values
            found.append((places + offset).to(torch.int32))
            offset += len(magnitude)
        selected = torch.cat(found)
        # A file brings its own entries for the layers that it names.
        if len(selected) or config.sites:
            index[site] = selected
    if not index:
        smallest = min(float(m.min()) for site in sites for m in magnitudes(layers[site]) if len(m))
        raise AdapterError(f"no magnitude is below the threshold {limit:g}; the smallest is {smallest:.3g}")
    # As a threshold for the re-selection: strictly above the largest magnitude counted in.
    threshold = limit
    if config.threshold is None:
        threshold = float(torch.nextafter(torch.tensor(limit), torch.tensor(math.inf)))
    return Selection(index, threshold, total, tuple(_left_alone(model)))


def chosen_layers(model: nn.Module, config: Any) -> list[str]:
    """Names of the layers that a SaraConfig goes on; their weights may be on the meta device.

    Raises:
        TargetError, AdapterError: as `select`.
    """
    sites = _sites(model, config, sparse_layers(model))
    _check_tied(model, sites)
    return sites


def wanted_count(config: Any, total: int) -> int:
    """How many of `total` entries a config with `count` or `fraction` trains.

    Raises:
        AdapterError: more than there are.
    """
    count = config.count if config.count is not None else max(1, round(config.fraction * total))
    if count > total:
        raise AdapterError(f"count is {count:,}; the layers chosen have {total:,} entries")
    return count


def magnitudes(layer: nn.Module) -> Iterator[torch.Tensor]:
    """|weight| and |bias| of the base, flat, float32."""
    sparse = next((each for each in chain(layer) if isinstance(each, SaraLayer)), None)
    parts = sparse.tensors_with().values() if sparse is not None else _own(layer)
    for part in parts:
        yield part.detach().reshape(-1).float().abs()


def _own(layer: nn.Module) -> list[torch.Tensor]:
    own = innermost(layer)._parameters
    return [part for part in (own.get("weight"), own.get("bias")) if part is not None]


def _kth(tensors: Any, k: int) -> tuple[float, int]:
    """The k-th smallest of all values, exactly, and how many equal to it are among the first k.

    Bit patterns of floats that are not negative are in the order of the floats: two histograms of 16 bits
    find the value without ever holding more than one tensor.
    """

    def bits() -> Iterator[torch.Tensor]:
        return (tensor.view(torch.int32) for tensor in tensors())

    high = sum(
        (torch.bincount(b >> 16, minlength=1 << 15).cpu() for b in bits()), torch.zeros(1 << 15, dtype=torch.int64)
    ).cumsum(0)
    top = int(torch.searchsorted(high, k))
    before = int(high[top - 1]) if top else 0
    low = sum(
        (torch.bincount(b[b >> 16 == top] & 0xFFFF, minlength=1 << 16).cpu() for b in bits()),
        torch.zeros(1 << 16, dtype=torch.int64),
    ).cumsum(0)
    rest = int(torch.searchsorted(low, k - before))
    before += int(low[rest - 1]) if rest else 0
    return float(torch.tensor(top << 16 | rest, dtype=torch.int32).view(torch.float32)), k - before


def _sites(model: nn.Module, config: Any, layers: dict[str, nn.Module]) -> list[str]:
    names = list(layers)
    if not names:
        raise TargetError(f"this {type(model).__name__} has no layer with a weight")
    target = config.target_modules
    if config.sites:
        missing = [name for name in config.sites if name not in layers]
        if missing:
            raise AdapterError(f"this {type(model).__name__} has no layer '{missing[0]}'{_near(missing[0], names)}")
        chosen = set(config.sites)
    elif target is None:
        chosen = set(names)
    elif isinstance(target, str) and target.lower() == "all-linear":
        chosen = {name for name in backbone(model)[0] if isinstance(innermost(layers[name]), nn.Linear)}
        if not chosen:
            raise TargetError(f"this {type(model).__name__} has no linear")
    elif not target:
        raise TargetError("target_modules is empty; leave it out for every layer")
    else:
        if not isinstance(target, str):
            _unfit(model, target, names)
        chosen = select_names(target, names, "target")
    if config.exclude_modules and not config.sites:
        chosen -= select_names(config.exclude_modules, names, "exclude_modules")
        if not chosen:
            raise TargetError("exclude_modules leaves no target")
    return [name for name in names if name in chosen]


def _unfit(model: nn.Module, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Say why a listed name cannot be trained, where it names a module that is there."""
    for pattern in sorted(patterns):
        matched = [name for name in modules_outside(model) if _matches(pattern, name)]
        if matched and not set(matched) & set(names):
            layer = innermost(model.get_submodule(matched[0]))
            raise AdapterError(f"cannot adapt '{matched[0]}', a {type(layer).__name__}: it {why_not(layer)}")


def _check_tied(model: nn.Module, sites: Sequence[str]) -> None:
    wanted = {f"{site}.{part}" for site in sites for part in ("weight", "bias")}
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = name.replace(".base_layer", "")
        first = owners.setdefault(id(parameter), name)
        if first != name and (first in wanted or name in wanted):
            raise AdapterError(
                f"'{first}' and '{name}' are one tied tensor, and SaRA would train it in one place only; "
                "leave both layers out with exclude_modules"
            )


def _left_alone(model: nn.Module) -> Iterator[str]:
    for name, module in {"": model, **modules_outside(model)}.items():
        inner = innermost(module)
        fits = bool(name) and not why_not(inner)
        if name and isinstance(module, BaseTunerLayer) and fits:
            continue
        for key, parameter in inner._parameters.items():
            if parameter is not None and not (fits and key in ("weight", "bias")):
                yield f"{name}.{key}" if name else key
