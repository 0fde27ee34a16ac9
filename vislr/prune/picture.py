"""A plan as a picture: which units, their scores, what goes; and how additive the scores are."""

from __future__ import annotations

import os
from typing import Any

from vislr.core.files import atomic_path
from vislr.prune.output_loss import Additivity
from vislr.prune.plan import LayerPlan
from vislr.prune.units import Inventory

_GONE, _KEPT = "#c0392b", "#8d99ae"


def draw_plan(plan: LayerPlan, inventory: Inventory, path: str | os.PathLike) -> None:
    """One PNG: above the score of every unit in the order of the forward, below what each frees.

    Args:
        plan: the plan. inventory: of the model before it, at the plan's granularity.
        path: of the PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.patches import Patch

    units, budget = inventory.units, plan.budget
    gone = set(plan.removed)
    inside = tuple(f"{name}." for name in plan.removed)
    colours = [_GONE if unit.name in gone or unit.name.startswith(inside or ("\0",)) else _KEPT for unit in units]
    places = list(range(len(units)))
    figure = _figure((max(7.0, 1.5 + 0.16 * len(units)), 5.6))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    scores = [plan.scores.get(unit.name, float("nan")) for unit in units]
    above.bar(places, scores, color=colours)
    finite = [score for score in scores if score == score]
    if finite and min(finite) > 0 and max(finite) > 20 * min(finite):
        above.set_yscale("log")
    above.set_ylabel("score (higher stays)" if finite else "no scores")
    what = f"{len(plan.removed)} units"
    if plan.saved is not None and plan.total:
        what += f", {plan.saved / plan.total:.1%} of the {budget}"
    above.set_title(f"{plan.criterion or 'plan'} on {plan.architecture}: {what}", loc="left", fontsize=10)
    handles = [Patch(color=_GONE, label="removed"), Patch(color=_KEPT, label="stays")]
    figure.legend(handles=handles, fontsize=8, ncols=2, frameon=False, loc="outside lower right")
    total = getattr(inventory, budget) or 1
    below.bar(places, [100 * getattr(unit, budget) / total for unit in units], color=colours)
    below.set_ylabel(f"% of the {budget}")
    below.set_xticks(places, [_short(unit.name) for unit in units], rotation=90, fontsize=6)
    below.set_xlim(-0.8, len(units) - 0.2)
    for axis in (above, below):
        axis.grid(axis="y", alpha=0.3)
    _save(figure, path)


def draw_additivity(report: Additivity, path: str | os.PathLike) -> None:
    """One PNG: joint loss over summed loss of every subset, the diagonal, and the fitted slope."""
    from matplotlib.ticker import NullFormatter

    figure = _figure((5.6, 5.0))
    axis = figure.subplots()
    shares, sums, joint = zip(*report.points, strict=True)
    dots = axis.scatter(sums, joint, c=[100 * share for share in shares], cmap="viridis", s=18)
    figure.colorbar(dots, label="% of the parameters removed")
    low, high = min(min(sums), min(joint)) * 0.8, max(max(sums), max(joint)) * 1.2
    axis.plot([low, high], [low, high], color="0.6", linewidth=1, label="additive")
    slope = report.slope.value
    axis.plot([low, high], [slope * low, slope * high], color=_GONE, linewidth=1, label=f"slope {slope:.2f}")
    axis.set(
        xscale="log", yscale="log", xlabel="sum of one-unit output losses", ylabel="output loss of the joint removal"
    )
    axis.set_title(f"Pearson r = {report.pearson.value:.3f}, {len(report.points)} subsets", loc="left", fontsize=10)
    for one in (axis.xaxis, axis.yaxis):
        # Within one decade matplotlib also names the ticks between, on top of one another.
        one.set_minor_formatter(NullFormatter())
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    _save(figure, path)


def _short(name: str) -> str:
    """Names that fit under a bar: "up_blocks.0.attentions.1.transformer_blocks.0.attn1" -> "up0.a1.t0.attn1"."""
    table = {"down_blocks": "down", "up_blocks": "up", "mid_block": "mid", "resnets": "r", "attentions": "a",
             "transformer_blocks": "t", "single_transformer_blocks": "s", "blocks": "b", "stages": "s"}  # fmt: skip
    parts: list[str] = []
    for part in name.split("."):
        if part.isdigit() and parts:
            parts[-1] += part
        else:
            parts.append(table.get(part, part))
    return ".".join(parts)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global figures, no display, no backend to choose.
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | os.PathLike) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
