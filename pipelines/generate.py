"""`vislr generate`: pictures from a pipeline and adapters, the same for the same prompt and seed.

vislr generate --model emoji-unet --adapter style.safetensors:0.8 --prompts "a red car" "a cat" --seeds 0 1
vislr generate --model folder --adapter a.safetensors b.safetensors --compose cmlora --prompts_file prompts.txt
vislr generate --again generated/000-a-red-car-0.png --out again
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vislr.core.arguments import parse_config, plain_data, read_section
from vislr.core.cli_guard import run
from vislr.core.errors import AdapterError, ConfigError, DataError, ModelError
from vislr.core.files import check_output, write_picture
from vislr.pipelines.picture_notes import Job, hashes_of, note_of, read_again

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class GenerateConfig:
    """What to make."""

    model: str = "emoji-unet"
    """Name of an embedded pipeline, a diffusers folder (also one of vislr.save), a hub id; or a recipe, the vislr.json
    of a folder, whose steps are done again on `base`."""
    base: str | None = None
    """With a recipe as model: name of an embedded pipeline, a diffusers folder or a hub id."""
    adapter: list[str] = field(default_factory=list)
    """Adapter files, each with a weight behind a colon if it is not 1: style.safetensors:0.8."""
    compose: str | None = None
    """How two or more adapters make a picture together: merge, cat, svd, ties, dare, dare_ties, magnitude, switch,
    composite, cmlora, w_switch, w_composite. null: their sum. `vislr compose` has the options of each."""
    triggers: list[str] = field(default_factory=list)
    """Of w_switch and w_composite: for each adapter the part of the prompt that asks for it."""
    prompts: list[str] = field(default_factory=list)
    """Prompts; a picture is made for each prompt and seed. This or prompts_file must be given."""
    prompts_file: str | None = None
    """A prompt a line (empty lines and lines that begin with # are left out); or .jsonl: a line is an object with
    prompt and, if they differ from seeds and negative, seeds and negative."""
    negative: str = ""
    """What the pictures should not show; not of FLUX and DiT."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 4.0
    """Classifier-free guidance scale."""
    size: int | None = None
    """Side in pixels; null: the pipeline's own."""
    image: str | None = None
    """A picture to start from; its middle is cut to a square of the size. SD 1, 2, XL, SD3 and FLUX."""
    strength: float = 0.6
    """With image: how far it is changed, above 0 and at most 1; this share of the steps runs."""
    batch: int = 4
    """Pictures made at once."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the pipeline."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; null: a GPU if there is one."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep the pipeline in main memory; move each model (model) or each layer (sequential) to the GPU as it runs."""
    compile: bool = False
    """Compile the denoiser with torch.compile: slow first steps, faster later ones."""
    out: str = "generated"
    """Folder for the pictures: NUMBER-PROMPT-SEED.png, with the way they were made in each file."""
    grid: bool = False
    """Write grid.png too: a row for each seed, a column for each prompt."""
    any_base: bool = False
    """Accept adapters, and with a recipe a base, with other weights than those that they were made on."""
    again: str | None = None
    """A picture of `vislr generate` or of the studio, to make once more: all but out, device and the places of moved
    files (model, adapter, image) is the picture's."""

    def __post_init__(self) -> None:
        if self.again is not None:
            return
        if bool(self.prompts) == bool(self.prompts_file):
            raise ConfigError("prompts and prompts_file are both given; expected one" if self.prompts else
                              "prompts is empty; give at least one, or prompts_file")  # fmt: skip
        if not self.seeds:
            raise ConfigError("seeds is empty; give at least one")
        for name in ("steps", "batch", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more")
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength is {self.strength}; expected above 0 and at most 1")
        if self.image is not None and int(self.steps * self.strength) < 1:
            raise ConfigError(f"strength {self.strength} of {self.steps} steps leaves no step to run")
        if Path(self.model).suffix == ".json" and self.base is None:
            raise ConfigError(f"'{self.model}' is a recipe; it needs base, the pipeline that its steps are done on")
        if self.base is not None and Path(self.model).suffix != ".json":
            raise ConfigError("base belongs to a recipe (a vislr.json) as model")
        if self.compose is not None:
            from vislr.compose import options_of  # knows the methods; slow to import, so last

            options_of(self.compose)


@dataclass
class Loaded:
    """A pipeline that is ready to draw.

    Attributes:
        pipe: what draws: of image to image where that is asked for.
        own: the adapters that were on in the model itself -> their weights.
        given: name -> (file, weight), in the order of the config.
        device: where it runs.
    """

    pipe: Any
    own: dict[str, float]
    given: dict[str, tuple[Path, float]]
    device: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr generate` with these arguments; returns the exit code."""
    config = parse_config(GenerateConfig, argv, prog="vislr generate", description="Make pictures.")
    if config.again is not None:
        return again(config)
    adapters = [adapter_file(text) for text in config.adapter]
    lines = read_prompts(config)
    jobs = [Job(prompt, seed, negative) for prompt, seeds, negative in lines for seed in seeds]
    hashes = hashes_of(config.model, config.base, [path for path, _ in adapters], config.image)
    folder = check_output(config.out, needed=len(jobs) * 3 * (config.size or 64) ** 2)
    loaded = load(config, adapters, [(f"prompt {i}", text) for i, line in enumerate(lines, 1) for text in
                                     (line[0], line[2])])  # fmt: skip
    plan = _compose_plan(config, loaded, [line[0] for line in lines])
    made = _noted(config, loaded)
    places = {prompt: place for place, (prompt, _, _) in reversed(list(enumerate(lines)))}
    images: list[Image.Image] = []
    notes: list[dict[str, Any]] = []
    for part, drawn in draw(config, loaded, plan, jobs):
        for place, (job, image) in enumerate(zip(part, drawn, strict=True)):
            note = note_of(made, part, place, hashes, None if plan is None else plan.to_dict())
            write_picture(folder / f"{places[job.prompt]:03d}-{slug(job.prompt)}-{job.seed}.png", image, note)
            notes.append(note)
        images += drawn
    if config.grid:
        _write_grid(folder / "grid.png", images, jobs, notes)
    print(f"{len(images)} pictures -> {folder}")
    return 0


def again(config: GenerateConfig) -> int:
    """Make the picture `config.again` once more; returns the exit code."""
    note, fields = read_again(str(config.again), config)
    wanted = read_section(GenerateConfig, fields, where=f"the note of '{config.again}'")
    beside = note["beside"]
    jobs = [Job(*one) for one in zip(beside["prompts"], beside["seeds"], beside["negatives"], strict=True)]
    folder = check_output(config.out)
    adapters = [adapter_file(text) for text in wanted.adapter]
    loaded = load(wanted, adapters, [("the picture's prompt", job.prompt) for job in jobs])
    plan = None
    if note["plan"] is not None:
        from vislr.compose import ComposePlan

        # The files may have other names now: the plan's last adapters are those of the files.
        names = list(loaded.given)
        renamed = dict(zip(note["plan"]["adapters"][-len(names) :], names, strict=True)) if names else {}
        plan = ComposePlan.from_dict(_renamed(note["plan"], renamed))
    ((_, drawn),) = draw(wanted, loaded, plan, jobs)
    path = folder / Path(str(config.again)).name
    # The files may lie elsewhere by now, and the device may be another.
    places = {key: getattr(wanted, key) for key in ("model", "adapter", "image")} | {"device": loaded.device}
    made = note_of(note | places, jobs, beside["place"], note["hashes"], note["plan"])
    write_picture(path, drawn[beside["place"]], made)
    print(f"made again -> {path}")
    return 0


def read_prompts(config: GenerateConfig) -> list[tuple[str, list[int], str]]:
    """(prompt, seeds, negative) of every line.

    Raises:
        DataError: a file without prompts, or a line that is none.
    """
    if config.prompts_file is None:
        return [(prompt, config.seeds, config.negative) for prompt in config.prompts]
    path = Path(config.prompts_file)
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts_file '{path}' cannot be read: {error}") from error
    lines = []
    for number, text in enumerate(texts, 1):
        text = text.strip()
        if not text or text.startswith("#"):
            continue
        lines.append(_json_line(text, f"'{path}' line {number}", config) if path.suffix == ".jsonl" else
                     (text, config.seeds, config.negative))  # fmt: skip
    if not lines:
        raise DataError(f"prompts_file '{path}' holds no prompt")
    return lines


def _json_line(text: str, where: str, config: GenerateConfig) -> tuple[str, list[int], str]:
    import json

    try:
        one = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}") from error
    known = {"prompt", "seeds", "negative"}
    if not isinstance(one, dict) or not isinstance(one.get("prompt"), str) or not set(one) <= known:
        raise DataError(
            f"{where} is {text[:60]!r}; expected an object with prompt, and seeds and negative if they differ"
        )
    seeds, negative = one.get("seeds", config.seeds), one.get("negative", config.negative)
    if not isinstance(negative, str) or not isinstance(seeds, list) or not seeds:
        raise DataError(f"{where}: seeds is a list of whole numbers, negative a text")
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise DataError(f"{where}: seeds is {seeds!r}; expected whole numbers")
    return one["prompt"], seeds, negative


def load(config: GenerateConfig, adapters: Sequence[tuple[Path, float]], texts: Sequence[tuple[str, str]]) -> Loaded:
    """The pipeline with its adapters, on its device, offloaded and compiled as the config says.

    Raises:
        ModelError, AdapterError, ConfigError, DataError: what is asked for does not exist, fit or work here.
    """
    import torch

    from vislr import folders, recipe, replaying
    from vislr.adapters import inject
    from vislr.anatomy import denoiser_of
    from vislr.formats import default_name
    from vislr.train.prompts import check_prompts

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.offload != "none" and (device == "cpu" or not torch.accelerator.is_available()):
        raise ConfigError(
            f"offload '{config.offload}' moves models to a GPU as they run; device is '{device}', expected none"
        )
    dtype = getattr(torch, config.dtype)
    if config.base is not None:
        folder = Path(config.model).parent
        replaying.check_recipe(folder)
        pipe, notes = replaying.replay(folder, config.base, any_base=config.any_base)
        print("\n".join(notes))
        pipe.to(dtype=dtype)
    else:
        pipe = folders.load(config.model, dtype=dtype)
    if not hasattr(pipe, "components"):
        raise ModelError(f"'{config.model}' is one model; expected a whole pipeline")
    check_prompts(pipe, texts)
    own = inject.active_adapters(denoiser_of(pipe)[1])
    given: dict[str, tuple[Path, float]] = {}
    taken = set(inject.adapter_names(denoiser_of(pipe)[1]))
    for path, weight in adapters:
        name = default_name(path)
        while name in taken:
            name += "_"
        taken.add(name)
        recipe.load_adapter(pipe, path, name=name, weight=weight, any_base=config.any_base)
        given[name] = (path, weight)
    if config.image is not None:
        pipe = image_to_image(pipe)
    if config.compile:
        denoiser_of(pipe)[1].compile()
    try:
        if config.offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif config.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            pipe.to(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from error
    return Loaded(pipe, own, given, device)


def image_to_image(pipe: Any) -> Any:
    """The pipeline of image to image that shares every part, and so every change, with this one.

    Raises:
        ModelError: diffusers has none for its class.
    """
    from diffusers import AutoPipelineForImage2Image

    try:
        made = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise ModelError(
            f"diffusers has no image to image for a {type(pipe).__name__}; expected SD 1, 2 or XL, SD3 or FLUX"
        ) from error
    # Run-time changes find their scheduler through the pipeline that they were put on.
    made.__dict__["_vislr_made_from"] = pipe
    return made


def draw(
    config: GenerateConfig, loaded: Loaded, plan: Any, jobs: Sequence[Job]
) -> Iterator[tuple[Sequence[Job], list[Image.Image]]]:
    """Batch by batch: the jobs and their pictures."""
    from tqdm import tqdm

    from vislr import compose
    from vislr.train import sample_images

    pipe, start = loaded.pipe, _start(config, loaded.pipe)
    composed = contextlib.nullcontext() if plan is None else compose.composed(pipe, plan)
    with composed, tqdm(total=len(jobs), desc="generating", unit="picture") as bar:
        for first in range(0, len(jobs), config.batch):
            part, steps = jobs[first : first + config.batch], _StepBar(bar)
            images = sample_images(
                pipe, [job.prompt for job in part], [job.seed for job in part], steps=config.steps,
                guidance=config.guidance, size=config.size, batch=len(part), negative=[job.negative for job in part],
                image=start, strength=config.strength, progress=bar.update,
                on_step=steps.step,
            )  # fmt: skip
            yield part, images


class _StepBar:
    """Beside a bar of pictures: the denoising step of the batch."""

    def __init__(self, bar: Any):
        self.bar, self.done = bar, 0

    def step(self) -> None:
        self.done += 1
        self.bar.set_postfix_str(f"step {self.done}")


def _start(config: GenerateConfig, pipe: Any) -> Image.Image | None:
    """The picture to start from, as large as the result."""
    if config.image is None:
        return None
    from PIL import Image, ImageOps

    from vislr.train.diffusion import latent_shape

    side, _ = latent_shape(pipe, config.size)
    try:
        with Image.open(config.image) as image:
            return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    except OSError as error:
        raise DataError(f"image '{config.image}' cannot be read: {error}") from error


def _compose_plan(config: GenerateConfig, loaded: Loaded, prompts: list[str]) -> Any:
    if config.compose is None:
        return None
    from vislr.pipelines.compose import ComposeConfig, plan_of

    names = [*loaded.own, *loaded.given]
    if len(names) < 2:
        raise ConfigError(f"compose '{config.compose}' needs two adapters or more; {len(names)} given")
    weights = [*loaded.own.values(), *(weight for _, weight in loaded.given.values())]
    files = [None] * len(loaded.own) + [path for path, _ in loaded.given.values()]
    wanted = ComposeConfig(
        adapters=names, methods=[config.compose], prompts=prompts, triggers=config.triggers, steps=config.steps
    )
    return plan_of(wanted, loaded.pipe, config.compose, names, weights, files)


def _noted(config: GenerateConfig, loaded: Loaded) -> dict[str, Any]:
    """What of the config is the picture's: all but where it goes and what is made beside it."""
    left = ("prompts", "prompts_file", "seeds", "negative", "batch", "out", "grid", "again", "device")
    return {key: value for key, value in plain_data(config).items() if key not in left} | {"device": loaded.device}


def _write_grid(path: Path, images: list[Image.Image], jobs: Sequence[Job], notes: list[dict[str, Any]]) -> None:
    from vislr.data import make_grid

    prompts, seeds = list(dict.fromkeys(job.prompt for job in jobs)), list(dict.fromkeys(job.seed for job in jobs))
    table = {(job.seed, job.prompt): image for job, image in zip(jobs, images, strict=True)}
    rows = [[table.get((seed, prompt)) for prompt in prompts] for seed in seeds]
    cell = max(128, min(images[0].width, 512))
    labels = [f"seed {seed}" for seed in seeds]
    grid = make_grid(rows, row_labels=labels, column_labels=prompts, cell=cell)
    write_picture(path, grid, {"pictures": notes})


def _renamed(data: Any, names: dict[str, str]) -> Any:
    """Plain data with other names of adapters in it."""
    if isinstance(data, dict):
        return {key: _renamed(value, names) for key, value in data.items()}
    if isinstance(data, list):
        return [_renamed(value, names) for value in data]
    return names.get(data, data) if isinstance(data, str) else data


def adapter_file(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:WEIGHT`; a folder of peft is as good as a file.

    Raises:
        AdapterError: there is no such file.
    """
    path, weight = split_weight(text)
    if not Path(path).exists():
        raise AdapterError(f"there is no adapter file '{path}'; expected FILE or FILE:WEIGHT")
    return Path(path), weight


def split_weight(text: str) -> tuple[str, float]:
    """ "style.safetensors:0.8" -> ("style.safetensors", 0.8); without a weight 1."""
    path, colon, number = text.rpartition(":")
    if colon and path:
        # Else it is a colon of the path itself.
        with contextlib.suppress(ValueError):
            return path, float(number)
    return text, 1.0


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())[:60] or "prompt"


if __name__ == "__main__":
    sys.exit(run(main))
