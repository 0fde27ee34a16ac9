"""Weights as codes: observers that choose scales, packing of codes into bytes, and the NF4 table.

Shapes: a weight (Co, ...) is read as rows (Co, K), K everything but the first axis; G codes of a row share a
scale. One scale for a whole row is the case G = K.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.nn import functional as F

from vislr.core.errors import ConfigError
from vislr.core.quantizing import TINY, affine_of, to_codes, top
from vislr.kernels.integer_gemm import pack_int4, unpack_int4

OBSERVERS = ("minmax", "mse", "percentile")
FORMATS = ("uniform", "nf4")
# Codes that lie side by side in packed rows of a linear: what the kernels read.
BLOCK = 64
# EfficientDM's search: shares of the full range, and the power of the error that is minimised.
SHARES = tuple(share / 100 for share in range(100, 20, -1))
POWER = 2.4
# Of a row's values, the share that "percentile" keeps inside the range.
INSIDE = 0.999


class Codes(NamedTuple):
    """A quantised weight.

    Attributes:
        codes: (Co, K) uint8, 0 ... L.
        scale: (Co, groups) float32.
        zero: (Co, groups) uint8; None: 2^(bits - 1) everywhere, or the format has none.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


def container(bits: int) -> int:
    """Bits that a packed code takes: 2, 4 or 8."""
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def groups_of(columns: int, group: int | None) -> int:
    """Scales in a row of K columns."""
    return 1 if group is None else -(-columns // group)


def _grouped(rows: torch.Tensor, group: int | None) -> torch.Tensor:
    """(Co, K) -> (Co, groups, G); the last group is completed with zeros."""
    if group is None:
        return rows.unsqueeze(1)
    return F.pad(rows, (0, -rows.shape[1] % group)).unflatten(1, (-1, group))


@torch.no_grad()
def quantize_weight(
    weight: torch.Tensor, bits: int, *, symmetric: bool, group: int | None = None, observer: str = "minmax",
    kind: str = "uniform",
) -> Codes:  # fmt: skip
    """Codes and scales of a weight.

    Args:
        weight: (Co, ...), floating.
        symmetric: the zero is the middle code.
        group: G; None: one scale a row.
        observer: "minmax": the whole range. "mse": the share of it (80 of .21 to 1) with the least
            sum |w - w_hat|^2.4. "percentile": .1 % of a group's entries may lie outside.
        kind: "uniform", or "nf4" (bits 4): 16 quantiles of a normal distribution, scaled by the
            group's largest magnitude (QLoRA, arXiv 2305.14314, appendix E).
    """
    rows = weight.detach().float().flatten(1)
    blocks = _grouped(rows, group)
    if kind == "nf4":
        scale = blocks.abs().amax(2, keepdim=True).clamp_min(TINY)
        table = nf4_table().to(rows.device)
        # Nearest entry: where the value lies among the middles between entries.
        codes = torch.bucketize(blocks / scale, (table[1:] + table[:-1]) / 2)
        return Codes(codes.flatten(1)[:, : rows.shape[1]].to(torch.uint8), scale.squeeze(2), None)
    scale, zero = choose_scale(blocks, bits, symmetric, observer)
    codes = to_codes(blocks, scale, zero, bits).flatten(1)[:, : rows.shape[1]].to(torch.uint8)
    return Codes(codes, scale.squeeze(2), None if symmetric else zero.squeeze(2).to(torch.uint8))


def choose_scale(blocks: torch.Tensor, bits: int, symmetric: bool, observer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero (Co, groups, 1) of blocks (Co, groups, G)."""
    low, high = blocks.amin(2, keepdim=True), blocks.amax(2, keepdim=True)
    if observer == "percentile":
        edge = (1 - INSIDE) / 2
        low, high = blocks.quantile(edge, 2, keepdim=True), blocks.quantile(1 - edge, 2, keepdim=True)
    best = affine_of(low, high, bits, symmetric)
    if observer != "mse":
        return best
    least = _error(blocks, *best, bits)
    for share in SHARES[1:]:
        tried = affine_of(low * share, high * share, bits, symmetric)
        error = _error(blocks, *tried, bits)
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1]))
    return best


def _error(blocks: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    back = (to_codes(blocks, scale, zero, bits) - zero) * scale
    return (blocks - back).abs_().pow_(POWER).sum(2, keepdim=True)


@functools.cache
def nf4_table() -> torch.Tensor:
    """The 16 values of NF4, rising from -1 to 1, with an exact 0."""
    # The outermost quantile lies halfway between 1 / 30 and 1 / 32 from the ends.
    outer = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(outer, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outer, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (values / values.abs().max()).float()


def check_observer(observer: str) -> None:
    """Raises ConfigError unless the observer is known."""
    if observer not in OBSERVERS:
        raise ConfigError(f"observer is {observer!r}; expected one of {', '.join(OBSERVERS)}")


# Packing. Rows of 8-bit codes are int8, q - 128, which integer products read as they are. Four-bit codes of a
# linear lie in the kernels' order (`pack_int4`); everything else low bits first.


def packed_shape(rows: int, columns: int, bits: int, block: int) -> tuple[int, int]:
    """Shape of `pack`'s result."""
    if container(bits) == 8:
        return rows, columns
    if container(bits) == 4:
        return rows, -(-columns // block) * block // 2
    return rows, -(-columns // 4)


def pack(codes: torch.Tensor, bits: int, block: int = 2) -> torch.Tensor:
    """Codes (Co, K) uint8 as bytes, any K: rows are completed with zeros.

    Args:
        block: of four-bit codes, an even number: byte j of a block holds codes j and j + block / 2.

    Returns:
        int8 (Co, K) for 5 to 8 bits, uint8 (Co, ceil(K / block) * block / 2) for 3 and 4, (Co, ceil(K / 4)) for 2.
    """
    if container(bits) == 8:
        return (codes.to(torch.int16) - 128).to(torch.int8)
    if container(bits) == 4:
        return pack_int4(codes, block, 0)
    quads = F.pad(codes, (0, -codes.shape[1] % 4)).unflatten(1, (-1, 4))
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def unpack(packed: torch.Tensor, bits: int, columns: int, block: int = 2) -> torch.Tensor:
    """The codes (Co, K) uint8 of `pack`."""
    if container(bits) == 8:
        return packed.view(torch.uint8) ^ 128
    if container(bits) == 4:
        return unpack_int4(packed, block)[:, :columns]
    quads = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 2)
    return quads.flatten(1)[:, :columns]


def default_symmetric(bits: int) -> bool:
    """Eight bits lose next to nothing by a fixed zero, and integer products are cheapest with it."""
    return bits == 8


def stored_bits(weight_shape: tuple[int, ...], bits: int, group: int | None, symmetric: bool, block: int = 2) -> int:
    """Bits that codes, scales and zeros of one weight take on disk."""
    rows, columns = weight_shape[0], 1
    for size in weight_shape[1:]:
        columns *= size
    count = packed_shape(rows, columns, bits, block)
    scales = rows * groups_of(columns, group)
    return 8 * count[0] * count[1] + scales * (32 + (0 if symmetric else 8))


__all__ = [
    "BLOCK", "FORMATS", "OBSERVERS", "Codes", "check_observer", "choose_scale", "container", "default_symmetric",
    "groups_of", "nf4_table", "pack", "packed_shape", "quantize_weight", "stored_bits", "top", "unpack",
]  # fmt: skip
