"""Token pruning against dense SDPA and tomesd at equal FLOPs, at the true sizes of SDXL and SD 1.5, on a CPU.

    python benchmarks/tokens_cpu.py --dtype float32
    python benchmarks/tokens_cpu.py --dtype bfloat16 --only "sdxl 64" "sdxl 32"
    python benchmarks/tokens_cpu.py --dtype bfloat16 --only "sd15 512" --rounds 3

Random weights. Times one Transformer2DModel of SDXL at 64 x 64 and at 32 x 32 tokens, and the whole UNet of
SD 1.5 at 512 pixels, interleaved. tomesd's share of merged tokens is chosen so that its FLOPs are those of the
AT-EDM plan (or as near as 2 x 2 cells allow). All arms have channels_last: a CPU without bfloat16 instructions computes
other bfloat16 convolutions in scalar loops. Needs tomesd (`pip install tomesd`). Writes a record.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vislr import measure
from vislr.anatomy import sample_inputs, skeleton
from vislr.measure import Measurement
from vislr.tokens import TokenPlan, at_edm_plan, tome_plan
from vislr.tokens.handler import put_hooks, take_hooks

# name -> (architecture, module to run or "" for the whole, latent side of the whole, share that AT-EDM keeps)
CASES = {
    "sdxl 64": ("sdxl", "down_blocks.1.attentions.0", 128, 0.5),
    "sdxl 32": ("sdxl", "mid_block.attentions.0", 128, 0.5),
    "sd15 512": ("sd15", "", 64, 0.4),
}
SIDES = {"sdxl 64": 64, "sdxl 32": 32}


def real(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give a module on meta memory and normal weights."""
    module.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            values = torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5
            parameter.copy_(values)
        else:
            parameter.fill_(float(name.endswith("weight")))


def inputs_of(unet: Any, name: str, side: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    if name not in SIDES:
        return sample_inputs(unet, {"height": side, "width": side}, device=device)
    generator = torch.Generator().manual_seed(0)
    width = unet.get_submodule(CASES[name][1]).config.in_channels
    made = {
        "hidden_states": torch.randn(1, width, SIDES[name], SIDES[name], generator=generator),
        "encoder_hidden_states": torch.randn(1, 77, 2048, generator=generator),
    }
    return {key: value.to(device, dtype) for key, value in made.items()}


def counted(unet: Any, part: Any, plan: TokenPlan | None, inputs: dict[str, Any]) -> int:
    """FLOPs of one forward of `part` on meta, with the plan on the whole."""
    hooked = None if plan is None else put_hooks(unet, plan)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        part(**inputs)
    if hooked is not None:
        take_hooks(unet, hooked)
    return counter.get_total_flops()


def equal_merging(unet: Any, part: Any, inputs: dict[str, Any], target: int) -> float:
    """The share that merging keeps for `target` FLOPs, at least a quarter."""
    low, high = 0.25, 1.0
    for _ in range(9):
        middle = (low + high) / 2
        more = counted(unet, part, tome_plan(unet, keep=middle), inputs) > target
        low, high = (low, middle) if more else (middle, high)
    return (low + high) / 2


def planned(unet: Any, part: Any, plan: TokenPlan, inputs: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        # Hooks cost about a millisecond to put on, in calls of seconds; tomesd swaps classes below them otherwise.
        hooked = put_hooks(unet, plan)
        with torch.no_grad():
            part(**inputs)
        take_hooks(unet, hooked)

    return run


def merged(part: Any, keep: float, inputs: dict[str, Any], name: str) -> Callable[[], None]:
    import tomesd

    # tomesd reads the size from the first positional argument.
    image = next(iter(inputs))
    rest = {key: value for key, value in inputs.items() if key != image}

    def run() -> None:
        tomesd.apply_patch(part, ratio=1 - keep, max_downsample=8, merge_crossattn=True, merge_mlp=True)
        with torch.no_grad():
            part(inputs[image], **rest)
        tomesd.remove_patch(part)

    return run


def case(name: str, a: argparse.Namespace) -> dict[str, Measurement]:
    architecture, path, side, keep = CASES[name]
    dtype = getattr(torch, a.dtype)
    unet = skeleton(architecture)
    part = unet.get_submodule(path) if path else unet
    on_meta = inputs_of(unet, name, side, torch.float32, "meta")
    at_edm = at_edm_plan(unet, keep=keep, early=0.0)
    dense = counted(unet, part, None, on_meta)
    wanted = counted(unet, part, at_edm, on_meta)
    merging = equal_merging(unet, part, on_meta, wanted)
    tome = tome_plan(unet, keep=merging)
    shares = {"dense": 1.0, "at-edm": wanted / dense, "tome": counted(unet, part, tome, on_meta) / dense}
    shares["tomesd"] = shares["tome"]
    real(part, dtype)
    inputs = inputs_of(unet, name, side, dtype, "cpu")
    part.to(memory_format=torch.channels_last)
    image = next(iter(inputs))
    inputs[image] = inputs[image].contiguous(memory_format=torch.channels_last)

    def plain() -> None:
        with torch.no_grad():
            part(**inputs)

    calls = {
        "dense": plain,
        "at-edm": planned(unet, part, at_edm, inputs),
        "tome": planned(unet, part, tome, inputs),
        "tomesd": merged(part, merging, inputs, name),
    }
    figures = measure.interleaved(calls, baseline="dense", rounds=a.rounds, warmup=1, device="cpu")
    found = {}
    for key, figure in figures.items():
        about = {"share of the dense FLOPs": shares[key], "dtype": a.dtype, "layout": "channels_last"}
        about["share of tokens kept"] = {"dense": 1.0, "at-edm": keep}.get(key, merging)
        data = figure.to_dict()
        data["settings"] = {**data["settings"], **about}
        found[f"{name} {key}"] = Measurement.from_dict(data)
        print(f"{name} {key}: {figure}, {shares[key]:.1%} of the dense FLOPs", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", nargs="*", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--name", default="tokens-cpu")
    a = parser.parse_args()
    figures: dict[str, Measurement] = {}
    for name in a.only:
        figures |= case(name, a)
    log = "".join(f"{name}: {one}\n" for name, one in figures.items())
    only = " ".join(f'"{name}"' for name in a.only)
    command = f"python benchmarks/tokens_cpu.py --dtype {a.dtype} --only {only} --rounds {a.rounds}"
    print(measure.write_record(f"{a.name}-{a.dtype}", figures, log=log, command=command, seed=0))


if __name__ == "__main__":
    main()
