"""Ways to compute ConvLoRA's part of a conv, against peft's conv LoRA; and the arithmetic that each of them needs.

    python benchmarks/convlora_ways.py

Forward and backward of the adapter alone at the convs of SD 1.5 (rank 2 against peft's 4: 10 % fewer parameters on a
3 x 3 conv). ConvLoRA's rows of three pieces need 54 Ci + 18 Co multiply-adds a position, LoRA's 36 Ci + 4 Co: the limit
of a training step follows from torch's FLOP counter on the whole UNet. CPU time of one thread, interleaved, so that
other work on the machine matters little. Two minutes. Writes a record.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from adapters_step import build_unet, convs_of, twin_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vislr import measure
from vislr.adapters import ConvLoraConfig, attach
from vislr.adapters.conv_lora import _copies, _shifted, chain_forward
from vislr.adapters.geometry import Geometry, geometry_of
from vislr.measure.timing import compare_times

SHAPES = {(320, 320, 32): 13, (640, 640, 16): 10, (1280, 1280, 8): 13, (2560, 1280, 8): 5}
RANK = 2


def slices(x: torch.Tensor, A: torch.Tensor, g: Geometry) -> torch.Tensor:
    """A conv for each piece on a slice of x: no copy, but a backward that fills a whole gradient for each."""
    return torch.cat([g.convolve(x[:, first:last], kernel) for (first, last), kernel in _shifted(A, g.shape)], 1)


def copies(x: torch.Tensor, A: torch.Tensor, g: Geometry) -> torch.Tensor:
    """What vislr does: slices that are joined from parts without overlap."""
    runs, kernels = zip(*_shifted(A, g.shape), strict=True)
    return torch.cat([g.convolve(own, kernel) for own, kernel in zip(_copies(x, runs), kernels, strict=True)], 1)


def one_kernel(x: torch.Tensor, A: torch.Tensor, g: Geometry) -> torch.Tensor:
    """One conv, its kernel filled with zeros where a piece is not: k1 times the multiply-adds, one call."""
    inside = g.shape[1]
    kernels = [F.pad(k, (0, 0, 0, 0, first, inside - last)) for (first, last), k in _shifted(A, g.shape)]
    return g.convolve(x, torch.cat(kernels))


def whole_and_divided(x: torch.Tensor, A: torch.Tensor, g: Geometry) -> torch.Tensor:
    """A conv for the whole channels of each piece, one more for the channels that two pieces share."""
    _, inside, k1, *rest = g.shape
    taps, length = g.kernel, A.shape[1]
    whole = [(-(-p * length // taps), (p + 1) * length // taps) for p in range(k1)]
    sizes, at = [], 0
    for first, last in whole:
        sizes += [first - at] * (first > at) + [last - first]
        at = last
    chunks, columns = x.split(sizes, 1), []
    maps = [
        g.convolve(chunk, A[:, a * taps - p * length : b * taps - p * length].reshape(len(A), b - a, k1, *rest))
        for p, (chunk, (a, b)) in enumerate(zip(chunks[::2], whole, strict=True))
    ]
    for channel in sorted(set(range(inside)) - {c for a, b in whole for c in range(a, b)}):
        rows = []
        for p in range(k1):
            a, b = max(channel * taps, p * length), min((channel + 1) * taps, (p + 1) * length)
            part = A[:, a - p * length : b - p * length] if b > a else A[:, :0]
            before = min(max(a - channel * taps, 0), taps - part.shape[1])
            rows.append(F.pad(part, (before, taps - before - part.shape[1])))
        columns.append(torch.cat(rows))
    kernel = torch.stack(columns, 1).unflatten(2, (k1, *rest))
    return torch.cat(maps, 1) + g.convolve(torch.cat(chunks[1::2], 1), kernel)


def ways(channels: int, out: int, size: int, batch: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> the layer's output with the adapter's part added, over the same tensors."""
    g = geometry_of(nn.Conv2d(channels, out, 3, padding=1))
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    base = torch.randn(batch, out, size, size, requires_grad=True)
    A = nn.Parameter(torch.randn(3 * RANK, 3 * channels) * 0.01)
    B = nn.Parameter(torch.randn(3 * out, 3 * RANK) * 0.01)
    down, up = nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.Conv2d(4, out, 1, bias=False)
    matrix = B.view(out, -1)

    def added(h: torch.Tensor) -> torch.Tensor:
        return base + g.mix(h, matrix)

    def into(h: torch.Tensor) -> torch.Tensor:
        flat = torch.baddbmm(base.flatten(2), matrix.expand(batch, -1, -1), h.flatten(2))
        return flat.unflatten(2, (size, size))

    return {
        "peft lora": lambda: base + up(down(x)),
        "vislr convlora": lambda: base + chain_forward(x, A, B, 1.0, g),
        "slices": lambda: added(slices(x, A, g)),
        "product and sum in one call": lambda: into(copies(x, A, g)),
        "whole and divided channels": lambda: added(whole_and_divided(x, A, g)),
        "one kernel with zeros": lambda: added(one_kernel(x, A, g)),
    }


def counted(adapter: str, batch: int = 1) -> int:
    """FLOPs of forward and backward of SD 1.5's UNet with an adapter on its residual blocks' convs."""
    from peft import LoraConfig

    with torch.device("meta"):
        unet = twin_of(build_unet(320).to("meta"), 320).requires_grad_(False)
        convs = convs_of(unet)
        if adapter == "peft":
            attach(unet, LoraConfig(r=2 * RANK, lora_alpha=2 * RANK, target_modules=convs), "a")
        else:
            attach(unet, ConvLoraConfig(r=RANK, target_modules=convs), "a")
        x, text = torch.randn(batch, 4, 32, 32), torch.randn(batch, 77, 768)
        with FlopCounterMode(display=False) as counter:
            unet(x, torch.zeros(batch), text).sample.sum().backward()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dry", action="store_true", help="write no record")
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng, figures, sums = random.Random(0), {}, {}
    for batch in (1, 4):
        for (channels, out, size), count in SHAPES.items():
            made = ways(channels, out, size, batch)
            expected = made["vislr convlora"]()
            gradient, times = torch.randn_like(expected), {name: [] for name in made}
            for name, one in made.items():
                if name != "peft lora":
                    torch.testing.assert_close(one(), expected, rtol=1e-4, atol=1e-5)
            for number in range(a.rounds + 2):
                for name in rng.sample(list(made), len(made)):
                    start = time.process_time()
                    made[name]().backward(gradient)
                    if number > 1:
                        times[name].append(time.process_time() - start)
            about = {"device": measure.record.device_name(torch.device("cpu")), "threads": 1, "batch": batch,
                     "clock": "process_time", "shape": [channels, out, size], "convs of SD 1.5": count}  # fmt: skip
            for name, one in compare_times(times, "peft lora", 0, about).items():
                figures[f"{channels} to {out} at {size} x {size}, batch {batch}: {name}"] = one
            for name, own in times.items():
                key = (batch, name)
                sums[key] = sums.get(key, 0.0) + count * statistics.median(own)
    flops = {name: counted(name) for name in ("peft", "convlora")}
    lines = [f"{name}: {one}" for name, one in figures.items()]
    for (batch, name), seconds in sums.items():
        ratio = sums[batch, "peft lora"] / seconds
        lines.append(f"{sum(SHAPES.values())} convs, batch {batch}: {name} {1e3 * seconds:.0f} ms, speedup {ratio:.3f}")
    ratio = flops["peft"] / flops["convlora"]
    lines.append(f"FLOPs of a step: peft lora {flops['peft']:,}, convlora {flops['convlora']:,}: ratio {ratio:.4f}")
    figures["limit of a step"] = measure.Measurement(
        ratio, None, 1, None, "ratio", "FLOPs of peft's step by ConvLoRA's, forward and backward", "", dict(flops)
    )
    log = "\n".join(lines) + "\n"
    print(log, end="")
    if not a.dry:
        command = " ".join(["python benchmarks/convlora_ways.py", *sys.argv[1:]])
        print(measure.write_record("convlora-ways", figures, log=log, command=command, seed=0))


if __name__ == "__main__":
    main()
