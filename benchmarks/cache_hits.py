"""A training step that finds its latents in the cache against one that encodes its pictures.

    python benchmarks/cache_hits.py --rounds 8

The embedded UNet with a ConvLoRA, forward and backward over one batch, pictures read from PNG files. "no cache" encodes
the batch at once in each step; "memory" and "disk" look up what was encoded before, "disk" with its checksums. CPU time
of the process (one thread), so that other work on the machine matters little. Writes a record.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

import torch

import vislr
from vislr import measure, zoo
from vislr.data import DataConfig, open_pool
from vislr.measure.timing import compare_times
from vislr.train import AdapterSection, OutputConfig, TrainConfig
from vislr.train.adapted import trainable_parameters
from vislr.train.diffusion import Diffusion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--name", default="cache-hits", help="of the record")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        zoo.export(Path(folder) / "pictures", zoo.images(style="noto")[: a.pictures])
        settings = {
            "no cache": {"cache_latents": False},
            "memory": {},
            "disk": {"cache_folder": f"{folder}/cache"},
        }
        tasks = {name: make_task(folder, values) for name, values in settings.items()}
        steps = {name: step_of(task, a.batch) for name, task in tasks.items()}
        rng, times = random.Random(0), {name: [] for name in steps}
        for number in range(a.rounds + 1):
            for name in rng.sample(list(steps), len(steps)):
                start = time.process_time()
                steps[name]()
                if number:  # the first warms up
                    times[name].append(time.process_time() - start)
    about = {
        "device": measure.record.device_name(torch.device("cpu")), "threads": 1, "batch": a.batch, "size": 64,
        "clock": "process_time", "rounds": a.rounds, "baseline": "no cache",
    }  # fmt: skip
    figures = compare_times(times, "no cache", 0, about)
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; times are CPU time of one thread"
    log = "\n".join([load, *(f"{name}: {figure}" for name, figure in figures.items())]) + "\n"
    print(log, end="")
    command = f"python benchmarks/cache_hits.py --rounds {a.rounds} --batch {a.batch} --pictures {a.pictures}"
    print(measure.write_record(a.name, figures, log=log, command=command, seed=0))


def make_task(folder: str, data: dict) -> Diffusion:
    """The embedded pipeline with a ConvLoRA, and the pictures."""
    config = TrainConfig(
        data=DataConfig(folder=f"{folder}/pictures", **data), output=OutputConfig(folder=f"{folder}/out"),
        adapter=AdapterSection(r=4),
    )  # fmt: skip
    pipe = vislr.load("emoji-unet")
    torch.manual_seed(0)
    vislr.apply(pipe, config.adapter.to_change())
    task = Diffusion(pipe, config, open_pool(config.data), None, quiet=True)
    trainable_parameters(task.models, "default")
    task.model.to(memory_format=torch.channels_last)
    return task


def step_of(task: Diffusion, batch: int):
    """A function that takes the next batch through forward and backward."""
    items = task.train.source.batches(0, 10**6, batch)

    def step() -> None:
        draw = task.forward(task.model, task.train[next(items)])
        draw.loss.mean().backward()
        task.model.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
