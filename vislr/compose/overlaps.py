"""Where adapters get in each other's way: cosine and overlap of their changes, layer by layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vislr.adapters.inject import adapter_names
from vislr.anatomy import denoiser_of
from vislr.anatomy.wrapping import unwrapped
from vislr.compose.live import deltas
from vislr.core.errors import AdapterError, ConfigError, hint

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class LayerConflict:
    """Two adapters on one layer.

    Attributes:
        layer: its name.
        first, second: the adapters.
        cosine: of their flattened changes: 1 they do the same, 0 independent, -1 they cancel.
        overlap: sum |a||b| / (|a| |b|), 0 to 1: how much they change the same entries.
        norms: Frobenius norms of their changes, at weight 1.
    """

    layer: str
    first: str
    second: str
    cosine: float
    overlap: float
    norms: tuple[float, float]


@dataclass(frozen=True)
class PairConflict:
    """Two adapters over the whole denoiser; fields as in `LayerConflict`.

    Attributes:
        shared_layers: layers that both change.
    """

    first: str
    second: str
    cosine: float
    overlap: float
    shared_layers: int
    norms: tuple[float, float]


@dataclass(frozen=True)
class Conflicts:
    """The conflicts of several adapters.

    Attributes:
        pairs: every pair, the strongest |cosine| first.
        layers: every layer that two adapters change, the strongest |cosine| first.
    """

    pairs: tuple[PairConflict, ...]
    layers: tuple[LayerConflict, ...]

    def lines(self, layers: int = 5) -> list[str]:
        """The report as text: every pair, and the layers that conflict most."""
        lines = []
        for pair in self.pairs:
            if not pair.shared_layers:
                lines.append(f"{pair.first} and {pair.second} change no layer together")
                continue
            lines.append(
                f"{pair.first} and {pair.second}: cosine {pair.cosine:+.3f}, overlap {pair.overlap:.3f} over "
                f"{pair.shared_layers} shared layers; norms {pair.norms[0]:.3g} and {pair.norms[1]:.3g}"
            )
        for one in self.layers[:layers]:
            lines.append(
                f"  {one.layer}: {one.first} and {one.second} cosine {one.cosine:+.3f}, overlap {one.overlap:.3f}"
            )
        return lines

    def table(self) -> list[dict[str, Any]]:
        """The layers as rows of plain values."""
        return [
            {
                "layer": one.layer, "first": one.first, "second": one.second, "cosine": round(one.cosine, 4),
                "overlap": round(one.overlap, 4), "norm of first": round(one.norms[0], 5),
                "norm of second": round(one.norms[1], 5),
            }
            for one in self.layers
        ]  # fmt: skip


@torch.no_grad()
def conflicts(pipe: Any, names: Sequence[str], top: int | None = None) -> Conflicts:
    """Compare the changes that adapters make to the denoiser's weights, at weight 1.

    Args:
        pipe: a pipeline or a denoiser with the adapters on it.
        names: at least two.
        top: how many layers to keep; None: all.

    Raises:
        AdapterError: an adapter is not on the denoiser, or is no addition to weights. ConfigError: fewer than two.
    """
    module = unwrapped(denoiser_of(pipe)[1])
    known = adapter_names(module)
    for name in names:
        if name not in known:
            raise AdapterError(f"no adapter of the denoiser is called '{name}'{hint(name, known)}")
    if len(set(names)) < 2 or len(set(names)) != len(names):
        raise ConfigError(f"adapters are {list(names)}; expected at least two, each once")
    pairs = list(itertools.combinations(names, 2))
    # dot, overlap, shared layers
    totals = {pair: [0.0, 0.0, 0.0] for pair in pairs}
    squares = dict.fromkeys(names, 0.0)
    layers = []
    for site, found in deltas(module, tuple(names)):
        flat = {name: delta.weight.flatten() for name, delta in found.items()}
        norms = {name: float(value.norm()) for name, value in flat.items()}
        for name, norm in norms.items():
            squares[name] += norm**2
        for first, second in pairs:
            if not norms.get(first) or not norms.get(second):
                continue
            dot = float(flat[first] @ flat[second])
            over = float(flat[first].abs() @ flat[second].abs())
            total = totals[first, second]
            total[0], total[1], total[2] = total[0] + dot, total[1] + over, total[2] + 1
            both = norms[first] * norms[second]
            layers.append(LayerConflict(site, first, second, dot / both, over / both, (norms[first], norms[second])))
    summed = []
    for (first, second), (dot, over, count) in totals.items():
        own = (math.sqrt(squares[first]), math.sqrt(squares[second]))
        both = own[0] * own[1] or 1.0
        summed.append(PairConflict(first, second, dot / both, over / both, int(count), own))
    layers.sort(key=lambda one: -abs(one.cosine))
    summed.sort(key=lambda one: -abs(one.cosine))
    return Conflicts(tuple(summed), tuple(layers[:top]))


def conflict_picture(found: Conflicts, rows: int = 24) -> Image.Image:
    """Cosine by pair and layer, the layers that conflict most; blue they cancel, red they agree."""
    from io import BytesIO

    from matplotlib.figure import Figure
    from PIL import Image

    pairs = [(pair.first, pair.second) for pair in found.pairs]
    names = list(dict.fromkeys(one.layer for one in found.layers))[:rows]
    values = [[0.0] * len(pairs) for _ in names]
    for one in found.layers:
        if one.layer in names:
            values[names.index(one.layer)][pairs.index((one.first, one.second))] = one.cosine
    figure = Figure(figsize=(4.5 + 0.9 * len(pairs), 1.2 + 0.2 * max(1, len(names))), dpi=110, layout="constrained")
    axes = figure.subplots()
    most = max([abs(value) for row in values for value in row] + [0.05])
    image = axes.imshow(values or [[0.0]], cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(pairs)), [f"{first}\n{second}" for first, second in pairs], fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_title("cosine of the changes", fontsize=9)
    figure.colorbar(image).ax.tick_params(labelsize=7)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")
