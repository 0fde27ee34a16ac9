"""Does an adapter bring the embedded pipeline's pictures closer to its style? KID and a sheet of pictures.

    python benchmarks/adapted_style.py runs/quickstart/adapter --style outline

Draws the same captions and seeds with the adapter off and on and compares both with pictures of the style
by other concepts. The captions are of concepts that the base knows and the adapter's folder does not hold.
A few minutes on two cores; needs the extra `measure`. Writes a record.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

import vislr
from vislr import measure, zoo
from vislr.data import ImageFolder

BATCH = 16


def draw(
    pipe, captions: list[str], steps: int, guidance: float, *, batch: int = BATCH, seed: int = 0, **options
) -> list:
    """One picture a caption, each from its own seed; the first one's is `seed`."""
    pictures = []
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "guidance_scale": guidance, **options}
    for start in tqdm(range(0, len(captions), batch), desc="drawing"):
        some = captions[start : start + batch]
        seeds = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        pictures += pipe(some, generator=seeds, **call).images
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of `vislr train`")
    parser.add_argument("--style", required=True, choices=(*zoo.STYLES, *zoo.PROCEDURAL_STYLES))
    parser.add_argument("--base", default="emoji-unet")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--name", default="adapted-style")
    a = parser.parse_args()

    report = json.loads((a.run / "report.json").read_text())
    pipe = vislr.load(a.base)
    vislr.load_adapter(pipe, a.run / "adapter.safetensors", name="style")
    seen = {sample.caption for sample in ImageFolder.with_captions(report["data"]["folder"]).samples}
    unseen = [p for p in zoo.images(style=a.style, split="train") if p.caption not in seen]
    captions = [p.caption for p in unseen[:: max(1, len(unseen) // a.count)][: a.count]]
    chosen = set(captions)
    reference = [p.image() for p in zoo.images(style=a.style) if p.caption not in chosen and p.caption not in seen]
    net = measure.feature_net()
    target = net.features(reference[:: max(1, len(reference) // (2 * a.count))])
    figures = {}
    for name, on in (("before", []), ("after", ["style"])):
        vislr.set_adapters(pipe, on)
        figures[f"kid {name}"] = measure.kid(draw(pipe, captions, a.steps, a.guidance), target, net=net)
    settings = f"style {a.style}, {len(captions)} captions, {a.steps} steps, guidance {a.guidance}"
    lines = [settings, *(f"{name}: {figure}" for name, figure in figures.items())]
    lines += [
        f"held-out {name}: {loss['before']:.4f} before, {loss['after']:.4f} after"
        for name, loss in report["held_out"].items()
    ]
    lines.append(f"training: {report['steps']} steps, {report['seconds']:.0f} s")
    log = "\n".join(lines) + "\n"
    print(log, end="")
    command = f"python benchmarks/adapted_style.py RUN --style {a.style} --count {a.count}"
    print(measure.write_record(a.name, figures, log=log, command=command, seed=0))


if __name__ == "__main__":
    main()
