"""Losses of a run: kept for the checkpoint, written to tensorboard, drawn as one picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class History:
    """What was measured, as (step, value) pairs by name.

    Attributes:
        train: "loss" (mean since the last entry), "lr", "gradient" (norm before clipping).
        held_out: "loss", and "accuracy" for classifiers; the first entry is from before training.
    """

    train: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    held_out: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, part: str, step: int, values: dict[str, float]) -> None:
        """Append to "train" or "held_out"."""
        for name, value in values.items():
            getattr(self, part).setdefault(name, []).append((step, value))

    def last(self, part: str) -> dict[str, float]:
        """The newest value of every curve."""
        return {name: points[-1][1] for name, points in getattr(self, part).items()}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> History:
        """From `dataclasses.asdict`, as JSON gives it back."""
        return cls(
            **{
                part: {name: [(int(step), float(value)) for step, value in points] for name, points in curves.items()}
                for part, curves in stored.items()
            }
        )


class Board:
    """Scalars and pictures for tensorboard.

    Args:
        folder: of the event files. first_step: where this run goes on; later entries of a run that
            was stopped are hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def scalars(self, part: str, step: int, values: dict[str, float]) -> None:
        """Curves `part/name`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{part}/{name}", value, step)

    def image(self, name: str, step: int, image: Image.Image) -> None:
        """A picture."""
        import numpy as np

        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def draw_curves(history: History, path: Path) -> None:
    """One PNG: training and held-out loss above, learning rate below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global figures, no display, no backend to choose.
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    if history.train.get("loss"):
        steps, losses = zip(*history.train["loss"], strict=True)
        above.plot(steps, losses, color="0.75", linewidth=0.8, label="training loss")
        above.plot(steps, _smooth(losses), color="tab:blue", label="training loss, smoothed")
    for (name, points), colour in zip(history.held_out.items(), ("tab:orange", "tab:red"), strict=False):
        steps, values = zip(*points, strict=True)
        above.plot(steps, values, color=colour, marker="o", markersize=3, label=f"held-out {name}")
    above.set_ylabel(" and ".join(history.held_out) or "loss")
    above.grid(alpha=0.3)
    if above.get_legend_handles_labels()[0]:
        above.legend()
    if history.train.get("lr"):
        below.plot(*zip(*history.train["lr"], strict=True), color="tab:green")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _smooth(values: tuple[float, ...], rate: float = 0.9) -> list[float]:
    """Exponential average, corrected for its start."""
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = rate * mean + (1 - rate) * value, rate * weight + (1 - rate)
        smoothed.append(mean / weight)
    return smoothed
