"""HierarchicalPrune's criterion: what a unit contributes to the pictures, weighted by its position.

HierarchicalPrune (arXiv 2508.04663, AAAI 2026). The drop of a unit is P(whole) - P(without it), P the
mean quality of generated pictures. Notes on the paper print the score -|drop| W(i) with
W(i) = exp((i - |B|) / |B|), the highest pruned first. W grows with i, so that form prunes later
blocks *later*, against the stated aim, and it keeps units whose removal helps. Here::

    keep(i) = max(drop, 0) / W(i)^kappa - max(-drop, 0) * W(i)^kappa        lowest first

Of equal drops the later unit goes first, what helps goes before everything else, and kappa = 0 is the
order of the drops, as in the reference code.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vislr.anatomy import denoiser_of
from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import ConfigError, DataError, ModelError, hint
from vislr.core.hashing import content_hash
from vislr.prune import solve, surgery
from vislr.prune.plan import LayerPlan
from vislr.prune.scoring import ScoringCost, make_plan, plan_layers, processes, score_units, scoring_cost
from vislr.prune.units import Inventory, units_of, without

Quality = Callable[[Sequence[Any], Sequence[str]], float]
CUTS = ("moderate", "hybrid")
# A hybrid cut keeps them.
ATTENTIONS = ("attn", "attn1", "attn2")


def keep_score(drop: float, position: int, blocks: int, kappa: float = 1.0) -> float:
    """How much a unit should stay; the formula above.

    Args:
        drop: P(whole) - P(without the unit).
        position: index of its block, from 0. blocks: of the model.
        kappa: strength of the position; 0: none.
    """
    weight = math.exp((position - blocks) / blocks) ** kappa
    return max(drop, 0.0) / weight - max(-drop, 0.0) * weight


def block_range(text: str, *, inclusive: bool = True) -> list[int]:
    """`"25-29,31-35"` -> indices.

    The reference code's ranges end before their second number although its comment says otherwise:
    its "25-29,31-35" are 8 blocks (`inclusive=False`), which fits the paper's memory figures.

    Raises:
        ConfigError: not numbers and ranges joined by commas, or a range that is empty.
    """
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ConfigError(f"'{part}' in '{text}' is no block and no range; expected for example 25-29,31")
        first = int(match[1])
        end = first + 1 if match[2] is None else int(match[2]) + inclusive
        if end <= first:
            raise ConfigError(f"the range '{part}' in '{text}' is empty")
        found += range(first, end)
    return sorted(set(found))


def block_names(module: Any) -> list[str]:
    """The model's units of position: transformer blocks in the order of the forward, or a UNet's resnets and blocks."""
    return [unit.name for unit in units_of(module, "block").units]


def position_of(name: str, blocks: Sequence[str]) -> int:
    """Index of the block that is or holds the unit `name`."""
    return next(i for i, block in enumerate(blocks) if name == block or name.startswith(f"{block}."))


class Contribution:
    """The criterion.

    Args:
        prompts: what pictures are made of, each with every seed.
        quality: (PIL images, prompts) -> a number, higher is better; for example `PrototypeQuality`. Its
            text `hash`, if it has one, keeps drops by other qualities apart.
        seeds, steps, guidance: of the pictures.
        kappa: strength of the position.
        eligible: indices of the blocks that may lose units; None: all.
        exclude: last names of units that stay ("attn").
        batch: pictures made at once.
        options: passed on to the pipeline (height, max_sequence_length, ...).
        removal: as in `LayerPlan`.
        folder: drops are kept there as they come. progress: say the cost and show a bar.
    """

    name = "hierarchical"
    solver = "ranked"

    def __init__(
        self,
        prompts: Sequence[str],
        quality: Quality,
        *,
        seeds: Sequence[int] = (0,),
        steps: int = 20,
        guidance: float = 4.0,
        kappa: float = 1.0,
        eligible: Collection[int] | None = None,
        exclude: Collection[str] = (),
        batch: int = 16,
        options: Mapping[str, Any] | None = None,
        removal: str = "skip",
        folder: str | os.PathLike | None = None,
        progress: bool = True,
    ) -> None:
        if not prompts or not seeds:
            raise DataError(f"contribution from {len(prompts)} prompts and {len(seeds)} seeds; expected one of each")
        if kappa < 0:
            raise ConfigError(f"kappa is {kappa}; expected 0 or more")
        self.prompts, self.quality, self.seeds = list(prompts), quality, list(seeds)
        self.steps, self.guidance, self.batch, self.options = steps, guidance, batch, dict(options or {})
        self.kappa, self.eligible, self.exclude = kappa, eligible, tuple(exclude)
        self.removal, self.folder, self.progress = removal, folder, progress
        self.drops: dict[str, float] = {}
        self.whole: float | None = None

    def score(self, target: Any, inventory: Inventory) -> dict[str, float]:
        """unit -> `keep_score`, of the eligible units.

        Raises:
            ModelError: the target is no pipeline. ConfigError: no unit is eligible, or no such block.
        """
        if not hasattr(target, "components"):
            raise ModelError(f"contribution needs pictures; expected a pipeline, not a {type(target).__name__}")
        module = unwrapped(denoiser_of(target)[1])
        blocks = block_names(module)
        names = [unit.name for unit in inventory.units if self._may_go(unit.name, blocks)]
        if not names:
            raise ConfigError(f"no unit is eligible: blocks {self.eligible}, without {list(self.exclude)}")
        if self.progress and processes()[0] == 0:
            print(f"scoring: {self.cost(target, inventory)}", file=sys.stderr)
        key = content_hash(module.state_dict(), repr(self._settings()) + inventory.granularity)
        measured = score_units(
            ["", *names], lambda name: self._quality(target, module, [name] if name else []), key=key,
            folder=self.folder, progress=self.progress, describe="pictures without a unit",
        )  # fmt: skip
        self.whole = measured.pop("")
        self.drops |= {name: self.whole - value for name, value in measured.items()}
        return {
            name: keep_score(self.drops[name], position_of(name, blocks), len(blocks), self.kappa) for name in names
        }

    def cost(self, target: Any, inventory: Inventory) -> ScoringCost:
        """What `score` takes in forwards of the denoiser: every picture without each eligible unit, and with all."""
        module: Any = unwrapped(denoiser_of(target)[1])
        blocks = block_names(module)
        units = tuple(unit for unit in inventory.units if self._may_go(unit.name, blocks))
        # FLUX is told its guidance; the others run twice.
        twice = self.guidance > 1 and inventory.family != "flux"
        pictures = len(self.prompts) * len(self.seeds)
        forwards = (len(units) + 1) * math.ceil(pictures / self.batch) * self.steps
        flops = scoring_cost(replace(inventory, units=units), pictures * self.steps * (1 + twice)).flops
        return ScoringCost(len(units), forwards, flops)

    def _may_go(self, name: str, blocks: Sequence[str]) -> bool:
        if self.eligible is not None:
            wrong = [i for i in self.eligible if not 0 <= i < len(blocks)]
            if wrong:
                raise ConfigError(f"block {wrong[0]} is eligible, and the model has blocks 0 to {len(blocks) - 1}")
            if position_of(name, blocks) not in self.eligible:
                return False
        return name.rpartition(".")[2] not in self.exclude

    @torch.no_grad()
    def _quality(self, pipe: Any, module: Any, removed: Sequence[str]) -> float:
        pairs = [(prompt, seed) for seed in self.seeds for prompt in self.prompts]
        images: list[Any] = []
        bar = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(**(bar | {"disable": True}))
        try:
            with without(module, removed, self.removal):
                for start in range(0, len(pairs), self.batch):
                    part = pairs[start : start + self.batch]
                    # Noise is drawn a picture at a time, on the CPU: neither batch nor device changes it.
                    rngs = [torch.Generator("cpu").manual_seed(seed) for _, seed in part]
                    images += pipe(
                        [prompt for prompt, _ in part], generator=rngs, num_inference_steps=self.steps,
                        guidance_scale=self.guidance, **self.options,
                    ).images  # fmt: skip
        finally:
            pipe._progress_bar_config = bar
        return float(self.quality(images, [prompt for prompt, _ in pairs]))

    def _settings(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "seeds": self.seeds, "steps": self.steps, "guidance": self.guidance,
                "options": self.options, "removal": self.removal,
                "quality": getattr(self.quality, "hash", "")}  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Pictures, position, and the drops themselves, which recovery reads."""
        return {
            **self._settings(),
            "kappa": self.kappa,
            "eligible": None if self.eligible is None else sorted(self.eligible),
            "exclude": list(self.exclude),
            "whole": self.whole,
            "drops": dict(self.drops),
        }


class PrototypeQuality:
    """Quality of pictures of known concepts: share whose nearest prototype is right, plus mean likeness to it.

    Args:
        concepts: prompt -> the concept that it shows, a name of the gallery.
        gallery: what `vislr.measure.prototypes` gave, of other pictures of the concepts.
    """

    def __init__(self, concepts: Mapping[str, str], gallery: Any) -> None:
        for name in concepts.values():
            if name not in gallery.names:
                raise DataError(f"the gallery has no concept '{name}'{hint(name, gallery.names)}")
        self.concepts, self.gallery = dict(concepts), gallery
        table = {"prototypes": gallery.features.values}
        self.hash = content_hash(table, repr([gallery.features.net_hash, gallery.names, sorted(concepts.items())]))

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> float:
        from torch.nn import functional as F

        from vislr.measure import feature_net, retrieval

        features = feature_net().features(images)
        names = [self.concepts[prompt] for prompt in prompts]
        place = {name: row for row, name in enumerate(self.gallery.names)}
        centre = self.gallery.features.values.mean(0)
        right = self.gallery.features.values[[place[name] for name in names]]
        likeness = F.cosine_similarity(features.values - centre, right - centre)
        return retrieval(features, names, self.gallery, top=1).value + float(likeness.mean())


def hierarchical_plan(
    target: Any,
    prompts: Sequence[str],
    ratio: float,
    quality: Quality,
    *,
    cut: str = "moderate",
    block_ratio: float = 0.2,
    budget: str = "parameters",
    part_range: Collection[int] | None = None,
    folder: str | os.PathLike | None = None,
    **contribution: Any,
) -> LayerPlan:
    """HierarchicalPrune's cut.

    Args:
        target: a pipeline.
        prompts, quality: as in `Contribution`, which takes `contribution` too.
        ratio: share of the budget to remove at least.
        cut: "moderate": whole blocks. "hybrid": blocks up to `block_ratio`, then feed-forwards and
            adaptive norms of the other blocks (their attention stays) up to `ratio`.
        part_range: hybrid: indices of the blocks that may lose parts; None: all that stay.
        folder: where drops are kept.

    Raises:
        ConfigError: a ratio beyond what is prunable; an unknown cut.
    """
    if cut not in CUTS:
        raise ConfigError(f"no cut '{cut}'{hint(cut, CUTS)}")
    inner = None if folder is None else os.path.join(folder, "blocks")
    criterion = Contribution(prompts, quality, folder=inner, **contribution)
    if cut == "moderate" or ratio <= block_ratio:
        return plan_layers(target, criterion, ratio, budget=budget, removal=criterion.removal)
    component, module = denoiser_of(target)
    module = unwrapped(module)
    first = plan_layers(target, criterion, block_ratio, budget=budget, removal=criterion.removal)
    parts = units_of(module, "part", removal=criterion.removal)
    rest = [i for i, block in enumerate(block_names(module)) if block not in first.removed]
    finer = Contribution(
        prompts, quality, folder=None if folder is None else os.path.join(folder, "parts"),
        **(contribution | {"eligible": rest if part_range is None else part_range, "exclude": ATTENTIONS}),
    )  # fmt: skip
    scores = finer.score(target, parts)
    removed = hybrid_cut(module, first.removed, parts, scores, ratio, budget)
    settings = {**first.settings, "cut": "hybrid", "block_ratio": block_ratio, "parts": finer.settings()}
    return make_plan(
        module, component, parts, removed, criterion="hierarchical", ratio=ratio, budget=budget,
        removal=criterion.removal, scores={**first.scores, **scores}, settings=settings,
    )  # fmt: skip


def hybrid_cut(
    module: Any, blocks: Sequence[str], parts: Inventory, scores: Mapping[str, float], ratio: float,
    budget: str = "parameters",
) -> list[str]:  # fmt: skip
    """Whole blocks, then parts of others with the lowest score first, until the ratio is reached.

    Args:
        blocks: names that go whole. parts: the inventory at granularity "part".
        scores: part -> score; others stay.

    Returns:
        the blocks and the parts, in the model's order.

    Raises:
        ConfigError: the parts do not suffice.
    """
    within = [unit.name for unit in parts.units if _inside(unit.name, blocks)]
    needed = solve.needed_for(parts, ratio, budget)
    ranked = [name for name in sorted(scores, key=scores.__getitem__) if name not in within]
    chosen = solve.first_enough(parts, [*within, *ranked], needed, budget) if needed else []
    order = {name: i for i, (name, _) in enumerate(module.named_modules())}
    whole = [block for block in blocks if any(_inside(name, [block]) for name in chosen)]
    return sorted([*whole, *(name for name in chosen if name not in within)], key=order.__getitem__)


def _inside(name: str, blocks: Collection[str]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def removed_blocks(module: Any, plan: LayerPlan) -> list[int]:
    """Positions of the blocks that lose something, in the model before the plan."""
    blocks = block_names(module)
    return sorted({position_of(name, blocks) for name in surgery.effective(module, plan.removed, plan.removal)
                   if any(_inside(name, [block]) for block in blocks)})  # fmt: skip
