"""The kernels' references on a CPU against the other plain ways in torch. Writes a record.

    python benchmarks/kernels_cpu.py --rounds 8

Tucker convolution: layouts, dtypes, ways to add, and the weight made anew. Ranking: query blocks of several
sizes, the whole map, and torch's flash attention with the roles of queries and keys exchanged. SaRA's gradient:
all of it and then the trained entries, against those entries alone. Integers: W8A8 and W4A16 against float32.
CPU time of one thread, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vislr import kernels, measure
from vislr.kernels.attention import reference as plain_attention
from vislr.kernels.sparse_gradient.reference import _alone
from vislr.kernels.tucker_conv.reference import tucker_conv
from vislr.measure.timing import compare_times

Ways = dict[str, Callable[[], Any]]
GEOMETRY = ([1, 1], [1, 1], [1, 1])


def tucker_ways(channels: int, side: int, rank: int) -> Ways:
    """y = base + 0.5 up (core * (down x)); the first is what vislr runs."""
    torch.manual_seed(0)
    last = torch.channels_last
    x, base = torch.randn(2, channels, side, side), torch.randn(2, channels, side, side)
    down, core, up = torch.randn(rank, channels), torch.randn(rank, rank, 3, 3), torch.randn(channels, rank)
    dense = [x, base, down, core, up]
    wide = [t.contiguous(memory_format=last) if t.dim() == 4 else t for t in dense]
    half = [t.bfloat16() for t in wide]

    def separate(x: Any, base: Any, down: Any, core: Any, up: Any) -> Any:
        h = F.conv2d(F.conv2d(x, down[:, :, None, None]), core, None, 1, 1)
        return base + 0.5 * F.conv2d(h, up[:, :, None, None])

    def product_into_base(x: Any, base: Any, down: Any, core: Any, up: Any) -> Any:
        h = F.conv2d(F.conv2d(x, down[:, :, None, None]), core, None, 1, 1)
        flat = [t.permute(0, 2, 3, 1).flatten(0, 2) for t in (base, h)]
        return torch.addmm(flat[0], flat[1], up.mT, alpha=0.5)

    def fused_add(x: Any, base: Any, down: Any, core: Any, up: Any) -> Any:
        h = F.conv2d(F.conv2d(x, down[:, :, None, None]), core, None, 1, 1)
        return torch.add(base, F.conv2d(h, up[:, :, None, None]), alpha=0.5)

    def rebuilt(x: Any, base: Any, down: Any, core: Any, up: Any) -> Any:
        return torch.add(base, F.conv2d(x, torch.einsum("ab,bcij,cd->adij", up, core, down), None, 1, 1), alpha=0.5)

    def ours(x: Any, base: Any, down: Any, core: Any, up: Any) -> Any:
        return tucker_conv(x, base, down, core, up, 0.5, *GEOMETRY)

    return {
        "products for both 1x1, channels_last": lambda: ours(*wide),
        "chain, fused add, channels_last": lambda: fused_add(*wide),
        "chain, fused add, NCHW": lambda: ours(*dense),
        "chain, fused add, channels_last, bf16": lambda: fused_add(*half),
        "bf16 given, float32 inside": lambda: ours(*half),
        "chain, separate scale and add, channels_last": lambda: separate(*wide),
        "chain, last product into the base, channels_last": lambda: product_into_base(*wide),
        "weight made anew, channels_last": lambda: rebuilt(*wide),
    }


def ranking_ways(heads: int, tokens: int, size: int) -> Ways:
    """A^T s of every head; the first is what vislr runs."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, tokens, heads, size).transpose(1, 2) for _ in range(3))
    scale = size**-0.5
    _, lse = kernels.attention_with_lse(q, k, v)
    s = torch.full_like(lse, 1 / tokens)

    def blocks(size_of_block: int) -> Callable[[], Any]:
        def run() -> Any:
            before = plain_attention.BLOCK_BYTES
            plain_attention.BLOCK_BYTES = size_of_block
            try:
                return kernels.attention_column_sum(q, k, lse, s)
            finally:
                plain_attention.BLOCK_BYTES = before

        return run

    def whole_map() -> Any:
        return torch.einsum("bhqk,bhq->bhk", (q @ k.mT * scale).softmax(-1), s)

    def exchanged() -> Any:
        # Keys ask, queries answer with s, biased by -lse; the denominator comes back as the log-sum-exp.
        values = F.pad(s.unsqueeze(-1), (0, size - 1)).contiguous()
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            k, q, values, attn_mask=-lse.unsqueeze(2), scale=scale
        )
        return out[..., 0] * sums.exp()

    ways = {f"blocks of {plain_attention.BLOCK_BYTES >> 20} MB": blocks(plain_attention.BLOCK_BYTES)}
    ways |= {f"blocks of {n} MB": blocks(n << 20) for n in (1, 16)}
    ways |= {"whole map": whole_map, "flash attention, roles exchanged": exchanged}
    ways["(the attention itself, flash)"] = lambda: F.scaled_dot_product_attention(q, k, v)
    expected = whole_map()
    for name, way in ways.items():
        if not name.startswith("("):
            torch.testing.assert_close(way(), expected, rtol=1e-4, atol=1e-6)
    return ways


def lse_ways(heads: int, tokens: int, size: int) -> Ways:
    """Attention with its log-sum-exp; the first is what vislr runs."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, tokens, heads, size).transpose(1, 2) for _ in range(3))

    def plain() -> Any:
        logits = q @ k.mT * size**-0.5
        return logits.softmax(-1) @ v, logits.logsumexp(-1)

    def twice() -> Any:
        return F.scaled_dot_product_attention(q, k, v), (q @ k.mT * size**-0.5).logsumexp(-1)

    return {
        "flash with log-sum-exp": lambda: kernels.attention_with_lse(q, k, v),
        "plain formula": plain,
        "SDPA, then the logits again": twice,
        "(SDPA alone)": lambda: F.scaled_dot_product_attention(q, k, v),
    }


def sparse_ways(side: int, rows: int, density: float) -> Ways:
    """Entries of dY^T X at a random set of places."""
    torch.manual_seed(0)
    grad, x = torch.randn(rows, side), torch.randn(rows, side)
    index = torch.randperm(side * side)[: int(density * side * side)].sort().values
    across, along = grad.mT.contiguous(), x.mT.contiguous()

    def alone() -> Any:
        pieces = [(across[part // side] * along[part % side]).sum(-1) for part in index.split(1 << 14)]
        return torch.cat(pieces)

    ways = {
        "all, then the trained entries": lambda: (grad.mT @ x).view(-1)[index],
        "trained entries alone, gathered rows": alone,
        "trained entries alone, sampled product": lambda: _alone(grad, x, index),
    }
    torch.testing.assert_close(alone(), ways["all, then the trained entries"](), rtol=1e-3, atol=1e-3)
    return ways


def integer_ways(rows: int, columns: int, depth: int) -> Ways:
    """A linear layer; the first is float32."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, depth), torch.randn(columns, depth)
    codes, scale = kernels.quantize_rows(weight)
    found, row_scale = kernels.quantize_rows(x)
    packed = kernels.pack_int4(torch.randint(0, 16, (columns, depth)), 128)
    group_scale = torch.rand(columns, depth // 128)
    return {
        "float32": lambda: F.linear(x, weight),
        "W8A8": lambda: kernels.linear_w8a8(found, codes, row_scale, scale, dtype=torch.float32),
        "W8A8 with quantising": lambda: kernels.linear_w8a8(
            *(kernels.quantize_rows(x)[0], codes, row_scale, scale), dtype=torch.float32
        ),
        "W8A8 product alone, torch's for integers": lambda: torch._int_mm(found, codes.mT),
        "W4A16": lambda: kernels.linear_w4a16(x, packed, group_scale),
    }


def timed(ways: Ways, rounds: int, about: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of each way, in a new order in every round, against the first."""
    rng, times = random.Random(0), {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in rng.sample(list(ways), len(ways)):
            start = time.process_time()
            with torch.no_grad():
                ways[name]()
            if number:  # the first warms up
                times[name].append(time.process_time() - start)
    first = next(iter(ways))
    return compare_times(times, first, 0, about | {"baseline": first, "rounds": rounds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    groups = {
        "tucker 320@32x32 r=64": tucker_ways(320, 32, 64),
        "tucker 320@32x32 r=16": tucker_ways(320, 32, 16),
        "tucker 128@64x64 r=32": tucker_ways(128, 64, 32),
        "ranking N=1024 H=8 D=64": ranking_ways(8, 1024, 64),
        "ranking N=4096 H=2 D=40": ranking_ways(2, 4096, 40),
        "attention with lse N=1024 H=8 D=64": lse_ways(8, 1024, 64),
        "sparse gradient 640x640, 2048 rows, density 0.05": sparse_ways(640, 2048, 0.05),
        "sparse gradient 640x640, 2048 rows, density 0.2": sparse_ways(640, 2048, 0.2),
        "linear 1024x640x640": integer_ways(1024, 640, 640),
    }
    about = {"device": measure.record.device_name(torch.device("cpu")), "threads": 1, "clock": "process_time"}
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; times are CPU time of one thread\n"
    figures, lines = {}, [load]
    for group, ways in groups.items():
        for name, figure in timed(ways, options.rounds, about).items():
            figures[f"{group}: {name}"] = figure
            lines.append(f"{group}: {name}: {figure}\n")
            print(lines[-1], end="", flush=True)
    command = f"python benchmarks/kernels_cpu.py --rounds {options.rounds}"
    print(measure.write_record("kernels-cpu", figures, log="".join(lines), command=command, seed=0))


if __name__ == "__main__":
    main()
