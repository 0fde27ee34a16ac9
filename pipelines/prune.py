"""`vislr prune`: choose units of a pipeline, remove them, let it recover by distillation, save it.

vislr prune --config prune/emoji-unet-laptop.yaml --data.folder pictures --output.folder result
accelerate launch pipelines/prune.py --config configs/prune/emoji-unet-laptop.yaml ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vislr.core.arguments import dump_config, parse_config, plain_data
from vislr.core.cli_guard import run
from vislr.core.errors import ConfigError, ModelError, OutputError
from vislr.core.files import check_output, read_json, write_json
from vislr.data.config import DataConfig
from vislr.train.recovery import RecoverySection, recover

if TYPE_CHECKING:
    from vislr.core.report import Report
    from vislr.prune import Inventory, LayerPlan, ScoringCost

Criterion = Literal[
    "laptop", "hierarchical", "magnitude", "random", "uniform", "bk-sdm", "ssd",
    "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "ssd-1b",
]  # fmt: skip


@dataclass
class BaseSection:
    """The pipeline."""

    base: str = "emoji-unet"
    """Name of an embedded pipeline, a diffusers folder or a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the pipeline."""
    device: str | None = None
    """cpu, cuda, cuda:1; null: a GPU if there is one."""


@dataclass
class PlanSection:
    """Which units go."""

    criterion: Criterion = "laptop"
    """laptop: change of the output, solved exactly. hierarchical: drop of the pictures' quality, by position.
    magnitude, random, uniform, bk-sdm, ssd: baselines. bk-sdm-base, -small, -tiny, ssd-1b: published lists."""
    file: str | None = None
    """A plan.json to apply in place of choosing."""
    ratio: float = 0.25
    """Share of the budget to remove, at least."""
    budget: Literal["parameters", "flops", "latency"] = "parameters"
    """What the ratio is of; latency is measured on this machine first."""
    granularity: Literal["transformer", "block", "sub", "part"] = "block"
    """Size of the units: whole transformers of a UNet, their blocks, attentions and feed-forwards of blocks, or
    these and the adaptive norms of SD3 and FLUX. hierarchical chooses by itself."""
    removal: Literal["skip", "identity"] = "skip"
    """skip: a removed branch gives 0. identity: attention and feed-forward become the identity."""
    solver: Literal["knapsack", "greedy", "ranked"] | None = None
    """null: the criterion's own."""
    samples: int = 256
    """laptop: noisy pictures of data.folder that the output is compared on."""
    batch: int = 16
    """Samples in one forward."""
    additivity: int = 0
    """laptop: random subsets for the report on additivity; 0: none."""
    prompts: int = 64
    """hierarchical: captions of data.folder that pictures are made of."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """hierarchical: each prompt is drawn with each seed."""
    steps: int = 10
    """hierarchical: denoising steps."""
    guidance: float = 4.0
    """hierarchical: classifier-free guidance scale."""
    kappa: float = 1.0
    """hierarchical: strength of the position; 0: none."""
    cut: Literal["moderate", "hybrid"] = "moderate"
    """hierarchical: whole blocks, or blocks up to block_ratio and parts of others after."""
    block_ratio: float = 0.2
    """hierarchical, hybrid: share that goes as whole blocks."""
    eligible: str | None = None
    """hierarchical: blocks that may go, like 13-37; null: all."""

    def __post_init__(self) -> None:
        for name in ("ratio", "block_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"plan.{name} is {getattr(self, name)}; expected a share from 0 to 1")
        for name in ("samples", "batch", "prompts", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"plan.{name} is {getattr(self, name)}; expected 1 or more")
        if self.additivity and (self.criterion != "laptop" or self.additivity < 3):
            raise ConfigError(f"plan.additivity is {self.additivity}; expected 0, or 3 or more with criterion laptop")
        if not self.seeds:
            raise ConfigError("plan.seeds is empty; give at least one")


@dataclass
class PruneOutput:
    """Where the result goes."""

    folder: str = ""
    """The result's folder. Must be given."""
    resume: bool = False
    """Go on with what is in the folder: kept scores, the plan, the newest checkpoint of recovery."""
    overwrite: bool = False
    """Replace the result that is in the folder."""


@dataclass
class PruneConfig:
    """A pruning run."""

    model: BaseSection = field(default_factory=BaseSection)
    """The pipeline."""
    data: DataConfig = field(default_factory=DataConfig)
    """Captioned pictures: for scores and for recovery."""
    plan: PlanSection = field(default_factory=PlanSection)
    """Which units go."""
    recovery: RecoverySection = field(default_factory=RecoverySection)
    """What happens then."""
    output: PruneOutput = field(default_factory=PruneOutput)
    """Where the result goes."""
    seed: int = 0
    """Every random draw follows from this."""
    processes: int | None = None
    """Number of processes that must take part; another number is an error. null: as many as are started."""
    dry_run: bool = False
    """Say what can be removed and what scoring costs; write nothing."""

    def __post_init__(self) -> None:
        if not self.output.folder:
            raise ConfigError("output.folder is not given; expected a folder for the result")
        if self.output.resume and self.output.overwrite:
            raise ConfigError("output.resume and output.overwrite exclude each other")
        reads = self.plan.file is None and self.plan.criterion in ("laptop", "hierarchical")
        if (reads or self.recovery.train != "none") and not self.data.parts():
            raise ConfigError("data.folder is not given; expected captioned pictures for scores and recovery")


_OURS = ("plan.json", "plan.png", "additivity.json", "additivity.png", "scores", "recovery", "pipeline", "config.yaml",
         "report.json")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr prune` with these arguments; returns the exit code."""
    config = parse_config(
        PruneConfig, argv, prog="vislr prune", description="Remove layers of a pipeline and let it recover."
    )
    return carry_out(config)


def carry_out(config: PruneConfig) -> int:
    """Do what the config says; returns the exit code."""
    folder = Path(config.output.folder)
    _check_folder(config, folder)

    import torch

    from vislr import folders
    from vislr.prune import units_of
    from vislr.train import make_accelerator

    accelerator = make_accelerator(config.recovery.precision, config.processes)
    pipe = folders.load(config.model.base, dtype=getattr(torch, config.model.dtype))
    if not hasattr(pipe, "components"):
        raise ModelError(f"'{config.model.base}' is one model; expected a whole pipeline")
    pipe.to(config.model.device or accelerator.device)
    inventory = units_of(pipe, granularity_of(config), removal=config.plan.removal)
    accelerator.print(_overview(config, pipe, inventory))
    _check_ratio(config, inventory)
    if config.dry_run:
        return 0
    check_output(folder, needed=8 * inventory.parameters)
    if accelerator.is_main_process:
        dump_config(config, folder / "config.yaml")
    accelerator.wait_for_everyone()
    plan = _plan(config, pipe, inventory, folder, accelerator)
    applied, trained = _prune_and_recover(config, pipe, plan, folder, accelerator)
    if accelerator.is_main_process:
        folders.save(pipe, folder / "pipeline")
        report = {"plan": str(plan), "report": applied.to_dict(), "recovery": trained, "config": plain_data(config)}
        write_json(folder / "report.json", report)
        print(_summary(folder, applied, trained))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def _check_folder(config: PruneConfig, folder: Path) -> None:
    import shutil

    held = [name for name in _OURS if (folder / name).exists()]
    if held and not (config.output.resume or config.output.overwrite) and not config.dry_run:
        raise OutputError(f"'{folder}' holds a pruning run ({held[0]}); expected output.resume or output.overwrite")
    if held and config.output.overwrite and not config.dry_run:
        for name in held:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_ratio(config: PruneConfig, inventory: Inventory) -> None:
    """Refuse a ratio that nothing can reach before a file is written; latencies are not known yet, lists have none."""
    from vislr.prune import solve

    listed = config.plan.criterion == "ssd-1b" or config.plan.criterion.startswith("bk-sdm-")
    if config.plan.file is None and config.plan.budget != "latency" and not listed:
        needed = solve.needed_for(inventory, config.plan.ratio, config.plan.budget)
        solve.check_reachable(inventory, needed, config.plan.budget)


def granularity_of(config: PruneConfig) -> str:
    """Size of the units that the config chooses from."""
    if config.plan.criterion == "hierarchical":
        return "part" if config.plan.cut == "hybrid" else "block"
    return config.plan.granularity


def _overview(config: PruneConfig, pipe: Any, inventory: Inventory) -> str:
    from vislr.prune import scoring_cost

    lines = [
        f"base     {config.model.base}: {inventory.parameters:,} parameters, {inventory.flops / 1e9:.3f} GFLOP at "
        f"{inventory.sample}",
        f"units    {len(inventory.units)} at granularity '{inventory.granularity}': "
        f"{inventory.most() / inventory.parameters:.1%} of the parameters, "
        f"{inventory.most('flops') / inventory.flops:.1%} of the FLOPs",
    ]
    if config.plan.file is None and config.plan.criterion == "laptop":
        lines.append(f"scoring  {scoring_cost(inventory, config.plan.samples, config.plan.batch)}")
    if config.plan.file is None and config.plan.criterion == "hierarchical":
        lines += [f"scoring  {part}: {cost}" for part, cost in _contribution_costs(config, pipe, inventory)]
    return "\n".join(lines)


def _contribution_costs(config: PruneConfig, pipe: Any, inventory: Inventory) -> list[tuple[str, ScoringCost]]:
    """Of the pictures for blocks, and in a hybrid cut at most for parts; with as many captions as are asked for."""
    from vislr.prune import Contribution, block_range, units_of
    from vislr.prune.hierarchical import ATTENTIONS

    wanted = config.plan
    options: dict[str, Any] = {"seeds": wanted.seeds, "steps": wanted.steps, "guidance": wanted.guidance,
                               "batch": wanted.batch}  # fmt: skip

    def cost(units: Inventory, **more: Any) -> ScoringCost:
        return Contribution([""] * wanted.prompts, lambda images, prompts: 0.0, **options, **more).cost(pipe, units)

    blocks = inventory if wanted.cut == "moderate" else units_of(pipe, "block", removal=wanted.removal)
    eligible = None if wanted.eligible is None else block_range(wanted.eligible)
    found = [("blocks", cost(blocks, eligible=eligible))]
    if wanted.cut == "hybrid" and wanted.ratio > wanted.block_ratio:
        found.append(("parts", cost(inventory, exclude=ATTENTIONS)))
    return found


def _plan(config: PruneConfig, pipe: Any, inventory: Inventory, folder: Path, accelerator: Any) -> LayerPlan:
    """The plan: out of a file, kept from a run that stopped, or made now; written with its picture."""
    from vislr.prune import LayerPlan, draw_plan

    given = config.plan.file or (folder / "plan.json" if config.output.resume else None)
    if given is not None and (config.plan.file is not None or Path(given).is_file()):
        try:
            plan = LayerPlan.from_dict(read_json(given))
        except (OSError, ValueError) as error:
            raise ConfigError(f"plan.file '{given}' cannot be read: {error}") from error
    else:
        plan, inventory = _make_plan(config, pipe, inventory, folder, accelerator)
        if accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            # Latencies differ from process to process; what is removed must not.
            plan = LayerPlan.from_dict(broadcast_object_list([plan.to_dict()])[0])
    if accelerator.is_main_process:
        write_json(folder / "plan.json", plan.to_dict())
        draw_plan(plan, inventory, folder / "plan.png")
    accelerator.wait_for_everyone()
    return plan


def _make_plan(
    config: PruneConfig, pipe: Any, inventory: Inventory, folder: Path, accelerator: Any
) -> tuple[LayerPlan, Inventory]:
    from vislr import prune
    from vislr.prune.baselines import BK_SDM

    wanted, quiet = config.plan, not accelerator.is_main_process
    criterion: Any = None
    if wanted.criterion.removeprefix("bk-sdm-") in BK_SDM:
        return prune.bk_sdm_plan(pipe, wanted.criterion.removeprefix("bk-sdm-")), prune.units_of(pipe, "transformer")
    if wanted.criterion == "ssd-1b":
        return prune.ssd_1b_plan(pipe), inventory
    if wanted.criterion == "hierarchical":
        return _hierarchical(config, pipe, folder, quiet), inventory
    if wanted.criterion == "laptop" or wanted.budget == "latency":
        data = _calibration(config, pipe)
        if wanted.budget == "latency":
            inventory = prune.with_latency(pipe, inventory, data[0], removal=wanted.removal)
    if wanted.criterion == "laptop":
        criterion = prune.OutputLoss(data, removal=wanted.removal, folder=folder / "scores", progress=not quiet)
    else:
        table = {"magnitude": prune.Magnitude, "uniform": prune.UniformDepth, "bk-sdm": prune.BkSdmOrder,
                 "ssd": prune.SsdOrder}  # fmt: skip
        criterion = prune.Random(config.seed) if wanted.criterion == "random" else table[wanted.criterion]()
    plan = prune.plan_layers(
        pipe, criterion, wanted.ratio, budget=wanted.budget, removal=wanted.removal, solver=wanted.solver,
        inventory=inventory,
    )  # fmt: skip
    if wanted.additivity:
        found = prune.additivity(
            pipe, data, plan.scores, inventory, subsets=wanted.additivity, seed=config.seed, removal=wanted.removal,
            folder=folder / "scores", progress=not quiet,
        )  # fmt: skip
        if accelerator.is_main_process:
            write_json(folder / "additivity.json", found.to_dict())
            prune.draw_additivity(found, folder / "additivity.png")
    return plan, inventory


def _calibration(config: PruneConfig, pipe: Any) -> list[dict[str, Any]]:
    from vislr.data import open_pool
    from vislr.train.calibration import calibration_inputs

    return calibration_inputs(
        pipe, open_pool(config.data), samples=config.plan.samples, batch=config.plan.batch, seed=config.seed,
        size=config.data.size,
    )  # fmt: skip


def _hierarchical(config: PruneConfig, pipe: Any, folder: Path, quiet: bool) -> LayerPlan:
    """Quality: does a picture look like the pictures of its caption in data.folder?"""
    from vislr import measure
    from vislr.anatomy.text import sequence_length
    from vislr.data import open_pool
    from vislr.prune import PrototypeQuality, block_range, hierarchical_plan
    from vislr.train.diffusion import size_step, vae_factor
    from vislr.train.tasks import spread, to_image

    wanted = config.plan
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    size = config.data.size or int(getattr(pipe, "default_sample_size", None) or denoiser.config.sample_size)
    size = size if config.data.size else size * vae_factor(pipe)
    source = open_pool(config.data).at(size, size_step(pipe), seed=config.seed)
    every = [source.item(index) for index in range(source.count)]
    captions = list(dict.fromkeys(every[index].caption for index in spread(source, wanted.prompts)))
    shown = [item for item in every if item.caption in set(captions)]
    pictures = [to_image(source.read(item).pixels) for item in shown]
    gallery = measure.prototypes(pictures, [item.caption for item in shown])
    quality = PrototypeQuality({caption: caption for caption in captions}, gallery)
    options: dict[str, Any] = {"height": size, "width": size}
    if hasattr(pipe, "transformer"):
        options["max_sequence_length"] = sequence_length(pipe)
    eligible = None if wanted.eligible is None else block_range(wanted.eligible)
    return hierarchical_plan(
        pipe, captions, wanted.ratio, quality, cut=wanted.cut, block_ratio=wanted.block_ratio, budget=wanted.budget,
        folder=folder / "scores", seeds=wanted.seeds, steps=wanted.steps, guidance=wanted.guidance, kappa=wanted.kappa,
        eligible=eligible, options=options, removal=wanted.removal, progress=not quiet, batch=wanted.batch,
    )  # fmt: skip


def _prune_and_recover(
    config: PruneConfig, pipe: Any, plan: LayerPlan, folder: Path, accelerator: Any
) -> tuple[Report, dict[str, Any]]:
    import copy

    from vislr import record

    whole = record.component_of(pipe, plan)[1]
    wanted = config.recovery
    # The teacher is the model before the cut; without recovery nothing of it is kept.
    teacher = copy.deepcopy(whole) if wanted.train != "none" else None
    applied = record.apply(pipe, plan, name="pruned", undo=False)
    accelerator.print(str(applied))
    if teacher is None:
        return applied, {}
    trained = recover(
        pipe, teacher, plan, wanted, data=config.data, folder=folder / "recovery", seed=config.seed,
        accelerator=accelerator, resume=config.output.resume, base=config.model.base,
        put_on=lambda change, name: record.apply(pipe, change, name=name),
    )  # fmt: skip
    for name, (before, after) in trained["held_out"].items():
        record.note_measurement(pipe, f"held-out {name}", before, after)
    return applied, trained


def _summary(folder: Path, applied: Report, trained: dict[str, Any]) -> str:
    before, after = applied.parameters
    lines = [f"{before:,} -> {after:,} parameters ({1 - after / before:.1%} removed)"]
    for name, (start, end) in trained.get("held_out", {}).items():
        lines.append(f"held-out {name}: {start:.4f} pruned, {end:.4f} recovered")
    lines += [f"pipeline: {folder / 'pipeline'}", f"picture of the plan: {folder / 'plan.png'}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
