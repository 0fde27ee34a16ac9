"""A plan as a picture: bits, size and error of every layer, in the order of the model."""

from __future__ import annotations

import os
from collections.abc import Mapping

from vislr.core.files import atomic_path
from vislr.quantize.layers import QuantLayer
from vislr.quantize.plan import WHOLE

_COLOURS = {2: "#b5179e", 3: "#7209b7", 4: "#4361ee", 5: "#4895ef", 6: "#4cc9f0", 7: "#80ced7", 8: "#8d99ae"}


def draw_layers(layers: Mapping[str, QuantLayer], errors: Mapping[str, float], path: str | os.PathLike) -> None:
    """Write a PNG: above, the size of each quantised layer's weight; below, its relative error.

    Args:
        layers: name -> layer. errors: name -> |w - w_hat| / |w|.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(layers)
    bits = [layers[name].spec.bits for name in names]
    colours = [_COLOURS[one] for one in bits]
    figure = Figure(figsize=(11, 5.2), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.bar(range(len(names)), [layers[name].weight_count / 1e3 for name in names], color=colours, width=1.0)
    above.set_ylabel("weights, thousand")
    below.bar(range(len(names)), [errors.get(name, 0.0) for name in names], color=colours, width=1.0)
    below.set_ylabel("relative error of the weight")
    below.set_xlabel("quantised layers, in the order of the model")
    found = sorted(set(zip(bits, [layers[name].spec.input_bits for name in names], strict=True)))
    told = [f"W{weight}" + ("" if inputs == WHOLE else f"A{inputs}") for weight, inputs in found]
    above.legend(handles=[Patch(color=_COLOURS[pair[0]], label=text) for pair, text in zip(found, told, strict=True)])
    edges = [i for i in range(1, len(names)) if names[i].split(".")[:2] != names[i - 1].split(".")[:2]]
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.005)
        for edge in edges:
            axis.axvline(edge - 0.5, color="#dddddd", linewidth=0.6, zorder=0)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
