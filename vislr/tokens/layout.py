"""Where tokens can leave and come back: the runs of transformer blocks of each family of backbones."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vislr.anatomy.families import reader_of
from vislr.anatomy.wrapping import unwrapped
from vislr.core.context import context_of
from vislr.core.errors import ConfigError, ModelError

FAMILIES = ("unet", "sd3", "flux", "pixart", "dit", "vit")


@dataclass(frozen=True)
class Run:
    """Blocks one after another on one sequence of tokens.

    Attributes:
        holder: module whose input is the image that the tokens are made of ("" = the backbone).
        blocks: full names, in the order of the forward.
        stage: block of the backbone that holds them.
        patch: side of the square that becomes one token, in pixels of the holder's input.
    """

    holder: str
    blocks: tuple[str, ...]
    stage: str
    patch: int


@dataclass(frozen=True)
class Layout:
    """What token pruning needs to know of a backbone.

    Attributes:
        family: as in `vislr.anatomy`.
        runs: every run of blocks.
        image: where the image's tokens lie among those of an attention: "all", "first" (text behind) or
            "last" (text, or a class token, before).
        prefix: tokens at the head of a block's own sequence that never leave (class token, registers).
        parts: modules of a block that can work on few tokens alone.
        recovers: whether tokens come back at the end of a run.
    """

    family: str
    runs: tuple[Run, ...]
    image: str
    prefix: int
    parts: tuple[str, ...]
    recovers: bool

    def run_of(self, block: str) -> Run | None:
        """The run that holds this block."""
        return next((run for run in self.runs if block in run.blocks), None)


def token_layout(model: Any) -> Layout:
    """Read a backbone.

    Raises:
        ModelError: no UNet, diffusion transformer or ViT, or one without transformer blocks.
    """
    model = unwrapped(model)
    family = reader_of(model).family
    if family not in FAMILIES:
        raise ModelError(f"a {type(model).__name__} has no tokens to prune; supported are {', '.join(FAMILIES)}")
    layout = _READERS[family](model)
    if not any(run.blocks for run in layout.runs):
        raise ModelError(f"this {type(model).__name__} has no transformer blocks, so no tokens to prune")
    return layout


def beside_caches(model: Any, layout: Layout) -> Layout:
    """The layout with every run cut down to its longest stretch that cached steps leave out whole, or run whole.

    Raises:
        ConfigError: a cache that is on the model leaves no two blocks of a run together, and tokens cannot miss
            parts of one block.
    """
    context = context_of(unwrapped(model))
    groups = [] if context is None else [group for own in context.left_out.values() for group in own]
    runs = []
    for run in layout.runs:
        out = [(frozenset(n for n, group in enumerate(groups) if _within(block, group)), block) for block in run.blocks]
        stretches = [tuple(block for _, block in own) for _, own in itertools.groupby(out, lambda one: one[0])]
        blocks = max(stretches, key=len, default=())
        if len(blocks) == 1 < len(run.blocks) and not layout.parts:
            raise ConfigError(
                "cached steps neither leave out nor run two blocks in a row together: tokens have no blocks to miss; "
                "remove the cache plan, or plan tokens before it"
            )
        runs.append(dataclasses.replace(run, blocks=blocks))
    return dataclasses.replace(layout, runs=tuple(runs))


def _within(block: str, group: Sequence[str]) -> bool:
    return any(block == name or block.startswith(f"{name}.") for name in group)


def _there(block: nn.Module) -> bool:
    """Not taken out by a layer plan, which leaves a mark in its place."""
    return getattr(block, "removed_unit", None) is None


def _blocks(holder: nn.Module, path: str, name: str = "transformer_blocks") -> tuple[str, ...]:
    prefix = f"{path}.{name}" if path else name
    return tuple(f"{prefix}.{i}" for i, block in enumerate(getattr(holder, name)) if _there(block))


def _unet(model: Any) -> Layout:
    stages = {f"down_blocks.{i}": block for i, block in enumerate(model.down_blocks)}
    stages["mid_block"] = model.mid_block
    stages |= {f"up_blocks.{i}": block for i, block in enumerate(model.up_blocks)}
    runs = []
    for stage, block in stages.items():
        for i, attention in enumerate(getattr(block, "attentions", None) or ()):
            if _there(attention) and hasattr(attention, "transformer_blocks"):
                path = f"{stage}.attentions.{i}"
                runs.append(Run(path, _blocks(attention, path), stage, 1))
    runs = [run for run in runs if run.blocks]
    return Layout("unet", tuple(runs), "all", 0, ("attn1", "attn2", "ff"), True)


def _transformer(family: str, image: str, parts: tuple[str, ...]) -> Any:
    def read(model: Any) -> Layout:
        blocks = _blocks(model, "")
        if hasattr(model, "single_transformer_blocks"):
            blocks += _blocks(model, "", "single_transformer_blocks")
        run = Run("", blocks, "transformer_blocks", int(model.config.patch_size))
        return Layout(family, (run,), image, 0, parts, True)

    return read


def _vit(model: Any) -> Layout:
    prefix = getattr(model, "num_prefix_tokens", None)
    rope = getattr(model, "rope", None) is not None
    if prefix is None or rope or not hasattr(model, "pos_embed"):
        raise ModelError(f"a {type(model).__name__} moves or rotates tokens; supported is VisionTransformer")
    patch = model.patch_embed.patch_size
    side = patch if isinstance(patch, int) else patch[0]
    run = Run("", _blocks(model, "", "blocks"), "blocks", int(side))
    return Layout("vit", (run,), "last", int(prefix), (), False)


_READERS = {
    "unet": _unet,
    "sd3": _transformer("sd3", "first", ()),
    "flux": _transformer("flux", "last", ()),
    "pixart": _transformer("pixart", "all", ("attn1", "attn2", "ff")),
    "dit": _transformer("dit", "all", ("attn1", "ff")),
    "vit": _vit,
}
