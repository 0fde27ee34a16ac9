"""Find the fastest configuration of every kernel on the GPU at hand and keep it in the kernels' tables.

    python -m vislr.kernels.tune                  # all kernels, about ten minutes
    python -m vislr.kernels.tune --only attention --seconds 120

Writes `table.json` beside each kernel: GPU -> kernel -> shape -> configuration. Needs torch and triton.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vislr.kernels import attention, dispatch, integer_gemm, tucker_conv
from vislr.kernels.integer_gemm import ops as integer_ops
from vislr.kernels.tucker_conv import roofline

HALF = torch.bfloat16
DEVICE = "cuda"
# Processes that compile ahead.
COMPILERS = 8


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        folder, kernel, key: its place in the tables.
        candidates: configurations to try.
        make: draws inputs on the GPU and returns a call that runs the kernel on them.
        path: of the Tucker convolution, the path that runs this kernel.
    """

    folder: str
    kernel: str
    key: str
    candidates: tuple[dict[str, Any], ...]
    make: Callable[[], Callable[[], Any]]
    path: str = ""


def product(**choices: tuple) -> tuple[dict[str, Any], ...]:
    """All combinations of the choices."""
    return tuple(dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))


def seconds(calls: list[Callable[[], Any]], rounds: int = 12) -> float:
    """Median time of one call on the GPU: a CUDA graph of all calls, replayed, without the cost of starting.

    Give calls on different inputs, or the L2 cache answers.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times[2:])[rounds // 2]


def _normal(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)


def heads(batch: int, number: int, tokens: int, size: int) -> list[torch.Tensor]:
    """q, k and v as projections leave them in memory."""
    return [_normal(batch, tokens, number, size).transpose(1, 2) for _ in range(3)]


def attention_cases() -> Iterator[Case]:
    """The head sizes of SD 1.5, SDXL, SD 3 and FLUX, at the lengths where they cost most."""
    for size, number, tokens in ((64, 10, 4096), (40, 8, 4096), (128, 24, 2048), (80, 8, 1024), (160, 8, 1024)):

        def forward(size: int = size, number: int = number, tokens: int = tokens) -> Any:
            q, k, v = heads(2, number, tokens, size)
            return lambda: attention.attention_with_lse(q, k, v)

        def column_sum(size: int = size, number: int = number, tokens: int = tokens) -> Any:
            q, k, v = heads(2, number, tokens, size)
            _, lse = attention.attention_with_lse(q, k, v)
            share = torch.full_like(lse, 1 / tokens)
            return lambda: attention.attention_column_sum(q, k, lse, share)

        def backward(size: int = size, number: int = number, tokens: int = tokens) -> Any:
            q, k, v = heads(2, number, tokens, size)
            out, lse = attention.attention_with_lse(q, k, v)
            return lambda: torch.ops.vislr.attention_backward(out, q, k, v, out, lse, size**-0.5)

        def nearest(size: int = size, number: int = number, tokens: int = tokens) -> Any:
            q, k, v = heads(2, number, tokens, size)
            _, lse = attention.attention_with_lse(q, k, v)
            keep = torch.rand(2, tokens, device=DEVICE).argsort(1)[:, : tokens // 2].contiguous()
            kept = _normal(2, tokens // 2, number * size)
            return lambda: attention.recover_by_attention(kept, keep, q, k, lse)

        def gathered(size: int = size, number: int = number, tokens: int = tokens) -> Any:
            q, k, v = heads(2, number, tokens, size)
            keep = torch.rand(2, tokens, device=DEVICE).argsort(1)[:, : tokens // 2].contiguous()
            return lambda: attention.gathered_attention(q, k, v, keep, keep)

        key = f"D={size}"
        wide = size > 64
        blocks: dict[str, tuple[int, ...]]
        blocks = {"BLOCK_Q": (64, 128), "BLOCK_K": (32, 64, 128) if not wide else (32, 64), "num_warps": (4, 8)}
        yield Case("attention", "forward", key, product(**blocks, num_stages=(2, 3)), forward)
        blocks = {"BLOCK_Q": (64, 128), "BLOCK_K": (64, 128), "num_warps": (4, 8), "num_stages": (3,)}
        yield Case("attention", "column_sum", key, product(HALF_EXP=(False, True), **blocks), column_sum)
        blocks = {"BLOCK_Q": (32, 64), "BLOCK_K": (64, 128), "num_warps": (4, 8), "num_stages": (2,)}
        yield Case("attention", "keys", key, product(**blocks), backward)
        blocks = {"BLOCK_Q": (64, 128), "BLOCK_K": (32, 64), "num_warps": (4, 8), "num_stages": (2,)}
        yield Case("attention", "queries", key, product(**blocks), backward)
        blocks = {"BLOCK_Q": (64, 128), "BLOCK_K": (64,), "BLOCK_C": (128,), "num_warps": (4, 8), "num_stages": (2, 3)}
        yield Case("attention", "nearest", key, product(**blocks), nearest)
        yield Case("attention", "gather", key, product(copy=(False, True)), gathered)


# (channels, side, ranks): the levels of SDXL's and SD 1.5's UNets at 1024 and 512 pixels, batch 2.
LEVELS = ((320, 128, (8, 16, 32, 64, 80, 128, 160)), (640, 64, (8, 32, 64, 128, 160)), (1280, 32, (32, 128, 160)))


def tucker_inputs(channels: int, side: int, rank: int) -> list[torch.Tensor]:
    """x, down, core, up and base of a 3x3 convolution, all in channels_last."""
    last = torch.channels_last
    x, base = (_normal(2, channels, side, side).contiguous(memory_format=last) for _ in range(2))
    core = (_normal(rank, rank, 3, 3) / 3).contiguous(memory_format=last)
    return [x, _normal(rank, channels) / channels**0.5, core, _normal(channels, rank) / rank**0.5, base]


def tucker_key(channels: int, side: int, rank: int) -> str:
    """The table's key of that convolution."""
    return roofline.key(roofline.Shape(2 * side**2, 2 * side**2, channels, rank, rank, channels, 9))


def tucker_cases() -> Iterator[Case]:
    """Tiles of both kernels, then which path is fastest."""
    tiles = {"TILE_Y": (8,), "TILE_X": (8, 16), "BLOCK_CO": (64,), "num_warps": (4, 8), "num_stages": (2, 3)}
    for channels, side, ranks in LEVELS:
        for rank in ranks:

            def make(channels: int = channels, side: int = side, rank: int = rank) -> Any:
                x, down, core, up, base = tucker_inputs(channels, side, rank)
                return lambda: tucker_conv.tucker_convolution(x, down, core, up, base, padding=1)

            key = tucker_key(channels, side, rank)
            full = product(BLOCK_P=(64, 128), BLOCK_C=(64,), **tiles)
            yield Case("tucker_conv", "full", key, full, make, "full")
            yield Case("tucker_conv", "tail", key, product(**tiles), make, "tail")
            yield Case("tucker_conv", "path", key, product(path=roofline.PATHS), make)


# (M, N, K): SDXL's linears at 1024 pixels with guidance, FLUX's MLP, and rows of text and time.
LINEARS = (
    (2048, 10240, 1280),
    (2048, 1280, 5120),
    (2048, 1280, 1280),
    (8192, 5120, 640),
    (8192, 640, 640),
    (8192, 12288, 3072),
)
FEW_ROWS = ((2, 1280, 1280), (154, 1280, 2048), (2048, 10240, 1280))


def integer_cases() -> Iterator[Case]:
    """GEMM and convolution."""
    for rows, columns, depth in LINEARS:

        def eight(rows: int = rows, columns: int = columns, depth: int = depth) -> Any:
            x, weight = _codes(rows, depth), _codes(columns, depth)
            scales = torch.rand(rows, device=DEVICE), torch.rand(columns, device=DEVICE)
            return lambda: integer_gemm.linear_w8a8(x, weight, *scales)

        blocks = product(BLOCK_M=(128,), BLOCK_N=(128, 256), BLOCK_K=(64, 128), GROUP_M=(8,), num_warps=(4, 8))
        candidates = tuple(block | {"num_stages": stages} for block in blocks for stages in (3, 4))
        yield Case("integer_gemm", "w8a8", integer_ops.key(rows, columns, depth), candidates, eight)
    for rows, columns, depth in FEW_ROWS:

        def four(rows: int = rows, columns: int = columns, depth: int = depth) -> Any:
            x = _normal(rows, depth)
            packed, scale = four_bits(columns, depth)
            return lambda: integer_gemm.linear_w4a16(x, packed, scale)

        key = integer_ops.key(rows, columns, depth)
        blocks_m = (16,) if rows <= 16 else (64, 128)
        candidates = product(BLOCK_M=blocks_m, BLOCK_N=(32, 64, 128), GROUP_M=(8,), num_warps=(4, 8), num_stages=(3, 4))
        yield Case("integer_gemm", "w4a16", key, candidates, four)
    for channels, side in ((320, 128), (640, 64), (1280, 32)):

        def conv(channels: int = channels, side: int = side) -> Any:
            last = torch.channels_last
            x = _codes(2, channels, side, side).contiguous(memory_format=last)
            weight = _codes(channels, channels, 3, 3).contiguous(memory_format=last)
            scales = torch.rand(2, device=DEVICE), torch.rand(channels, device=DEVICE)
            return lambda: integer_gemm.conv_w8a8(x, weight, *scales, padding=1)

        key = integer_ops.key(2 * side**2, channels, 9 * channels)
        candidates = product(
            BLOCK_M=(128,), BLOCK_N=(64, 128), BLOCK_K=(64, 128), GROUP_M=(8,), num_warps=(4, 8), num_stages=(3, 4)
        )
        yield Case("integer_gemm", "conv", key, candidates, conv)


def four_bits(columns: int, depth: int, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A packed weight of random codes and its scales."""
    packed = torch.randint(0, 256, (columns, depth // 2), dtype=torch.uint8, device=DEVICE)
    return packed, torch.rand(columns, depth // group, device=DEVICE) / depth**0.5


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention_cases,
    "tucker_conv": tucker_cases,
    "integer_gemm": integer_cases,
}


def _chosen(only: list[str]) -> list[Case]:
    return [case for folder in only or CASES for case in CASES[folder]()]


def _with(case: Case, config: dict[str, Any]) -> None:
    dispatch.remember(case.folder, case.kernel, case.key, config)
    if case.path:
        dispatch.remember(case.folder, "path", case.key, {"path": case.path})


def _compile_share(only: list[str], part: int, deadline: float) -> None:
    """Run each of this process's configurations once, which leaves it in Triton's cache on disk."""
    torch.manual_seed(0)
    pairs = [(case, config) for case in _chosen(only) for config in case.candidates]
    for case, config in pairs[part::COMPILERS]:
        if time.monotonic() > deadline:
            return
        _with(case, config)
        # A configuration that does not fit the chip fails again in the timing, which reports it.
        with contextlib.suppress(Exception):
            case.make()()
            torch.cuda.synchronize()


def tune(only: list[str], budget: float, log: Callable[[str], None] = print) -> list[str]:
    """Tune in memory, by parts of `budget` seconds: a third to compile, the rest to time.

    Args:
        only: folders; empty: all.
        log: gets a line for each shape.

    Returns:
        The folders whose tables changed.
    """
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    compilers = [
        context.Process(target=_compile_share, args=(only, part, start + budget / 3)) for part in range(COMPILERS)
    ]
    for process in compilers:
        process.start()
    for process in compilers:
        process.join(max(1.0, budget / 2 - (time.monotonic() - start)))
        if process.is_alive():
            process.kill()
    changed = set()
    for case in _chosen(only):
        if time.monotonic() - start > budget:
            log(f"out of time before {case.folder} {case.kernel} {case.key}")
            break
        before = dispatch.tuned(case.folder, case.kernel, case.key)
        results = []
        for config in case.candidates:
            _with(case, config)
            try:
                results.append((seconds([case.make() for _ in range(2)] * 4, rounds=6), config))
            except Exception as error:  # shared memory or registers run out at some shapes
                log(f"{case.folder} {case.kernel} {case.key} {config}: {type(error).__name__}")
                torch.cuda.synchronize()
        if case.path:
            dispatch.forget(case.folder, "path", case.key)
        if not results:
            dispatch.forget(case.folder, case.kernel, case.key)
            if before:
                dispatch.remember(case.folder, case.kernel, case.key, before)
            continue
        best, config = min(results, key=lambda pair: pair[0])
        dispatch.remember(case.folder, case.kernel, case.key, config)
        changed.add(case.folder)
        worst = max(results, key=lambda pair: pair[0])[0]
        log(f"{case.folder} {case.kernel} {case.key}: {best * 1e6:.1f} us (worst {worst * 1e6:.1f}) {config}")
    return sorted(changed)


def write_tables(folders: list[str]) -> None:
    """Put the tables in memory onto the disk, beside the kernels."""
    for folder in folders:
        file = dispatch.table_file(folder)
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        aside.write_text(json.dumps(dispatch.table(folder), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(aside, file)
        print(file)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vislr.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], choices=[*CASES], help="folders to tune; default: all")
    parser.add_argument("--seconds", type=float, default=600, help="time to spend (default: 600)")
    options = parser.parse_args()
    if dispatch.INTERPRETED or not dispatch.runs_kernel(torch.device("cuda")):
        print("tuning needs a GPU with Triton, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    write_tables(tune(options.only, options.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
