"""`vislr quantize`: a pipeline whose denoiser is kept and runs in few bits, as a folder.

vislr quantize --config quantize/emoji-unet-efficientdm.yaml --output.folder result
vislr quantize --plan.method weights --plan.weights 4 --model.base emoji-unet --output.folder result
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vislr.core.arguments import dump_config, parse_config
from vislr.core.cli_guard import run
from vislr.core.errors import ConfigError, ModelError, OutputError
from vislr.core.files import atomic_path, check_output, read_json, write_json, write_text
from vislr.train.efficientdm import TuneConfig

if TYPE_CHECKING:
    from vislr.quantize import QuantPlan, Trajectories

Observer = Literal["minmax", "mse", "percentile"]


@dataclass
class BaseSection:
    """The pipeline."""

    base: str = "emoji-unet"
    """Name of an embedded pipeline, a diffusers folder or a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of what is not quantised."""
    device: str | None = None
    """cpu, cuda, cuda:1; null: a GPU if there is one."""


@dataclass
class QuantSection:
    """Which layers, how many bits."""

    method: Literal["efficientdm", "ptq", "weights"] = "efficientdm"
    """efficientdm: weights and inputs, fine-tuned without data. ptq: weights and inputs, not trained. weights: weights
    alone, no calibration."""
    file: str | None = None
    """A plan.json to apply in place of making one."""
    weights: int = 4
    """Bits of weights, 2 to 8. First and last layers have 8, shortcuts and downsampling convs stay as they are."""
    activations: int = 8
    """Bits of inputs, 2 to 8; not of method weights."""
    inputs: Literal["timestep", "static", "dynamic"] = "timestep"
    """Step sizes of inputs: one for each timestep, one a layer, or from every input itself (needs no calibration)."""
    group: int | None = 64
    """weights: entries of a row that share a scale; null: the whole row."""
    format: Literal["uniform", "nf4"] = "uniform"
    """weights: evenly spaced codes, or the 16 quantiles of QLoRA (4 bits)."""
    observer: Observer = "mse"
    """How scales of weights are chosen: minmax, mse (search) or percentile."""
    input_observer: Observer = "mse"
    """The same for inputs."""
    bits: dict[str, list[int] | None] = field(default_factory=dict)
    """Patterns of layer names -> bits of weight and input, or null: stays as it is. Later patterns win."""
    budget_mb: float | None = None
    """Mixed precision: megabytes for all codes and scales; bits are chosen by sensitivity. null: the same bits."""
    choices: list[int] = field(default_factory=lambda: [2, 4, 8])
    """Mixed precision: bits of weights to choose from."""


@dataclass
class CalibrationSection:
    """The pipeline's own trajectories; no pictures are read."""

    prompts: list[str] = field(default_factory=list)
    """Taken in turn; []: captions of the embedded pictures for an embedded pipeline, else the empty prompt."""
    trajectories: int = 16
    """Runs from noise to picture."""
    batch: int = 4
    """Trajectories at once."""
    steps: int = 20
    """Denoising steps; efficientdm: tune.steps in its place, so that every trained step size starts calibrated."""
    guidance: float = 4.0
    """Classifier-free guidance scale."""
    seed: int = 0
    """Of noise."""


@dataclass
class QuantOutput:
    """Where the result goes."""

    folder: str = ""
    """The result's folder. Must be given."""
    resume: bool = False
    """Go on with what is in the folder: calibration, plan, sensitivity, the newest checkpoint of fine-tuning."""
    overwrite: bool = False
    """Replace the result that is in the folder."""


@dataclass
class QuantizeConfig:
    """A quantising run."""

    model: BaseSection = field(default_factory=BaseSection)
    """The pipeline."""
    plan: QuantSection = field(default_factory=QuantSection)
    """Which layers, how many bits."""
    calibration: CalibrationSection = field(default_factory=CalibrationSection)
    """Where ranges of inputs come from."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """efficientdm: the fine-tuning."""
    ways: bool = True
    """Measure which way of computing is fastest for each layer on this device, and say where none helps."""
    pictures: list[str] = field(default_factory=list)
    """Prompts to draw before and after; []: none."""
    picture_seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of the pictures."""
    keep_adapter: bool = False
    """Also write the fine-tune as an adapter for the quantised base (qalora.safetensors)."""
    output: QuantOutput = field(default_factory=QuantOutput)
    """Where the result goes."""
    dry_run: bool = False
    """Say what would be quantised, and how large it would be; nothing is run or written."""

    def __post_init__(self) -> None:
        if not self.output.folder and not self.dry_run:
            raise ConfigError("output.folder is not given")
        if self.plan.method == "weights" and (self.plan.format == "nf4") and self.plan.weights != 4:
            raise ConfigError(f"plan.format nf4 has 4 bits, plan.weights is {self.plan.weights}")
        if self.pictures and not self.picture_seeds:
            raise ConfigError("pictures without picture_seeds; give at least one seed")
        for name, pair in self.plan.bits.items():
            if pair is not None and len(pair) != 2:
                raise ConfigError(f"plan.bits '{name}' is {pair}; expected bits of weight and input, or null")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr quantize` with these arguments; returns the exit code."""
    config = parse_config(
        QuantizeConfig,
        argv,
        prog="vislr quantize",
        description="Keep a pipeline's denoiser in few bits, and fine-tune it without data.",
    )
    return carry_out(config)


def carry_out(config: QuantizeConfig) -> int:
    """Do what the config says; returns the exit code."""
    if config.dry_run:
        print(dry_run(config))
        return 0
    folder = _folder(config)
    dump_config(config, folder / "config.yaml")
    import copy

    from vislr import folders, record
    from vislr.anatomy import denoiser_of
    from vislr.quantize.handler import weight_error

    pipe = _pipeline(config)
    component, teacher = denoiser_of(pipe)
    runs = _runs(config, pipe)
    plan = _plan(config, pipe, runs, folder)
    write_json(folder / "plan.json", plan.to_dict())
    print(plan)
    student = copy.deepcopy(teacher).requires_grad_(False)
    report = record.apply(student, plan, name="quantized", undo=False)
    lines = [str(report)]
    print(report)
    layers = _layers(student)
    originals: dict[str, Any] = {name: teacher.get_submodule(name) for name in layers}
    errors = {name: weight_error(originals[name].weight, layer) for name, layer in layers.items()}
    inputs = _inputs(pipe, runs)
    figures: dict[str, Any] = {"plan": str(plan), "notes": list(report.notes), "weight errors": errors}
    figures["distance of the plan"] = _distance(student, teacher, inputs).to_dict()
    lines.append(f"distance from the teacher, not trained: {figures['distance of the plan']['value']:.4f}")
    if config.plan.method == "efficientdm":
        lines += _tune(config, pipe, student, runs, inputs, folder, figures)
    pipe.register_modules(**{component: student})
    figures["seconds a call"] = _times(teacher, student, inputs[0])
    lines.append(
        "a call of the denoiser: {before:.4f} s before, {after:.4f} s after".format(**figures["seconds a call"])
    )
    if config.ways:
        from vislr.quantize import choose_ways

        ways = choose_ways(student, inputs[0], cache=folder / "ways.json")
        lines += list(ways.notes())
        write_text(folder / "ways.txt", ways.table() + "\n")
        figures["slower layers"] = list(ways.slower)
        after = _times(teacher, student, inputs[0])
        figures["seconds a call, fastest ways"] = after
        lines.append(f"with the fastest ways: {after['before']:.4f} s before, {after['after']:.4f} s after")
    if config.pictures:
        _pictures(config, pipe, teacher, student, component, folder)
    _draw(layers, errors, folder)
    folders.save(pipe, folder / "pipeline")
    write_json(folder / "report.json", figures)
    write_text(folder / "report.txt", "\n".join(lines) + "\n")
    print("\n".join(lines[1:]))
    print(f"pipeline: {folder / 'pipeline'}")
    return 0


def _folder(config: QuantizeConfig) -> Path:
    folder = check_output(config.output.folder)
    there = [
        name for name in ("plan.json", "pipeline", "calibration.safetensors", "checkpoints") if (folder / name).exists()
    ]
    if there and not (config.output.resume or config.output.overwrite):
        raise OutputError(f"'{folder}' holds '{there[0]}' of a run; expected output.resume or output.overwrite")
    if config.output.overwrite and not config.output.resume:
        import shutil

        for name in (*there, "tuning"):
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()
    return folder


def _pipeline(config: QuantizeConfig) -> Any:
    import torch

    from vislr import folders

    pipe = folders.load(config.model.base, dtype=getattr(torch, config.model.dtype))
    if not hasattr(pipe, "components"):
        raise ModelError(f"'{config.model.base}' is one model; expected a pipeline, whose own trajectories are needed")
    device = config.model.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from error
    return pipe


def _runs(config: QuantizeConfig, pipe: Any) -> Trajectories:
    from vislr import zoo
    from vislr.anatomy.text import sequence_length
    from vislr.quantize import Trajectories
    from vislr.train.families import family_of

    prompts: list[Any] = list(config.calibration.prompts)
    if not prompts and config.model.base in zoo.pipeline_names():
        captions = sorted({picture.caption for picture in zoo.images(split="train")})
        prompts = captions[:: max(1, len(captions) // 64)]
    family = family_of(pipe)
    if family.labelled and prompts:
        prompts = family.encode(prompts)["label"].tolist()
    options: dict[str, Any] = {}
    if hasattr(pipe, "transformer") and not family.labelled:
        options["max_sequence_length"] = sequence_length(pipe)
    wanted = config.calibration
    steps = config.tune.steps if config.plan.method == "efficientdm" else wanted.steps
    return Trajectories(
        tuple(prompts) or ("",), wanted.trajectories, wanted.batch, steps, wanted.guidance, wanted.seed, options
    )


def _plan(config: QuantizeConfig, pipe: Any, runs: Trajectories, folder: Path) -> QuantPlan:
    from vislr import quantize

    wanted, kept = config.plan, folder / "plan.json"
    if wanted.file is not None or (config.output.resume and kept.is_file()):
        file = wanted.file or kept
        try:
            return quantize.QuantPlan.from_dict(read_json(file))
        except (OSError, ValueError) as error:
            raise ConfigError(f"plan.file '{file}' cannot be read: {error}") from error
    bits = {name: None if pair is None else (pair[0], pair[1]) for name, pair in wanted.bits.items()}
    if wanted.method == "weights":
        plan = quantize.weight_only_plan(
            pipe, wanted.weights, group=wanted.group, format=wanted.format, observer=wanted.observer, layers=bits
        )
    else:
        make = quantize.efficientdm_plan if wanted.method == "efficientdm" else quantize.ptq_plan
        options: dict[str, Any] = {} if wanted.method == "efficientdm" else {"inputs": wanted.inputs}
        plan = make(
            pipe, wanted.weights, wanted.activations, source=runs, observer=wanted.observer,
            input_observer=wanted.input_observer, bits=bits, folder=folder, progress=True, **options,
        )  # fmt: skip
    if wanted.budget_mb is None:
        return plan
    inputs = 16 if wanted.method == "weights" else wanted.activations
    from vislr.anatomy import denoiser_of

    found = quantize.sensitivity(
        denoiser_of(pipe)[1], plan, [(one, inputs) for one in wanted.choices], _inputs(pipe, runs), folder=folder,
        progress=True,
    )  # fmt: skip
    return quantize.mixed_plan(plan, found, size=round(wanted.budget_mb * 1e6))


def _inputs(pipe: Any, runs: Trajectories) -> list[dict[str, Any]]:
    """What the denoiser is asked along two trajectories that calibration did not see, eight calls of each."""
    from vislr.quantize import trajectory_inputs

    other = replace(runs, count=2, batch=2, steps=min(runs.steps, 16), seed=runs.seed + 1)
    return trajectory_inputs(pipe, other, every=2)


def _distance(student: Any, teacher: Any, inputs: list[dict[str, Any]]) -> Any:
    from vislr.measure import teacher_distance

    return teacher_distance(student, teacher, inputs)


def _layers(student: Any) -> dict[str, Any]:
    from vislr.quantize import quant_layers

    return quant_layers(student)


def _tune(
    config: QuantizeConfig, pipe: Any, student: Any, runs: Trajectories, inputs: list[dict[str, Any]], folder: Path,
    figures: dict[str, Any],
) -> list[str]:  # fmt: skip
    from vislr import recipe
    from vislr.anatomy import denoiser_of
    from vislr.train.efficientdm import attach_qalora, merge_qalora, tune

    attach_qalora(student, config.tune.rank, seed=config.tune.seed)
    result = tune(pipe, student, runs, config.tune, folder=folder / "tuning", resume=config.output.resume)
    if config.keep_adapter:
        recipe.save_adapter(student, folder / "qalora.safetensors", name="qalora")
    merge_qalora(student)
    distance = _distance(student, denoiser_of(pipe)[1], inputs)
    figures["distance after fine-tuning"] = distance.to_dict()
    figures["fine-tuning"] = {
        "updates": result.updates, "seconds": result.seconds, "trained": result.trained, "errors": list(result.losses),
    }  # fmt: skip
    return [
        f"fine-tuned: {result.updates} updates in {result.seconds:.0f} s; distance from teacher {distance.value:.4f}"
    ]


def _times(teacher: Any, student: Any, kwargs: dict[str, Any]) -> dict[str, float]:
    import torch

    from vislr.measure import interleaved

    def call(model: Any) -> Any:
        def once() -> None:
            with torch.no_grad():
                model(**kwargs)

        return once

    found = interleaved(
        {"before": call(teacher), "after": call(student)}, rounds=6, warmup=1, device=teacher.device.type
    )
    return {name: float(one.value) for name, one in found.items()}


def _pictures(config: QuantizeConfig, pipe: Any, teacher: Any, student: Any, component: str, folder: Path) -> None:
    from vislr.data import make_grid
    from vislr.train import sample_images
    from vislr.train.prompts import check_prompts

    check_prompts(pipe, [("pictures", prompt) for prompt in config.pictures])
    pairs = [(prompt, seed) for seed in config.picture_seeds for prompt in config.pictures]
    rows = []
    for model in (teacher, student):
        pipe.register_modules(**{component: model})
        rows.append(
            sample_images(
                pipe, [prompt for prompt, _ in pairs], [seed for _, seed in pairs], steps=20,
                guidance=config.calibration.guidance,
            )
        )  # fmt: skip
    labels = [prompt if len(config.picture_seeds) == 1 else f"{prompt}, seed {seed}" for prompt, seed in pairs]
    grid = make_grid(rows, row_labels=["before", "after"], column_labels=labels)
    with atomic_path(folder / "before_after.png") as temporary:
        grid.save(temporary, format="png")


def _draw(layers: dict[str, Any], errors: dict[str, float], folder: Path) -> None:
    from vislr.quantize.picture import draw_layers

    draw_layers(layers, errors, folder / "layers.png")


def dry_run(config: QuantizeConfig) -> str:
    """Layers and size by structure alone; ranges and sensitivity need the weights."""
    from vislr import anatomy, zoo
    from vislr.quantize import QuantPlan, weight_only_plan
    from vislr.quantize.handler import rebuild, stored_bytes
    from vislr.quantize.planning import assigned

    embedded = {name: zoo.pipeline_folder(name) for name in zoo.pipeline_names()}
    model = anatomy.skeleton(config.model.base, embedded)
    before, wanted = stored_bytes(model), config.plan
    bits = {name: None if pair is None else (pair[0], pair[1]) for name, pair in wanted.bits.items()}
    if wanted.method == "weights":
        plan = weight_only_plan(model, wanted.weights, group=wanted.group, format=wanted.format, layers=bits)
    else:
        layers = assigned(model, wanted.weights, wanted.activations, bits)
        plan = QuantPlan(layers, inputs="dynamic", architecture=type(model).__name__, criterion=wanted.method)
    rebuild(model, plan)
    after = stored_bytes(model)
    return f"{plan}\nin float32 {before / 1e6:.2f} MB, quantised {after / 1e6:.2f} MB ({before / after:.2f}x smaller)"


if __name__ == "__main__":
    sys.exit(run(main))
