"""Does `vislr estimate` tell the truth? Its memory against the measured increment over the process after import.

    OMP_NUM_THREADS=2 python -P benchmarks/trainer_estimate.py              # SD1.5-shaped, float32: about 8 GB, minutes
    OMP_NUM_THREADS=1 python -P benchmarks/trainer_estimate.py --width 64   # the same with a fifth of the channels

A StableDiffusionPipeline of random weights is trained for two steps in a process of its own, by `fit`; the peak of
its resident set less what it held after the imports is compared with the estimate of the same config. A third run shows
what a fixed threshold of glibc's heap changes. Writes a record with --record.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from vislr.measure import Measurement, write_record
from vislr.train.config import TrainConfig

GIB = 2**30


def config_of(a: argparse.Namespace, folder: str) -> TrainConfig:
    from vislr.train import (
        AdapterSection,
        DataConfig,
        HeldOutConfig,
        ModelConfig,
        OptimConfig,
        OutputConfig,
        SampleConfig,
    )  # fmt: skip

    return TrainConfig(
        model=ModelConfig(checkpointing=a.checkpointing), data=DataConfig(folder=f"{folder}/images", size=a.size),
        held_out=HeldOutConfig(fraction=0.0, every=0), adapter=AdapterSection(kind=a.kind, r=4),
        optim=OptimConfig(batch=a.batch, warmup=0), sample=SampleConfig(prompts=["a cat"], steps=1, guidance=2.0),
        output=OutputConfig(folder=f"{folder}/run", checkpoint_every=0), steps=2,
    )  # fmt: skip


def components(width: int) -> dict:
    """UNet of SD1.5's shape (width 320 in place of `width`), its VAE and CLIP-L's text model."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    channels = (width, 2 * width, 4 * width, 4 * width)
    text = CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                          num_attention_heads=12, projection_dim=768)  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8,
                                block_out_channels=channels)  # fmt: skip
    return {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}


def child(a: argparse.Namespace) -> None:
    """Train, and print what it took."""
    import matplotlib.backends.backend_agg  # noqa: F401
    import torch
    import torch.utils.tensorboard
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    import vislr
    import vislr.adapters
    from vislr.pipelines import training_setup as setup
    from vislr.train import fit
    from vislr.zoo.vocabulary import build_tokenizer

    def held(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    config = config_of(a, a.child)
    # What every process pays once for its first operation is import, not training.
    torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))
    before = held("VmRSS")
    parts = components(a.width)
    for part in parts.values():
        part.eval().requires_grad_(False)
    tokenizer = build_tokenizer(["a cat"])
    pipe = StableDiffusionPipeline(**parts, tokenizer=tokenizer, scheduler=DDIMScheduler(), safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)  # fmt: skip
    loaded = held("VmRSS")
    vislr.apply(pipe, config.adapter.to_change())
    Path("/proc/self/clear_refs").write_text("5")
    train, held_out = setup.open_data(config)
    result = fit(pipe, "default", config, train, held_out)
    print(json.dumps({"before": before, "loaded": loaded, "peak": held("VmHWM"), "step": result.seconds / 2}))


def run(arguments: list[str], environment: dict[str, str]) -> dict:
    """What the child has measured."""
    done = subprocess.run(
        [sys.executable, "-P", __file__, *arguments], capture_output=True, text=True, env=environment
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=320, help="channels of the first level; SD1.5 has 320")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kind", default="lora")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--name", help="of the record; default: estimate-against-measured-widthWIDTH")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        child(a)
        return
    import torch

    from vislr import zoo
    from vislr.adapters import attach
    from vislr.train.estimates import estimate_run

    with tempfile.TemporaryDirectory() as folder:
        zoo.export(f"{folder}/images", zoo.images(style="noto")[:4])
        arguments = [word for word in sys.argv[1:] if word != "--record"]
        # A user's heap is as glibc sets it.
        plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        measured, returned = (
            run([*arguments, "--child", folder], plain | more) for more in ({}, {"MALLOC_MMAP_THRESHOLD_": "1048576"})
        )
        config = config_of(a, folder)
        with torch.device("meta"):
            parts = components(a.width)
        for part in parts.values():
            part.requires_grad_(False)
        unet = parts.pop("unet")
        attach(unet, config.adapter.to_change())
        side = a.size // 8
        estimate = estimate_run({"": unet}, parts, config, size={"height": side, "width": side},
                                device=torch.device("cpu"), timed=True)  # fmt: skip
    increment = measured["peak"] - measured["before"]
    error = estimate.total / increment - 1
    lines = [
        str(estimate),
        f"measured: {increment / GIB:.3f} GiB over the process after import "
        f"({(measured['loaded'] - measured['before']) / GIB:.3f} after the weights), {measured['step']:.2f} s a step",
        f"estimated: {estimate.total / GIB:.3f} GiB, {error:+.1%}",
        f"with MALLOC_MMAP_THRESHOLD_=1048576, where large blocks are returned at once: "
        f"{(returned['peak'] - returned['before']) / GIB:.3f} GiB, {returned['step']:.2f} s a step",
    ]
    log = "\n".join(lines) + "\n"
    print(log, end="")
    if a.record:
        settings = {"width": a.width, "size": a.size, "batch": a.batch, "kind": a.kind,
                    "checkpointing": a.checkpointing, "threads": torch.get_num_threads()}  # fmt: skip
        note = "one run"
        heap = returned["peak"] - returned["before"]
        slowdown = returned["step"] / measured["step"]
        fixed = settings | {"MALLOC_MMAP_THRESHOLD_": 1048576, "slowdown": slowdown}
        figures = {
            "measured increment": Measurement(increment / GIB, None, 1, 0, "GiB", note, "", settings),
            "estimated": Measurement(estimate.total / GIB, None, 1, 0, "GiB", note, "", settings),
            "measured increment, large blocks returned": Measurement(heap / GIB, None, 1, 0, "GiB", note, "", fixed),
            "error": Measurement(error, None, 1, 0, "ratio", "estimated over measured, less 1", "", settings),
        }
        name = a.name or f"estimate-against-measured-width{a.width}" + ("-checkpointing" if a.checkpointing else "")
        command = "python -P benchmarks/trainer_estimate.py " + " ".join(sys.argv[1:])
        print(write_record(name, figures, log=log, command=command, seed=0))


if __name__ == "__main__":
    main()
