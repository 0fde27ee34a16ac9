"""Pruned and in four bits: what HierarchicalPrune's cut, its recovery and four-bit weights save and cost together.

    python benchmarks/prune_bits.py
    python benchmarks/prune_bits.py --out runs/prune-bits  # the same command goes on after the last finished step

Runs configs/recipes/small-4bit.yaml on the embedded MMDiT: a fifth of the parameters goes as whole blocks, what is
behind the first cut learns from the whole model, weights become NF4. After each step: bytes of the denoiser, KID and
retrieval, and the distance of its answers from the whole model's, along the whole model's own trajectories of captions
and noise that recovery has not seen. The same for uniform four-bit weights, and for four bits without the cut. The cut
in bytes is against bfloat16, as the paper counts it. Needs the extra `measure`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

import vislr
from vislr import measure, zoo
from vislr.anatomy import denoiser_of
from vislr.anatomy.text import sequence_length
from vislr.core.arguments import find_config, read_section
from vislr.measure import Measurement
from vislr.pipelines.recipe_run import BASE, Run, RunConfig, table
from vislr.pipelines.recipe_steps import PIPELINE
from vislr.quantize import Trajectories, sizes, trajectory_inputs, weight_only_plan

RECIPE = "recipes/small-4bit.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/prune-bits"), help="folder of the run")
    a = parser.parse_args()
    values = yaml.safe_load(find_config(RECIPE).read_text()) | {"out": str(a.out)}
    run = Run(read_section(RunConfig, values, where=RECIPE))
    print(run.costs(), flush=True)
    rows = dict(run.go())

    whole = vislr.load(run.config.base)
    _, teacher = denoiser_of(whole)
    judged = run.config.judge
    captions = [p.caption for p in zoo.images(style="twemoji", split="train")[::40][:16]]
    options = {"max_sequence_length": sequence_length(whole)}
    runs = Trajectories(captions, 16, 8, judged.steps, judged.guidance, 1000, options)
    asked = trajectory_inputs(whole, runs, every=3)
    in_bf16 = 2 * sum(p.numel() for p in teacher.parameters())

    def told(net: Any) -> dict[str, Measurement]:
        size = sizes(net).total
        cut = 1 - size / in_bf16
        return {
            "bytes": Measurement(size, None, 1, 0, "bytes", "parameters and buffers of the denoiser"),
            "cut": Measurement(cut, None, 1, 0, "share", "bytes saved against the whole denoiser in bfloat16"),
            "distance": measure.teacher_distance(net, teacher, asked),
        }

    for step in run.steps:
        rows[step.name] |= told(denoiser_of(vislr.load(run.out / step.name / PIPELINE))[1])
    recovered = run.out / run.steps[-2].name / PIPELINE
    for name, source, form in (
        ("cut, recovered, uniform 4 bits", recovered, "uniform"),
        ("whole, uniform 4 bits", run.config.base, "uniform"),
        ("whole, NF4", run.config.base, "nf4"),
    ):
        pipe = vislr.load(source)
        vislr.apply(pipe, weight_only_plan(pipe, 4, group=64, format=form))
        rows[name] = told(denoiser_of(pipe)[1])
    rows[BASE] |= {"bytes": told(teacher)["bytes"]}
    text = table(list(rows.items()), {})
    print(text)
    figures = {f"{name} {key}": one for name, own in rows.items() for key, one in own.items()}
    folder = measure.write_record(
        "prune-bits-emoji-mmdit", figures, log=text + "\n", command="python benchmarks/prune_bits.py", seed=0
    )
    (folder / "sheet.png").write_bytes((a.out / "sheet.png").read_bytes())
    print(folder)


if __name__ == "__main__":
    main()
