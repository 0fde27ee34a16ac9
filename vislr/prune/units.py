"""The units of a model: what can go, in which pieces, and what each saves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from vislr.anatomy import Anatomy, denoiser_of, describe
from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import ConfigError, TargetError, hint
from vislr.prune import surgery
from vislr.prune.skips import Removed

# Coarse to fine. "part" adds the adaptive norms of SD3's and FLUX's blocks, as HierarchicalPrune does.
GRANULARITIES = ("transformer", "block", "sub", "part")


@dataclass(frozen=True)
class Unit:
    """Something that can be removed by itself.

    Attributes:
        name: full module name.
        type: class of what stands there.
        index: place in the order of the forward among the model's units, from 0.
        parameters: freed by removing this unit alone.
        flops: saved a forward by removing this unit alone, at the sample of `units_of`.
        latency: measured nanoseconds spent in it a forward (`vislr.prune.with_latency`); 0: not measured.
    """

    name: str
    type: str
    index: int
    parameters: int
    flops: int
    latency: int = 0


@dataclass(frozen=True)
class Bonus:
    """What a holder frees beyond its units, once all of them are gone (norm and projections around them).

    Attributes:
        name: full module name of the holder.
        units: names of all units inside.
        parameters, flops, latency: freed in addition.
    """

    name: str
    units: tuple[str, ...]
    parameters: int
    flops: int
    latency: int = 0


@dataclass(frozen=True)
class Inventory:
    """What of a model can be removed at one granularity.

    Attributes:
        family: of the model, as anatomy names it.
        granularity: one of `GRANULARITIES`.
        units: disjoint, in the order of the forward.
        bonuses: inner holders before outer ones.
        parameters, flops, latency: of the whole model.
        sample: the shapes that FLOPs were counted at.
    """

    family: str
    granularity: str
    units: tuple[Unit, ...]
    bonuses: tuple[Bonus, ...]
    parameters: int
    flops: int
    sample: dict[str, int]
    latency: int = 0

    def saved(self, removed: Sequence[str], budget: str = "parameters") -> int:
        """What of the budget goes with these units (or blocks of units), bonuses included; exact integers."""
        names = {unit.name for unit in self.units}
        blocks = tuple(f"{name}." for name in removed if name not in names)
        gone = names.intersection(removed) | {name for name in names if blocks and name.startswith(blocks)}
        whole = [bonus for bonus in self.bonuses if gone.issuperset(bonus.units)]
        # What a holder frees as a whole is not freed a second time by a norm inside.
        within = {name for bonus in whole for name in self.inside(bonus)}
        units = sum(getattr(unit, budget) for unit in self.units if unit.name in gone - within)
        return units + sum(getattr(bonus, budget) for bonus in whole)

    def inside(self, bonus: Bonus) -> list[str]:
        """Units within a holder that it does not wait for: they go with it, and their parameters are its own."""
        return [
            unit.name for unit in self.units if unit.name.startswith(f"{bonus.name}.") and unit.name not in bonus.units
        ]

    def most(self, budget: str = "parameters") -> int:
        """What goes with all units."""
        return self.saved([unit.name for unit in self.units], budget)


def units_of(
    target: Any, granularity: str = "block", *, removal: str = "skip", sample: dict[str, int] | None = None
) -> Inventory:
    """The removable units of a model, with what each saves.

    Args:
        target: a supported model, or a pipeline, whose denoiser is read. Values are not needed: meta will do.
        granularity: of the parts that hold attention. "transformer": whole Transformer2DModels of a UNet.
            "block": transformer blocks. "sub": their attentions and feed-forwards. "part": these and the
            adaptive norms of SD3's and FLUX's blocks. Residual blocks of UNets and conv nets and FLUX's
            single-stream blocks are units at every granularity.
        removal: as in `LayerPlan`.
        sample: shapes that FLOPs are counted at.

    Raises:
        ConfigError: another granularity. TargetError: nothing in the model can be removed.
        ModelError: no reader for this model.
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(f"no granularity '{granularity}'{hint(granularity, GRANULARITIES)}")
    module = unwrapped(denoiser_of(target)[1])
    anatomy = describe(module, sample)
    names = _names(module, anatomy, granularity)
    if not names:
        raise TargetError(f"this {anatomy.family} model has no unit that can be removed")
    flops = _Flops(anatomy)
    units = []
    for index, name in enumerate(names):
        changes = surgery.replacements(module, name, removal)
        parameters = sum(_size(module.get_submodule(n)) - _size(new) for n, new in changes.items())
        saved = sum(flops.of(n) - flops.kept(n, new) for n, new in changes.items())
        units.append(Unit(name, type(module.get_submodule(name)).__name__, index, parameters, saved))
    units, bonuses = _folded(units, _bonuses(module, units, removal, flops))
    return Inventory(
        anatomy.family, granularity, tuple(units), bonuses, anatomy.parameters, anatomy.flops, anatomy.sample
    )


def _folded(units: list[Unit], bonuses: tuple[Bonus, ...]) -> tuple[list[Unit], tuple[Bonus, ...]]:
    """The bonus of a holder with a single unit belongs to that unit."""
    alone = {bonus.units[0]: bonus for bonus in bonuses if len(bonus.units) == 1}
    units = [
        replace(u, parameters=u.parameters + alone[u.name].parameters, flops=u.flops + alone[u.name].flops)
        if u.name in alone
        else u
        for u in units
    ]
    return units, tuple(bonus for bonus in bonuses if len(bonus.units) > 1)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _names(module: nn.Module, anatomy: Anatomy, granularity: str) -> list[str]:
    """Names of the units, in the order of the forward."""
    modules = dict(module.named_modules())
    places = {site.name: site.depth for site in anatomy.sites}
    chosen: dict[str, float] = {}
    for site in anatomy.sites:
        inner = modules.get(site.name)
        if not site.removable or inner is None or isinstance(inner, Removed):
            continue
        if surgery.class_name(inner, "ResnetBlock2D", "FluxSingleTransformerBlock"):
            chosen[site.name] = site.depth
        elif surgery.class_name(inner, "Transformer2DModel"):
            if granularity == "transformer":
                chosen[site.name] = site.depth
        elif surgery.is_block(inner):
            if granularity == "block" or (granularity == "transformer" and not _in_transformer(modules, site.name)):
                chosen[site.name] = site.depth
            elif granularity in ("sub", "part"):
                parts = surgery.branches(inner) + (surgery.norms(inner) if granularity == "part" else [])
                for number, part in enumerate(sorted(parts, key=lambda part: ("norm" not in part, part))):
                    name = f"{site.name}.{part}"
                    # A norm is no site: it comes with its block, before the branches.
                    chosen[name] = places.get(name, site.depth + number / 16)
        elif surgery.class_name(inner, *surgery._RESIDUAL):
            chosen[site.name] = site.depth
    return sorted(chosen, key=chosen.__getitem__)


def _in_transformer(modules: dict[str, nn.Module], name: str) -> bool:
    holder = modules.get(surgery.parent_of(surgery.parent_of(name)))
    return holder is not None and bool(surgery.class_name(holder, "Transformer2DModel"))


class _Flops:
    """FLOPs of any module, from the sites."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.sites = {site.name: site.flops for site in anatomy.sites}

    def of(self, name: str) -> int:
        if name in self.sites:
            return self.sites[name]
        # What is no site itself holds linears and convs alone: norms with a projection.
        inside = [n for n in self.sites if n.startswith(f"{name}.")]
        return sum(self.sites[n] for n in inside if not any(n.startswith(f"{other}.") for other in inside))

    def kept(self, name: str, new: nn.Module) -> int:
        """Of what stays under this name (the embedding kept by a DiT's first block is not run in it)."""
        return 0 if hasattr(new, "norm1") else sum(self.of(f"{name}.{child}") for child, _ in new.named_children())


def _bonuses(module: nn.Module, units: list[Unit], removal: str, flops: _Flops) -> tuple[Bonus, ...]:
    names = {unit.name for unit in units}
    own = {unit.name: unit for unit in units}
    found: list[Bonus] = []
    covered: dict[str, set[str]] = {}
    for holder, children in surgery.holders(module, removal):
        if holder in names or not children:
            continue
        inside: set[str] = set()
        for child in children:
            inside |= {child} if child in names else covered.get(child, set())
        if any(child not in names and child not in covered for child in children):
            continue
        covered[holder] = inside
        new = surgery.replacements(module, holder, removal)[holder]
        already = [own[n] for n in inside]
        nested = [bonus for bonus in found if set(bonus.units) <= inside]
        parameters = _size(module.get_submodule(holder)) - _size(new)
        parameters -= sum(unit.parameters for unit in already) + sum(bonus.parameters for bonus in nested)
        saved = flops.of(holder) - flops.kept(holder, new)
        saved -= sum(unit.flops for unit in already) + sum(bonus.flops for bonus in nested)
        found.append(Bonus(holder, tuple(unit.name for unit in units if unit.name in inside), parameters, saved))
    return tuple(found)


@contextlib.contextmanager
def without(module: nn.Module, removed: Sequence[str], removal: str = "skip") -> Iterator[None]:
    """The model without these units, inside the block; nothing is freed, everything is put back.

    Raises:
        TargetError: as `vislr.prune.surgery.replacements`.
    """
    module = unwrapped(module)
    before: list[tuple[str, nn.Module]] = []
    try:
        for name in surgery.effective(module, removed, removal):
            for path, new in surgery.replacements(module, name, removal).items():
                before.append((path, surgery.swap(module, path, new)))
        yield
    finally:
        for path, old in reversed(before):
            surgery.swap(module, path, old)
