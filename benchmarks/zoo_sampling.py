"""What is lost in sampling, and what in the weights? KID and retrieval of an embedded pipeline by sampler settings.

    python benchmarks/zoo_sampling.py emoji-unet
    python benchmarks/zoo_sampling.py emoji-unet --noise-levels            # where along the trajectory is it lost?
    python benchmarks/zoo_sampling.py emoji-unet --training runs/base      # the weights of a training folder

The pictures of the gates (Noto, every kind of concept) are drawn with other guidance, more steps, rescaled guidance
and stochastic samplers; if none is better, the limit lies in the denoiser. `--noise-levels` starts instead from the
true pictures, noised to a share of the trajectory: what is lost at a share and not at the one before it is lost by
the denoiser in between. Three minutes on two cores each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from adapted_style import draw
from diffusers import AutoPipelineForImage2Image, DPMSolverMultistepScheduler
from tqdm import tqdm

from vislr import measure, zoo
from vislr.zoo.retraining import assemble
from vislr.zoo.vocabulary import MAX_TOKENS

SETTINGS: dict[str, dict[str, Any]] = {
    "20 steps, guidance 3": {},
    "guidance 2": {"guidance_scale": 2.0},
    "guidance 4.5": {"guidance_scale": 4.5},
    "50 steps": {"num_inference_steps": 50},
}
STRENGTHS = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
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


def redrawn(pipe: Any, chosen: list[Any], batch: int, strength: float) -> list[Any]:
    """The chosen pictures after noise up to `strength` of the trajectory was added and taken away."""
    again = AutoPipelineForImage2Image.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    extra = {} if hasattr(pipe, "unet") else {"max_sequence_length": MAX_TOKENS}
    pictures: list[Any] = []
    for i in tqdm(range(0, len(chosen), batch), desc=f"strength {strength}"):
        some = chosen[i : i + batch]
        seeds = [torch.Generator().manual_seed(1000 + i + j) for j in range(len(some))]
        pictures += again(
            [p.caption for p in some], image=[p.image() for p in some], strength=strength, num_inference_steps=20,
            guidance_scale=3.0, generator=seeds, **extra,
        ).images  # fmt: skip
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", choices=zoo.pipeline_names())
    parser.add_argument("--training", type=Path, help="folder of `vislr zoo retrain`; default: the embedded weights")
    parser.add_argument("--noise-levels", action="store_true", help="from the true pictures, noised, instead of noise")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--name", help="of the record; default: PIPELINE-sampling or -noise-levels")
    a = parser.parse_args()
    pipe = assemble(a.training, a.pipeline) if a.training else zoo.pipeline(a.pipeline)
    net = measure.feature_net()
    known = zoo.images(style="noto", split="train")
    chosen = known[:: max(1, len(known) // a.count)][: a.count]
    names = {p.name for p in chosen}
    reference = net.features([p for p in known if p.name not in names])
    gallery = measure.prototypes([p for p in zoo.images() if p.style != "noto"])
    figures = {}

    def judge(label: str, pictures: list[Any]) -> None:
        features = net.features(pictures)
        figures[f"kid, {label}"] = measure.kid(features, reference, net=net)
        figures[f"retrieval, {label}"] = measure.retrieval(features, [p.name for p in chosen], gallery)
        print(f"{label}: {figures[f'kid, {label}']}", flush=True)

    if a.noise_levels:
        for strength in STRENGTHS:
            judge(f"strength {strength:g}", redrawn(pipe, chosen, a.batch, strength))
    else:
        for label, options in (SETTINGS | (UNET if a.pipeline == "emoji-unet" else {})).items():
            judge(label, drawn(pipe, [p.caption for p in chosen], a.batch, **options))
    log = "\n".join(f"{key}: {figure}" for key, figure in figures.items()) + "\n"
    command = f"python benchmarks/zoo_sampling.py {a.pipeline}" + (" --training FOLDER" if a.training else "")
    command += " --noise-levels" if a.noise_levels else ""
    name = f"{a.pipeline}-{'noise-levels' if a.noise_levels else 'sampling'}"
    name += f"-{pipe_steps(a)}-steps" if a.training else ""
    print(measure.write_record(a.name or name, figures, log=log, command=command, seed=1000))


def pipe_steps(a: argparse.Namespace) -> int:
    """Steps of training that the folder has seen."""
    stage = a.pipeline.removeprefix("emoji-")
    return json.loads((a.training / f"{stage}-state" / "state.json").read_text())["step"]


if __name__ == "__main__":
    main()
