"""Training step of adapters on a UNet of SD 1.5's shape: time side by side, peak memory each in its own process.

    python benchmarks/adapters_step.py convs        # ConvLoRA and FLoRA against peft's conv LoRA and LyCORIS
    python benchmarks/adapters_step.py sparse       # SaRA against LoRA, 50 million trained parameters each

Random weights (speed and memory do not depend on them), batch 1, 32 x 32 latents unless flags say otherwise. All
variants of `convs` sit on the same convs and have about the same number of parameters, which the record states.
Needs the extra `bench` (lycoris-lora). About 15 and 8 minutes on two idle cores; 12 GiB
for `convs`, where LyCORIS keeps a composed weight for every conv, 6 for `sparse`. Writes a record.
`--width 32 --latent 16 --dry` tries it out in seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vislr import measure
from vislr.adapters import ConvLoraConfig, FloraConfig, SaraConfig, adapter_parameters, attach
from vislr.anatomy import ARCHITECTURES

SETS = {
    "convs": ["peft lora", "lycoris locon", "lycoris locon bypass", "vislr convlora", "lycoris tucker",
              "lycoris tucker bypass", "vislr flora"],
    "sparse": ["peft lora", "vislr sara", "vislr sara without rank term"],
}  # fmt: skip


def build_unet(width: int) -> nn.Module:
    """SD 1.5's UNet, `width` for its 320."""
    import diffusers

    name, config = ARCHITECTURES["sd15"]
    channels = [width * factor for factor in (1, 2, 4, 4)]
    return getattr(diffusers, name).from_config({**config, "block_out_channels": channels})


def twin_of(unet: nn.Module, width: int) -> nn.Module:
    """Another model over the same tensors."""
    with torch.device("meta"):
        twin = build_unet(width)
    twin.load_state_dict(unet.state_dict(), assign=True)
    return twin


def convs_of(unet: nn.Module) -> list[str]:
    """The convs that every variant goes on: those of the residual blocks and samplers."""
    inside = ("resnets.", "samplers.")
    return [n for n, m in unet.named_modules() if isinstance(m, nn.Conv2d) and any(part in n for part in inside)]


class Variant:
    """A model with an adapter and an optimiser; calling it makes one training step."""

    def __init__(self, name: str, unet: nn.Module, a: argparse.Namespace) -> None:
        unet.train().requires_grad_(False)
        if a.channels_last:
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.unet, self.kept = unet, []
        parameters = self.put_on(name, unet, a)
        self.count = sum(parameter.numel() for parameter in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        place = next(unet.parameters())
        generator = torch.Generator().manual_seed(0)
        shapes = ((a.batch, 4, a.latent, a.latent), (a.batch, 77, 768), (a.batch, 4, a.latent, a.latent))
        self.x, self.text, self.noise = (torch.randn(s, generator=generator).to(place) for s in shapes)
        self.time = torch.tensor([500] * a.batch, device=place.device)

    def put_on(self, name: str, unet: nn.Module, a: argparse.Namespace) -> list[nn.Parameter]:
        """The adapter called `name`; what it trains."""
        convs = convs_of(unet)
        if name.startswith("lycoris"):
            from lycoris.modules.locon import LoConModule

            tucker = "tucker" in name
            rank = a.tucker_rank if tucker else a.rank
            for site in convs:
                # As its wrapper does: the module's forward is replaced, the base stays where it is.
                layer = LoConModule(
                    site.replace(".", "_"), unet.get_submodule(site), 1.0, rank, rank, use_tucker=tucker,
                    bypass_mode="bypass" in name,
                ).to(next(unet.parameters()).device)  # fmt: skip
                layer.apply_to()
                self.kept.append(layer)
            return [p for layer in self.kept for p in layer.parameters() if p.requires_grad]
        change: Any
        if name == "peft lora":
            from peft import LoraConfig

            rank = a.rank if a.set == "convs" else lora_rank(unet, a.count)
            change = LoraConfig(r=rank, lora_alpha=rank, target_modules=convs if a.set == "convs" else None)
        elif name == "vislr convlora":
            change = ConvLoraConfig(r=a.rank // 2, target_modules=convs)
        elif name == "vislr flora":
            # Kernel axes whole: LyCORIS' Tucker exactly.
            change = FloraConfig(ranks=[a.tucker_rank, a.tucker_rank, 1.0, 1.0], target_modules=convs)
        else:
            weight = 0.0 if "without" in name else 5e-4
            change = SaraConfig(count=a.count, rank_weight=weight)
        attach(unet, change, "a")
        return list(adapter_parameters(unet, "a").values())

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.mse_loss(self.unet(self.x, self.time, self.text).sample, self.noise).backward()
        self.optimizer.step()


def lora_rank(unet: nn.Module, count: int) -> int:
    """The rank at which peft's LoRA on every conv and linear of the backbone has about `count` parameters."""
    from peft import LoraConfig

    twin = twin_of(unet, unet.config.block_out_channels[0]).to("meta")  # type: ignore[index]
    attach(twin, LoraConfig(r=1), "a")
    return max(1, round(count / sum(p.numel() for p in adapter_parameters(twin, "a").values())))


def memory_of(name: str, a: argparse.Namespace) -> dict[str, float]:
    """Peak over what the process held after imports: model, adapter, optimiser, two steps."""
    for library in ("diffusers.models.unets.unet_2d_condition", "lycoris.modules.locon", "peft"):
        importlib.import_module(library)
    found: dict[str, float] = {}

    def work() -> None:
        made = Variant(name, build_unet(a.width).to(a.device, getattr(torch, a.dtype)), a)
        for _ in range(2):
            made()
        found["count"] = made.count

    peak = measure.peak_memory(work, rounds=1, device=a.device)
    return {"bytes": peak.value, **found}


def in_own_process(name: str) -> dict[str, float]:
    """`memory_of` in a new process."""
    command = [sys.executable, *sys.argv, "--only-memory", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"measuring the memory of '{name}' failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--rank", type=int, default=4, help="of peft's LoRA and LoCon; ConvLoRA takes half of it")
    parser.add_argument("--tucker-rank", type=int, default=16)
    parser.add_argument("--count", type=int, default=50_000_000, help="trained parameters of the sparse set")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--name", help="of the record; default: adapters-SET-sd15-DEVICE")
    parser.add_argument("--dry", action="store_true", help="write no record")
    parser.add_argument("--only-memory", help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.manual_seed(0)
    if a.only_memory:
        print(json.dumps(memory_of(a.only_memory, a)))
        return
    names = SETS[a.set]
    memory = {name: in_own_process(name) for name in names}
    base = build_unet(a.width).to(a.device, getattr(torch, a.dtype))
    # Times one against another: models share the base's tensors.
    made: dict[str, Callable[[], None]] = {name: Variant(name, twin_of(base, a.width), a) for name in names}
    times = measure.interleaved(made, baseline="peft lora", rounds=a.rounds, warmup=1, device=a.device)
    figures: dict[str, measure.Measurement] = {}
    layout = ", channels last" if a.channels_last else ""
    lines = [
        f"SD 1.5's UNet at width {a.width}, batch {a.batch}, latents {a.latent}, {a.dtype}, {a.device}{layout}",
        f"{len(convs_of(base))} convs" if a.set == "convs" else "every conv and linear; SaRA: norms too",
    ]
    settings = {"width": a.width, "batch": a.batch, "latent": a.latent, "dtype": a.dtype, "device": a.device,
                "channels_last": a.channels_last}  # fmt: skip
    how = "peak over the process after imports: weights, adapter, optimiser, two steps"
    for name in names:
        figures[f"step, {name}"] = times[name]
        figures[f"peak memory, {name}"] = measure.Measurement(
            memory[name]["bytes"], None, 1, None, "bytes", how, settings=settings
        )
        figures[f"parameters, {name}"] = measure.Measurement(memory[name]["count"], None, 1, None, "parameters")
        gib = memory[name]["bytes"] / 2**30
        lines.append(f"{name}: {int(memory[name]['count']):,} parameters, step {times[name]}, peak {gib:.3f} GiB")
    against = {
        "vislr convlora": ("lycoris locon bypass", "lycoris locon"),
        "vislr flora": ("lycoris tucker bypass", "lycoris tucker"),
    }
    for ours, peers in against.items():
        for peer in peers if ours in times else ():
            ratio = times[peer].value / times[ours].value
            figures[f"time of {peer} by {ours}"] = measure.Measurement(
                ratio, None, a.rounds, None, "ratio", "ratio of the medians of interleaved rounds"
            )
            lines.append(f"time of {peer} by {ours}: {ratio:.2f}")
    log = "\n".join(lines) + "\n"
    print(log, end="")
    if not a.dry:
        name = a.name or f"adapters-{a.set}-sd15-{a.device}"
        command = "python benchmarks/adapters_step.py " + " ".join(sys.argv[1:])
        print(measure.write_record(name, figures, log=log, command=command))


if __name__ == "__main__":
    main()
