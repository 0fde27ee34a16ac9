"""Quality against ratio: every criterion before recovery, the best of them after the same recovery.

    python benchmarks/prune_quality.py --model emoji-unet --out runs/prune-quality/emoji-unet

A grid of cells, each kept as a file in --out as soon as it is measured: run the same command again to go on.
Before recovery: every criterion at ratios .1 to .6. After the same number of steps of distillation: laptop,
hierarchical and the best baseline at .25 (one seed) and .5 (three seeds). Beside them additivity of the output
losses, and latency against FLOPs. Writes a record when every cell is there. Needs the extra `measure`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vislr
from vislr import measure, prune, zoo
from vislr.core.files import write_json
from vislr.data import DataConfig
from vislr.measure import Measurement
from vislr.train import HeldOutConfig, OptimConfig, SampleConfig, sample_images
from vislr.train.calibration import calibration_inputs
from vislr.train.families import sequence_length
from vislr.train.recovery import RecoverySection, recover

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
RECOVERED = {0.25: (0,), 0.5: (0, 1, 2)}
STYLE = "noto"


class Bench:
    """The base, its teacher, the pictures and the criteria; made once."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.out = a, a.out
        self.pipe = vislr.load(a.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.whole = getattr(self.pipe, "unet", None) or self.pipe.transformer
        self.component = "unet" if hasattr(self.pipe, "unet") else "transformer"
        known = zoo.images(style=STYLE, split="train")
        # Three parts that share no concept: to be drawn and judged, to score with, to recover with.
        judged, rest = known[:: max(1, len(known) // a.count)][: a.count], set()
        rest = {p.name for p in judged}
        others = [p for p in known if p.name not in rest]
        self.scored = others[:: max(1, len(others) // a.prompts)][: a.prompts]
        taken = {p.name for p in self.scored}
        self.judged = judged
        self.folder = self.out / "pictures"
        if not self.folder.is_dir():
            zoo.export(self.folder, [p for p in others if p.name not in taken][:: max(1, len(others) // a.pictures)])
        self.net = measure.feature_net()
        self.gallery = measure.prototypes([p for p in zoo.images() if p.style != STYLE], cache=self.out, net=self.net)
        wanted = {p.name for p in judged}
        self.reference = self.net.features([p for p in known if p.name not in wanted][: 4 * a.count])
        from vislr.data import ImageFolder

        pictures = ImageFolder.with_captions(self.folder)
        self.calibration = calibration_inputs(self.pipe, pictures, samples=a.samples, batch=16, seed=0)
        self.tests = calibration_inputs(self.pipe, pictures, samples=a.samples, batch=16, seed=1)
        self.scores: dict[str, Any] = {}

    def criterion(self, name: str, seed: int = 0) -> Any:
        """The criterion of this name."""
        if name == "laptop":
            return prune.OutputLoss(self.calibration, folder=self.out / "scores" / "laptop", progress=False)
        if name == "hierarchical":
            quality = prune.PrototypeQuality({p.caption: p.name for p in self.scored}, self.gallery)
            return prune.Contribution(
                [p.caption for p in self.scored], quality, steps=self.a.steps, guidance=self.a.guidance, batch=16,
                options=self.options(), folder=self.out / "scores" / "hierarchical", progress=True,
            )  # fmt: skip
        table: dict[str, Callable[[], Any]] = {
            "magnitude": prune.Magnitude, "uniform": prune.UniformDepth, "bk-sdm": prune.BkSdmOrder,
        }  # fmt: skip
        return prune.Random(int(name.rpartition("-")[2])) if name.startswith("random") else table[name]()

    def options(self) -> dict[str, Any]:
        """What the pipeline is called with beside prompt, steps and guidance."""
        return {"max_sequence_length": sequence_length(self.pipe)} if self.component == "transformer" else {}

    def names(self) -> list[str]:
        """Criteria that this model can be scored by."""
        every = ["laptop", "hierarchical", "magnitude", "uniform", "random-0", "random-1", "random-2"]
        return every + (["bk-sdm"] if self.component == "unet" else [])

    def plan(self, name: str, ratio: float) -> prune.LayerPlan:
        """Kept as a file: recovery and figures use the same plan."""
        path = self.out / "plans" / f"{name}-{ratio}.json"
        if path.is_file():
            return prune.LayerPlan.from_dict(json.loads(path.read_text()))
        plan = prune.plan_layers(self.pipe, self.criterion(name), ratio)
        write_json(path, plan.to_dict())
        prune.draw_plan(plan, prune.units_of(self.pipe), path.with_suffix(".png"))
        return plan

    def judge(self, teacher: Any | None) -> dict[str, Measurement]:
        """Figures of the pipeline as it is now."""
        pictures = sample_images(
            self.pipe, [p.caption for p in self.judged], list(range(len(self.judged))), steps=self.a.steps,
            guidance=self.a.guidance, batch=16,
        )  # fmt: skip
        features = self.net.features(pictures)
        found = {
            "kid": measure.kid(features, self.reference, net=self.net),
            "retrieval": measure.retrieval(features, [p.name for p in self.judged], self.gallery, net=self.net),
        }
        if teacher is not None:
            now = getattr(self.pipe, self.component)
            found["distance"] = measure.teacher_distance(now, teacher, self.tests)
        return found

    def cell(self, name: str, make: Callable[[], dict[str, Measurement]]) -> dict[str, Measurement]:
        """Measure a cell, or read it."""
        path = self.out / "cells" / f"{name}.json"
        if not path.is_file():
            began = time.perf_counter()
            figures = {key: one.to_dict() for key, one in make().items()}
            write_json(path, {"seconds": time.perf_counter() - began, "figures": figures})
            print(f"{name}: " + ", ".join(f"{key} {one['value']:.4g}" for key, one in figures.items()), flush=True)
        stored = json.loads(path.read_text())
        return {key: Measurement.from_dict(one) for key, one in stored["figures"].items()}

    def before(self, name: str, ratio: float) -> dict[str, Measurement]:
        """Pruned, not trained."""

        def make() -> dict[str, Measurement]:
            plan = self.plan(name, ratio)
            teacher = copy.deepcopy(self.whole)
            report = vislr.apply(self.pipe, plan, name="cut")
            try:
                return self.judge(teacher)
            finally:
                vislr.remove(self.pipe, report)

        return self.cell(f"before-{name}-{ratio}", make)

    def after(self, name: str, ratio: float, seed: int) -> dict[str, Measurement]:
        """Pruned and trained as every other: the same steps, pictures and objective."""

        def make() -> dict[str, Measurement]:
            plan = self.plan(name, ratio)
            teacher, kept = copy.deepcopy(self.whole), copy.deepcopy(self.whole.state_dict())
            report = vislr.apply(self.pipe, plan, name="cut")
            wanted = RecoverySection(
                steps=self.a.recovery_steps, held_out=HeldOutConfig(fraction=0.1, every=0),
                optim=OptimConfig(lr=self.a.lr, batch=16, weight_decay=1e-4, betas=(0.9, 0.999)),
                sample=SampleConfig(prompts=[self.judged[0].caption], steps=self.a.steps), checkpoint_every=100,
            )  # fmt: skip
            folder = self.out / "recovery" / f"{name}-{ratio}-{seed}"
            try:
                recover(
                    self.pipe, copy.deepcopy(teacher), plan, wanted, data=DataConfig(folder=str(self.folder)),
                    folder=folder, seed=seed, resume=(folder / "checkpoints").is_dir(), base=self.a.model,
                )  # fmt: skip
                return self.judge(teacher)
            finally:
                vislr.remove(self.pipe, report)
                self.whole.load_state_dict(kept)

        return self.cell(f"after-{name}-{ratio}-seed{seed}", make)

    def latency(self) -> dict[str, Measurement]:
        """Time of a forward at each ratio of laptop's plans, beside the FLOPs that are left."""

        def make() -> dict[str, Measurement]:
            batch = self.tests[0]
            models = {"whole": copy.deepcopy(self.whole)}
            shares = {}
            for ratio in (0.25, 0.5):
                models[f"laptop {ratio}"] = copy.deepcopy(self.whole)
                report = vislr.apply(models[f"laptop {ratio}"], self.plan("laptop", ratio))
                assert report.flops is not None
                shares[f"laptop {ratio}"] = report.flops[1] / report.flops[0]

            def runner(model: Any) -> Callable[[], Any]:
                def once() -> Any:
                    with torch.no_grad():
                        return model(**batch)

                return once

            times = measure.interleaved({name: runner(model) for name, model in models.items()}, rounds=20)
            flops = {
                f"{name} FLOPs left": Measurement(share, None, 1, None, "ratio", "FLOPs after over before")
                for name, share in shares.items()
            }
            return times | flops

        return self.cell("latency", make)

    def additivity(self) -> dict[str, Measurement]:
        """Of the output losses, on random subsets."""

        def make() -> dict[str, Measurement]:
            inventory = prune.units_of(self.pipe)
            scores = self.criterion("laptop").score(self.pipe, inventory)
            report = prune.additivity(
                self.pipe, self.calibration, scores, inventory, subsets=48, folder=self.out / "scores", progress=False
            )
            prune.draw_additivity(report, self.out / "additivity.png")
            return {"pearson": report.pearson, "slope": report.slope}

        return self.cell("additivity", make)


def draw(figures: dict[str, Measurement], names: list[str], path: Path) -> None:
    """KID, retrieval and distance over the ratio, before recovery as lines, after it as dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, what in zip(figure.subplots(1, 3), ("kid", "retrieval", "distance"), strict=True):
        for number, name in enumerate(names):
            values = [figures[f"before {name} {ratio} {what}"].value for ratio in RATIOS]
            axis.plot([100 * r for r in RATIOS], values, color=f"C{number}", label=name, marker=".")
            for ratio, seeds in RECOVERED.items():
                keys = [f"after {name} {ratio} seed {seed} {what}" for seed in seeds]
                done = [figures[key].value for key in keys if key in figures]
                axis.scatter([100 * ratio] * len(done), done, color=f"C{number}", marker="*", s=60)
        if f"whole {what}" in figures:
            axis.axhline(figures[f"whole {what}"].value, color="0.5", linestyle=":")
        axis.set(xlabel="% of the parameters removed", ylabel=what)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7, title="line: before, star: after recovery")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64, help="pictures that are judged")
    parser.add_argument("--prompts", type=int, default=24, help="pictures for the contribution of a unit")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--pictures", type=int, default=500, help="pictures to recover with")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--recovery-steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--no-record", action="store_true")
    a = parser.parse_args()
    began = time.time()
    bench = Bench(a)
    names = bench.names()
    figures: dict[str, Measurement] = {
        f"whole {key}": one for key, one in bench.cell("whole", lambda: bench.judge(None)).items()
    }
    for name in names:
        for ratio in RATIOS:
            figures |= {f"before {name} {ratio} {key}": one for key, one in bench.before(name, ratio).items()}
    baselines = [name for name in names if name not in ("laptop", "hierarchical")]
    for ratio, seeds in RECOVERED.items():
        near = min(RATIOS, key=lambda other: abs(other - ratio))
        best = min(baselines, key=lambda name: figures[f"before {name} {near} kid"].value)
        for name in ("laptop", "hierarchical", best):
            for seed in seeds:
                done = bench.after(name, ratio, seed)
                figures |= {f"after {name} {ratio} seed {seed} {key}": one for key, one in done.items()}
    figures |= {f"additivity {key}": one for key, one in bench.additivity().items()}
    figures |= {f"latency {key}": one for key, one in bench.latency().items()}
    draw(figures, names, a.out / "quality.png")
    seconds = [json.loads(path.read_text())["seconds"] for path in (a.out / "cells").glob("*.json")]
    lines = [f"{name}: {figure}" for name, figure in figures.items()]
    for what in ("kid", "retrieval", "distance"):
        groups: dict[str, list[float]] = {}
        for key, one in figures.items():
            if key.startswith("after ") and " 0.5 seed " in key and key.endswith(what):
                groups.setdefault(key.split(" ")[1], []).append(one.value)
        for name, values in groups.items():
            lines.append(
                f"after {name} 0.5 {what}: mean {statistics.mean(values):.4g}, range {min(values):.4g} to "
                f"{max(values):.4g} over {len(values)} seeds"
            )
    lines.append("claims: LAPTOP-Diff halves the drop of the next method at 50 %; HierarchicalPrune: pruning without")
    lines.append("recovery collapses at 20 % (79 % worse), 2.5 % worse with it")
    lines.append(
        f"{sum(seconds) / 60:.0f} min of measuring in all cells, {(time.time() - began) / 60:.0f} min this run"
    )
    print("\n".join(lines))
    if not a.no_record:
        command = f"python benchmarks/prune_quality.py --model {a.model} --out runs/prune-quality/{a.model}"
        for name in ("count", "prompts", "samples", "pictures", "steps", "guidance", "recovery_steps", "lr"):
            if getattr(a, name) != parser.get_default(name):
                command += f" --{name.replace('_', '-')} {getattr(a, name)}"
        print(
            measure.write_record(
                f"prune-quality-{a.model}", figures, log="\n".join(lines) + "\n", command=command, seed=0
            )
        )


if __name__ == "__main__":
    main()
