"""A cache plan as a picture: what is computed in which step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vislr.cache.plan import CachePlan

if TYPE_CHECKING:
    from PIL import Image

COMPUTED, KEPT = "#1f4e79", "#bcd3e8"


def plan_picture(plan: CachePlan, steps: int | None = None) -> Image.Image:
    """A row of boxes for each region, a box a step: dark is computed, light is used again.

    Args:
        steps: of the run; None: the plan's.
    """
    from io import BytesIO

    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    from PIL import Image

    total = steps or plan.steps
    figure = Figure(figsize=(8, 0.9 + 0.24 * len(plan.regions)), dpi=110, layout="constrained")
    axes = figure.subplots()
    names = []
    for row, region in enumerate(plan.regions):
        computed = set(region.refresh.steps(total))
        for step in range(total):
            colour = COMPUTED if step in computed else KEPT
            axes.add_patch(Rectangle((step, row), 0.92, 0.86, color=colour))
        names.append(region.first if region.first == region.last else f"{region.first} to {region.last}")
    axes.set_xlim(0, total)
    axes.set_ylim(len(plan.regions), 0)
    axes.set_yticks([row + 0.43 for row in range(len(names))], names, fontsize=6)
    axes.tick_params(length=0, labelsize=7)
    axes.set_xlabel("denoising step", fontsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    marks = [Patch(color=COMPUTED, label="computed"), Patch(color=KEPT, label="used again")]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")
