"""Curves of a run: kept for the checkpoint, written to tensorboard, drawn as one picture."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.arguments import plain_data
from vislr.core.errors import LaunchError
from vislr.core.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image

    from vislr.train.config import TrainConfig


@dataclass
class History:
    """What was measured, as (step, value) pairs by name.

    Attributes:
        train: "loss" (mean since the last entry), "lr", "gradient" (norm before clipping).
        held_out: "loss", its bands, "drift" from the base, "accuracy" for classifiers; the first entry is from
            before training.
        samples: of sample pictures, "similarity" to the training pictures.
    """

    train: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    held_out: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    samples: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, part: str, step: int, values: dict[str, float]) -> None:
        """Append to "train", "held_out" or "samples"."""
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
    """Scalars and pictures for tensorboard, and for Weights & Biases if asked for.

    Args:
        folder: of the event files.
        first_step: after which this run goes on; later entries of a run that was stopped are hidden.
        config: of the run; `output.wandb` names the project.

    Raises:
        LaunchError: wandb is asked for and not installed.
    """

    def __init__(self, folder: Path, first_step: int, config: TrainConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
        self._wandb: Any = None
        if config.output.wandb:
            self._wandb = check_wandb().init(
                project=config.output.wandb, name=folder.parent.name, dir=str(folder.parent), config=plain_data(config),
                # The same run goes on when training does.
                id=key_id(str(folder.resolve())), resume="allow",
            )  # fmt: skip

    def scalars(self, part: str, step: int, values: dict[str, float]) -> None:
        """Curves `part/name`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{part}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{part}/{name}": value for name, value in values.items()} | {"step": step})

    def image(self, name: str, step: int, image: Image.Image) -> None:
        """A picture."""
        import numpy as np

        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({name: check_wandb().Image(image), "step": step})

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_wandb() -> Any:
    """The module wandb.

    Raises:
        LaunchError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise LaunchError(f"output.wandb needs wandb: pip install wandb ({error})") from error
    return wandb


def key_id(text: str) -> str:
    """A short name that follows from `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def draw_curves(history: History, path: Path) -> None:
    """One PNG: losses above; losses by noise, drift and similarity where there are any; the learning rate below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bands = {name: points for name, points in history.held_out.items() if name.startswith("loss, noise")}
    others = {name: points for name, points in history.held_out.items() if name == "drift"} | history.samples
    rows = [3] + [2] * (bool(bands) + bool(others)) + [1]
    # Without pyplot: no global figures, no display, no backend to choose.
    figure = Figure(figsize=(7, 2 + 1.1 * sum(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(len(rows), 1, sharex=True, height_ratios=rows))
    above, below = axes[0], axes[-1]
    if history.train.get("loss"):
        steps, losses = zip(*history.train["loss"], strict=True)
        above.plot(steps, losses, color="0.75", linewidth=0.8, label="training loss")
        above.plot(steps, _smooth(losses), color="tab:blue", label="training loss, smoothed")
    for name, colour in (("loss", "tab:orange"), ("accuracy", "tab:red")):
        if name in history.held_out:
            _points(above, history.held_out[name], f"held-out {name}", colour)
    if history.held_out.get("loss"):
        step, value = min(history.held_out["loss"], key=lambda point: point[1])
        above.axvline(step, color="tab:orange", linewidth=0.8, linestyle=":")
        above.annotate(f"lowest: {value:.4f} at {step}", (step, value), fontsize=8)
    above.set_ylabel("loss")
    for axis, curves in zip(axes[1:-1], [part for part in (bands, others) if part], strict=True):
        for name, points in curves.items():
            _points(axis, points, name, None)
    if history.train.get("lr"):
        below.plot(*zip(*history.train["lr"], strict=True), color="tab:green")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis is not below and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _points(axis: Any, points: list[tuple[int, float]], label: str, colour: str | None) -> None:
    steps, values = zip(*points, strict=True)
    axis.plot(steps, values, color=colour, marker="o", markersize=3, label=label)


def _smooth(values: tuple[float, ...], rate: float = 0.9) -> list[float]:
    """Exponential average, corrected for its start."""
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = rate * mean + (1 - rate) * value, rate * weight + (1 - rate)
        smoothed.append(mean / weight)
    return smoothed
