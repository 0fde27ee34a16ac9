"""What a Tucker convolution costs, fused and unfused, and which way to take.

Every stage takes the larger of its arithmetic and its memory traffic. Per output pixel, with b bytes an
entry, the stages move C + R (down), R + S (core), S + Co (up) entries; fused, C + Co in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vislr.kernels.dispatch import tuned

# NVIDIA H200, from its data sheet: dense bf16 and memory.
PEAK_FLOPS = 989.4e12
PEAK_BYTES = 4.8e12
# Starting a kernel from a stream.
LAUNCH = 3e-6
# Wider ranks do not fit into the registers of a block.
WIDEST_RANK = 160
PATHS = ("full", "tail", "chain")


@dataclass(frozen=True)
class Shape:
    """Sizes of one call.

    Attributes:
        pixels_in, pixels: input and output positions over the batch.
        channels_in, rank_in, rank_out, channels_out: C, R, S, Co.
        taps: kernel positions, 9 for 3x3.
        has_down: whether there is a first 1x1; without it R = C.
        has_base: whether a map is added.
    """

    pixels_in: int
    pixels: int
    channels_in: int
    rank_in: int
    rank_out: int
    channels_out: int
    taps: int
    has_down: bool = True
    has_base: bool = True

    def flops(self) -> int:
        """2 for each multiply-add of the three products."""
        first = self.pixels_in * self.channels_in * self.rank_in if self.has_down else 0
        return 2 * (first + self.pixels * self.rank_out * (self.taps * self.rank_in + self.channels_out))

    def _stage(self, entries: int, products: int, size: int) -> float:
        return max(entries * size / PEAK_BYTES, 2 * products / PEAK_FLOPS)

    def seconds(self, path: str, size: int = 2) -> float:
        """Lower bound on the H200 for one of PATHS, or "separate" (a chain with its own add); `size` bytes an entry."""
        pixels, mapped = self.pixels, self.pixels * self.channels_out * self.has_base
        down = (self.pixels_in * (self.channels_in + self.rank_in), self.pixels_in * self.channels_in * self.rank_in)
        core = (
            self.pixels_in * self.rank_in + pixels * self.rank_out,
            pixels * self.taps * self.rank_in * self.rank_out,
        )
        up = (pixels * (self.rank_out + self.channels_out), pixels * self.rank_out * self.channels_out)
        stages = [down] * self.has_down
        if path == "full":
            entries = self.pixels_in * self.channels_in + pixels * self.channels_out + mapped
            return self._stage(entries, self.flops() // 2, size)
        if path == "tail":
            wide = self.pixels_in * self.rank_in + pixels * self.channels_out + mapped
            return sum(self._stage(*stage, size) for stage in [*stages, (wide, core[1] + up[1])])
        add = (3 * mapped, 0) if path == "separate" else (mapped, 0)
        return sum(self._stage(*stage, size) for stage in [*stages, core, up, add])

    def launches(self, path: str) -> int:
        """Kernels that a path starts."""
        return {"full": 1, "tail": 1 + self.has_down, "chain": 3 + self.has_down, "separate": 3 + self.has_down}[path]


def key(shape: Shape) -> str:
    """The shape's row in the table: ranks rounded up to 16, channels and positions as they are."""
    rank = -(-max(shape.rank_in if shape.has_down else 16, shape.rank_out) // 16) * 16
    return f"C={shape.channels_in} P={shape.pixels} r={rank}"


def choose(shape: Shape, size: int = 2) -> str:
    """The path for a call: measured, if the table has the shape, else by the roofline.

    A fused kernel of Triton comes less close to the peak of arithmetic than cuBLAS and cuDNN do, so it
    must promise a tenth.
    """
    if shape.rank_out > WIDEST_RANK:
        return "chain"
    allowed = [path for path in PATHS if path != "full" or (shape.has_down and shape.rank_in <= WIDEST_RANK)]
    measured: dict[str, Any] = tuned("tucker_conv", "path", key(shape))
    if measured.get("path") in allowed:
        return measured["path"]

    def expected(path: str) -> float:
        return shape.seconds(path, size) * (1.0 if path == "chain" else 1.1) + LAUNCH * shape.launches(path)

    return min(allowed, key=expected)
