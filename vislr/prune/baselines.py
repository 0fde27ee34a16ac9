"""What every criterion must beat: size of weights, chance, even spacing, and the lists of BK-SDM and SSD-1B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vislr.anatomy import denoiser_of
from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import ConfigError, ModelError, hint
from vislr.prune import surgery
from vislr.prune.plan import LayerPlan
from vislr.prune.scoring import make_plan
from vislr.prune.units import Inventory, units_of


class Magnitude:
    """Mean absolute value of the weights that go with a unit; the smallest first."""

    name = "magnitude"
    solver = "ranked"

    def score(self, target: Any, inventory: Inventory) -> dict[str, float]:
        """unit -> mean |w|.

        Raises:
            ModelError: the model is on meta.
        """
        module = unwrapped(denoiser_of(target)[1])
        scores = {}
        for unit in inventory.units:
            kept = {id(p) for new in surgery.replacements(module, unit.name).values() for p in new.parameters()}
            gone = [p for p in module.get_submodule(unit.name).parameters() if id(p) not in kept]
            if any(p.is_meta for p in gone):
                raise ModelError("a model on the meta device has no weights to compare")
            total = sum(float(p.detach().abs().sum(dtype=torch.float32)) for p in gone)
            scores[unit.name] = total / sum(p.numel() for p in gone)
        return scores

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}


class Random:
    """Any order, the same for the same seed."""

    name = "random"
    solver = "ranked"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, target: Any, inventory: Inventory) -> dict[str, float]:
        """unit -> a number in [0, 1)."""
        rng = torch.Generator().manual_seed(self.seed)
        values = torch.rand(len(inventory.units), generator=rng).tolist()
        return {unit.name: value for unit, value in zip(inventory.units, values, strict=True)}

    def settings(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}


class UniformDepth:
    """Evenly spaced over the depth at every ratio: units in the order of their bit-reversed index."""

    name = "uniform"
    solver = "ranked"

    def score(self, target: Any, inventory: Inventory) -> dict[str, float]:
        """unit -> van der Corput's sequence at its index, from the middle of the depth outwards."""
        count = len(inventory.units)
        # The sequence visits the places of [0, 1); each takes the nearest unit that is left.
        order: list[int] = []
        left = set(range(count))
        step = 1
        while left:
            place = min(left, key=lambda i: (abs((i + 0.5) / count - _reversed_bits(step)), i))
            order.append(place)
            left.remove(place)
            step += 1
        return {inventory.units[place].name: float(rank) for rank, place in enumerate(order)}

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}


def _reversed_bits(index: int) -> float:
    value, share = 0.0, 0.5
    while index:
        index, bit = divmod(index, 2)
        value += bit * share
        share /= 2
    return value


class BkSdmOrder:
    """BK-SDM's rule for a UNet of any size, as an order.

    Kim et al., BK-SDM (arXiv 2305.15798), section 3.1: first the pairs of resnet and transformer that
    repeat a stage's first one (in up stages all but the first and the last), then the mid stage, then
    whole stages from the innermost outwards.
    """

    name = "bk-sdm"
    solver = "ranked"

    def score(self, target: Any, inventory: Inventory) -> dict[str, float]:
        """unit -> its place in the order.

        Raises:
            ModelError: the model is no UNet.
        """
        module: Any = unwrapped(denoiser_of(target)[1])
        tiers = _bk_tiers(module, inventory)
        ranked = [name for tier in tiers for name in tier]
        return {name: float(rank) for rank, name in enumerate(ranked)}

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}


class SsdOrder:
    """SSD-1B's rule for a UNet of any size, as an order (Segmind; read off its config).

    First the middle but for one resnet; then the last blocks of the transformers, a share of each
    transformer at a time, innermost stages first. Resnets elsewhere stay.
    """

    name = "ssd"
    solver = "ranked"

    def score(self, target: Any, inventory: Inventory) -> dict[str, float]:
        """unit -> its place in the order; units that the rule keeps have none.

        Raises:
            ModelError: the model is no UNet.
        """
        module: Any = unwrapped(denoiser_of(target)[1])
        if inventory.family != "unet":
            raise ModelError(f"SSD-1B's rule is for UNets of Stable Diffusion; this is a {type(module).__name__}")
        levels = len(module.down_blocks)
        places: dict[str, tuple[float, int]] = {}
        for unit in inventory.units:
            parts = unit.name.split(".")
            if parts[0] == "mid_block":
                if unit.name != "mid_block.resnets.0":
                    places[unit.name] = (0.0, 0)
            elif parts[2] == "attentions":
                depth = levels - 1 - int(parts[1]) if parts[0] == "down_blocks" else int(parts[1])
                count = len(getattr(module.get_submodule(".".join(parts[:4])), "transformer_blocks", "."))
                block = int(parts[5]) if len(parts) > 5 else 0
                places[unit.name] = (1 + (count - 1 - block) / count, depth)
        ranked = sorted(places, key=places.__getitem__)
        return {name: float(rank) for rank, name in enumerate(ranked)}

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}


BK_SDM = ("base", "small", "tiny")


def _bk_tiers(module: Any, inventory: Inventory) -> list[list[str]]:
    """Repeated pairs; the mid stage; then stage by stage from the innermost."""
    if inventory.family != "unet":
        raise ModelError(f"BK-SDM's rule is for UNets of Stable Diffusion; this is a {type(module).__name__}")
    repeated: list[str] = []
    mid: list[str] = []
    stages: dict[int, list[str]] = {}
    for unit in inventory.units:
        parts = unit.name.split(".")
        if parts[0] == "mid_block":
            mid.append(unit.name)
            continue
        stage = getattr(module, parts[0])[int(parts[1])]
        place, last = int(parts[3]), len(stage.resnets) - 1
        if place > 0 and (parts[0] == "down_blocks" or place < last):
            repeated.append(unit.name)
        else:
            depth = len(module.down_blocks) - 1 - int(parts[1]) if parts[0] == "down_blocks" else int(parts[1])
            stages.setdefault(depth, []).append(unit.name)
    return [repeated, mid, *(stages[depth] for depth in sorted(stages))]


def bk_sdm_plan(target: Any, variant: str = "base") -> LayerPlan:
    """BK-SDM's architectures as a list of units: base, small (and no mid stage), tiny (and no innermost stages).

    BK-SDM also leaves out the skip connections of the removed pairs and resizes nothing in the removed
    stages; here shortcuts and resizing stay: .587, .490 and .367 B for the published .58, .49 and .33 B.

    Raises:
        ConfigError: another variant. ModelError: no UNet.
    """
    if variant not in BK_SDM:
        raise ConfigError(f"BK-SDM has no variant '{variant}'{hint(variant, BK_SDM)}")
    component, module = denoiser_of(target)
    module = unwrapped(module)
    inventory = units_of(module, "transformer")
    tiers = _bk_tiers(module, inventory)
    chosen = {name for tier in tiers[: 1 + BK_SDM.index(variant)] for name in tier}
    return _listed(module, component, inventory, chosen, f"bk-sdm-{variant}")


# Blocks that SSD-1B keeps in each Transformer2DModel of SDXL; the mid block keeps one resnet alone.
_SSD_1B = {"down_blocks.1": (2, 2), "down_blocks.2": (4, 4), "up_blocks.0": (4, 4, 10), "up_blocks.1": (2, 1, 1)}


def ssd_1b_plan(target: Any) -> LayerPlan:
    """SSD-1B's architecture (Segmind) as a list of SDXL's units: 1.33 B of 2.57 B parameters.

    How many blocks each transformer keeps is in its config; which ones is not published: here the first.

    Raises:
        ModelError: the model has not SDXL's layout.
    """
    component, module = denoiser_of(target)
    module = unwrapped(module)
    inventory = units_of(module, "block")
    names = {unit.name for unit in inventory.units}
    chosen = {name for name in names if name.startswith("mid_block.attentions.")} | {"mid_block.resnets.1"}
    for stage, kept in _SSD_1B.items():
        for i, count in enumerate(kept):
            prefix = f"{stage}.attentions.{i}.transformer_blocks."
            chosen |= {n for n in names if n.startswith(prefix) and int(n.removeprefix(prefix)) >= count}
    blocks = sum("transformer_blocks" in name for name in names)
    if inventory.family != "unet" or blocks != 70 or not chosen <= names:
        raise ModelError(
            f"SSD-1B's list is for the UNet of SDXL with 70 blocks; this {type(module).__name__} has {blocks}"
        )
    return _listed(module, component, inventory, chosen, "ssd-1b")


def _listed(module: Any, component: str, inventory: Inventory, chosen: set[str], name: str) -> LayerPlan:
    removed: Sequence[str] = [unit.name for unit in inventory.units if unit.name in chosen]
    return make_plan(
        module, component, inventory, removed, criterion=name, ratio=None, budget="parameters", removal="skip",
        scores={}, settings={"granularity": inventory.granularity},
    )  # fmt: skip
