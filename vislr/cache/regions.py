"""Where a denoiser can be cached: boundaries of UNets, blocks of transformers, lone modules.

=========== ============================================================================================
UNet        the region below a boundary up block: from the down block at the boundary's level on, over the
            middle, to the up block before it. A cached pass runs the stem, the down blocks above that
            level (and of the boundary's own level all but its downsampler), the boundary and what follows.
            For SD1.x and the last up block this is DeepCache's and CMLoRA's choice. SDXL's last up block
            has no attention; a cached pass that shall run attention takes `up_blocks.1`.
transformer blocks one after another (double-stream and single-stream blocks of FLUX count as one row): a
            cached pass runs the blocks before and behind, and adds what the region added last time.
=========== ============================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from vislr.anatomy.families import reader_of
from vislr.anatomy.wrapping import original, unwrapped
from vislr.cache.hooks import BoundaryHook, SkipHook, Stretch, StretchHook
from vislr.cache.plan import Refresh, Region
from vislr.cache.state import CacheState
from vislr.core.context import context_of
from vislr.core.errors import ConfigError, ModelError, TargetError, hint

TRANSFORMERS = ("sd3", "flux", "pixart", "dit")


@dataclass(frozen=True)
class Backbone:
    """What caching needs to know of a denoiser.

    Attributes:
        family: as in `vislr.anatomy`.
        blocks: a UNet's stages, or a transformer's blocks, in the order of the forward.
        units: lone modules that can be cached by themselves.
    """

    family: str
    blocks: tuple[str, ...]
    units: tuple[str, ...]

    @property
    def ups(self) -> tuple[str, ...]:
        """A UNet's up blocks."""
        return tuple(block for block in self.blocks if block.startswith("up_blocks."))


def backbone_of(model: Any) -> Backbone:
    """Read a denoiser.

    Raises:
        ModelError: neither a UNet nor a diffusion transformer.
    """
    model = unwrapped(model)
    family = reader_of(model).family
    if family == "unet":
        stages = {f"down_blocks.{i}": block for i, block in enumerate(model.down_blocks)}
        if model.mid_block is not None:
            stages["mid_block"] = model.mid_block
        stages |= {f"up_blocks.{i}": block for i, block in enumerate(model.up_blocks)}
        units = [
            f"{name}.{part}.{i}"
            for name, block in stages.items()
            for part in ("resnets", "attentions")
            for i, unit in enumerate(getattr(block, part, None) or ())
            if _there(unit) and not getattr(unit, "up", False) and not getattr(unit, "down", False)
        ]
        return Backbone(family, tuple(stages), tuple(units))
    if family not in TRANSFORMERS:
        raise ModelError(f"a {type(model).__name__} has no denoising steps to reuse features between")
    blocks = [
        f"{name}.{i}"
        for name in ("transformer_blocks", "single_transformer_blocks")
        for i, block in enumerate(getattr(model, name, None) or ())
        if _there(block)
    ]
    return Backbone(family, tuple(blocks), tuple(blocks))


def _there(module: nn.Module) -> bool:
    """Not taken out by a layer plan, which leaves a mark in its place."""
    return getattr(module, "removed_unit", None) is None


def region_at(model: Any, boundary: str | None = None, refresh: Refresh | None = None) -> Region:
    """The region that ends before `boundary`.

    Args:
        model: a UNet or a diffusion transformer.
        boundary: of a UNet, an up block (None: the last one). Of a transformer, a block: everything from
            the first blocks (a sixth, at least one) to it is cached. None: a last sixth runs, too.
        refresh: of the region; default every third step.

    Raises:
        TargetError: no such block; names the nearest. ModelError: too few blocks, or no such model.
    """
    refresh = refresh or Refresh(every=3)
    backbone = backbone_of(model)
    if backbone.family == "unet":
        ups = backbone.ups
        name = ups[-1] if boundary is None else boundary
        if name not in ups:
            raise TargetError(f"the UNet has no up block '{name}'{hint(name, ups)}")
        place = backbone.blocks.index(name)
        first = max(0, len(ups) - 1 - ups.index(name)) + 1
        downs = [block for block in backbone.blocks if block.startswith("down_blocks.")]
        start = downs[first] if first < len(downs) else "mid_block"
        if start not in backbone.blocks or backbone.blocks.index(start) >= place:
            raise ModelError(f"nothing of this UNet lies below '{name}'")
        return Region(start, backbone.blocks[place - 1], refresh)
    blocks = backbone.blocks
    edge = max(1, round(len(blocks) / 6))
    if boundary is None:
        end = len(blocks) - (edge if len(blocks) > 2 * edge else 0)
    elif boundary in blocks:
        end = blocks.index(boundary)
    else:
        raise TargetError(f"the {backbone.family} transformer has no block '{boundary}'{hint(boundary, blocks)}")
    if end <= edge:
        raise ModelError(f"a transformer of {len(blocks)} blocks has none between the first {edge} and {boundary!r}")
    return Region(blocks[edge], blocks[end - 1], refresh)


def fitting_region(model: Any, boundary: str | None = None, refresh: Refresh | None = None) -> Region:
    """`region_at`, moved where some of its blocks alone would be among those that tokens miss together.

    A cached step leaves out all blocks between which a token plan takes tokens away and brings them back, or none of
    them. The region is the nearest to that of `region_at`; of two as near, the one that leaves out less.

    Args:
        model, boundary, refresh: as in `region_at`. A boundary that is given stays: only the first block moves.

    Raises:
        as `region_at`. ConfigError: nothing that ends before this boundary fits; names the nearest one that does.
    """
    region, blocks = region_at(model, boundary, refresh), backbone_of(model).blocks
    missing = stretches_missed(model, blocks)
    start, end = blocks.index(region.first), blocks.index(region.last)
    if _fits(start, end, missing):
        return region
    spans = [(i, j) for j in range(len(blocks)) for i in range(j + 1) if _fits(i, j, missing)]
    spans.sort(key=lambda span: (abs(span[0] - start) + abs(span[1] - end), span[1] - span[0]))
    own = [span for span in spans if boundary is None or span[1] == end]
    if not own:
        i, j = spans[0]
        first, last = _longest([span for span in missing if span[0] <= end < span[1]], blocks)
        right = f"the nearest that does is '{blocks[j + 1]}'" if j + 1 < len(blocks) else "leave it out (null)"
        raise ConfigError(
            f"boundary '{boundary}' does not fit: tokens leave in '{first}' and come back after '{last}', and cached "
            f"steps run all of these blocks or none; {right}, which caches '{blocks[i]}' to '{blocks[j]}'"
        )
    return Region(blocks[own[0][0]], blocks[own[0][1]], region.refresh)


def stretches_missed(model: Any, names: tuple[str, ...]) -> list[tuple[int, int]]:
    """First and last place among `names` of every stretch whose modules a call runs all or none of."""
    context = context_of(unwrapped(model))
    groups = [] if context is None else [group for own in context.joined.values() for group in own]
    places = [[n for n, name in enumerate(names) if any(_within(one, name) for one in group)] for group in groups]
    return list(dict.fromkeys((own[0], own[-1]) for own in places if own))


def _fits(start: int, end: int, missing: list[tuple[int, int]]) -> bool:
    return all(end < first or last < start or (start <= first and last <= end) for first, last in missing)


def moved(model: Any, regions: tuple[Region, ...]) -> tuple[str, ...]:
    """A line for a report: where the usual region would be, if tokens are missing in a part of it."""
    blocks = backbone_of(model).blocks
    missing = [(first, last) for first, last in stretches_missed(model, blocks) if first < last]
    if len(regions) > 1 or not missing:
        return ()
    usual = region_at(model)
    crossing = [span for span in missing if not _fits(blocks.index(usual.first), blocks.index(usual.last), [span])]
    if not crossing or (regions[0].first, regions[0].last) == (usual.first, usual.last):
        return ()
    first, last = _longest(crossing, blocks)
    return (
        f"not the usual '{usual.first}' to '{usual.last}': tokens are missing from '{first}' to '{last}', of which a "
        "cached step runs all or none",
    )


def _longest(spans: list[tuple[int, int]], blocks: tuple[str, ...]) -> tuple[str, str]:
    first, last = max(spans, key=lambda span: span[1] - span[0])
    return blocks[first], blocks[last]


def region_hooks(model: Any, regions: tuple[Region, ...], state: CacheState) -> dict[str, Any]:
    """Module name -> its hook, for everything that the regions touch. Nothing is changed.

    Raises:
        TargetError: a name is not in the model. ConfigError: a stretch that cannot be cached, regions that
            overlap.
    """
    model = unwrapped(model)
    backbone = backbone_of(model)
    hooks: dict[str, Any] = {}
    for number, region in enumerate(regions):
        own = _hooks(model, backbone, region, number, state)
        for name in own:
            inside = [other for other in hooks if _within(name, other) or _within(other, name)]
            if inside and not (isinstance(own[name], BoundaryHook) and name not in hooks):
                raise ConfigError(f"the cached regions overlap at '{name}' and '{inside[0]}'")
        hooks |= own
    return hooks


def _within(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")


def _hooks(model: Any, backbone: Backbone, region: Region, number: int, state: CacheState) -> dict[str, Any]:
    known = tuple(dict.fromkeys((*backbone.blocks, *backbone.units)))
    for name in (region.first, region.last):
        if name not in known:
            raise TargetError(f"the {backbone.family} model has no block '{name}' to cache{hint(name, known)}")
    stages = backbone.family == "unet" and region.last in backbone.blocks and region.first in backbone.blocks
    if stages:
        return _deep(model, backbone, region, number, state)
    stretch = Stretch(state, number)
    if region.first == region.last:
        return {region.first: StretchHook(stretch, True, True)}
    if backbone.family == "unet":
        raise ConfigError(f"'{region.first}' to '{region.last}': units of a UNet are cached one by one")
    start, end = backbone.blocks.index(region.first), backbone.blocks.index(region.last)
    if start > end:
        raise ConfigError(f"a region runs '{region.first}' to '{region.last}', against the order of the forward")
    inside = backbone.blocks[start : end + 1]
    return {name: StretchHook(stretch, name == region.first, name == region.last) for name in inside}


def _deep(model: Any, backbone: Backbone, region: Region, number: int, state: CacheState) -> dict[str, Any]:
    place = backbone.blocks.index(region.last) + 1
    if place == len(backbone.blocks):
        raise ConfigError(f"a UNet's region ends before an up block, not at the last one, '{region.last}'")
    boundary = backbone.blocks[place]
    expected = region_at(model, boundary, region.refresh) if boundary in backbone.ups else None
    if expected is None or expected != region:
        right = f"; before '{boundary}' it is '{expected.first}' to '{expected.last}'" if expected else ""
        raise ConfigError(f"'{region.first}' to '{region.last}' is no level of the UNet{right}")
    start = backbone.blocks.index(region.first)
    hooks: dict[str, Any] = {}
    level = model.get_submodule(backbone.blocks[start - 1])
    # Only skipped blocks read what the level's own downsampler makes.
    for i, _ in enumerate(getattr(original(level), "downsamplers", None) or ()):
        hooks[f"{backbone.blocks[start - 1]}.downsamplers.{i}"] = SkipHook(state, number)
    for name in backbone.blocks[start:place]:
        hooks[name] = SkipHook(state, number)
    hooks[boundary] = BoundaryHook(state, number)
    return hooks
