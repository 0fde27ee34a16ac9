"""Figures of a domain adaptation, what they say about one another, and their plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vislr.core.files import atomic_path
from vislr.train.self_training_data import Domain

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# How many slices a picture shows.
_SHOWN = 6


@dataclass
class Outcome:
    """What a model decided on a domain, and how right it was.

    Attributes:
        decided: (n,) classes or (n, H, W) masks.
        figures: name -> value: accuracy, or dice and surface_dice (means over volumes); empty without labels.
        scores: (n,) of each example: right or wrong, or the slice's Dice; None without labels.
    """

    decided: torch.Tensor
    figures: dict[str, float] = field(default_factory=dict)
    scores: np.ndarray | None = None


def outcome(decided: torch.Tensor, domain: Domain, tolerance: float) -> Outcome:
    """Compare with the domain's labels, if it has any."""
    import numpy as np

    from vislr.measure import dice, surface_dice

    if domain.truth is None:
        return Outcome(decided)
    if domain.truth.dim() == 1:
        hits = (decided == domain.truth).numpy().astype(float)
        return Outcome(decided, {"accuracy": float(hits.mean())}, hits)
    own, truth = decided.numpy(), domain.truth.numpy()
    spacing = dict(domain.spacing)
    pairs = [(own[rows], truth[rows], spacing[key]) for key, rows in domain.volumes().items()]
    figures = {
        "dice": float(np.mean([dice(a, b) for a, b, _ in pairs])),
        "surface_dice": float(np.mean([surface_dice(a, b, spacing=s, tolerance=tolerance) for a, b, s in pairs])),
    }
    return Outcome(decided, figures, np.array([dice(a, b) for a, b in zip(own, truth, strict=True)]))


def agreement(full: torch.Tensor, early: torch.Tensor, domain: Domain) -> float:
    """How far two decisions agree, without labels: share of equal classes, or mean surface Dice at one pixel.

    A volume of which either finds nothing counts 0: two empty masks are no evidence.
    """
    import numpy as np

    from vislr.measure import surface_dice

    if full.dim() == 1:
        return float((full == early).double().mean())
    one, other = full.numpy(), early.numpy()
    values = []
    for rows in domain.volumes().values():
        a, b = one[rows], other[rows]
        values.append(surface_dice(a, b) if a.any() and b.any() else 0.0)
    return float(np.mean(values))


@dataclass(frozen=True)
class Verdict:
    """A variant against the source model, on the target.

    Attributes:
        word: "better", "worse", "no clear difference" (the interval holds 0), or "unknown" (no labels).
        gain: mean over examples of (variant's score - source model's); None without labels.
        interval: its 95 % bootstrap interval over examples.
        line: a sentence.
    """

    word: str
    gain: float | None
    interval: tuple[float, float] | None
    line: str


def verdict(name: str, trial: Any, base: Any, seed: int) -> Verdict:
    """What adaptation did to the target's figures; without labels, to the agreement.

    Args:
        trial, base: a Trial of the variant, and of the source model.
    """
    from vislr.measure.measurement import bootstrap_interval

    before, after = base.agreement[0], trial.agreement[trial.epoch]
    agree = f"early and full output agree {before:.3f} -> {after:.3f}"
    if trial.outcome.scores is None or base.outcome.scores is None:
        if after < before:
            return Verdict(
                "unknown", None, None, f"{name}: WORSE AGREEMENT than the source model: {agree}; no labels to tell"
            )
        return Verdict("unknown", None, None, f"{name}: no labels to tell; {agree}")
    change = trial.outcome.scores - base.outcome.scores
    count = len(change)
    low, high = bootstrap_interval(lambda drawn: drawn @ change / count, count, seed)
    gain = float(change.mean())
    figures = ", ".join(
        f"{key} {base.outcome.figures[key]:.3f} -> {value:.3f}" for key, value in trial.outcome.figures.items()
    )
    span = f"{gain:+.3f} an example, 95 % {low:+.3f} to {high:+.3f}"
    if high < 0:
        return Verdict("worse", gain, (low, high), f"{name}: WORSE THAN THE SOURCE MODEL: {figures} ({span}); {agree}")
    word = "better" if low > 0 else "no clear difference"
    return Verdict(word, gain, (low, high), f"{name}: {word}: {figures} ({span}); {agree}")


def draw_overview(trials: Mapping[str, Any], path: Path) -> None:
    """One PNG: figures of every variant on the target, agreement and loss by epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    bars, agree, losses = figure.subplots(1, 3)
    names = list(next(iter(trials.values())).outcome.figures)
    for number, name in enumerate(names):
        places = [i + (number - (len(names) - 1) / 2) * 0.4 for i in range(len(trials))]
        drawn = bars.bar(places, [trial.outcome.figures[name] for trial in trials.values()], width=0.38, label=name)
        bars.bar_label(drawn, fmt="%.3f", fontsize=8)
    bars.set_xticks(range(len(trials)), list(trials))
    bars.set_ylim(0, 1.08)
    bars.set_title("target" if names else "target: no labels")
    if names:
        bars.legend(fontsize=8, loc="lower right")
    for name, trial in trials.items():
        epochs = range(len(trial.agreement))
        agree.plot(epochs, trial.agreement, marker="o", markersize=3, label=name)
        agree.plot([trial.epoch], [trial.agreement[trial.epoch]], marker="*", markersize=11, color="black")
        if trial.losses:
            losses.plot(range(1, len(trial.losses) + 1), trial.losses, marker="o", markersize=3, label=name)
    agree.set_title("agreement without labels (star: kept)", fontsize=10)
    losses.set_title("self-training loss", fontsize=10)
    for axes in (agree, losses):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def slice_grid(trials: Mapping[str, Any], domain: Domain) -> Image.Image:
    """Slices of the target with what the mask says and what every variant found, as red and green outlines."""
    import numpy as np
    from PIL import Image
    from scipy import ndimage

    from vislr.data import make_grid

    rows = [i * len(domain) // _SHOWN for i in range(min(_SHOWN, len(domain)))]
    masks = {name: trial.outcome.decided for name, trial in trials.items()}
    colours = dict.fromkeys(masks, (40, 220, 40))
    if domain.truth is not None:
        masks, colours = {"mask": domain.truth} | masks, {"mask": (230, 40, 40)} | colours

    def drawn(row: int, mask: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
        grey = (domain.inputs[row, 0].numpy() * 255).clip(0, 255).astype(np.uint8)
        picture = np.stack([grey] * 3, -1)
        picture[mask & ~ndimage.binary_erosion(mask)] = colour
        return Image.fromarray(picture)

    grid = [[drawn(row, mask[row].numpy(), colours[name]) for row in rows] for name, mask in masks.items()]
    return make_grid(grid, row_labels=list(masks))
