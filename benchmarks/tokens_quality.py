"""Quality against FLOPs saved on an embedded pipeline: AT-EDM, ToMe, random and even choices, early steps or not.

    python benchmarks/tokens_quality.py --model emoji-unet --headline 0.1
    python benchmarks/tokens_quality.py --model emoji-mmdit --saved 0.1 0.2 0.3 0.388 0.5

Every cell of the grid (method, share saved, early steps, seed) is kept in the folder and not made again: stopped, it
goes on. A share that a model cannot reach is noted with the reachable maximum. Three seeds at 38.8 %, or at
`--headline` where a model cannot save that, one elsewhere. Needs the extra `measure`. Writes a record when the grid is
whole.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch

import vislr
from vislr import measure, zoo
from vislr.anatomy import denoiser_of
from vislr.core.errors import ConfigError
from vislr.core.files import read_json, write_json
from vislr.measure import Measurement
from vislr.tokens import at_edm_plan, plan_flops, tome_plan
from vislr.train import sample_images

PUBLISHED = 0.388
METHODS = ("at-edm", "tome", "random", "stride")
GUIDANCE = 4.0


def plan_for(pipe: Any, method: str, saved: float, early: float, steps: int) -> Any:
    if method == "tome":
        return tome_plan(pipe, flops_saved=saved, early=early, steps=steps)
    criterion = "g-wpr" if method == "at-edm" else method
    return at_edm_plan(pipe, flops_saved=saved, early=early, steps=steps, criterion=criterion)


def trajectory(pipe: Any, captions: list[str], steps: int) -> list[dict[str, Any]]:
    """What the denoiser was asked in a dense run: real latents at every step, as keyword arguments."""
    denoiser, seen = denoiser_of(pipe)[1], []
    names = ("sample", "timestep", "encoder_hidden_states")

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        seen.append({key: copy.deepcopy(value) for key, value in given.items() if key != "return_dict"})

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    draw(pipe, captions, 1000, steps)
    handle.remove()
    return seen


def draw(pipe: Any, captions: list[str], seed: int, steps: int) -> list[Any]:
    seeds = [seed * 10_000 + i for i in range(len(captions))]
    return sample_images(pipe, captions, seeds, steps=steps, guidance=GUIDANCE, batch=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--saved", nargs="*", type=float, default=[0.05, 0.1, 0.2, 0.3, PUBLISHED, 0.5])
    parser.add_argument("--headline", type=float, default=PUBLISHED, help="the share of --saved that gets three seeds")
    parser.add_argument("--name", default="tokens-quality", help="of the record")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=None)
    a = parser.parse_args()
    if a.headline not in a.saved:
        parser.error(f"--headline {a.headline:g} is not one of --saved {' '.join(f'{s:g}' for s in a.saved)}")
    folder = a.folder or Path("runs") / f"tokens-quality-{a.model}"

    pipe = vislr.load(a.model)
    pipe.set_progress_bar_config(disable=True)
    pictures = zoo.images(style="noto", split="train")
    chosen = pictures[:: max(1, len(pictures) // a.count)][: a.count]
    captions, names = [p.caption for p in chosen], [p.name for p in chosen]
    net = measure.feature_net()
    # Spread over all: they come in the order of their categories.
    unused = [p for p in pictures if p.name not in set(names)]
    reference = net.features(unused[:: max(1, len(unused) // (2 * a.count))])
    gallery = measure.prototypes([p for p in zoo.images() if p.style != "noto"], net=net, cache=folder / "cache")
    denoiser = denoiser_of(pipe)[1]
    teacher = copy.deepcopy(denoiser)
    asked = trajectory(pipe, captions[:8], a.steps)

    def judged(seed: int) -> dict[str, Any]:
        features = net.features(draw(pipe, captions, seed, a.steps))
        return {
            "retrieval": measure.retrieval(features, names, gallery).to_dict(),
            "kid": measure.kid(features, reference).to_dict(),
        }

    def cell(method: str, saved: float, early: float, seed: int) -> dict[str, Any]:
        if method == "dense":
            return judged(seed)
        try:
            plan = plan_for(pipe, method, saved, early, a.steps)
        except ConfigError as error:
            return {"unreachable": str(error)}
        counted = plan_flops(pipe, plan)
        report = vislr.apply(pipe, plan)
        try:
            distance = measure.teacher_distance(denoiser, teacher, asked)
            return {"saved": counted.saved, "teacher_distance": distance.to_dict(), **judged(seed)}
        finally:
            vislr.remove(pipe, report)

    # ToMe has early steps where blocks are pruned inside of a UNet.
    grid = [("dense", 0.0, 0.0, seed) for seed in range(3)]
    for saved in a.saved:
        for method in METHODS:
            for early in (0.0, 0.3):
                if early and method == "tome" and not hasattr(pipe, "unet"):
                    continue
                grid += [(method, saved, early, seed) for seed in range(3 if saved == a.headline else 1)]
    results = {}
    for number, (method, saved, early, seed) in enumerate(grid):
        key = f"{method} saved {saved:g} early {early:g} seed {seed}"
        path = folder / f"{key.replace(' ', '-')}.json"
        if not path.is_file():
            write_json(path, cell(method, saved, early, seed))
        results[key] = read_json(path)
        short = {k: v if isinstance(v, (str, float)) else round(v["value"], 4) for k, v in results[key].items()}
        print(f"[{number + 1}/{len(grid)}] {key}: {json.dumps(short)}", flush=True)
    figures = {}
    for key, found in results.items():
        for metric, value in found.items():
            if isinstance(value, dict):
                settings = value["settings"] | {"share of the FLOPs saved": found.get("saved", 0.0)}
                figures[f"{key} {metric}"] = Measurement.from_dict(value | {"settings": settings})
    log = "".join(f"{name}: {one}\n" for name, one in figures.items())
    log += "".join(f"{key}: {found['unreachable']}\n" for key, found in results.items() if "unreachable" in found)
    command = f"python benchmarks/tokens_quality.py --model {a.model} --saved {' '.join(f'{s:g}' for s in a.saved)}"
    command += f" --headline {a.headline:g} --count {a.count} --steps {a.steps}"
    print(measure.write_record(f"{a.name}-{a.model}", figures, log=log, command=command, seed=0))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
