"""A held-out style learned by LoRA, ConvLoRA, FLoRA and SaRA with as many trained parameters each. Writes a record.

    python benchmarks/style_adapters.py --base emoji-unet --style outline
    python benchmarks/style_adapters.py --base emoji-unet --style fluent3d --seeds 0 1 2

Every method trains on the same pictures with the same noise. Its learning rate is the one of `--lr` with the lowest
held-out loss at the first seed; the other seeds run with it. Judged by the loss on concepts never trained on, and by
KID of pictures of unseen concepts against the style's own. Cells are runs of `vislr train` in
`runs/style-adapters/`; finished ones are not repeated, stopped ones go on. With the defaults about 35 minutes on two
idle cores; `--lr 1e-3` a third of it. Needs the extra `measure`. The record holds a picture.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from adapted_style import draw

import vislr
from vislr import measure, zoo
from vislr.adapters import adapter_parameters, attach, detach
from vislr.data import make_grid
from vislr.measure.measurement import Measurement
from vislr.pipelines import train_adapter
from vislr.train import AdapterSection

METHODS = ("lora", "convlora", "flora", "sara")


def section(method: str, size: int | None = None, model: Any = None) -> tuple[dict[str, Any], int]:
    """Fields of the adapter section with about `size` trained parameters, and how many it is."""

    def count(**fields: Any) -> int:
        change = AdapterSection(kind=method, **fields).to_change()  # type: ignore[arg-type]
        attached = attach(model, change, "count")
        found = sum(parameter.numel() for parameter in adapter_parameters(model, "count").values())
        detach(model, attached)
        return found

    if method == "sara":
        return {"count": size}, int(size or 0)
    tried = []
    for r in (4,) if size is None else range(1, 65):
        fields: dict[str, Any] = {"ranks": [r, r, 1.0, 1.0]} if method == "flora" else {"r": r}
        tried.append((fields, count(**fields)))
        if size is not None and tried[-1][1] > size:
            break
    return min(tried, key=lambda one: abs(one[1] - (size or 0)))


def data(style: str, count: int, folder: Path) -> tuple[Path, Path]:
    """`count` pictures of the style to train on, and the held-out concepts."""
    made = []
    for split, limit in (("train", count), ("held-out", None)):
        path = folder / f"{style}-{split}-{count}"
        if not path.is_dir():
            zoo.export(path, zoo.images(style=style, split=split)[:limit])
        made.append(path)
    return made[0], made[1]


def train(a: argparse.Namespace, method: str, fields: dict, lr: float, seed: int, folders: tuple[Path, Path]) -> Path:
    """One cell; its folder."""
    out = a.folder / f"{a.base}-{a.style}-{method}-{lr:g}-{seed}"
    flags = [f"--adapter.{key}={json.dumps(value)}" for key, value in fields.items()]
    code = train_adapter.main([
        "--model.base", a.base, "--data.folder", str(folders[0]), "--held_out.folder", str(folders[1]),
        "--adapter.kind", method, *flags, "--optim.lr", f"{lr:g}", "--steps", str(a.steps), "--seed", str(seed),
        "--held_out.every", "0", "--sample.steps", "1", "--output.folder", str(out), "--output.resume",
    ])  # fmt: skip
    if code:
        raise SystemExit(code)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="emoji-unet")
    parser.add_argument("--style", default="outline", choices=(*zoo.STYLES, *zoo.PROCEDURAL_STYLES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--pictures", type=int, default=200, help="to train on")
    parser.add_argument("--count", type=int, default=128, help="pictures drawn for KID")
    parser.add_argument("--draw-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/style-adapters"))
    parser.add_argument("--name", help="of the record; default: style-adapters-BASE-STYLE")
    parser.add_argument("--dry", action="store_true", help="write no record")
    a = parser.parse_args()
    folders = data(a.style, a.pictures, a.folder)
    pipe = vislr.load(a.base)
    model = copy.deepcopy(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
    # ConvLoRA of rank 4 says how many parameters everybody gets.
    size = section("convlora", None, model)[1]
    cells = {method: section(method, size, model) for method in a.methods}
    held_out = zoo.images(style=a.style, split="held-out")
    captions = [picture.caption for picture in held_out[:: max(1, len(held_out) // a.count)][: a.count]]
    net = measure.feature_net()
    style = zoo.images(style=a.style, split="train")
    target = net.features([picture.image() for picture in style[:: max(1, len(style) // (2 * a.count))]])
    drawn = draw(pipe, captions, a.draw_steps, a.guidance)
    figures: dict[str, Measurement] = {"kid, base": measure.kid(drawn, target, net=net)}
    lines = [f"{a.base}, style {a.style}, {a.pictures} pictures, {a.steps} steps, seeds {a.seeds}"]
    lines.append(f"base: kid {figures['kid, base']}")
    shown = min(8, len(captions))
    rows, labels = [drawn[:shown]], ["base"]
    for method, (fields, count) in cells.items():
        first = {lr: train(a, method, fields, lr, a.seeds[0], folders) for lr in a.lr}
        losses = {lr: loss_of(out)[1] for lr, out in first.items()}
        lr = min(losses, key=lambda one: losses[one])
        outs = [first[lr], *(train(a, method, fields, lr, seed, folders) for seed in a.seeds[1:])]
        after = [loss_of(out)[1] for out in outs]
        kids = []
        for out in outs:
            report = vislr.load_adapter(pipe, out / "adapter.safetensors", name="style")
            drawn = draw(pipe, captions, a.draw_steps, a.guidance)
            vislr.remove(pipe, report)
            kids.append(measure.kid(drawn, target, net=net))
        rows.append(drawn[:shown])
        labels.append(method)
        figures |= {f"kid, {method}, seed {seed}": kid for seed, kid in zip(a.seeds, kids, strict=True)}
        how = f"mean over seeds of the loss on {len(held_out)} held-out pictures; interval: smallest and largest"
        figures[f"held-out loss, {method}"] = Measurement(
            statistics.fmean(after), (min(after), max(after)), len(after), None, "loss", how,
            settings={"lr": lr, "parameters": count, **fields},
        )  # fmt: skip
        seconds = statistics.fmean(json.loads((out / "report.json").read_text())["seconds"] for out in outs)
        lines.append(
            f"{method} {fields}, {count:,} parameters, lr {lr:g} of {losses}: "
            f"held-out loss {loss_of(outs[0])[0]:.4f} -> {statistics.fmean(after):.4f} "
            f"({min(after):.4f} to {max(after):.4f}), "
            f"kid {', '.join(map(str, kids))}, {seconds:.0f} s of training"
        )
    truth = {picture.caption: picture.image() for picture in held_out}
    rows.append([truth[caption] for caption in captions[:shown]])
    labels.append("the style")
    grid = make_grid(rows, row_labels=labels, column_labels=captions[:shown])
    sheet = a.folder / f"{a.base}-{a.style}.png"
    grid.quantize(96).save(sheet, optimize=True)  # a third of the bytes
    log = "\n".join(lines) + "\n"
    print(log, end="")
    if not a.dry:
        command = (
            f"python benchmarks/style_adapters.py --base {a.base} --style {a.style} --steps {a.steps} "
            f"--lr {' '.join(f'{lr:g}' for lr in a.lr)} --seeds {' '.join(map(str, a.seeds))}"
        )
        name = a.name or f"style-adapters-{a.base}-{a.style}"
        path = measure.write_record(name, figures, log=log, command=command, seed=a.seeds[0])
        shutil.copyfile(sheet, path / "pictures.png")
        print(path)


def loss_of(run: Path) -> tuple[float, float]:
    """Held-out loss before and after a run."""
    found = json.loads((run / "report.json").read_text())["held_out"]["loss"]
    return found["before"], found["after"]


if __name__ == "__main__":
    main()
