"""Measured latency of pruned denoisers against the FLOPs and parameters that plans save, on a CPU or a GPU.

    python benchmarks/prune_latency.py --model emoji-unet
    python benchmarks/prune_latency.py --model sdxl --device cuda --dtype bfloat16
    python benchmarks/prune_latency.py --model sd15 --ratios 0.25 --rounds 6 --no-record

MODEL is an embedded pipeline, a diffusers folder, or an architecture at true size with random weights (sd15, sdxl,
sd35-medium, pixart, dit, ...): a plan's latency does not depend on the values. For every budget (parameters, FLOPs,
measured latency) units go by even spacing over the depth; whole and pruned models are timed in turn. Also says what
LAPTOP-Diff's scoring of SDXL's 87 units takes at the speed that was measured here. Writes a record with a picture.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vislr import measure, prune
from vislr.anatomy import ARCHITECTURES, denoiser_of, flops, sample_inputs, skeleton
from vislr.measure import Measurement
from vislr.measure.record import device_name
from vislr.prune.removal import attach
from vislr.prune.units import GRANULARITIES

BUDGETS = ("parameters", "flops", "latency")


def built(name: str, dtype: torch.dtype, device: str) -> Any:
    """The denoiser, with random weights where only its architecture is known."""
    if name not in ARCHITECTURES:
        import vislr

        return denoiser_of(vislr.load(name, dtype=dtype))[1].to(device).eval().requires_grad_(False)
    model = skeleton(name).to(dtype).to_empty(device=device).eval().requires_grad_(False)
    rng = torch.Generator(device).manual_seed(0)
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        if value.dim() > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=rng)
        else:
            # Norms are the identity, biases 0.
            value.fill_(float(key.endswith("weight")))
    return model


def runner(model: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(**inputs)

    return run


def with_settings(figure: Measurement, **more: Any) -> Measurement:
    data = figure.to_dict()
    return Measurement.from_dict({**data, "settings": {**data["settings"], **more}})


def measured(a: argparse.Namespace) -> dict[str, Measurement]:
    dtype = getattr(torch, a.dtype)
    whole = built(a.model, dtype, a.device)
    sample = {key: value for key in ("height", "width", "batch") if (value := getattr(a, key)) is not None}
    inputs = sample_inputs(whole, sample, device=a.device)
    inputs = {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() and key != "timestep" else value
        for key, value in inputs.items()
    } | {"return_dict": False}
    inventory = prune.units_of(whole, a.granularity, sample=sample)
    timed = prune.with_latency(whole, inventory, inputs, rounds=a.rounds)
    models, shares = {"whole": whole}, {"whole": {"FLOPs left": 1.0, "parameters left": 1.0}}
    for budget in BUDGETS:
        for ratio in a.ratios:
            plan = prune.plan_layers(whole, prune.UniformDepth(), ratio, budget=budget, inventory=timed)
            # Kept layers are the whole model's own: nothing but structure is copied.
            pruned = copy.deepcopy(whole, {id(p): p for p in (*whole.parameters(), *whole.buffers())})
            attach(pruned, plan)
            name = f"{budget} {ratio}"
            models[name] = pruned
            shares[name] = {
                "FLOPs left": flops(pruned, sample) / inventory.flops,
                "parameters left": sum(p.numel() for p in pruned.parameters()) / inventory.parameters,
                "units removed": len(plan.removed),
            }
    calls = {name: runner(model, inputs) for name, model in models.items()}
    figures = measure.interleaved(calls, baseline="whole", rounds=a.rounds, warmup=2, device=a.device)
    about = {"dtype": a.dtype, "sample": inventory.sample, "granularity": a.granularity}
    found = {name: with_settings(one, **about, **shares[name]) for name, one in figures.items()}
    if a.memory and torch.device(a.device).type == "cuda":
        for name, model in models.items():
            found[f"{name} weights"] = Measurement(
                float(sum(p.numel() * p.element_size() for p in model.parameters())), None, 1, None, "bytes", "counted"
            )
    return found | scoring(inventory.flops, found["whole"].value)


def scoring(counted: int, seconds: float) -> dict[str, Measurement]:
    """LAPTOP-Diff's scoring of SDXL, from its structure alone and the speed of the model that was timed."""
    cost = prune.scoring_cost(prune.units_of(skeleton("sdxl"), "block"), samples=256, batch=4)
    speed = counted / seconds
    how = f"{cost}; at the {speed / 1e9:.1f} GFLOP/s of the whole model here"
    return {"SDXL scoring, 256 samples": Measurement(cost.flops / speed, None, cost.units, None, "s", how)}


def draw(figures: dict[str, Measurement], path: Path, title: str) -> None:
    """Time left over FLOPs left, a mark for each budget; on the diagonal FLOPs would be time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for budget, mark in zip(BUDGETS, "os^", strict=True):
        own = [one for name, one in figures.items() if name.split(" ")[0] == budget]
        x = [100 * one.settings["FLOPs left"] for one in own]
        speedups = [one.parts["speedup"] for one in own]
        y = [100 / one.value for one in speedups]
        spans = [one.interval or (one.value, one.value) for one in speedups]
        errors = [
            [max(0.0, at - 100 / high) for at, (_, high) in zip(y, spans, strict=True)],
            [max(0.0, 100 / low - at) for at, (low, _) in zip(y, spans, strict=True)],
        ]
        axis.errorbar(x, y, yerr=errors, fmt=mark, capsize=2, label=f"ratio of {budget}")
    axis.plot([0, 100], [0, 100], color="0.6", linewidth=1, label="time = FLOPs")
    axis.set(xlabel="% of the FLOPs left", ylabel="% of the time left", xlim=(0, 105), ylim=(0, 110))
    axis.set_title(title, loc="left", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.25, 0.5])
    parser.add_argument("--granularity", choices=GRANULARITIES, default="block")
    parser.add_argument("--height", type=int, help="of the latent; default: the model's own")
    parser.add_argument("--width", type=int, help="of the latent")
    parser.add_argument("--batch", type=int, help="default 1")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--memory", action="store_true", help="also count the bytes of the weights")
    parser.add_argument("--no-record", action="store_true")
    a = parser.parse_args()
    figures = measured(a)
    lines = []
    for name, one in figures.items():
        left = one.settings.get("FLOPs left")
        lines.append(f"{name}: {one}" + (f", {left:.1%} of the FLOPs left" if left is not None else f"; {one.how}"))
    print("\n".join(lines))
    short = f"prune-latency-{Path(a.model).name}-{torch.device(a.device).type}-{a.dtype}"
    if a.no_record:
        return
    command = f"python benchmarks/prune_latency.py --model {a.model} --device {a.device} --dtype {a.dtype}"
    command += f" --ratios {' '.join(map(str, a.ratios))} --granularity {a.granularity} --rounds {a.rounds}"
    command += "".join(
        f" --{key} {getattr(a, key)}" for key in ("height", "width", "batch") if getattr(a, key) is not None
    )
    folder = measure.write_record(short, figures, log="\n".join(lines) + "\n", command=command, seed=0)
    draw(figures, folder / "latency.png", f"{a.model}, {device_name(torch.device(a.device))}, {a.dtype}")
    print(folder)


if __name__ == "__main__":
    main()
