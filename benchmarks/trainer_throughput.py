"""The trainer against a plain loop over peft and diffusers: seconds a step, interleaved, and memory.

    OMP_NUM_THREADS=2 python -P benchmarks/trainer_throughput.py --shape emoji --rounds 30 --record
    OMP_NUM_THREADS=2 python -P benchmarks/trainer_throughput.py --shape sd15 --rounds 8 --record      # about 7 GB each
    OMP_NUM_THREADS=1 python -P benchmarks/trainer_throughput.py --memory 8 --rounds 0 --record        # attempts, too

Both train the same LoRA on the same pipeline: the same order of pictures, latents and captions encoded beforehand,
the same target, batch, number type, clipping, fused AdamW and memory format. The plain loop has no held-out loss, no
checkpoints, no exact draws and no curves; ours is `vislr.train.fit` as it is, stopped between two steps. They alternate
in a random order; the ratio is taken within a round. Peak memory is that of a process of its own for each, over what it
held after the imports; with `--memory N` of N processes each, also of vislr with its heap returned before the first
step, without its first picture, and with one arena of malloc. `-P` keeps this folder out of the module path.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import vislr
import vislr.train.loop
from vislr import measure, zoo
from vislr.core.memory import return_freed_heap
from vislr.data import sample_at
from vislr.measure.measurement import median_interval
from vislr.measure.timing import compare_times
from vislr.pipelines import training_setup as setup
from vislr.train import (
    AdapterSection,
    DataConfig,
    HeldOutConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    SampleConfig,
    TrainConfig,
    fit,
)

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
NAMES = ("plain peft + diffusers", "vislr")


def pipeline(shape: str):
    """The embedded pipeline, or one of SD1.5's shape with random weights."""
    if shape == "emoji":
        return vislr.load("emoji-unet")
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from vislr.zoo.vocabulary import build_tokenizer

    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=1,
                          num_attention_heads=12)  # fmt: skip
    # The encoders are not part of a step: small ones.
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False,
    )  # fmt: skip
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8), vae=vae,
        text_encoder=CLIPTextModel(text), tokenizer=build_tokenizer(p.caption for p in zoo.images()),
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def config_of(a: argparse.Namespace, folder: str) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(base="emoji-unet"), data=DataConfig(folder=f"{folder}/images", size=a.size),
        held_out=HeldOutConfig(fraction=0.0, every=0), adapter=AdapterSection(kind="lora", r=8, target_modules=TARGETS),
        optim=OptimConfig(batch=a.batch, warmup=0, lr=1e-4), sample=SampleConfig(prompts=["a red apple"], steps=1),
        output=OutputConfig(folder=f"{folder}/run", checkpoint_every=0, overwrite=True),
        steps=max(a.rounds, 2) + a.warmup + 1,
        precision=a.precision,
    )  # fmt: skip


class Ours:
    """`fit` in a thread of its own that waits between two steps."""

    def __init__(self, pipe, config: TrainConfig) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        setup.attach(config, pipe)
        train, held_out = setup.open_data(config)

        def stop(step: int) -> bool:
            self.done.release()
            self.go.acquire()
            return False

        def run() -> None:
            fit(pipe, "default", config, train, held_out, stop=stop)
            self.done.release()

        # Its first step is made at once and is part of the warm-up.
        threading.Thread(target=run, daemon=True).start()
        self.done.acquire()

    def step(self) -> None:
        self.go.release()
        self.done.acquire()


class Plain:
    """What one writes by hand with peft and diffusers, at its best."""

    def __init__(self, pipe, config: TrainConfig) -> None:
        from diffusers import DDPMScheduler
        from peft import LoraConfig

        self.config, self.unet = config, pipe.unet
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
        self.unet.to(memory_format=torch.channels_last)
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.rates = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.steps)
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        train, _ = setup.open_data(config)
        source = train.at(config.data.size, 8)
        self.latents, texts = [], []
        with torch.no_grad():
            for index in range(source.count):
                pixels = source.read(source.item(index)).pixels[None].float() / 127.5 - 1
                posterior = pipe.vae.encode(pixels).latent_dist
                self.latents.append(torch.stack([posterior.mean, posterior.std])[:, 0] * pipe.vae.config.scaling_factor)
                texts.append(pipe.encode_prompt(source.item(index).caption, "cpu", 1, False)[0])
        self.texts, self.count = torch.cat(texts), source.count
        self.rng, self.number = torch.Generator().manual_seed(0), 0
        self.unet.train()
        self.step()

    def step(self) -> None:
        batch = self.config.optim.batch
        chosen = [sample_at(0, self.number * batch + i, self.count) for i in range(batch)]
        self.number += 1
        mean, std = torch.stack([self.latents[i] for i in chosen], 1)
        x = mean + std * torch.randn(mean.shape, generator=self.rng)
        noise = torch.randn(mean.shape, generator=self.rng)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (batch,), generator=self.rng)
        noisy = self.scheduler.add_noise(x, noise, t)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(x, noise, t) if velocity else noise
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
            prediction = self.unet(noisy, t, encoder_hidden_states=self.texts[chosen], return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(prediction.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad(set_to_none=True)


MAKE = {NAMES[0]: Plain, NAMES[1]: Ours}
# Attempts at a lower peak.
RETURNED, NO_PICTURE, ONE_ARENA = (f"vislr, {how}" for how in ("heap returned first", "no first picture", "one arena"))


def held(field: str) -> int:
    """Bytes of resident memory now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def interleaved(a: argparse.Namespace, folder: str) -> dict[str, list[float]]:
    """Seconds of steps of both, in a random order."""
    config = config_of(a, folder)
    loops = {name: make(pipeline(a.shape), config) for name, make in MAKE.items()}
    for _ in range(a.warmup):
        for loop in loops.values():
            loop.step()
    rng, times = random.Random(0), {name: [] for name in NAMES}
    for _ in range(a.rounds - 2):
        for name in rng.sample(NAMES, len(NAMES)):
            began = time.perf_counter()
            loops[name].step()
            times[name].append(time.perf_counter() - began)
    return times


def memory(a: argparse.Namespace, name: str, folder: str) -> float:
    """Peak in MiB of three steps in a process of its own, over what it held after its imports."""
    arguments = [sys.executable, "-P", __file__, *(word for word in sys.argv[1:] if word != "--record")]
    arena = {"MALLOC_ARENA_MAX": "1"} if name == ONE_ARENA else {}
    done = subprocess.run(
        [*arguments, "--child", name, "--folder", folder], capture_output=True, text=True, env={**os.environ, **arena}
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1]) / 2**20


def three_steps(name: str, a: argparse.Namespace) -> None:
    """Print the peak of resident memory over that after the imports when three steps are made, and leave."""
    for module in ("accelerate", "peft", "diffusers", "torch.utils.tensorboard", "vislr.adapters", "vislr.anatomy"):
        importlib.import_module(module)
    before = held("VmRSS")

    def report() -> None:
        print(held("VmHWM") - before, flush=True)
        os._exit(0)

    pipe, config = pipeline(a.shape), config_of(a, a.folder)
    if name == NAMES[0]:
        loop = Plain(pipe, config)  # makes the first
        loop.step()
        loop.step()
        report()
    draw_first = vislr.train.loop._Run._before

    def before_training(run):
        preview = None if name == NO_PICTURE else draw_first(run)
        if name == RETURNED:
            return_freed_heap()
        return preview

    vislr.train.loop._Run._before = before_training
    setup.attach(config, pipe)
    # In the main thread, as users run it: another has an arena and a pool of OpenMP threads of its own.
    fit(pipe, "default", config, *setup.open_data(config), stop=lambda step: report() if step == 3 else False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("emoji", "sd15"), default="emoji")
    parser.add_argument("--size", type=int, help="side of the pictures; default 64 (emoji) or 256 (sd15)")
    parser.add_argument("--batch", type=int, help="default 16 (emoji) or 1 (sd15)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--memory", type=int, default=1, help="processes for the peak of each; several: attempts, too")
    parser.add_argument("--name", help="of the record")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--child", choices=(*NAMES, RETURNED, NO_PICTURE, ONE_ARENA), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.size = a.size or {"emoji": 64, "sd15": 256}[a.shape]
    a.batch = a.batch or {"emoji": 16, "sd15": 1}[a.shape]
    if a.child:
        three_steps(a.child, a)
        return
    with tempfile.TemporaryDirectory() as folder:
        zoo.export(f"{folder}/images", zoo.images(style="noto")[: 64 if a.shape == "emoji" else 4])
        ways = NAMES if a.memory == 1 else (*NAMES, RETURNED, NO_PICTURE, ONE_ARENA)
        peaks: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(a.memory):
            for name in ways:
                peaks[name].append(memory(a, name, folder))
        times = interleaved(a, folder) if a.rounds else {}
    device = measure.record.device_name(torch.device("cpu"))
    settings = {"shape": a.shape, "size": a.size, "batch": a.batch, "precision": a.precision, "rounds": a.rounds - 2,
                "threads": torch.get_num_threads(), "device": device}  # fmt: skip
    figures = compare_times(times, NAMES[0], 0, settings) if times else {}
    for name, own in peaks.items():
        value, interval, how = median_interval(own) if len(own) > 1 else (own[0], None, "one process")
        what = f"peak resident memory over that after import, {how}"
        figures[f"{name}: memory"] = measure.Measurement(value, interval, len(own), None, "MiB", what, "", settings)
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    log = "\n".join([load, *(f"{name}: {figure}" for name, figure in figures.items())]) + "\n"
    print(log, end="")
    if a.record:
        name = a.name or f"trainer-{'against-plain-loop' if a.rounds else 'memory'}-{a.shape}" + (
            "-bf16" if a.precision == "bf16" else ""
        )
        command = "python -P benchmarks/trainer_throughput.py " + " ".join(sys.argv[1:])
        print(measure.write_record(name, figures, log=log, command=command, seed=0))
    # The thread of `fit` waits for its next step.
    os._exit(0)


if __name__ == "__main__":
    main()
