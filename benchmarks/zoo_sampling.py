"""What is lost in sampling, and what in the weights? KID and retrieval of an embedded pipeline by sampler settings.

    python benchmarks/zoo_sampling.py emoji-unet
    python benchmarks/zoo_sampling.py emoji-unet --training runs/base      # the weights of a training folder

The pictures of the gates (Noto, every kind of concept) are drawn with other guidance, more steps, rescaled guidance
and stochastic samplers; if none is better, the limit lies in the denoiser. Three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from adapted_style import draw
from diffusers import DPMSolverMultistepScheduler

from vislr import measure, zoo
from vislr.zoo.retraining import assemble

SETTINGS: dict[str, dict[str, Any]] = {
    "20 steps, guidance 3": {},
    "guidance 2": {"guidance_scale": 2.0},
    "guidance 4.5": {"guidance_scale": 4.5},
    "50 steps": {"num_inference_steps": 50},
}
UNET = {
    "guidance rescaled .7": {"guidance_rescale": 0.7},
    "SDE-DPM-Solver++": {"scheduler": "sde-dpmsolver++"},
}


def drawn(pipe: Any, captions: list[str], batch: int, scheduler: str | None = None, **options: Any) -> list[Any]:
    """The captions' pictures, with this kind of DPM-Solver++ if one is named."""
    own = pipe.scheduler
    if scheduler:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config, algorithm_type=scheduler)
    steps, guidance = options.pop("num_inference_steps", 20), options.pop("guidance_scale", 3.0)
    pictures = draw(pipe, captions, steps, guidance, batch=batch, seed=1000, **options)
    pipe.scheduler = own
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", choices=zoo.pipeline_names())
    parser.add_argument("--training", type=Path, help="folder of `vislr zoo retrain`; default: the embedded weights")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--batch", type=int, default=25)
    a = parser.parse_args()
    pipe = assemble(a.training, a.pipeline) if a.training else zoo.pipeline(a.pipeline)
    net = measure.feature_net()
    known = zoo.images(style="noto", split="train")
    chosen = known[:: max(1, len(known) // a.count)][: a.count]
    names = {p.name for p in chosen}
    reference = net.features([p for p in known if p.name not in names])
    gallery = measure.prototypes([p for p in zoo.images() if p.style != "noto"])
    figures = {}
    for label, options in (SETTINGS | (UNET if a.pipeline == "emoji-unet" else {})).items():
        features = net.features(drawn(pipe, [p.caption for p in chosen], a.batch, **options))
        figures[f"kid, {label}"] = measure.kid(features, reference, net=net)
        figures[f"retrieval, {label}"] = measure.retrieval(features, [p.name for p in chosen], gallery)
        print(f"{label}: {figures[f'kid, {label}']}", flush=True)
    log = "\n".join(f"{key}: {figure}" for key, figure in figures.items()) + "\n"
    command = f"python benchmarks/zoo_sampling.py {a.pipeline}" + (" --training FOLDER" if a.training else "")
    name = f"{a.pipeline}-sampling" + (f"-{pipe_steps(a)}-steps" if a.training else "")
    print(measure.write_record(name, figures, log=log, command=command, seed=1000))


def pipe_steps(a: argparse.Namespace) -> int:
    """Steps of training that the folder has seen."""
    stage = a.pipeline.removeprefix("emoji-")
    return json.loads((a.training / f"{stage}-state" / "state.json").read_text())["step"]


if __name__ == "__main__":
    main()
