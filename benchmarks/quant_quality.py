"""Quality of an embedded pipeline against bits and steps of EfficientDM, and what they cost.

    python benchmarks/quant_quality.py --model emoji-unet
    python benchmarks/quant_quality.py --model emoji-mmdit --updates 800 --only "W4A4"

Cells: full precision; then for W8A8, W4A8, W4A4 and W2A8 plain PTQ, + QALoRA (one rate for all layers), + scale-aware
rates, + step sizes by timestep (TALSQ). Of W8A7, which CPUs without VNNI multiply fast, PTQ alone. At W4A4 also
quantisation-aware training of all weights and step sizes, with the same loss and updates: what QALoRA's cost is
compared with. Three seeds at W4A4, one elsewhere. Every cell is kept in the folder and not made again: stopped, the
grid goes on, and a cell's fine-tuning from its checkpoint. Needs the extra `measure`.
Writes a record when the grid is whole.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vislr
from vislr import measure, zoo
from vislr.anatomy import denoiser_of
from vislr.anatomy.text import sequence_length
from vislr.core.files import read_json, write_json
from vislr.measure import Measurement
from vislr.quantize import QuantPlan, Trajectories, ptq_plan, quant_layers, sizes, trajectory_inputs
from vislr.train import sample_images
from vislr.train.efficientdm import TuneConfig, attach_qalora, guided, merge_qalora, output_of, tune

BITS = {"W8A8": (8, 8), "W8A7": (8, 7), "W4A8": (4, 8), "W4A4": (4, 4), "W2A8": (2, 8)}
METHODS = ("ptq", "qalora", "scale-aware", "talsq", "qat")
GUIDANCE = 4.0


class Whole(nn.Module):
    """A quantised layer whose every weight and step size is trained: the update has the weight's own shape."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.delta = nn.Parameter(torch.zeros(layer.shape))
        self.weight_scale = nn.Parameter(layer.weight_scale[:, 0].clone())
        self.input_scale = nn.Parameter(layer.input_scale.clone())
        self.input_zero = nn.Parameter(layer.input_zero.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, self.delta, self.weight_scale[:, None], self.input_scale, self.input_zero)


class Guided(nn.Module):
    """A denoiser's answer to a doubled batch after classifier-free guidance, as the sampler and the loss see it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, timestep: torch.Tensor, **asked: Any) -> torch.Tensor:
        both = torch.cat([timestep, timestep]) if timestep.dim() else timestep
        return guided(output_of(self.net(timestep=both, **asked)), GUIDANCE, doubled=True)


def halved(asked: dict[str, Any]) -> dict[str, Any]:
    """What `Guided` takes: a timestep for each answer."""
    timestep = asked["timestep"]
    return asked | {"timestep": timestep.chunk(2)[0] if timestep.dim() else timestep}


def put_whole(student: nn.Module) -> None:
    """`Whole` around every quantised layer."""
    for name, layer in quant_layers(student).items():
        parent, _, attribute = name.rpartition(".")
        setattr(student.get_submodule(parent), attribute, Whole(layer))


def mean_rate(student: nn.Module, reach: float) -> float:
    """The mean of the scale-aware rates: what one rate for all layers is set to."""
    rates = [float(layer.weight_scale.mean()) / reach for layer in quant_layers(student).values()]
    return sum(rates) / len(rates)


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of KID and of the guided distance for each method, by bits: means over seeds, and every seed as a dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    shown = [bits for bits in BITS if any(key.startswith(bits) for key in results)]
    for axis, (metric, title) in zip(
        figure.subplots(1, 2), (("kid", "KID"), ("guided_distance", "distance from the float model")), strict=True
    ):
        for at, method in enumerate(METHODS):
            for place, bits in enumerate(shown):
                own = [one[metric]["value"] for key, one in results.items() if key.startswith(f"{bits} {method} ")]
                if own:
                    x = place + (at - 2) * 0.17
                    axis.bar(x, sum(own) / len(own), 0.16, color=f"C{at}", label=method if bits == "W4A4" else None)
                    axis.plot([x] * len(own), own, "k.", markersize=3)
        whole = [one[metric]["value"] for key, one in results.items() if key.startswith("full") and metric in one]
        if whole:
            axis.axhline(sum(whole) / len(whole), color="k", linestyle=":", linewidth=1, label="full precision")
        axis.set_xticks(range(len(shown)), shown)
        axis.set_title(title, fontsize=10)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def scale_rate(rate: float, bits: int) -> float:
    """Rate of the weights' step sizes: those of 8 bits are a sixteenth of those of 4, and would be gone soon."""
    return rate / 2 ** max(0, bits - 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--only", nargs="*", choices=tuple(BITS), default=list(BITS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--updates", type=int, default=200, help="of every fine-tuning")
    parser.add_argument("--reach", type=float, default=300.0, help="mean step size over this is a layer's rate")
    parser.add_argument("--weight-scale-lr", type=float, default=1e-4, help="of weights of 4 and fewer bits")
    parser.add_argument("--input-lr", type=float, default=2e-3)
    parser.add_argument("--window", type=int, default=5, help="batches of trajectories that are learnt in random order")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tune-guidance", type=float, default=1.5, help="of the trajectories that are learnt from")
    parser.add_argument("--count", type=int, default=64, help="pictures that are judged")
    parser.add_argument("--seeds", type=int, default=3, help="at W4A4")
    parser.add_argument("--folder", type=Path, default=None, help="where cells are kept")
    parser.add_argument("--name", default=None, help="of the record; default quant-quality-MODEL")
    a = parser.parse_args()
    folder = a.folder or Path("runs") / f"quant-quality-{a.model}"

    pipe = vislr.load(a.model)
    pipe.set_progress_bar_config(disable=True)
    component, teacher = denoiser_of(pipe)
    pictures = zoo.images(style="noto", split="train")
    chosen = pictures[:: max(1, len(pictures) // a.count)][: a.count]
    captions, names = [p.caption for p in chosen], [p.name for p in chosen]
    others = [p.caption for p in pictures if p.name not in set(names)]
    options = {} if hasattr(pipe, "unet") else {"max_sequence_length": sequence_length(pipe)}
    runs = Trajectories(tuple(others[:: max(1, len(others) // 64)]), 16, a.batch, a.steps, GUIDANCE, 0, options)
    # What no fine-tuning sees: other captions, other noise.
    asked = trajectory_inputs(pipe, Trajectories(tuple(captions[:8]), 8, 4, a.steps, GUIDANCE, 1000, options), every=2)
    net = measure.feature_net()
    # Spread over all: they come in the order of their categories.
    unused = [p for p in pictures if p.name not in set(names)]
    reference = net.features(unused[:: max(1, len(unused) // (2 * a.count))])
    gallery = measure.prototypes([p for p in zoo.images() if p.style != "noto"], net=net, cache=folder / "cache")

    def judged(seed: int) -> dict[str, Any]:
        seeds = [seed * 10_000 + i for i in range(len(captions))]
        drawn = sample_images(pipe, captions, seeds, steps=a.steps, guidance=GUIDANCE, batch=8)
        features = net.features(drawn)
        return {
            "retrieval": measure.retrieval(features, names, gallery).to_dict(),
            "kid": measure.kid(features, reference).to_dict(),
        }

    def plan_of(bits: str, inputs: str) -> QuantPlan:
        path = folder / f"plan-{bits}-{inputs}.json"
        if not path.is_file():
            plan = ptq_plan(pipe, *BITS[bits], source=runs, inputs=inputs, observer="mse")
            write_json(path, plan.to_dict())
        return QuantPlan.from_dict(read_json(path))

    def cell(bits: str, method: str, seed: int, place: Path) -> dict[str, Any]:
        if method == "full precision":
            return judged(seed)
        student = copy.deepcopy(teacher).requires_grad_(False)
        started = time.monotonic()
        vislr.apply(student, plan_of(bits, "timestep" if method == "talsq" else "static"), undo=False)
        size, extra = sizes(student).total, {}
        if method != "ptq":
            trajectories = a.batch * max(1, a.updates // a.steps)
            rate = mean_rate(student, a.reach)
            config = TuneConfig(
                trajectories=trajectories, batch=a.batch, steps=a.steps, guidance=a.tune_guidance,
                rank=a.rank, reach=a.reach, lr=rate, scale_aware=method not in ("qalora", "qat"), seed=seed,
                weight_scale_lr=scale_rate(a.weight_scale_lr, BITS[bits][0]), input_lr=a.input_lr,
                window=a.window, checkpoint_every=100,
                train="full" if method == "qat" else "all",
            )  # fmt: skip
            if method == "qat":
                put_whole(student)
            else:
                attach_qalora(student, a.rank, seed=seed)
            result = tune(pipe, student, runs, config, folder=place, resume=True, progress=False)
            extra = {"minutes": (time.monotonic() - started) / 60, "updates": result.updates, "losses": result.losses,
                     "trained": sum(result.trained.values())}  # fmt: skip
            if method != "qat":
                merge_qalora(student)
        distance = measure.teacher_distance(student, teacher, asked)
        seen = measure.teacher_distance(Guided(student), Guided(teacher), map(halved, asked))
        pipe.register_modules(**{component: student})
        try:
            distances = {"teacher_distance": distance.to_dict(), "guided_distance": seen.to_dict()}
            return {"megabytes": size / 1e6, **distances, **extra, **judged(seed)}
        finally:
            pipe.register_modules(**{component: teacher})

    grid = [("", "full precision", seed) for seed in range(a.seeds)]
    for bits in a.only:
        for method in a.methods:
            if (method == "qat" and bits != "W4A4") or (method != "ptq" and bits == "W8A7"):
                continue
            grid += [(bits, method, seed) for seed in range(a.seeds if bits == "W4A4" and method != "qat" else 1)]
    results = {}
    for number, (bits, method, seed) in enumerate(grid):
        key = f"{bits} {method} seed {seed}".strip()
        path = folder / f"{key.replace(' ', '-')}.json"
        if not path.is_file():
            write_json(path, cell(bits, method, seed, folder / "tuning" / key.replace(" ", "-")))
        results[key] = read_json(path)
        short = {
            k: round(v["value"], 4) if isinstance(v, dict) else v for k, v in results[key].items() if k != "losses"
        }
        print(f"[{number + 1}/{len(grid)}] {key}: {json.dumps(short)}", flush=True)
    figures = {}
    for key, found in results.items():
        about = {name: found[name] for name in ("megabytes", "minutes", "updates", "trained") if name in found}
        for metric, value in found.items():
            if isinstance(value, dict):
                figures[f"{key} {metric}"] = Measurement.from_dict(value | {"settings": value["settings"] | about})
    log = "".join(f"{name}: {one}\n" for name, one in figures.items())
    log += "".join(
        f"{key}: {found['minutes']:.1f} minutes, {found['updates']} updates, {found['trained']:,} trained\n"
        for key, found in results.items()
        if "minutes" in found
    )
    command = f"python benchmarks/quant_quality.py --model {a.model} --only {' '.join(a.only)} --updates {a.updates}"
    command += f" --methods {' '.join(a.methods)} --rank {a.rank} --batch {a.batch}"
    command += f" --steps {a.steps} --count {a.count} --seeds {a.seeds}"
    command += f" --reach {a.reach:g} --weight-scale-lr {a.weight_scale_lr:g} --input-lr {a.input_lr:g}"
    command += f" --window {a.window} --tune-guidance {a.tune_guidance:g}"
    record = measure.write_record(a.name or f"quant-quality-{a.model}", figures, log=log, command=command, seed=0)
    draw(results, record / "quality.png")
    print(record)


if __name__ == "__main__":
    main()
