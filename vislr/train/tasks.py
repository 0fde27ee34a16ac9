"""What the loop needs of a model: its examples, its loss and pictures of what it can do; classifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from vislr.data import Pool, Source, make_grid
from vislr.train import objectives
from vislr.train.config import TrainConfig
from vislr.train.examples import Batch, Examples, HeldOut, Pixels

if TYPE_CHECKING:
    from PIL import Image

# Pictures in a row of a grid, unless prompts say otherwise.
SHOWN = 6


@dataclass
class Preview:
    """Pictures of what the model does now: rows of pictures, and a text for each column.

    Attributes:
        drawn: the pictures are the model's own; False for a classifier's inputs.
    """

    rows: list[list[Image.Image]]
    columns: list[str]
    drawn: bool = True


@dataclass(frozen=True)
class Draw:
    """One forward of training or of evaluating, as the task made it.

    Attributes:
        noisy: what the model saw, (B, C, H, W); pixels for a classifier.
        time: (B,) timesteps or sigmas; empty for a classifier.
        conditions: what else it was told.
        prediction, target: (B, ...), float32.
        loss: (B,) the task's own.
        parts: further values worth a curve, (B,) each.
    """

    noisy: torch.Tensor
    time: torch.Tensor
    conditions: dict[str, torch.Tensor]
    prediction: torch.Tensor
    target: torch.Tensor
    loss: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


# Called with the draw of a training forward: "objective" (B,) is minimised in place of its loss, all become curves.
Extra = Callable[[Draw], Mapping[str, torch.Tensor]]


class Task(Protocol):
    """A model and how it is trained.

    Attributes:
        model: the module that carries the adapter.
        models: prefix of parameter names -> module, of all that carry it; `model` under "".
        train, held_out: examples; `held_out` is None if nothing is held out.
        drifts: whether the distance of a prediction from the base's means something.
    """

    model: nn.Module
    models: dict[str, nn.Module]
    train: Examples
    held_out: HeldOut | None
    drifts: bool

    def forward(self, model: nn.Module, batch: Batch, *, plain: bool = False) -> Draw:
        """`model` is `self.model`, perhaps wrapped. `plain`: without weights and extra noise, as held out."""

    def preview(self) -> Preview:
        """What the model does now."""

    def before_after(self, before: Preview, after: Preview) -> Image.Image:
        """Both, side by side."""


class Classification:
    """Cross entropy of a timm or torchvision classifier.

    Args:
        model: takes (B, 3, size, size), gives (B, classes).
        config: the run.
        train, held_out: pictures with classes; `held_out` may be None.
    """

    drifts = False

    def __init__(self, model: nn.Module, config: TrainConfig, train: Pool, held_out: Pool | None) -> None:
        self.model, self.config, self.models = model, config, {"": model}
        pixels = input_of(model, config.data.size)

        def source(pool: Pool) -> Source:
            return pool.at(pixels.size, pixels.size, seed=config.seed)

        self.train = Examples(source(train), pixels, config.seed)
        self.held_out = HeldOut(source(held_out), pixels, config.seed, 1) if held_out is not None else None
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype

    def forward(self, model: nn.Module, batch: Batch, *, plain: bool = False) -> Draw:
        pixels = batch["pixels"].to(self.device, self.dtype)
        label = batch["label"].to(self.device)
        logits = model(pixels)
        loss, hit = objectives.classify(logits, label)
        return Draw(pixels, torch.empty(0), {}, logits.float(), label, loss, {"accuracy": hit})

    @torch.no_grad()
    def preview(self) -> Preview:
        shown = (self.held_out or self.train).source
        loaded = [shown.read(shown.item(index)) for index in spread(shown)]
        inputs = torch.stack([self.train.pixels.scaled(one.pixels) for one in loaded])
        guesses = self.model(inputs.to(self.device, self.dtype)).argmax(1).tolist()
        columns = [shown.pool.classes[guess] for guess in guesses]
        return Preview([[to_image(one.pixels) for one in loaded]], columns, drawn=False)

    def before_after(self, before: Preview, after: Preview) -> Image.Image:
        shown = (self.held_out or self.train).source
        truth = [shown.pool.classes[shown.item(index).label] for index in spread(shown)]
        columns = zip(truth, before.columns, after.columns, strict=True)
        labels = [f"{true}\nbefore: {old}\nafter: {new}" for true, old, new in columns]
        return make_grid(after.rows, column_labels=labels)


def spread(source: Source, count: int = SHOWN) -> list[int]:
    """Indices of `count` pictures, evenly spaced over the source."""
    count = min(count, source.count)
    return [i * source.count // count for i in range(count)]


def to_image(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) uint8 -> picture."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def input_of(model: nn.Module, size: int | None) -> Pixels:
    """Size, mean and deviation of a classifier's pictures, from timm's config; else 224 and ImageNet's."""
    known = getattr(model, "pretrained_cfg", None) or {}
    patches: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    native = patches[0] if patches else known.get("input_size", (3, 224, 224))[-1]
    return Pixels(
        size or native,
        tuple(known.get("mean", (0.485, 0.456, 0.406))),
        tuple(known.get("std", (0.229, 0.224, 0.225))),
    )
