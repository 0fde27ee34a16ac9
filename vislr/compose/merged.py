"""Several adapters as one change of each weight, made before the first step: cat, SVD, TIES, DARE, magnitude."""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from vislr.adapters.geometry import geometry_of
from vislr.adapters.inject import plain_name, tuner_layers
from vislr.compose.live import Delta, deltas
from vislr.compose.plan import ComposePlan
from vislr.core.errors import ConfigError, TargetError, hint
from vislr.core.merging import LowRank, low_rank_of, low_rank_sum, merge_deltas, resized


@dataclass
class Change:
    """What the adapters do together to one layer: a low-rank pair, or a whole weight; and a bias.

    Attributes:
        factors: (up, down), kernel axes with the input; None: `weight` holds it.
        weight: the change of the whole weight.
        bias: of the bias, or None.
        error: relative Frobenius error of a cut to a rank; 0: exact.
    """

    factors: tuple[torch.Tensor, torch.Tensor] | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None = None
    error: float = 0.0

    def __call__(self, base: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer with the change: as a second path for factors, as another weight for whole changes."""
        if self.factors is None:
            return functional_call(base, self._swapped(base), (x, *args), kwargs, tie_weights=False)
        up, down = (factor.to(x.device, x.dtype) for factor in self.factors)
        result = base(x, *args, **kwargs)
        if isinstance(base, nn.Linear):
            added = F.linear(F.linear(x, down), up)
        else:
            geometry = geometry_of(base)
            added = geometry.pointwise(geometry.convolve(x, down.reshape(-1, *geometry.shape[1:])), up)
        if self.bias is not None:
            shift = self.bias.to(x.device, x.dtype)
            added = added + shift.reshape(-1, *(1,) * (0 if isinstance(base, nn.Linear) else x.dim() - 2))
        return result + added

    def _swapped(self, base: Any) -> dict[str, torch.Tensor]:
        assert self.weight is not None
        swapped = {"weight": _plus(base.weight, self.weight)}
        if self.bias is not None:
            swapped["bias"] = _plus(base.bias, self.bias)
        return swapped


def _plus(base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Summed in the change's precision, rounded once."""
    return (base.to(change.dtype) + change.to(base.device)).to(base.dtype)


@torch.no_grad()
def merged_changes(module: nn.Module, plan: ComposePlan, names: tuple[str, ...]) -> dict[str, Change]:
    """Layer -> what these of the plan's adapters do to it together, by the plan's method.

    Raises:
        AdapterError: a kind that is no addition to a weight, or values that are not finite.
        ConfigError: as many weights by input as a layer has not.
    """
    made = {}
    for site, found in deltas(module, names):
        weights = layer_weights(plan, site)
        made[site] = _merge(plan, site, {name: _weighted(delta, weights[name], site) for name, delta in found.items()})
    return made


def check_patterns(module: nn.Module, plan: ComposePlan) -> None:
    """Refuse weights by layer whose pattern fits no layer of the plan's adapters.

    Raises:
        TargetError: names the nearest layers.
    """
    if not plan.merging.layers:
        return
    own = [layer for layer in tuner_layers(module) if set(plan.adapters) & layer[1]._get_available_adapters()]
    sites = list(dict.fromkeys(plain_name(path) for path, _ in own))
    for layer in plan.merging.layers:
        if not any(fnmatch.fnmatchcase(site, layer.pattern) for site in sites):
            raise TargetError(f"no changed layer is called '{layer.pattern}'{hint(layer.pattern, sites)}")


def layer_weights(plan: ComposePlan, site: str) -> dict[str, Any]:
    """Adapter -> its weight on this layer."""
    for layer in plan.merging.layers:
        if fnmatch.fnmatchcase(site, layer.pattern):
            return dict(zip(plan.adapters, layer.weights, strict=True))
    return dict(zip(plan.adapters, plan.weights, strict=True))


def _weighted(delta: Delta, weight: float | tuple[float, ...], site: str) -> tuple[Delta, float]:
    """A delta and its weight; weights by input are multiplied into the delta, as ZipLoRA does (arXiv 2311.13600)."""
    if not isinstance(weight, tuple):
        return delta, weight
    shape = delta.weight.shape
    if len(shape) < 2 or len(weight) != shape[1]:
        raise ConfigError(f"{len(weight)} weights by input for '{site}', whose weight has the shape {tuple(shape)}")
    inputs = torch.tensor(weight, dtype=delta.weight.dtype, device=delta.weight.device)
    factors = delta.factors
    if factors is not None:
        up, down = factors
        factors = up, (down.unflatten(1, (shape[1], -1)) * inputs[:, None]).flatten(1)
    scaled = delta.weight * inputs.reshape(-1, *(1,) * (len(shape) - 2))
    return Delta(scaled, delta.bias, factors), 1.0


def _merge(plan: ComposePlan, site: str, parts: dict[str, tuple[Delta, float]]) -> Change:
    method, rank = plan.method, plan.merging.rank
    found, weights = [delta for delta, _ in parts.values()], [weight for _, weight in parts.values()]
    bias = _bias(plan, site, parts)
    factors = [delta.factors for delta in found if delta.factors is not None]
    if method in ("cat", "svd") and len(factors) == len(found):
        up, down = low_rank_sum(factors, weights)
        if method == "cat" and rank is None:
            return Change((up, down), None, bias)
        return _cut(resized(up, down, rank or max(pair[1].shape[0] for pair in factors)), bias)
    total = _mixed(plan, site, [delta.weight for delta in found], weights)
    if rank is None and method == "svd" and factors:
        rank = max(pair[1].shape[0] for pair in factors)
    if rank is None or total.dim() < 2:
        return Change(None, total, bias)
    return _cut(low_rank_of(total, rank), bias)


def _cut(pair: LowRank, bias: torch.Tensor | None) -> Change:
    return Change((pair.up.float(), pair.down.float()), None, bias, pair.error)


def _bias(plan: ComposePlan, site: str, parts: dict[str, tuple[Delta, float]]) -> torch.Tensor | None:
    present = [(delta.bias, weight) for delta, weight in parts.values() if delta.bias is not None]
    if not present:
        return None
    return _mixed(plan, f"{site}.bias", [bias for bias, _ in present], [weight for _, weight in present])


def _mixed(plan: ComposePlan, name: str, found: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    # Each layer's draw depends on the seed and its name, not on the order of layers.
    digest = hashlib.sha256(f"{plan.merging.seed} {name}".encode()).digest()
    method = "sum" if plan.method in ("cat", "svd") else plan.method
    generator = None
    if method in ("dare", "dare_ties") and found[0].device.type != "meta":
        generator = torch.Generator(found[0].device).manual_seed(int.from_bytes(digest[:7], "little"))
    return merge_deltas(found, weights, method, plan.merging.density, generator)
