"""The turns of a run as a picture: who computes whole, who uses kept features, who leads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vislr.compose.plan import ComposePlan
from vislr.compose.schedule import turns

if TYPE_CHECKING:
    from PIL import Image

WHOLE, KEPT, OFF = "#1f4e79", "#bcd3e8", "#f4f4f4"


def turns_picture(plans: Sequence[ComposePlan], steps: int | None = None) -> Image.Image:
    """A row of boxes for each adapter of each plan, a box a step; the largest coefficient of a step has a dot.

    Args:
        plans: one panel each. Online leads are drawn as if the latent stayed in high frequencies.
        steps: of the run; None: each plan's.
    """
    from io import BytesIO

    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    from PIL import Image

    rows = [len(plan.adapters) for plan in plans]
    figure = Figure(figsize=(8, 0.9 + 0.3 * sum(rows) + 0.45 * len(rows)), dpi=110, layout="constrained")
    panels = figure.subplots(len(plans), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, plan in zip(panels, plans, strict=True):
        order = turns(plan, steps or plan.steps)
        for step, turn in enumerate(order):
            most = max(turn.mix)
            for place in range(len(plan.adapters)):
                colour = WHOLE if place in turn.full else KEPT if place in turn.cached else OFF
                axes.add_patch(Rectangle((step, place), 0.92, 0.86, color=colour))
                if turn.mix[place] == most > min(turn.mix):
                    axes.plot(step + 0.46, place + 0.43, "o", color="#e8833a", markersize=3.5)
        axes.set_xlim(0, len(order))
        axes.set_ylim(len(plan.adapters), 0)
        axes.set_yticks([place + 0.43 for place in range(len(plan.adapters))], plan.adapters, fontsize=7)
        axes.tick_params(length=0, labelsize=7)
        axes.set_title(plan.method, fontsize=9, loc="left")
        for side in axes.spines.values():
            side.set_visible(False)
    panels[-1].set_xlabel("denoising step", fontsize=8)
    marks = [Patch(color=WHOLE, label="whole"), Patch(color=KEPT, label="kept features"), Patch(color=OFF, label="off")]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")
