"""A diagnosis as text and as a picture: how much each block of the model changes."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from vislr.core.files import atomic_path
from vislr.formats.doctor import Diagnosis, block_of
from vislr.formats.doctor_rules import TOOLS

_BAR = 32
_COLOURS = ("#3b6ea5", "#d1782c", "#4f8f4f", "#9464a5", "#7f7f7f")


def as_text(found: Diagnosis, most: int = 40) -> str:
    """The whole diagnosis for a terminal.

    Args:
        most: lines of problems at most.
    """
    layers = sum(found.components.values())
    where = f" in {found.format}'s format" if found.format else ""
    lines = [
        f"{found.path.name}: {_counted(found.kinds)} for {found.family or 'an unknown family'}{where}",
        f"  layers      {layers} ({_counted(found.components)})",
        f"  ranks       {_counted(found.ranks) or '-'}    scales (alpha / rank) {_counted(found.scales) or '-'}",
        f"  values      {found.parameters:,} in {found.bytes / 2**20:.1f} MiB ({_counted(found.dtypes)})",
        f"  made for    {'; '.join(found.made_for) or 'the header does not say'}",
    ]
    if found.blocks:
        lines += ["", "change of each block (Frobenius norm)", *_bars(found)]
    lines += ["", "problems" if found.problems else "no problems found"]
    lines += [f"  {line}" for line in found.problems[:most]]
    if len(found.problems) > most:
        lines.append(f"  and {len(found.problems) - most} more")
    lines += [f"  note: {note}" for note in found.notes]
    lines += ["", "tools"]
    width = max(map(len, TOOLS.values()))
    for verdict in found.verdicts:
        lines.append(f"  {TOOLS[verdict.tool]:<{width}}  {verdict.verdict}")
        lines += [f"  {'':<{width}}    {says}" for says in verdict.says]
        if verdict.fix:
            lines.append(f"  {'':<{width}}    fix: {verdict.fix}")
    return "\n".join(lines)


def _counted(counter: Counter[Any]) -> str:
    """ "lora 12, diff 3": the commonest first."""
    some = counter.most_common(6)
    text = ", ".join(f"{key:g} x {n}" if isinstance(key, (int, float)) else f"{key} {n}" for key, n in some)
    return text + (f", {len(counter) - 6} more" if len(counter) > 6 else "")


def _relative(found: Diagnosis) -> dict[str, float]:
    """Block -> largest relative change of its layers."""
    most: dict[str, float] = {}
    for name, value in found.relative.items():
        block = block_of(name)
        most[block] = max(most.get(block, 0.0), value)
    return most


def _bars(found: Diagnosis) -> list[str]:
    largest = max((norm for norm in found.blocks.values() if math.isfinite(norm)), default=0.0)
    width = max(map(len, found.blocks))
    relative = _relative(found)
    lines = []
    for block, norm in found.blocks.items():
        share = norm / largest if largest and math.isfinite(norm) else 0.0
        bar = "#" * round(_BAR * share) or ("." if norm == 0 else "|")
        beside = f"  up to {relative[block]:.1%} of a weight" if block in relative else ""
        lines.append(f"  {block:<{width}}  {norm:9.4g}  {bar:<{_BAR}}{beside}".rstrip())
    return lines


def draw(found: Diagnosis, path: str | os.PathLike) -> Path:
    """Write the picture: a bar for every block, coloured by component, dots for its layers. PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = list(found.blocks)
    figure = Figure(figsize=(9, 1.6 + 0.24 * max(4, len(blocks))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    components = list(dict.fromkeys(name.partition(".")[0] for name in blocks))
    for place, block in enumerate(blocks):
        norm = found.blocks[block]
        colour = _COLOURS[components.index(block.partition(".")[0]) % len(_COLOURS)]
        if math.isfinite(norm):
            axes.barh(place, norm, color=colour, alpha=0.75)
        else:
            axes.annotate("not finite", (0, place), color="#b02020", va="center")
        inside = [value for name, value in found.layers.items() if block_of(name) == block and math.isfinite(value)]
        axes.plot(inside, [place] * len(inside), "|", color="black", markersize=6, alpha=0.5)
        dead = sum(value == 0 for value in inside)
        if dead:
            axes.annotate(f"{dead} dead", (max(0.0, norm), place), color="#b02020", va="center", xytext=(4, 0),
                          textcoords="offset points")  # fmt: skip
    axes.set_yticks(range(len(blocks)), blocks, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("Frobenius norm of the change: block (bar), each of its layers (ticks)")
    axes.set_title(f"{found.path.name}: {_counted(found.kinds)}, {found.family or 'unknown family'}", fontsize=10)
    path = Path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path
