"""Quality against ratio: every criterion before recovery, the best of them after the same recovery.

    python benchmarks/prune_quality.py --model emoji-unet           # go on until every cell is there, then record
    python benchmarks/prune_quality.py --model emoji-unet --subset  # minutes: a few small cells, no record
    python benchmarks/prune_quality.py --model emoji-unet --cost    # say what is left to do and how long it takes

A grid of cells, each kept as a file in --out (default runs/prune-quality/MODEL) as soon as it is measured: run the
same command again to go on, or start it twice to use two cores; each takes the cells that the other is not at.
Recovery goes on from its newest checkpoint. Settings and weights are kept too: cells of others are never mixed in.

Before recovery: every criterion at ratios .1 to .6 of the parameters. After it: laptop, hierarchical and the best
baseline at .25 (one seed) and .5 (three seeds), all with the same objective, pictures, batch and steps; beside them
`own`: hierarchical with its own recovery (frozen prefix, slow sensitive units). Additivity of the output losses.
Judged by KID, retrieval of the concept and the distance from the model before the cut. Needs the extra `measure`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import vislr
from vislr import measure, prune, zoo
from vislr.anatomy.text import sequence_length
from vislr.core.errors import ConfigError
from vislr.core.files import read_json, write_json
from vislr.core.hashing import content_hash
from vislr.data import DataConfig, ImageFolder
from vislr.measure import Measurement
from vislr.prune.scoring import timed_forward
from vislr.train import HeldOutConfig, OptimConfig, SampleConfig, sample_images
from vislr.train.calibration import calibration_inputs
from vislr.train.recovery import RecoverySection, recover

RATIOS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
RECOVERED = {0.25: (0,), 0.5: (0, 1, 2)}
CRITERIA = ("laptop", "hierarchical", "magnitude", "uniform", "random-0", "random-1", "random-2", "bk-sdm", "ssd")
BASELINES = ("magnitude", "uniform", "random", "bk-sdm", "ssd")
FIGURES = ("kid", "retrieval", "distance")
STYLE = "noto"
# What figures depend on; kept with the cells.
SETTINGS = {"count": 96, "prompts": 24, "samples": 128, "pictures": 500, "steps": 10, "guidance": 4.0,
            "recovery_steps": 600, "lr": 3e-4, "batch": 16, "subsets": 48}  # fmt: skip
SUBSET = {"count": 8, "prompts": 3, "samples": 16, "pictures": 24, "steps": 2, "recovery_steps": 2, "subsets": 4}


class Bench:
    """The base, the pictures, and the cells."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.out, self.began = a, a.out, time.perf_counter()
        self.pipe = vislr.load(a.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.component = "unet" if hasattr(self.pipe, "unet") else "transformer"
        self.whole = getattr(self.pipe, self.component)
        self.inventory = prune.units_of(self.pipe)
        self.ratios = (0.2, 0.5) if a.subset else RATIOS
        self.recovered = {0.5: (0,)} if a.subset else RECOVERED
        self.names = [name for name in CRITERIA if self.component == "unet" or name not in ("bk-sdm", "ssd")]
        with self.lock("setup"):
            self._check_settings()
            self._share_out()

    def _check_settings(self) -> None:
        own = {name: getattr(self.a, name) for name in SETTINGS}
        own |= {"model": self.a.model, "weights": content_hash(self.whole.state_dict()), "subset": self.a.subset}
        path = self.out / "settings.json"
        if path.is_file():
            stored = read_json(path)
            wrong = [name for name in own if own[name] != stored.get(name)]
            if wrong:
                raise ConfigError(f"'{self.out}' holds cells with another {wrong[0]}; expected another --out")
        write_json(path, own)

    def _share_out(self) -> None:
        """Pictures that share no concept: to be drawn and judged, to score with, to recover with."""
        a = self.a
        known = zoo.images(style=STYLE, split="train")

        def some(pictures: list[Any], count: int) -> list[Any]:
            return pictures[:: max(1, len(pictures) // count)][:count]

        self.judged = some(known, a.count)
        taken = {picture.name for picture in self.judged}
        reference = [picture for picture in known if picture.name not in taken]
        self.scored = some(reference, a.prompts)
        taken |= {picture.name for picture in self.scored}
        folder = self.out / "pictures"
        if not folder.is_dir():
            zoo.export(folder, some([picture for picture in known if picture.name not in taken], a.pictures))
        self.net = measure.feature_net()
        # Minutes of work that the grids of all models share; a subset looks at its own concepts alone.
        shown = {picture.name for picture in (*self.judged, *self.scored)}
        others = [p for p in zoo.images() if p.style != STYLE and (p.name in shown or not a.subset)]
        self.gallery = measure.prototypes(others, cache=self.out.parent / "prototypes", net=self.net)
        self.reference = self.net.features(some(reference, 4 * a.count))
        self.folder, pictures = folder, ImageFolder.with_captions(folder)
        self.calibration, self.tests = (
            calibration_inputs(self.pipe, pictures, samples=a.samples, batch=a.batch, seed=seed) for seed in (0, 1)
        )

    @contextlib.contextmanager
    def lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Whether this process has the name for itself; the system lets go of it when a process ends, however."""
        path = self.out / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def path(self, name: str) -> Path:
        return self.out / "cells" / f"{name}.json"

    def cell(self, name: str, make: Callable[[], dict[str, Measurement]], wait: bool = True) -> None:
        """Measure a cell that is not there yet, unless another process is at it and we need not wait."""
        if self.path(name).is_file():
            return
        if self.a.minutes and (time.perf_counter() - self.began) > 60 * self.a.minutes:
            raise TimeoutError
        with self.lock(name, wait) as mine:
            if not mine or self.path(name).is_file():
                return
            began = time.perf_counter()
            figures = {key: one.to_dict() for key, one in make().items()}
            write_json(self.path(name), {"seconds": time.perf_counter() - began, "figures": figures})
            told = ", ".join(f"{key} {one['value']:.4g}" for key, one in figures.items())
            print(f"{name} ({time.perf_counter() - began:.0f} s): {told or 'cannot be reached'}", flush=True)

    def figures(self, name: str) -> dict[str, Measurement]:
        """Of a cell that is there; none where the ratio cannot be reached."""
        return {key: Measurement.from_dict(one) for key, one in read_json(self.path(name))["figures"].items()}

    def criterion(self, name: str) -> Any:
        scores = self.out / "scores"
        if name == "laptop":
            return prune.OutputLoss(self.calibration, folder=scores / name)
        if name == "hierarchical":
            quality = prune.PrototypeQuality({p.caption: p.name for p in self.scored}, self.gallery)
            options = {} if self.component == "unet" else {"max_sequence_length": sequence_length(self.pipe)}
            return prune.Contribution(
                [p.caption for p in self.scored], quality, steps=self.a.steps, guidance=self.a.guidance,
                batch=self.a.batch, options=options, folder=scores / name,
            )  # fmt: skip
        if name.startswith("random"):
            return prune.Random(int(name.rpartition("-")[2]))
        return {"magnitude": prune.Magnitude, "uniform": prune.UniformDepth, "bk-sdm": prune.BkSdmOrder,
                "ssd": prune.SsdOrder}[name]()  # fmt: skip

    def plan(self, name: str, ratio: float) -> prune.LayerPlan | None:
        """Kept as a file with its picture: recovery uses the same plan. None: beyond what the criterion may remove."""
        path = self.out / "plans" / f"{name}-{ratio}.json"
        # Scores are shared; who comes second waits for them.
        with self.lock(f"plan-{name}"):
            if path.is_file():
                return prune.LayerPlan.from_dict(read_json(path))
            try:
                plan = prune.plan_layers(self.pipe, self.criterion(name), ratio, inventory=self.inventory)
            except ConfigError as error:
                if "beyond what can be removed" in str(error):
                    return None
                raise
            write_json(path, plan.to_dict())
            prune.draw_plan(plan, self.inventory, path.with_suffix(".png"))
            return plan

    def judge(self, teacher: Any | None) -> dict[str, Measurement]:
        """Figures of the pipeline as it is now."""
        prompts, seeds = [p.caption for p in self.judged], list(range(len(self.judged)))
        pictures = sample_images(
            self.pipe, prompts, seeds, steps=self.a.steps, guidance=self.a.guidance, batch=self.a.batch
        )
        features = self.net.features(pictures)
        found = {
            "kid": measure.kid(features, self.reference, net=self.net),
            "retrieval": measure.retrieval(features, [p.name for p in self.judged], self.gallery, net=self.net),
        }
        if teacher is not None:
            found["distance"] = measure.teacher_distance(getattr(self.pipe, self.component), teacher, self.tests)
        return found

    def before(self, name: str, ratio: float) -> dict[str, Measurement]:
        """Pruned, not trained."""
        plan = self.plan(name, ratio)
        if plan is None:
            return {}
        teacher = copy.deepcopy(self.whole)
        report = vislr.apply(self.pipe, plan, name="cut")
        try:
            return self.judge(teacher)
        finally:
            vislr.remove(self.pipe, report)

    def after(self, name: str, ratio: float, seed: int) -> dict[str, Measurement]:
        """Pruned and trained as every other; `own` as HierarchicalPrune trains."""
        a, plan = self.a, self.plan("hierarchical" if name == "own" else name, ratio)
        assert plan is not None
        teacher, kept = copy.deepcopy(self.whole), copy.deepcopy(self.whole.state_dict())
        report = vislr.apply(self.pipe, plan, name="cut")
        method: dict[str, Any] = {}
        if name == "own":
            method = {"train": "after-cut", "sensitivity": 1.0, "features": 1e-4, "normalise": "none"}
        wanted = RecoverySection(
            steps=a.recovery_steps, held_out=HeldOutConfig(fraction=0.1, every=0),
            optim=OptimConfig(lr=a.lr, batch=a.batch, weight_decay=1e-4, betas=(0.9, 0.999)),
            sample=SampleConfig(prompts=[self.judged[0].caption], steps=a.steps), checkpoint_every=100, **method,
        )  # fmt: skip
        folder = self.out / "recovery" / f"{name}-{ratio}-{seed}"
        try:
            done = recover(
                self.pipe, copy.deepcopy(teacher), plan, wanted, data=DataConfig(folder=str(self.folder)),
                folder=folder, seed=seed, resume=(folder / "checkpoints").is_dir(), base=a.model,
            )  # fmt: skip
            told = f"loss on held-out pictures, {a.recovery_steps} steps of batch {a.batch}"
            loss = {
                f"held-out {when}": Measurement(float(done["held_out"]["loss"][i]), None, 1, seed, "loss", told)
                for i, when in enumerate(("before", "after"))
            }
            return self.judge(teacher) | loss
        finally:
            vislr.remove(self.pipe, report)
            self.whole.load_state_dict(kept)

    def additivity(self) -> dict[str, Measurement]:
        """Of the output losses, on random subsets."""
        plan = self.plan("laptop", self.ratios[0])
        assert plan is not None
        report = prune.additivity(
            self.pipe, self.calibration, plan.scores, self.inventory, subsets=self.a.subsets, folder=self.out / "scores"
        )
        write_json(self.out / "additivity.json", report.to_dict())
        prune.draw_additivity(report, self.out / "additivity.png")
        return {"pearson": report.pearson, "slope": report.slope}

    def best_baseline(self, ratio: float) -> str:
        """By KID before recovery; of chance the mean over its seeds."""
        found: dict[str, list[float]] = {}
        for name in self.names:
            if name.split("-")[0] in BASELINES or name in BASELINES:
                figures = self.figures(f"before-{name}-{ratio}")
                if figures:
                    found.setdefault("random" if name.startswith("random") else name, []).append(figures["kid"].value)
        best = min(found, key=lambda name: statistics.mean(found[name]))
        return "random-0" if best == "random" else best

    def first_cells(self) -> dict[str, Callable[[], dict[str, Measurement]]]:
        cells: dict[str, Callable[[], dict[str, Measurement]]] = {"whole": lambda: self.judge(None)}
        cells["additivity"] = self.additivity
        for ratio, name in itertools.product(self.ratios, self.names):
            cells[f"before-{name}-{ratio}"] = lambda name=name, ratio=ratio: self.before(name, ratio)
        return cells

    def recovery_cells(self) -> dict[str, Callable[[], dict[str, Measurement]]]:
        cells: dict[str, Callable[[], dict[str, Measurement]]] = {}
        # Seed by seed, so that a stopped grid has compared something.
        seeds = sorted({seed for own in self.recovered.values() for seed in own})
        for seed, (ratio, own) in itertools.product(seeds, self.recovered.items()):
            names = ["laptop", "hierarchical", self.best_baseline(ratio), *(["own"] if seed == 0 else [])]
            for name in names if seed in own else []:
                cells[f"after-{name}-{ratio}-seed{seed}"] = lambda n=name, r=ratio, s=seed: self.after(n, r, s)
        return cells

    def run(self) -> dict[str, Measurement]:
        """Every cell; first those that nobody is at."""
        found: dict[str, Measurement] = {}
        for cells in (self.first_cells, self.recovery_cells):
            for wait in (False, True):
                for name, make in cells().items():
                    self.cell(name, make, wait)
            for name in cells():
                found |= {f"{name} {key}": one for key, one in self.figures(name).items()}
        return found

    def cost(self) -> str:
        """What is left, timed by one forward and one training step."""
        batch = self.tests[0]
        forward = timed_forward(self.whole, batch)
        began = time.perf_counter()
        self.whole(**batch)[0].square().mean().backward()
        training = time.perf_counter() - began
        self.whole.zero_grad(set_to_none=True)
        a, began = self.a, time.perf_counter()
        few = [picture.caption for picture in self.judged[: a.batch]]
        self.net.features(
            sample_images(self.pipe, few, [0] * len(few), steps=a.steps, guidance=a.guidance, batch=a.batch)
        )
        pictures = (time.perf_counter() - began) / len(few)
        judging = a.count * pictures + 2 * len(self.tests) * forward
        left = [name for name in self.first_cells() if not self.path(name).is_file()]
        recoveries = sum(4 if seed == 0 else 3 for own in self.recovered.values() for seed in own)
        recoveries -= len(list((self.out / "cells").glob("after-*")))
        scoring = (len(self.inventory.units) + 1) * a.prompts * pictures
        seconds = len(left) * judging + scoring + recoveries * (a.recovery_steps * (training + forward) + judging)
        return (
            f"{len(left)} cells before recovery and {recoveries} after it are left: about {seconds / 60:.0f} min of "
            "one process, half of it with two"
        )


def draw(bench: Bench, figures: dict[str, Measurement], path: Path) -> None:
    """KID, retrieval and distance over the ratio, before recovery as lines, after it as stars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, what in zip(figure.subplots(1, 3), FIGURES, strict=True):
        for number, name in enumerate([*bench.names, "own"]):
            keys = {ratio: f"before-{name}-{ratio} {what}" for ratio in bench.ratios}
            line = [(100 * ratio, figures[key]) for ratio, key in keys.items() if key in figures]
            if line:
                y = [one.value for _, one in line]
                ends = [one.interval or (one.value, one.value) for _, one in line]
                # A bootstrap's interval need not hold the figure itself.
                errors = [[max(0.0, at - low) for at, (low, _) in zip(y, ends, strict=True)],
                          [max(0.0, high - at) for at, (_, high) in zip(y, ends, strict=True)]]  # fmt: skip
                # Side by side, so that the bars do not hide one another.
                x = [at + 0.35 * (number - len(bench.names) / 2) for at, _ in line]
                axis.errorbar(x, y, yerr=errors, color=f"C{number}", label=name, marker=".", elinewidth=0.6)
            for ratio, seeds in bench.recovered.items():
                done = [figures.get(f"after-{name}-{ratio}-seed{seed} {what}") for seed in seeds]
                values = [one.value for one in done if one is not None]
                label = name if name == "own" and ratio == max(bench.recovered) else None
                axis.scatter([100 * ratio] * len(values), values, color=f"C{number}", marker="*", s=60, label=label)
        if f"whole {what}" in figures:
            axis.axhline(figures[f"whole {what}"].value, color="0.5", linestyle=":")
        axis.set(xlabel="% of the parameters removed", ylabel=what)
        axis.grid(alpha=0.3)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=10, fontsize=8, frameon=False,
        title="line: before recovery, with 95 % intervals; star: after it", title_fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=120)


def over_seeds(figures: dict[str, Measurement], ratio: float) -> dict[str, Measurement]:
    """Means over the seeds of a ratio, with Student's 95 % interval."""
    groups: dict[str, list[float]] = {}
    for key, one in figures.items():
        cell, _, what = key.partition(" ")
        if cell.startswith("after-") and f"-{ratio}-seed" in cell:
            groups.setdefault(f"{cell.removeprefix('after-').partition(f'-{ratio}-')[0]} {what}", []).append(one.value)
    found = {}
    for name, values in groups.items():
        if len(values) > 1:
            from scipy.stats import t

            mean = statistics.mean(values)
            wide = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
            how = f"mean over {len(values)} seeds of recovery; interval: Student's t, 95 %"
            found[f"after {ratio} {name}"] = Measurement(
                mean, (mean - wide, mean + wide), len(values), None, "mean", how
            )
    return found


def summary(bench: Bench, figures: dict[str, Measurement]) -> list[str]:
    """The figures beside the papers' claims."""
    lines = [f"{name}: {figure}" for name, figure in figures.items()]
    whole = figures["whole retrieval"].value

    def drop(key: str) -> str:
        return f"{1 - figures[key].value / whole:.1%}" if key in figures and whole else "-"

    half = {name: drop(f"after 0.5 {name} retrieval") for name in (*bench.names, "own")}
    lines += [
        "LAPTOP-Diff's claim: at 50 %, after recovery, half the drop of the next method. Drop of retrieval here: "
        + ", ".join(f"{name} {value}" for name, value in half.items() if value != "-"),
        "HierarchicalPrune's claim: without recovery quality falls by 79 % at 20 %, by 2.5 % with it. Drop of "
        f"retrieval at 20 % without: hierarchical {drop('before-hierarchical-0.2 retrieval')}, "
        f"laptop {drop('before-laptop-0.2 retrieval')}; at 25 % with it: "
        f"{drop('after-hierarchical-0.25-seed0 retrieval')}, {drop('after-laptop-0.25-seed0 retrieval')}",
    ]
    seconds = sum(read_json(path)["seconds"] for path in (bench.out / "cells").glob("*.json"))
    return [*lines, f"{seconds / 60:.0f} min of one process in all cells"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-unet", help="embedded pipeline, diffusers folder or hub id")
    parser.add_argument("--out", type=Path, help="where cells are kept; default runs/prune-quality/MODEL")
    parser.add_argument("--subset", action="store_true", help="minutes: few pictures and steps, two ratios, no record")
    parser.add_argument("--cost", action="store_true", help="say what is left and how long it takes, and stop")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no cell after so many; 0: no limit")
    parser.add_argument("--no-record", action="store_true")
    told = {"count": "pictures that are judged", "prompts": "pictures for the contribution of a unit",
            "samples": "calibration samples", "pictures": "pictures to recover with", "steps": "denoising steps",
            "recovery_steps": "updates of every recovery", "subsets": "random subsets for additivity"}  # fmt: skip
    for name, value in SETTINGS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), help=f"{told.get(name, '')} (default {value})".strip())
    a = parser.parse_args()
    for name, value in SETTINGS.items():
        if getattr(a, name) is None:
            setattr(a, name, SUBSET.get(name, value) if a.subset else value)
    a.out = a.out or Path("runs/prune-quality") / (Path(a.model).name + ("-subset" if a.subset else ""))
    bench = Bench(a)
    print(bench.cost(), flush=True)
    if a.cost:
        return
    try:
        figures = bench.run()
    except TimeoutError:
        print(f"stopped after {a.minutes:g} min; run the same command to go on")
        return
    for ratio in bench.recovered:
        figures |= over_seeds(figures, ratio)
    lines = summary(bench, figures)
    with bench.lock("record", wait=False) as mine:
        if not mine:
            return
        print("\n".join(lines))
        draw(bench, figures, a.out / "quality.png")
        if a.subset or a.no_record or (a.out / "recorded").exists():
            return
        command = f"python benchmarks/prune_quality.py --model {a.model}"
        for name, value in SETTINGS.items():
            if getattr(a, name) != value:
                command += f" --{name.replace('_', '-')} {getattr(a, name)}"
        name = f"prune-quality-{Path(a.model).name}"
        folder = measure.write_record(name, figures, log="\n".join(lines) + "\n", command=command, seed=0)
        for picture in ("quality.png", "additivity.png"):
            (folder / picture).write_bytes((a.out / picture).read_bytes())
        (a.out / "recorded").touch()
        print(folder)


if __name__ == "__main__":
    main()
