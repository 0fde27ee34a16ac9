"""Compile every kernel for a Hopper chip without having one: registers, spills, shared memory, tensor core use.

    python benchmarks/kernels_compile.py

One line for each kernel and shape, two minutes on an idle core. Leaves with code 1 if a kernel does not compile, a
kernel of half floats or integers spills registers, uses no tensor core instruction where it multiplies, or does not
fit into shared memory. Needs torch and triton.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from vislr.kernels import dispatch  # noqa: E402
from vislr.kernels.attention import ops as attention  # noqa: E402
from vislr.kernels.integer_gemm import ops as integer  # noqa: E402
from vislr.kernels.tucker_conv import ops as tucker  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MOST_SHARED = 232448
HALF = torch.bfloat16


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiling:
    """In the place of `launcher`: a launch compiles and reports."""

    label = ""
    failures: tuple[str, ...] = ()

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            name = f"{self.kernel.__name__} {Compiling.label}"
            try:
                line, wrong = report(self.kernel.warmup(*args, grid=grid, **options), args[0].dtype)
            except Exception as error:
                line, wrong = f"{type(error).__name__}: {str(error)[:300]}", True
            print(f"{name:50s} {line}", flush=True)
            if wrong:
                Compiling.failures += (name,)

        return launch


def report(compiled: Any, dtype: torch.dtype) -> tuple[str, bool]:
    """What the machine code needs, and whether that is wrong."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    registers, stack = (int(n) for n in found.groups()) if found else (0, 0)
    matrix = len(re.findall(r"\b[HIQ]G?MMA", code))
    shared, multiplies = compiled.metadata.shared, "dot" in compiled.asm["ttir"]
    wrong = shared > MOST_SHARED or (dtype != torch.float32 and (stack > 0 or (multiplies and not matrix)))
    text = f"registers {registers:3d}, stack {stack:3d}, shared {shared:6d}, tensor core {matrix:3d}, async copies "
    return text + f"{code.count('LDGSTS'):3d}{'   WRONG' if wrong else ''}", wrong


def compile_attention() -> None:
    for dtype, sizes in ((HALF, (64, 40, 80, 128, 160)), (torch.float32, (64,))):
        for size in sizes:
            Compiling.label = f"{dtype} D={size}"
            q, k, v = (torch.empty(2, 1024, 4, size, dtype=dtype).transpose(1, 2) for _ in range(3))
            lse, keep = torch.empty(2, 4, 1024), torch.zeros(2, 512, dtype=torch.int64)
            attention._forward(q, k, v, None, None, 0.1)
            attention._forward(q, k, v, keep, keep, 0.1)
            attention._column_sum(q, k, lse, lse, 0.1)
            attention._backward(q, q, k, v, q, lse, 0.1)
            attention._nearest(torch.empty(2, 512, 64, dtype=dtype), keep, q, k, lse, 0.1)
    Compiling.label = "two at once"
    attention.DEFAULTS["column_sum"][0][1]["HALF_EXP"] = True
    q = torch.empty(2, 1024, 4, 64, dtype=HALF).transpose(1, 2)
    attention._column_sum(q, q, torch.empty(2, 4, 1024), torch.empty(2, 4, 1024), 0.1)


def compile_tucker() -> None:
    last, geometry = torch.channels_last, ([1, 1], [1, 1], [1, 1])
    shapes = ((HALF, 320, 128, 8), (HALF, 320, 128, 64), (HALF, 320, 128, 80), (HALF, 640, 64, 160))
    for dtype, channels, side, rank in (*shapes, (torch.float32, 320, 128, 64)):
        Compiling.label = f"{dtype} {channels}@{side} r={rank}"
        x, y, h = (torch.empty(2, c, side, side, dtype=dtype, memory_format=last) for c in (channels, channels, rank))
        down, core = torch.empty(rank, channels, dtype=dtype), torch.empty(rank, rank, 3, 3, dtype=dtype)
        up = torch.empty(channels, rank, dtype=dtype)
        shape = tucker.shape_of(x, y, down, core, up, *geometry)
        tucker._full(shape, x, y, down, core, up, 1.0, *geometry, y)
        tucker._tail(shape, h, y, core, up, 1.0, *geometry, y, h)


def compile_integer() -> None:
    def codes(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int8)

    for rows, columns, depth in ((2048, 10240, 1280), (2, 1280, 1280)):
        Compiling.label = f"{rows}x{columns}x{depth}"
        x, weight, packed = codes(rows, depth), codes(columns, depth), codes(columns, depth // 2).view(torch.uint8)
        scales, scale = (torch.empty(rows), torch.empty(columns)), torch.empty(columns, depth // 128)
        zeros = [torch.zeros(n, dtype=torch.int32) for n in (rows, columns)]
        integer._w8a8(x, weight, *scales, scales[1], None, None, HALF)
        integer._w8a8(x, weight, *scales, scales[1], *zeros, HALF)
        integer._w4a16(torch.empty(rows, depth, dtype=HALF), packed, scale, None, None, 128)
        integer._w4a8(x, packed, scales[0], scale, None, None, 128, HALF)
    integer._quantize(torch.empty(2048, 1280, dtype=HALF))
    Compiling.label = "640@64"
    pixels, taps = (codes(n, 640, s, s).contiguous(memory_format=torch.channels_last) for n, s in ((2, 64), (640, 3)))
    integer._conv(pixels, taps, torch.empty(2), torch.empty(640), None, None, None, [1, 1], [1, 1], [1, 1], HALF)


def main() -> int:
    if dispatch.INTERPRETED:
        print("compiling needs TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    triton.runtime.driver.set_active(Hopper())
    attention.launcher = tucker.launcher = integer.launcher = Compiling
    tucker._multiprocessors = lambda device: 132
    compile_attention()
    compile_tucker()
    compile_integer()
    print(f"triton {triton.__version__}: {len(Compiling.failures)} wrong {', '.join(Compiling.failures)}")
    return 1 if Compiling.failures else 0


if __name__ == "__main__":
    sys.exit(main())
