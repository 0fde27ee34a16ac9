"""How long a step of several adapters takes: plans of vislr against diffusers' `set_adapters`. Writes a record.

    python benchmarks/compose_speed.py
    python benchmarks/compose_speed.py --adapters 5 --device cuda --dtype bfloat16

Four steps of the embedded UNet with LoRAs on attention and convs, guidance's batch of 2: the sum by `set_adapters`
against "merge", "cat" and "ties"; Composite by switching with `set_adapters` N times a step against Composite one after
another, and several adapters in one forward; CMLoRA. Interleaved, a copy of the UNet for each.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig

import vislr
from vislr import compose, measure
from vislr.adapters.inject import adapter_parameters, attach, set_adapters
from vislr.anatomy import sample_inputs
from vislr.compose.handler import put_plan

TIMES = (900.0, 700.0, 500.0, 300.0)
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


def variants(a: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Name -> one run of four steps."""
    pipe = vislr.load("emoji-unet", dtype=getattr(torch, a.dtype)).to(a.device)
    model, names = pipe.unet, [f"a{i}" for i in range(a.adapters)]
    for place, name in enumerate(names):
        attach(model, LoraConfig(r=a.rank, target_modules=LAYERS), name)
        generator = torch.Generator().manual_seed(place)
        for parameter in adapter_parameters(model, name).values():
            parameter.data = (0.02 * torch.randn(parameter.shape, generator=generator)).to(a.device)
    set_adapters(model, [])
    inputs = sample_inputs(model, {"batch": a.batch, "tokens": 16}, device=a.device)

    def run(unet: Any, before: Callable[[Any], Any] = lambda unet: None) -> Callable[[], Any]:
        @torch.no_grad()
        def steps() -> None:
            for time in TIMES:
                before(unet)
                unet(**(inputs | {"timestep": torch.full_like(inputs["timestep"].float(), time)}))

        return steps

    @torch.no_grad()
    def switching() -> None:
        for time in TIMES:
            moment = inputs | {"timestep": torch.full_like(inputs["timestep"].float(), time)}
            made = []
            for name in names:
                switched.set_adapters([name], [1.0])
                made.append(switched(**moment).sample)
            torch.stack(made).mean(0)

    summed, switched = copy.deepcopy(model), copy.deepcopy(model)
    summed.set_adapters(names, [1.0] * len(names))
    found: dict[str, Callable[[], Any]] = {"sum by set_adapters": run(summed)}
    plans = {
        "merge": compose.merge_plan(model, names),
        "cat": compose.merge_plan(model, names, method="cat"),
        "ties": compose.merge_plan(model, names, method="ties"),
        "composite, one after another": compose.composite_plan(model, names, passes="separate"),
        "composite, one forward": compose.composite_plan(model, names, passes="batched"),
        "cmlora": compose.cmlora_plan(model, names),
    }
    for name, plan in plans.items():
        twin = copy.deepcopy(model)
        put_plan(twin, plan)
        found[name] = run(twin)
    found["composite by set_adapters"] = switching
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--name", help="of the record; default: compose-speed-DEVICE")
    parser.add_argument("--dry", action="store_true", help="write no record")
    a = parser.parse_args()
    figures = measure.interleaved(variants(a), rounds=a.rounds, device=a.device)
    lines = [f"emoji-unet, {a.adapters} LoRAs of rank {a.rank}, batch {a.batch}, {a.dtype}, {len(TIMES)} steps a call"]
    for name, one in figures.items():
        lines.append(f"{name:30} {one}")
    lines.append(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    log = "\n".join(lines) + "\n"
    print(log, end="")
    if not a.dry:
        command = f"python benchmarks/compose_speed.py --adapters {a.adapters} --device {a.device} --dtype {a.dtype}"
        print(measure.write_record(a.name or f"compose-speed-{a.device}", figures, log=log, command=command, seed=0))


if __name__ == "__main__":
    main()
