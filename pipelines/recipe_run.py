"""`vislr recipe run`: several verbs in a row, each on the output of the one before, judged after every step.

vislr recipe run recipes/small-fast.yaml --out runs/small-fast
vislr recipe run recipes/small-fast.yaml --dry_run
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.arguments import dump_config, parse_config, plain_data
from vislr.core.errors import ConfigError, DataError, ModelError, OutputError
from vislr.core.files import atomic_path, check_output, read_json, write_json, write_picture, write_text
from vislr.data.config import DataConfig
from vislr.measure import Measurement
from vislr.pipelines.picture_notes import model_hash
from vislr.pipelines.recipe_steps import PIPELINE, VERBS, Place, Step, adapter_of, cost_of, read_steps

if TYPE_CHECKING:
    from PIL import Image

# A text in the place of a folder of pictures: embedded ones of a style, of the part to train on, at most so many.
ZOO = "zoo:"
# The folder of the base's figures and pictures.
BASE = "00-base"


@dataclass
class JudgeSection:
    """What is looked at after every step."""

    prompts: list[str] = field(default_factory=list)
    """A column each of sheet.png; []: captions of the judged pictures."""
    seed: int = 0
    """Of the sheet's pictures; judged ones have seeds from here on."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 4.0
    """Classifier-free guidance scale."""
    size: int | None = None
    """Side in pixels; null: the pipeline's own."""
    batch: int = 4
    """Pictures made at once."""
    folder: str = ""
    """Captioned pictures to judge by, or zoo:STYLE; "": those of data."""
    pictures: int = 64
    """Captions that are drawn and judged: KID against other pictures of the folder, and how often a picture is nearest
    to that of its caption (retrieval); 0: none. Needs the extra `measure`."""
    rounds: int = 6
    """Pictures drawn to time one, taking turns with the base; 0: not timed."""


@dataclass
class RunConfig:
    """Several verbs in a row."""

    base: str = "emoji-unet"
    """Name of an embedded pipeline, a diffusers folder or a hub id."""
    data: DataConfig = field(default_factory=DataConfig)
    """Captioned pictures of all steps whose section has no data; folder may be zoo:STYLE or zoo:STYLE:COUNT."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """A list of verbs, each with its section: prune, quantize, tokens, compose and train as in the verbs' own configs
    (without model and output); recover (recovery, data, seed), fuse (adapters), cache (method, every, ...). Adapters
    of train steps are made on the base, and known to compose by their names."""
    judge: JudgeSection = field(default_factory=JudgeSection)
    """What is looked at after every step."""
    device: str | None = None
    """cpu, cuda, cuda:1; null: a GPU if there is one."""
    out: str = ""
    """Folder of the run: NUMBER-VERB/pipeline after each step, report.json, report.txt, sheet.png. Must be given. A run
    that was stopped goes on after its last finished step."""
    overwrite: bool = False
    """Do every step again."""
    dry_run: bool = False
    """Say what the steps are and what they take; write nothing."""

    def __post_init__(self) -> None:
        if not self.out and not self.dry_run:
            raise ConfigError("out is not given; expected a folder for the run")
        for name, least in (("steps", 1), ("batch", 1), ("pictures", 0), ("rounds", 0)):
            if getattr(self.judge, name) < least:
                raise ConfigError(f"judge.{name} is {getattr(self.judge, name)}; expected {least} or more")


def run_recipe(argv: Sequence[str]) -> int:
    """Run `vislr recipe run` with these arguments; returns the exit code."""
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--config")
    config = parse_config(
        RunConfig, arguments, prog="vislr recipe run",
        description="Several verbs in a row. `vislr recipe run FILE` is short for --config FILE.",
    )  # fmt: skip
    run = Run(config)
    print(run.costs(), flush=True)
    if config.dry_run:
        return 0
    run.go()
    return 0


class Run:
    """The steps of a config, what of them is done, and the judge.

    Raises:
        ConfigError, AdapterError: a section, or an adapter's name, is wrong; before any work.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.out = config, Path(config.out or "run")
        # As it was written: what steps depend on, whatever the folder is called.
        self.data = config.data.folder
        self.base: list[str | None] = [config.base]
        self.steps = read_steps(config.steps)
        if config.judge.pictures and not (config.judge.folder or config.data.folder):
            raise ConfigError("judge.pictures needs captioned pictures: judge.folder or data.folder; or give 0")
        trained = {}
        for step in self.steps:
            place = self._place(step)
            own = step.config(place)
            if step.verb == "train":
                trained[own.adapter.name] = Path()
            if step.verb == "compose":
                for text in own.adapters:
                    adapter_of(text, trained)
            if step.verb == "recover" and place.whole is None:
                raise ConfigError(
                    f"step {step.number}: recover learns from the pipeline before a `prune`; none is before"
                )

    def _place(self, step: Step, folder: Path | None = None) -> Place:
        before, whole, adapters = self.config.base, None, {}
        for other in self.steps[: step.number - 1]:
            if other.verb == "prune":
                whole = before
            if VERBS[other.verb].pipeline:
                before = str(self.out / other.name / PIPELINE)
            else:
                name = (other.values.get("adapter") or {}).get("name", "default")
                adapters[name] = self.out / other.name / f"{name}.safetensors"
        data = plain_data(self.config.data)
        return Place(self.config.base, before, whole, folder or self.out / step.name, adapters, data,
                     self.config.device)  # fmt: skip

    def costs(self) -> str:
        """The steps and what each takes, counted on the base."""
        from vislr import anatomy, zoo
        from vislr.anatomy.site import figure

        try:
            model = anatomy.skeleton(
                self.config.base, {name: zoo.pipeline_folder(name) for name in zoo.pipeline_names()}
            )
        except ModelError:
            return (
                "\n".join(f"{step.name}" for step in self.steps) + "\ncosts are not counted: the base is not here yet"
            )
        flops = anatomy.flops(model)
        lines, whole = [f"base        {self.config.base}: {figure(flops)}FLOP a forward"], 0.0
        for step in self.steps:
            place = self._place(step)
            text, total = cost_of(step, step.config(place), place, model, flops)
            whole += total
            lines.append(f"{step.name:<11} {text}" + (f"; {figure(round(total))}FLOP" if total else ""))
        judge = self.config.judge
        drawn = judge.pictures + max(6, len(judge.prompts)) + 2 * judge.rounds
        total = 2.0 * drawn * judge.steps * flops * (1 + sum(VERBS[step.verb].pipeline for step in self.steps))
        lines.append(
            f"judge       {drawn} pictures of {judge.steps} steps after each; at most {figure(round(total))}FLOP"
        )
        lines.append(f"in all      at most {figure(round(whole + total))}FLOP")
        return "\n".join(lines)

    def go(self) -> list[tuple[str, dict[str, Measurement]]]:
        """Every step that is not done, then its judgement; the report after each.

        Returns:
            the base and every step that leaves a pipeline, with its figures.

        Raises:
            OutputError: the folder holds another run.
        """
        config, started = self.config, time.monotonic()
        check_output(self.out)
        # Read whole: a step of a base that has changed anywhere must not be taken for done.
        self.base = [config.base, model_hash(config.base, quick=False)]
        if config.overwrite:
            for path in self.out.iterdir():
                if path.name.lstrip(".")[:2].isdigit() and path.is_dir():
                    shutil.rmtree(path)
        dump_config(config, self.out / "config.yaml")
        self.config.data.folder = self._pictures(config.data.folder)
        judge = Judge(self)
        rows = [(BASE, judge.look(BASE, config.base))]
        for step in self.steps:
            self._do(step)
            if VERBS[step.verb].pipeline:
                figures = judge.look(step.name, str(self.out / step.name / PIPELINE))
                rows.append((step.name, figures))
                head, *lines = self._report(rows, judge).splitlines()
                print(f"{head}\n{lines[-1]}", flush=True)
        print(self._report(rows, judge))
        print(f"{time.monotonic() - started:.0f} s; {self.out / self.steps[-1].name}, {self.out / 'sheet.png'}")
        return rows

    def _key(self, step: Step) -> str:
        """What a step's result depends on: the base and all sections up to its own."""
        sections = [[one.verb, dict(one.values)] for one in self.steps[: step.number]]
        return hashlib.sha256(json.dumps([self.base, self.data, sections], sort_keys=True).encode()).hexdigest()

    def _do(self, step: Step) -> None:
        done, aside, key = self.out / step.name, self.out / f".{step.name}.part", self._key(step)
        if done.is_dir():
            if read_json(done / "step.json")["key"] != key:
                raise OutputError(
                    f"'{done}' was made by other settings or of another base; give another out, or overwrite"
                )
            return
        if aside.is_dir() and (not (aside / "key").is_file() or (aside / "key").read_text() != key):
            shutil.rmtree(aside)
        if (aside / "step.json").is_file():  # killed when only the name was missing
            self._finish(aside, done)
            return
        aside.mkdir(exist_ok=True)
        write_text(aside / "key", key)
        print(f"--- {step.name}", flush=True)
        place, started = self._place(step, aside), time.monotonic()
        values = _resolved(dict(step.values), self._pictures)
        step = Step(step.number, step.verb, values)
        VERBS[step.verb].work(step.config(place), place)
        write_json(aside / "step.json", {"verb": step.verb, "key": key, "section": values,
                                         "seconds": round(time.monotonic() - started, 2)})  # fmt: skip
        self._finish(aside, done)

    def _finish(self, aside: Path, done: Path) -> None:
        os.rename(aside, done)
        (done / "key").unlink()

    def _pictures(self, text: str) -> str:
        """The folder of `zoo:STYLE:COUNT`, written once; any other text as it is."""
        if not text.startswith(ZOO):
            return text
        from vislr import zoo

        style, _, count = text.removeprefix(ZOO).partition(":")
        if count and not count.isdecimal():
            raise ConfigError(f"'{text}' names no pictures; expected zoo:STYLE or zoo:STYLE:COUNT")
        folder = self.out / "pictures" / (f"{style}-{count}" if count else style)
        if not folder.is_dir():
            found = zoo.images(style=style, split="train")
            found = found[:: max(1, len(found) // int(count))][: int(count)] if count else found
            with atomic_path(folder) as temporary:
                zoo.export(temporary, found)
        return str(folder)

    def _report(self, rows: list[tuple[str, dict[str, Measurement]]], judge: Judge) -> str:
        """Write report.json, report.txt and sheet.png; gives the table."""
        from vislr.data import make_grid

        seconds = {step.name: read_json(path)["seconds"] for step in self.steps
                   if (path := self.out / step.name / "step.json").is_file()}  # fmt: skip
        figures = {name: {key: one.to_dict() for key, one in own.items()} for name, own in rows}
        write_json(self.out / "report.json", {"base": self.config.base, "seconds": seconds, "figures": figures})
        text = table(rows, seconds)
        write_text(self.out / "report.txt", text + "\n")
        pictures = [judge.sheet(name) for name, _ in rows]
        cell = max(128, min(pictures[0][0].width, 256))
        grid = make_grid(pictures, row_labels=[name for name, _ in rows], column_labels=judge.prompts, cell=cell)
        write_picture(self.out / "sheet.png", grid, {"rows": [name for name, _ in rows], "prompts": judge.prompts})
        return text


def _resolved(values: Any, pictures: Any) -> Any:
    """The section with folders in the places of `zoo:STYLE`."""
    if isinstance(values, dict):
        return {key: _resolved(value, pictures) for key, value in values.items()}
    if isinstance(values, list):
        return [_resolved(value, pictures) for value in values]
    return pictures(values) if isinstance(values, str) else values


def table(rows: Sequence[tuple[str, Mapping[str, Measurement]]], seconds: Mapping[str, float]) -> str:
    """A line for each step, a column for each figure."""
    names = list(dict.fromkeys(key for _, own in rows for key in own))
    lines = [["step", "took", *names]]
    for name, own in rows:
        cells = [f"{seconds[name]:.0f} s" if name in seconds else "-"]
        for key in names:
            one = own.get(key)
            span = "" if one is None or one.interval is None else f" [{one.interval[0]:.3g}, {one.interval[1]:.3g}]"
            cells.append("-" if one is None else f"{one.value:.4g}{span}")
        lines.append([name, *cells])
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(wide) for cell, wide in zip(line, width, strict=True)).rstrip() for line in lines
    )


class Judge:
    """Size, time and quality of a pipeline, and its pictures of the same prompts and seeds."""

    def __init__(self, run: Run) -> None:
        self.run, self.wanted = run, run.config.judge
        self.base = self._load(run.config.base)
        self.captions: list[str] = []
        self.gallery: Any = None
        self.reference: Any = None
        if self.wanted.pictures:
            self._read(run._pictures(self.wanted.folder) or run.config.data.folder)
        self.prompts = self.wanted.prompts or self.captions[:6]
        if not self.prompts:
            raise ConfigError("judge.prompts is empty, and no pictures are judged; give at least one prompt")
        from vislr.train.prompts import check_prompts

        check_prompts(self.base, [("judge.prompts", prompt) for prompt in self.prompts])

    def _load(self, name: str) -> Any:
        import torch

        from vislr import folders

        pipe = folders.load(name)
        if not hasattr(pipe, "components"):
            raise ModelError(f"'{name}' is one model; expected a whole pipeline")
        return pipe.to(self.run.config.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _read(self, folder: str) -> None:
        """Captions to draw, their own pictures as prototypes, other pictures as reference."""
        from vislr import measure
        from vislr.data import open_pool
        from vislr.train.diffusion import latent_shape, size_step
        from vislr.train.tasks import spread, to_image

        side, _ = latent_shape(self.base, self.wanted.size)
        source = open_pool(DataConfig(folder=folder)).at(side, size_step(self.base), seed=0)
        chosen = spread(source, min(self.wanted.pictures, source.count))
        items = {index: source.item(index) for index in range(source.count)}
        self.captions = list(dict.fromkeys(items[index].caption for index in chosen))
        if len(self.captions) < 2:
            raise DataError(f"'{folder}' has {len(self.captions)} captions to judge by; expected two or more")
        own = [to_image(source.read(items[index]).pixels) for index in chosen]
        rest = [index for index in items if index not in set(chosen)][: 4 * len(chosen)]
        net = measure.feature_net()
        self.gallery = measure.prototypes(own, [items[index].caption for index in chosen], net=net)
        other = [to_image(source.read(items[index]).pixels) for index in rest] if len(rest) > 1 else own
        self.reference = net.features(other)

    def look(self, name: str, source: str) -> dict[str, Measurement]:
        """The figures of a step's pipeline, measured once; they and its pictures stay in the step's folder."""
        import dataclasses

        folder = self.run.out / name
        key = hashlib.sha256(json.dumps([dataclasses.asdict(self.wanted), self.run.base, self.run.data], sort_keys=True)
                             .encode()).hexdigest()  # fmt: skip
        path = folder / "figures.json"
        if path.is_file() and read_json(path)["key"] == key:
            return {one: Measurement.from_dict(data) for one, data in read_json(path)["figures"].items()}
        pipe = self.base if source == self.run.config.base else self._load(source)
        figures = self._figures(pipe)
        for place, image in enumerate(self._draw(pipe, self.prompts, [self.wanted.seed] * len(self.prompts))):
            made = {"step": name, "prompts": [self.prompts[place]], "seeds": [self.wanted.seed]}
            write_picture(folder / "pictures" / f"{place:03d}.png", image, made)
        if pipe is not self.base:
            self._note(pipe, figures, source)
        write_json(path, {"key": key, "figures": {one: figure.to_dict() for one, figure in figures.items()}})
        return figures

    def _note(self, pipe: Any, figures: Mapping[str, Measurement], source: str) -> None:
        """Into the recipe: the base's figures and those of this step."""
        from vislr import folders, record

        before = self.look(BASE, self.run.config.base)
        for name, figure in figures.items():
            record.note_measurement(pipe, name, before.get(name), figure)
        folders.save(pipe, source)

    def sheet(self, name: str) -> list[Image.Image]:
        """The pictures of `look`, a column each."""
        from PIL import Image

        images = []
        for place in range(len(self.prompts)):
            with Image.open(self.run.out / name / "pictures" / f"{place:03d}.png") as image:
                images.append(image.convert("RGB"))
        return images

    def _draw(self, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], batch: int | None = None) -> list[Any]:
        from vislr.train import sample_images

        wanted = self.wanted
        return sample_images(pipe, prompts, seeds, steps=wanted.steps, guidance=wanted.guidance, size=wanted.size,
                             batch=batch or wanted.batch)  # fmt: skip

    def _figures(self, pipe: Any) -> dict[str, Measurement]:
        from vislr import measure
        from vislr.anatomy import denoiser_of
        from vislr.core.quantizing import parameter_count
        from vislr.quantize.handler import stored_bytes

        wanted, model = self.wanted, denoiser_of(pipe)[1]
        figures = {
            "parameters": Measurement(parameter_count(model), None, 1, None, "count", "of the denoiser, adapters too"),
            "bytes": Measurement(stored_bytes(model), None, 1, None, "bytes", "of all that the denoiser's file holds"),
        }
        if wanted.rounds:
            one = self.prompts[:1]
            found = measure.interleaved(
                {"base": lambda: self._draw(self.base, one, [wanted.seed], 1),
                 "step": lambda: self._draw(pipe, one, [wanted.seed], 1)},
                rounds=wanted.rounds, warmup=1, device=str(model.device.type),
            )  # fmt: skip
            figures["seconds a picture"] = found["step"]
            figures["speedup"] = found["step"].parts["speedup"]
        if self.captions:
            seeds = [wanted.seed + place for place in range(len(self.captions))]
            features = measure.feature_net().features(self._draw(pipe, self.captions, seeds))
            figures["KID"] = measure.kid(features, self.reference)
            figures["retrieval"] = measure.retrieval(features, self.captions, self.gallery, top=1)
        return figures
