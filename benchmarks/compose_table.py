"""Every way of composing adapters on 100 fixed sets of two to five: quality of each element, and cost. Writes a record.

    python benchmarks/compose_table.py
    python benchmarks/compose_table.py --sets 8 --methods base merge composite cmlora --dry

Trains the testbed's adapters first (15 LoRAs; see compose_testbed.py), profiles them, draws every set with every
method, and each adapter alone, and judges. What is done is kept in `--folder` and not done again: a stopped run goes
on, and further methods or sets only cost themselves. Beside vislr's methods: diffusers' own `set_adapters`, and peft's
`add_weighted_adapter` ("peft-linear", "peft-ties", "peft-dare_linear"). With the defaults about 2 hours on two cores;
a second process with `--dry` and some of the methods shares the work. `--sets 8` is a tenth of the drawing. The record
holds the tables and a sheet of pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compose_testbed import ComposedSet, Referee, parts, sets, singles, train
from PIL import Image
from tqdm import tqdm

import vislr
from vislr import compose, measure
from vislr.compose.costing import formula
from vislr.core.files import atomic_path, write_json
from vislr.data import make_grid
from vislr.measure.measurement import Measurement, proportion_interval
from vislr.train import sample_images

OURS = ("merge", "svd", "ties", "dare_ties", "magnitude", "switch", "composite", "w_switch", "w_composite")
# CMLoRA as specified, and the attempts at making it better.
VARIANTS: dict[str, dict[str, Any]] = {
    "cmlora": {},
    "cmlora-no-cache": {"cache": None},
    "cmlora-online": {"mode": "online"},
    "cmlora-decay": {"decay": "geometric"},
    "cmlora-beta-1.5": {"beta": 1.5},
}
PEERS = ("diffusers", "peft-linear", "peft-ties", "peft-dare_linear")
# Each adapter by itself, on scenes that ask for nothing else new.
ALONE = "alone"
METHODS = ("base", *OURS, *VARIANTS, *PEERS)


@contextlib.contextmanager
def composed(
    pipe: Any, method: str, one: ComposedSet, weight: float, profiles: dict[str, Any], steps: int, costs: dict
) -> Iterator:
    """The pipeline under a method; gives its cost in full forwards a step, which `costs` keeps by their number."""
    names = [part.adapter for part in one.parts]
    weights = [weight] * len(names)
    if method == "base":
        yield 1.0
    elif method in ("diffusers", ALONE):
        pipe.set_adapters(names, weights)
        try:
            yield 1.0
        finally:
            vislr.set_adapters(pipe, [])
    elif method in PEERS:
        with peft_weighted(pipe.unet, names, weights, method.removeprefix("peft-")):
            yield 1.0
    else:
        plan = planned(pipe, method, one, weight, profiles, steps)
        # All adapters of the testbed have one shape: what counts is how many there are.
        if (method, len(names)) not in costs:
            costs[method, len(names)] = compose.cost(pipe, plan).forwards
        with compose.composed(pipe, plan):
            yield costs[method, len(names)]


def planned(
    pipe: Any, method: str, one: ComposedSet, weight: float, profiles: dict[str, Any], steps: int
) -> compose.ComposePlan:
    """The plan of one of vislr's methods for a set."""
    names = [part.adapter for part in one.parts]
    options: dict[str, Any] = {"steps": steps}
    if method.startswith("w_"):
        options |= {"prompt": one.scene.caption, "triggers": [part.trigger for part in one.parts]}
    if method in VARIANTS:
        options |= {"profiles": [profiles[name] for name in names], **VARIANTS[method]}
    return compose.compose_plan(pipe, names, [weight] * len(names), method.partition("-")[0], **options)


@contextlib.contextmanager
def peft_weighted(unet: Any, names: list[str], weights: list[float], way: str) -> Iterator[None]:
    """peft's own combination of adapters that are on the model, as the one active adapter."""
    from peft import LoraConfig, LoraModel

    known = dict(unet.peft_config)
    first = known[names[0]]
    config = LoraConfig(r=first.r, lora_alpha=first.lora_alpha, target_modules=first.target_modules)
    tuner: Any = LoraModel(unet, config, "scratch")
    tuner.peft_config.update(known)
    density = {} if way == "linear" else {"density": 0.5}
    try:
        tuner.add_weighted_adapter(names, weights, "weighted", combination_type=way, **density)
        tuner.set_adapter("weighted")
        yield
    finally:
        for name in ("weighted", "scratch"):
            if name in unet.peft_config:
                tuner.delete_adapter(name)
        vislr.set_adapters(unet, [])


def draw(a: argparse.Namespace, pipe: Any, chosen: list[ComposedSet], methods: list[str], profiles: dict) -> None:
    """Draw what is not there yet: FOLDER/pictures/SETUP/METHOD/SET-SEED.png and SET.json with cost and seconds."""
    todo = [(number, method) for number in range(len(chosen)) for method in methods]
    costs: dict[tuple[str, int], float] = {}
    for number, method in tqdm(todo, desc="drawing", unit="set"):
        one, out = chosen[number], place(a, method)
        note = out / f"{number:03d}.json"
        if note.is_file():
            continue
        seeds = list(range(1000 * number, 1000 * number + a.seeds))
        with composed(pipe, method, one, a.weight, profiles, a.draw_steps, costs) as cost:
            start = time.perf_counter()
            pictures = sample_images(
                pipe, [one.scene.caption] * a.seeds, seeds, steps=a.draw_steps, guidance=a.guidance, batch=a.seeds
            )
            seconds = (time.perf_counter() - start) / a.seeds
        for seed, picture in zip(seeds, pictures, strict=True):
            with atomic_path(out / f"{number:03d}-{seed}.png") as temporary:
                picture.save(temporary, format="png")
        write_json(note, {"forwards": cost, "seconds": seconds, "caption": one.scene.caption})


def place(a: argparse.Namespace, method: str) -> Path:
    """Where a method's pictures lie."""
    setup = f"{a.base}-{a.train_steps}-{a.rank}-{a.lr:g}-{a.draw_steps}-{a.guidance:g}-{a.weight:g}"
    return a.folder / "pictures" / setup / method


def pictures_of(a: argparse.Namespace, method: str, number: int) -> list[Image.Image]:
    """What was drawn for a set."""
    files = sorted(place(a, method).glob(f"{number:03d}-*.png"))[: a.seeds]
    return [Image.open(file).convert("RGB") for file in files]


def judge(a: argparse.Namespace, chosen: list[ComposedSet], methods: list[str]) -> tuple[dict[str, Measurement], str]:
    """The table: by method and number of adapters, and over all of them by kind of element."""
    referee = Referee(a.judge)
    hits: dict[tuple[str, str], list[bool]] = {}
    aligned: dict[tuple[str, str], list[float]] = {}
    shown = ["truth", ALONE, *methods]
    for method in tqdm(shown, desc="judging", unit="method"):
        for number, one in enumerate(singles(a.alone) if method == ALONE else chosen):
            images = [one.scene.image()] if method == "truth" else pictures_of(a, method, number)
            right, near = referee.judged(one, images)
            groups = [f"N={len(one.parts)}", "all"]
            for part in one.parts:
                for group in (*groups, part.kind):
                    hits.setdefault((method, group), []).extend(right[part.adapter])
            for group in groups:
                aligned.setdefault((method, group), []).extend(near)
    columns = [f"N={n}" for n in (1, 2, 3, 4, 5)] + ["all", "style", "concept", "ground"]
    columns = [column for column in columns if any((method, column) in hits for method in shown)]
    figures, lines = {}, [f"{'elements right':22}" + "".join(f"{column:>9}" for column in columns) + f"{'align':>9}"]
    how = "share of elements nearest to the scene as asked for, among renderings with that element replaced"
    for method in shown:
        row = f"{method:22}"
        for column in columns:
            values = hits.get((method, column), [])
            if not values:
                row += " " * 9
                continue
            count, n = sum(values), len(values)
            figures[f"{method}, {column}"] = Measurement(
                count / n, proportion_interval(count, n), n, None, "share", f"{how}; interval: Wilson score, 95 %",
                referee.hash,
            )  # fmt: skip
            row += f"{count / n:9.3f}"
        near = aligned[method, "all"]
        row += f"{sum(near) / len(near):9.3f}"
        lines.append(row)
    return figures, "\n".join(lines)


def costs_by_number(
    a: argparse.Namespace, pipe: Any, chosen: list[ComposedSet], methods: list[str], profiles: dict[str, Any]
) -> tuple[dict[str, Measurement], str]:
    """Forwards a step and seconds a picture by number of adapters; CMLoRA's forwards beside its formula."""
    numbers = sorted({len(one.parts) for one in chosen})
    heads = "".join(f"{f'N={n}':>9}" for n in numbers)
    figures, lines = {}, [f"{'forwards a step':22}{heads}   {heads} seconds a picture"]
    for method in methods:
        forwards, times = "", ""
        for n in numbers:
            of_size = [number for number, one in enumerate(chosen) if len(one.parts) == n]
            notes = [json.loads((place(a, method) / f"{number:03d}.json").read_text()) for number in of_size]
            counted = notes[0]["forwards"]
            seconds = sorted(note["seconds"] for note in notes)
            middle = seconds[len(seconds) // 2]
            forwards, times = forwards + f"{counted:9.3f}", times + f"{middle:9.2f}"
            how = "counted on the pipeline's structure"
            figures[f"{method}, N={n}, forwards a step"] = Measurement(counted, None, 1, None, "full forwards", how)
            figures[f"{method}, N={n}, seconds a picture"] = Measurement(
                middle, (seconds[0], seconds[-1]), len(seconds), None, "s", "median over the sets; interval: range"
            )
        lines.append(f"{method:22}{forwards}   {times}")
        if method in VARIANTS:
            row = f"{'  by the formula':22}"
            for n in numbers:
                one = next(one for one in chosen if len(one.parts) == n)
                plan = planned(pipe, method, one, a.weight, profiles, a.draw_steps)
                rho = compose.cost(pipe, plan).rho
                row += (
                    f"{formula(n, 1.0 if rho is None else rho, len(plan.refresh.steps(plan.steps)), plan.steps):9.3f}"
                )
            lines.append(row)
    return figures, "\n".join(lines)


def sheet(a: argparse.Namespace, chosen: list[ComposedSet], methods: list[str]) -> Image.Image:
    """The first sets, a row for each method, below the scenes as asked for."""
    few = chosen[:8]
    rows = [[one.scene.image() for one in few]]
    rows += [[pictures_of(a, method, number)[0] for number in range(len(few))] for method in methods]
    return make_grid(rows, row_labels=["asked for", *methods], column_labels=[one.scene.caption for one in few])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="emoji-unet")
    parser.add_argument("--sets", type=int, default=100, help="how many of the fixed sets")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=2, help="pictures for each set and method")
    parser.add_argument("--alone", type=int, default=4, help="scenes for each adapter by itself")
    parser.add_argument("--draw-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--weight", type=float, default=0.8, help="of every adapter, as in the papers")
    parser.add_argument("--train-steps", type=int, default=240)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pictures", type=int, default=160, help="scenes that an adapter is trained on")
    parser.add_argument("--judge", default="efficientnet", choices=("efficientnet", "emoji-net"))
    parser.add_argument("--folder", type=Path, default=Path("runs/compose-table"))
    parser.add_argument("--name", help="of the record; default: compose-table-BASE")
    parser.add_argument("--dry", action="store_true", help="write no record")
    a = parser.parse_args()

    chosen = sets(a.sets)
    needed = list(dict.fromkeys(part for one in chosen for part in one.parts))
    files = {
        part.adapter: train(part, a.base, a.folder, a.train_steps, a.rank, a.lr, a.pictures)
        for part in tqdm([part for part in parts() if part in needed], desc="adapters")
    }
    pipe = vislr.load(a.base)
    pipe.set_progress_bar_config(disable=True)
    for name, file in files.items():
        vislr.load_adapter(pipe, file, name=name)
    vislr.set_adapters(pipe, [])
    profiles = {}
    for name, file in files.items():
        found = compose.read_profile(file)
        if found is None:
            prompts = ["noto style, a cat face", "twemoji style, a red apple"]
            (found,) = compose.profile_adapters(pipe, [name], prompts, steps=a.draw_steps, guidance=a.guidance)
            compose.write_profile(found, file)
        profiles[name] = found
    draw(a, pipe, chosen, a.methods, profiles)
    draw(a, pipe, singles(a.alone), [ALONE], profiles)
    figures, table = judge(a, chosen, a.methods)
    lines = [
        f"{a.base}, {a.sets} sets, {a.seeds} seeds, {a.draw_steps} steps, weight {a.weight:g}, judged by {a.judge}"
    ]
    high, low = compose.split_profiles(list(profiles.values()))
    lines += [f"high: {', '.join(high)}", f"low: {', '.join(low)}", table]
    more, table = costs_by_number(a, pipe, chosen, a.methods, profiles)
    figures |= more
    lines.append(table)
    if {"diffusers", "merge"} <= set(a.methods):
        same = all(
            one.tobytes() == other.tobytes()
            for number in range(len(chosen))
            for one, other in zip(pictures_of(a, "diffusers", number), pictures_of(a, "merge", number), strict=True)
        )
        lines.append(f"merge and diffusers' set_adapters: {'the same pictures' if same else 'pictures differ'}")
    log = "\n".join(lines) + "\n"
    print(log, end="")
    picture = a.folder / "sheet.png"
    sheet(a, chosen, a.methods).quantize(256).save(picture)  # half the bytes
    if not a.dry:
        command = (
            f"python benchmarks/compose_table.py --base {a.base} --sets {a.sets} --seeds {a.seeds} "
            f"--alone {a.alone} --train-steps {a.train_steps} --draw-steps {a.draw_steps} "
            f"--methods {' '.join(a.methods)}"
        )
        path = measure.write_record(a.name or f"compose-table-{a.base}", figures, log=log, command=command, seed=7)
        shutil.copyfile(picture, path / "pictures.png")
        print(path)


if __name__ == "__main__":
    main()
