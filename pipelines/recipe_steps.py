"""The steps of `vislr recipe run`: each takes the pipeline of the step before it and leaves its own in a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vislr.core.arguments import read_section
from vislr.core.errors import ConfigError, ModelError, hint
from vislr.data.config import DataConfig
from vislr.pipelines import compose as compose_verb
from vislr.pipelines import prune as prune_verb
from vislr.pipelines import quantize as quantize_verb
from vislr.pipelines import tokens as tokens_verb
from vislr.pipelines import train_adapter as train_verb
from vislr.pipelines.generate import adapter_file, split_weight
from vislr.train.config import TrainConfig
from vislr.train.recovery import RecoverySection, recover

PIPELINE = "pipeline"


@dataclass
class RecoverStep:
    """Distillation of what the last `prune` left, from the pipeline before it."""

    data: DataConfig = field(default_factory=DataConfig)
    """Captioned pictures; left out: those of the run."""
    recovery: RecoverySection = field(default_factory=RecoverySection)
    """As `recovery` of `vislr prune`; train lora leaves an adapter on, which a later `fuse` makes part of the weights
    (then the run can be replayed bit for bit)."""
    seed: int = 0
    """Every random draw follows from this."""


@dataclass
class FuseStep:
    """Adapters become part of the weights; their files are kept in the recipe."""

    adapters: list[str] = field(default_factory=list)
    """Their names; []: all that are on."""


@dataclass
class CacheStep:
    """Features used again in later denoising steps."""

    method: Literal["interval", "measured"] = "interval"
    """interval: the deep part in every k-th step (DeepCache). measured: each block when it has changed (Block
    Caching)."""
    every: int = 3
    """interval: k."""
    boundary: str | None = None
    """interval: of a UNet the up block that cached features enter, of a transformer the block before which they end;
    null: the last, or a sixth of the blocks at both ends."""
    steps: int = 25
    """Denoising steps of a run."""
    prompts: list[str] = field(default_factory=list)
    """measured: run once each without a cache."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """measured: of these runs."""
    threshold: float = 0.15
    """measured: larger saves more and changes more."""
    guidance: float = 4.0
    """measured: classifier-free guidance scale."""


@dataclass(frozen=True)
class Place:
    """Where a step works.

    Attributes:
        base: what the run began with. before: the pipeline of the step before.
        whole: the pipeline before the last `prune`; None: there was none.
        folder: of this step; its pipeline goes to `folder`/pipeline.
        adapters: name -> file, of the `train` steps before.
        data: the run's pictures, for sections that name none.
        device: cpu, cuda, ...; None: a GPU if there is one.
    """

    base: str
    before: str
    whole: str | None
    folder: Path
    adapters: Mapping[str, Path]
    data: Mapping[str, Any]
    device: str | None


def _base(place: Place) -> dict[str, Any]:
    return {
        "model": {"base": place.before, "device": place.device},
        "output": {"folder": str(place.folder), "resume": True},
    }


def _flat(place: Place) -> dict[str, Any]:
    return {"model": place.before, "device": place.device, "out": str(place.folder)}


def _prune(config: prune_verb.PruneConfig, place: Place) -> None:
    prune_verb.carry_out(config)


def _recover(config: RecoverStep, place: Place) -> None:
    from vislr import folders, record
    from vislr.anatomy import denoiser_of
    from vislr.prune import LayerPlan
    from vislr.train import make_accelerator

    if place.whole is None:
        raise ConfigError("recover learns from the pipeline before a `prune`, and no step before it is one")
    accelerator = make_accelerator(config.recovery.precision, None)
    pipe, teacher = folders.load(place.before), denoiser_of(folders.load(place.whole))[1]
    for one in (pipe, teacher):
        one.to(place.device or accelerator.device)
    plans = [step["change"]["plan"] for step in record.recipe_of(pipe) if step["report"]["kind"] == "layers"]
    trained = recover(
        pipe, teacher, LayerPlan.from_dict(plans[-1]), config.recovery, data=config.data,
        folder=place.folder / "recovery", seed=config.seed, accelerator=accelerator, resume=True, base=place.base,
        put_on=lambda change, name: record.apply(pipe, change, name=name),
    )  # fmt: skip
    for name, (before, after) in trained["held_out"].items():
        record.note_measurement(pipe, f"held-out {name}", before, after)
    accelerator.end_training()
    folders.save(pipe, place.folder / PIPELINE)


def _fuse(config: FuseStep, place: Place) -> None:
    from vislr import folders, recipe

    pipe = folders.load(place.before)
    print(recipe.fuse(pipe, config.adapters, undo=False))
    folders.save(pipe, place.folder / PIPELINE)


def _quantize(config: quantize_verb.QuantizeConfig, place: Place) -> None:
    quantize_verb.carry_out(config)


def _tokens(config: tokens_verb.TokensConfig, place: Place) -> None:
    from vislr import folders, record

    pipe = folders.load(place.before)
    print(record.apply(pipe, tokens_verb.plan_of(config, pipe), name="tokens"))
    folders.save(pipe, place.folder / PIPELINE)


def _cache(config: CacheStep, place: Place) -> None:
    import torch

    from vislr import cache, folders, record

    pipe = folders.load(place.before)
    if config.method == "interval":
        plan = cache.interval_plan(pipe, config.every, config.boundary, steps=config.steps)
    else:
        pipe.to(place.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        plan = cache.measured_plan(
            pipe, config.prompts, config.seeds, steps=config.steps, threshold=config.threshold, guidance=config.guidance
        )
    print(record.apply(pipe, plan, name="cache"))
    folders.save(pipe, place.folder / PIPELINE)


def _train(config: TrainConfig, place: Place) -> None:
    train_verb.carry_out(config)
    shutil.copyfile(place.folder / "adapter.safetensors", place.folder / f"{config.adapter.name}.safetensors")


def _compose(config: compose_verb.ComposeConfig, place: Place) -> None:
    from vislr import folders, recipe, record
    from vislr.formats import default_name

    pipe = folders.load(place.before)
    files = [adapter_of(text, place.adapters) for text in config.adapters]
    names = [default_name(path) for path, _ in files]
    for name, (path, weight) in zip(names, files, strict=True):
        # They were made on the base, before it was made small.
        print(recipe.load_adapter(pipe, path, name=name, weight=weight, any_base=True))
    method = config.methods[0]
    plan = compose_verb.plan_of(
        config, pipe, method, names, [weight for _, weight in files], [path for path, _ in files]
    )
    print(record.apply(pipe, plan, name=method))
    folders.save(pipe, place.folder / PIPELINE)


def adapter_of(text: str, trained: Mapping[str, Path]) -> tuple[Path, float]:
    """File and weight of "NAME:WEIGHT" of a `train` step, or of "FILE:WEIGHT".

    Raises:
        AdapterError: neither.
    """
    name, weight = split_weight(text)
    return (trained[name], weight) if name in trained else adapter_file(text)


@dataclass(frozen=True)
class Verb:
    """A kind of step.

    Attributes:
        section: the verb's own config. work: does it.
        sets: what of the section the run sets. reads: whether it reads the run's pictures if it names none.
        pipeline: whether it leaves a pipeline; else an adapter's file.
    """

    section: type
    work: Callable[[Any, Place], None]
    sets: Callable[[Place], dict[str, Any]] = lambda place: {}
    reads: bool = False
    pipeline: bool = True


VERBS = {
    "prune": Verb(prune_verb.PruneConfig, _prune, _base, reads=True),
    "recover": Verb(RecoverStep, _recover, reads=True),
    "fuse": Verb(FuseStep, _fuse),
    "quantize": Verb(quantize_verb.QuantizeConfig, _quantize, _base),
    "tokens": Verb(tokens_verb.TokensConfig, _tokens, _flat),
    "cache": Verb(CacheStep, _cache),
    "train": Verb(
        TrainConfig, _train,
        lambda place: {"model": {"base": place.base}, "output": {"folder": str(place.folder), "resume": True}},
        reads=True, pipeline=False,
    ),
    "compose": Verb(compose_verb.ComposeConfig, _compose, _flat),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One entry of a run's `steps`.

    Attributes:
        number: from 1. verb: a key of `VERBS`. values: its section, as written.
    """

    number: int
    verb: str
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.number:02d}-{self.verb}"

    def config(self, place: Place) -> Any:
        """The section as the verb's config, with what the run sets.

        Raises:
            ConfigError: an unknown key, a wrong value, or what the run sets itself.
        """
        verb, where = VERBS[self.verb], f"step {self.number} ({self.verb})"
        values = _filled(dict(self.values), verb.sets(place), where)
        data = dict(values.get("data") or {})
        if verb.reads and not data.get("folder") and not data.get("folders"):
            values["data"] = {**place.data, **data}
        config: Any = read_section(verb.section, values, where=where)
        if self.verb == "compose" and len(config.methods) != 1:
            raise ConfigError(f"{where}: {len(config.methods)} methods; expected one")
        if self.verb == "cache" and config.method == "measured" and not config.prompts:
            raise ConfigError(f"{where}: measured needs prompts")
        return config


def _filled(values: dict[str, Any], own: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key, value in own.items():
        if isinstance(value, dict):
            given = values.get(key, {})
            if not isinstance(given, dict):
                raise ConfigError(f"{where}: {key} is {given!r}; expected a table")
            values[key] = _filled(dict(given), value, f"{where}: {key}")
        elif key in values:
            raise ConfigError(f"{where}: '{key}' is set by the run; leave it out")
        else:
            values[key] = value
    return values


def read_steps(entries: list[dict[str, Any]]) -> list[Step]:
    """The steps of a run's config.

    Raises:
        ConfigError: none, or an entry that is not one verb with its section; names the nearest.
    """
    steps = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ConfigError(
                f"step {number} is {str(entry)[:60]!r}; expected one verb and its section, as in 'fuse: {{}}'"
            )
        ((verb, values),) = entry.items()
        if verb not in VERBS:
            raise ConfigError(f"step {number}: no verb '{verb}'{hint(str(verb), VERBS)}")
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"step {number} ({verb}) is {values!r}; expected a table")
        steps.append(Step(number, verb, values or {}))
    if not steps:
        raise ConfigError("steps is empty; expected a list of verbs with their sections")
    return steps


def cost_of(step: Step, config: Any, place: Place, model: Any, flops: int) -> tuple[str, float]:
    """What a step does and what it takes, in words, and its FLOPs.

    Args:
        model: the base's denoiser without weights; token and cache plans are put on it.
        flops: of one of its forwards, one sample.
    """
    if step.verb == "prune":
        from vislr.prune import scoring_cost, units_of

        wanted = config.plan
        inventory = units_of(model, prune_verb.granularity_of(config), removal=wanted.removal)
        text = f"{wanted.criterion}, {wanted.ratio:.0%} of the {wanted.budget}, {len(inventory.units)} units"
        total = 0.0
        if wanted.file is None and wanted.criterion == "laptop":
            total = float(scoring_cost(inventory, wanted.samples, wanted.batch).flops)
        if wanted.file is None and wanted.criterion == "hierarchical":
            pictures = wanted.prompts * len(wanted.seeds) * (len(inventory.units) + 1)
            total = 2.0 * pictures * wanted.steps * flops
        trained = config.recovery if config.recovery.train != "none" else None
        return text, total + (0 if trained is None else _training(trained.steps, trained.optim, flops, teacher=1))
    if step.verb == "recover":
        wanted = config.recovery
        text = f"{wanted.train}, {wanted.steps} updates of {wanted.optim.batch * wanted.optim.accumulation} pictures"
        return text, _training(wanted.steps, wanted.optim, flops, teacher=1)
    if step.verb == "train":
        pictures = config.optim.batch * config.optim.accumulation
        text = (
            f"{config.adapter.kind} '{config.adapter.name}' on the base, {config.steps} updates of {pictures} pictures"
        )
        return text, _training(config.steps, config.optim, flops, teacher=0)
    if step.verb == "quantize":
        size = quantize_verb.dry_run(_on(config, place.base)).splitlines()[-1]
        runs, tune = config.calibration, config.tune
        total = 0.0 if config.plan.method == "weights" else 2.0 * runs.trajectories * runs.steps * flops
        if config.plan.method == "efficientdm":
            total += 2.0 * tune.trajectories * tune.steps * 4 * flops
        return f"{config.plan.method}, W{config.plan.weights}; of the base: {size}", total
    return _run_time(step.verb, config, model), 0.0


def _on(config: Any, base: str) -> Any:
    import dataclasses

    return dataclasses.replace(config, model=dataclasses.replace(config.model, base=base))


def _training(updates: int, optim: Any, flops: int, teacher: int) -> float:
    """A backward takes twice a forward."""
    return float(updates) * optim.batch * optim.accumulation * (3 + teacher) * flops


def _run_time(verb: str, config: Any, model: Any) -> str:
    from vislr import cache, record

    if verb == "fuse":
        return "adapters into the weights" + (f": {', '.join(config.adapters)}" if config.adapters else "")
    if verb == "compose":
        return f"{', '.join(config.adapters)} by {config.methods[0]}"
    if verb == "cache" and config.method == "measured":
        return f"measured on {len(config.prompts) * len(config.seeds)} runs of {config.steps} steps"
    plan: Any = (
        tokens_verb.plan_of(config, model) if verb == "tokens"
        else cache.interval_plan(model, config.every, config.boundary, steps=config.steps)
    )  # fmt: skip
    # It stays on: tokens and caches are planned for what is there.
    report = record.apply(model, plan, name=verb)
    if report.flops is None:
        raise ModelError(f"the FLOPs of this {type(model).__name__} cannot be counted")
    return f"saves {1 - report.flops[1] / report.flops[0]:.1%} of the FLOPs before it, on the base"
