"""A LoRA made before pruning on the pruned pipeline: what of it is dropped, and whether the style is still there.

    python benchmarks/prune_adapter.py --model emoji-unet
    python benchmarks/prune_adapter.py --model emoji-unet --adapter my-style.safetensors --style outline

Trains a LoRA of one style on the whole pipeline (or takes one), removes units by LAPTOP-Diff at every ratio, loads the
same file again and judges pictures by KID to the style's own: whole and pruned, with and without the adapter. No
training after the cut. Runs are kept in --out and not repeated. Needs the extra `measure`. Writes a record.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import vislr
from vislr import measure, prune, zoo
from vislr.data import ImageFolder
from vislr.measure import Measurement
from vislr.pipelines import train_adapter
from vislr.train import sample_images
from vislr.train.calibration import calibration_inputs


def trained(a: argparse.Namespace, folder: Path) -> Path:
    """A LoRA of the style on the whole model; an interrupted training goes on."""
    out = a.out / f"lora-{a.rank}-{a.steps}"
    if not (out / "report.json").is_file():
        code = train_adapter.main([
            "--model.base", a.model, "--data.folder", str(folder), "--held_out.every", "0",
            "--adapter.kind", "lora", "--adapter.r", str(a.rank), "--optim.lr", f"{a.lr:g}", "--steps", str(a.steps),
            "--sample.steps", "1", "--output.folder", str(out), "--output.resume",
        ])  # fmt: skip
        if code:
            raise SystemExit(code)
    return out / "adapter.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--style", default="outline", choices=(*zoo.STYLES, *zoo.PROCEDURAL_STYLES))
    parser.add_argument("--adapter", type=Path, help="a file of any format, in place of training one")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=240, help="of training")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--pictures", type=int, default=200, help="to train on")
    parser.add_argument("--samples", type=int, default=128, help="for LAPTOP-Diff's scores")
    parser.add_argument("--count", type=int, default=96, help="pictures that are judged")
    parser.add_argument("--draw-steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--out", type=Path, help="default runs/prune-adapter/MODEL")
    parser.add_argument("--no-record", action="store_true")
    a = parser.parse_args()
    a.out = a.out or Path("runs/prune-adapter") / Path(a.model).name
    # Scores are made on what the model is for, not on what the adapter adds.
    folders = {style: a.out / f"pictures-{style}-{a.pictures}" for style in (a.style, "noto")}
    for style, folder in folders.items():
        if not folder.is_dir():
            zoo.export(folder, zoo.images(style=style, split="train")[: a.pictures])
    adapter = a.adapter or trained(a, folders[a.style])
    unseen = zoo.images(style=a.style, split="held-out")
    captions = [picture.caption for picture in unseen[:: max(1, len(unseen) // a.count)][: a.count]]
    known = zoo.images(style=a.style, split="train")
    net = measure.feature_net()
    target = net.features(known[:: max(1, len(known) // (2 * a.count))][: 2 * a.count])
    figures: dict[str, Measurement] = {}
    lines = [f"{a.model}, style {a.style}, LAPTOP-Diff, no training after the cut"]

    def judge(pipe: Any, name: str) -> None:
        drawn = sample_images(pipe, captions, list(range(len(captions))), steps=a.draw_steps, guidance=a.guidance)
        figures[name] = measure.kid(drawn, target, net=net)
        lines.append(f"{name}: {figures[name]}")
        print(lines[-1], flush=True)

    for ratio in (0.0, *a.ratios):
        pipe = vislr.load(a.model)
        name = f"{ratio:.0%} removed"
        if ratio:
            data = calibration_inputs(pipe, ImageFolder.with_captions(folders["noto"]), samples=a.samples)
            vislr.apply(pipe, prune.laptop_plan(pipe, data, ratio, folder=a.out / "scores"), undo=False)
        judge(pipe, f"{name}, without the adapter")
        report = vislr.load_adapter(pipe, adapter, name="style")
        judge(pipe, f"{name}, with the adapter")
        lines += [f"{name}: {note}" for note in report.notes if note.startswith("pruned model")]
    print("\n".join(lines))
    if not a.no_record:
        command = f"python benchmarks/prune_adapter.py --model {a.model} --style {a.style}"
        command += f" --ratios {' '.join(map(str, a.ratios))} --rank {a.rank} --steps {a.steps} --lr {a.lr:g}"
        name = f"prune-adapter-{Path(a.model).name}"
        print(measure.write_record(name, figures, log="\n".join(lines) + "\n", command=command, seed=0))


if __name__ == "__main__":
    main()
