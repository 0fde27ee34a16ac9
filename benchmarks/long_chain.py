"""The long chain: prune, recover, fuse, quantise, tokens, cache, two adapters composed; what each step costs and keeps.

    python benchmarks/long_chain.py --model emoji-unet           # go on until every step is there, then record
    python benchmarks/long_chain.py --model emoji-unet --subset  # minutes: tiny budgets, no record
    python benchmarks/long_chain.py --model emoji-unet --cost    # say what the steps take, and stop

The chain is configs/recipes/small-fast.yaml with another base: run the same command again to go on after the last
finished step. After each step: bytes of the denoiser, seconds a picture against the base, KID and retrieval. At the
end: the folder loaded in a new process by vislr and by diffusers alone, replayed from the untouched base, and its
run-time tail undone, each compared bit for bit. Needs the extra `measure`.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

import vislr
from vislr import measure, replaying
from vislr.core.arguments import find_config, read_section
from vislr.measure import Measurement
from vislr.pipelines.recipe_run import Run, RunConfig, table
from vislr.pipelines.recipe_steps import PIPELINE
from vislr.record import entries_of
from vislr.train import sample_images

RECIPE = "recipes/small-fast.yaml"
# What is drawn, and its factor to the unit of `TITLES`.
FIGURES = {"bytes": 1e-6, "seconds a picture": 1.0, "KID": 1.0, "retrieval": 1.0}
TITLES = {"bytes": "denoiser, MB", "seconds a picture": "seconds a picture", "KID": "KID", "retrieval": "retrieval"}
IN_NEW_PROCESS = """
import sys, hashlib, vislr, torch
from diffusers import DiffusionPipeline
from vislr.train import sample_images
prompt, steps, folder, *missing = sys.argv[1:]
for pipe in (vislr.load(folder), DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(missing))):
    image = sample_images(pipe, [prompt], [1], steps=int(steps), guidance=4.0)[0]
    print("MADE", hashlib.sha256(image.tobytes()).hexdigest())
"""


def settings(a: argparse.Namespace) -> dict[str, Any]:
    """The recipe for this base; with --subset its budgets are a few steps."""
    values = yaml.safe_load(find_config(RECIPE).read_text())
    values |= {"base": a.model, "out": str(a.out), "device": a.device}
    if not a.subset:
        return values
    values["data"]["folder"] = "zoo:noto:24"
    values["judge"] |= {"pictures": 8, "rounds": 1, "steps": 2, "prompts": values["judge"]["prompts"][:2]}
    for step in values["steps"]:
        ((verb, section),) = step.items()
        if verb in ("train", "recover"):
            short = section["recovery"] if verb == "recover" else section
            short |= {"steps": 2, "sample": {"steps": 1, "prompts": values["judge"]["prompts"][:1]}}
            short["optim"] |= {"batch": 2}
        if verb == "train":
            section["data"]["folder"] = section["data"]["folder"].rpartition(":")[0] + ":8"
        if verb == "prune":
            section["plan"]["samples"], section["plan"]["batch"] = 4, 2
        if verb == "quantize":
            section["calibration"] = {"trajectories": 1, "batch": 1, "steps": 2}
            section["ways"] = False
        if verb in ("tokens", "cache", "compose"):
            section["steps"] = 2
    return values


def look(pipe: Any, prompt: str, steps: int) -> str:
    """The bits of one picture."""
    return hashlib.sha256(sample_images(pipe, [prompt], [1], steps=steps, guidance=4.0)[0].tobytes()).hexdigest()


def checks(run: Run) -> dict[str, bool]:
    """What must be equal bit for bit, and whether it is."""
    judge = run.config.judge
    prompt, steps = judge.prompts[0], judge.steps
    last, quantised = (run.out / step.name / PIPELINE for step in (run.steps[-1], *_step(run, "quantize")))
    pipe = vislr.load(last)
    whole, before = look(pipe, prompt, steps), look(vislr.load(quantised), prompt, steps)
    # SD3 without its third text encoder: diffusers wants that said.
    missing = [name for name, part in pipe.components.items() if part is None and name.endswith("_3")]
    command = [sys.executable, "-W", "ignore", "-c", IN_NEW_PROCESS, prompt, str(steps), str(last), *missing]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    made = [line.split()[1] for line in output if line.startswith("MADE")]
    replayed, notes = replaying.replay(last, run.config.base)
    tail = len(entries_of(pipe)) - len(entries_of(vislr.load(quantised)))
    undone, _ = replaying.replay(last, run.config.base, leave_out=tail)
    found = {
        "vislr.load in a new process": made[0] == whole,
        "from_pretrained in a new process": made[1] == before,
        "replayed weights": "bit for bit" in notes[0],
        "replayed from the base": look(replayed, prompt, steps) == whole,
        "tail left out": look(undone, prompt, steps) == before,
    }
    for entry in reversed(entries_of(replayed)[-tail:]):
        vislr.remove(replayed, entry.report)
    return found | {"tail removed": look(replayed, prompt, steps) == before}


def _step(run: Run, verb: str) -> list[Any]:
    return [step for step in run.steps if step.verb == verb]


def draw(rows: list[tuple[str, dict[str, Measurement]]], path: Path) -> None:
    """Bars of every figure over the steps, with 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [name for name in FIGURES if any(name in own for _, own in rows)]
    figure = Figure(figsize=(3.6 * len(shown), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        own = [(step, one[name]) for step, one in rows if name in one]
        values = [FIGURES[name] * one.value for _, one in own]
        ends = [[FIGURES[name] * end for end in one.interval or (one.value, one.value)] for _, one in own]
        errors = [[max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
                  [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]]  # fmt: skip
        axis.bar(range(len(own)), values, yerr=errors, color="C0", error_kw={"elinewidth": 0.8})
        axis.set_xticks(range(len(own)), [step.partition("-")[2] or step for step, _ in own], rotation=60, ha="right")
        axis.set_title(TITLES[name], fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-unet", help="embedded pipeline, diffusers folder or hub id")
    parser.add_argument("--out", type=Path, help="folder of the run; default runs/long-chain/MODEL")
    parser.add_argument("--device", default=None, help="cpu, cuda; default: a GPU if there is one")
    parser.add_argument("--subset", action="store_true", help="minutes: tiny budgets, no record")
    parser.add_argument("--cost", action="store_true", help="say what the steps take, and stop")
    parser.add_argument("--no-record", action="store_true")
    a = parser.parse_args()
    name = Path(a.model).name
    a.out = a.out or Path("runs/long-chain") / (name + ("-subset" if a.subset else ""))
    run = Run(read_section(RunConfig, settings(a), where=RECIPE))
    print(run.costs(), flush=True)
    if a.cost:
        return
    rows = run.go()
    with torch.no_grad():
        equal = checks(run)
    lines = [table(rows, {}), *(f"{key}: {'equal' if value else 'DIFFERENT'}" for key, value in equal.items())]
    print("\n".join(lines))
    draw(rows, a.out / "chain.png")
    if not all(equal.values()):
        sys.exit(1)
    if a.subset or a.no_record:
        return
    figures = {f"{step} {key}": one for step, own in rows for key, one in own.items()}
    figures |= {key: Measurement(float(value), None, 1, 1, "equal", "a picture's bits") for key, value in equal.items()}
    command = f"python benchmarks/long_chain.py --model {a.model}"
    folder = measure.write_record(f"long-chain-{name}", figures, log="\n".join(lines) + "\n", command=command, seed=0)
    for picture in ("chain.png", "sheet.png"):
        (folder / picture).write_bytes((a.out / picture).read_bytes())
    print(folder)


if __name__ == "__main__":
    main()
