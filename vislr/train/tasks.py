"""What the loop needs of a model: its examples, its loss and pictures of what it can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from vislr.core.errors import ModelError
from vislr.data import ImageFolder, Sample, make_grid, open_image, square
from vislr.train import objectives
from vislr.train.config import TrainConfig
from vislr.train.examples import Batch, Examples, HeldOut, Pixels, Source
from vislr.train.families import Conditions, family_of
from vislr.train.sampling import sample_images

if TYPE_CHECKING:
    from PIL import Image

# Pictures in a row of a grid, unless prompts say otherwise.
_SHOWN = 6


@dataclass
class Preview:
    """Pictures of what the model does now: rows of pictures, and a text for each column."""

    rows: list[list[Image.Image]]
    columns: list[str]


class Task(Protocol):
    """A model and how it is trained.

    Attributes:
        model: the module that carries the adapter.
        train, held_out: examples; `held_out` is None if nothing is held out.
    """

    model: nn.Module
    train: Examples
    held_out: HeldOut | None

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """ "loss" and whatever else is worth a curve, each (B,). `model` is `self.model`, perhaps wrapped."""

    def preview(self) -> Preview:
        """What the model does now."""

    def before_after(self, before: Preview, after: Preview) -> Image.Image:
        """Both, side by side."""


class Diffusion:
    """Denoising or flow matching on the latents of a pipeline, whichever its scheduler says.

    Captions are encoded once; pictures are, too, unless crops or flips need the pixels.

    Args:
        pipe: a diffusers pipeline that `family_of` knows, on its device.
        config: the run.
        train, held_out: pictures with captions; `held_out` may be empty.
        quiet: no progress bar.

    Raises:
        ModelError: not a pipeline that can be trained, or not at this size.
    """

    def __init__(
        self, pipe: Any, config: TrainConfig, train: ImageFolder, held_out: ImageFolder, *, quiet: bool = False
    ) -> None:
        self.pipe, self.config, self.family = pipe, config, family_of(pipe)
        self.model: nn.Module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        first = next(self.model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.flow = "FlowMatch" in type(pipe.scheduler).__name__
        self.shift = float(pipe.scheduler.config.get("shift") or 1.0)
        self.scheduler = None if self.flow else training_scheduler(pipe.scheduler)
        self.size, noise = latent_shape(pipe, config.data.size)
        pixels = Pixels(self.size, crop=config.data.crop, flip=config.data.flip)
        table: dict[str, int] = {}

        def source(folder: ImageFolder, cached: bool) -> Source:
            made = Source(folder, pixels, noise)
            made.captions = torch.tensor([table.setdefault(s.caption, len(table)) for s in folder.samples])
            made.latents = self._latents(made, quiet) if cached else None
            return made

        self.train = Examples(source(train, config.data.cache_latents and not pixels.random), config.seed)
        self.held_out = None
        if len(held_out):
            # Held-out pictures are never augmented.
            self.held_out = HeldOut(source(held_out, True), config.seed, config.held_out.repeats)
        self.conditions = self._encode_captions(list(table))
        shown = held_out if len(held_out) else train
        self.prompts = config.sample.prompts or [sample.caption for sample in _spread(shown)]

    @torch.no_grad()
    def _encode_captions(self, captions: list[str]) -> Conditions:
        parts = [self.family.encode(captions[i : i + 32], self.size) for i in range(0, len(captions), 32)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and deviation of the latents, scaled as the denoiser sees them."""
        vae = self.pipe.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def _latents(self, source: Source, quiet: bool) -> tuple[torch.Tensor, torch.Tensor]:
        # Always in the same batches: the bits of a convolution may depend on the size of its batch.
        means, deviations = [], []
        starts = range(0, len(source.folder), 16)
        for start in tqdm(starts, desc="encoding pictures", leave=False, disable=quiet):
            indices = range(start, min(start + 16, len(source.folder)))
            mean, std = self._encode(torch.stack([source.pixels.read(source.folder, i) for i in indices]))
            means.append(mean.cpu())
            deviations.append(std.cpu())
        return torch.cat(means), torch.cat(deviations)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        mean, std = (batch["mean"], batch["std"]) if "mean" in batch else self._encode(batch["pixels"])
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        x = torch.addcmul(mean.to(self.device), std.to(self.device), batch["posterior"])
        conditions = {key: value[batch["caption"].to(value.device)] for key, value in self.conditions.items()}

        def predict(noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return self.family.forward(model, noisy.to(self.dtype), time, conditions)

        if self.scheduler is None:
            return {"loss": objectives.flow(predict, x, batch["noise"], batch["u"], self.shift)}
        return {"loss": objectives.denoise(predict, self.scheduler, x, batch["noise"], batch["u"])}

    def preview(self) -> Preview:
        sample = self.config.sample
        images = sample_images(
            self.pipe, self.prompts * len(sample.seeds), [seed for seed in sample.seeds for _ in self.prompts],
            steps=sample.steps, guidance=sample.guidance, size=self.size,
        )  # fmt: skip
        count = len(self.prompts)
        return Preview([images[i * count : (i + 1) * count] for i in range(len(sample.seeds))], self.prompts)

    def before_after(self, before: Preview, after: Preview) -> Image.Image:
        rows, labels = [], []
        for seed, old, new in zip(self.config.sample.seeds, before.rows, after.rows, strict=True):
            rows += [old, new]
            labels += [f"before, seed {seed}", f"after, seed {seed}"]
        folder = self.train.source.folder
        pictures = [open_image(sample.path) for sample in _spread(folder, len(self.prompts))]
        rows.append([square(picture, self.size) for picture in pictures])
        labels.append("training pictures")
        return make_grid(rows, row_labels=labels, column_labels=before.columns)


class Classification:
    """Cross entropy of a timm or torchvision classifier.

    Args:
        model: takes (B, 3, size, size), gives (B, classes).
        config: the run.
        train, held_out: pictures with classes; `held_out` may be empty.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, train: ImageFolder, held_out: ImageFolder) -> None:
        self.model, self.config = model, config
        pixels = input_of(model, config.data.size)
        pixels.crop, pixels.flip = config.data.crop, config.data.flip
        self.train = Examples(Source(train, pixels), config.seed)
        self.held_out = HeldOut(Source(held_out, pixels), config.seed, 1) if len(held_out) else None
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits = model(batch["pixels"].to(self.device, self.dtype))
        loss, hit = objectives.classify(logits, batch["label"].to(self.device))
        return {"loss": loss, "accuracy": hit}

    @torch.no_grad()
    def preview(self) -> Preview:
        shown = self.held_out or self.train
        folder, pixels = shown.source.folder, shown.source.pixels
        chosen = _spread(folder)
        inputs = torch.stack([pixels.read(folder, folder.samples.index(sample)) for sample in chosen])
        guesses = self.model(inputs.to(self.device, self.dtype)).argmax(1).tolist()
        pictures = [square(open_image(sample.path), pixels.size) for sample in chosen]
        return Preview([pictures], [folder.classes[guess] for guess in guesses])

    def before_after(self, before: Preview, after: Preview) -> Image.Image:
        shown = (self.held_out or self.train).source.folder
        truth = [shown.classes[sample.label] for sample in _spread(shown)]
        columns = zip(truth, before.columns, after.columns, strict=True)
        labels = [f"{true}\nbefore: {old}\nafter: {new}" for true, old, new in columns]
        return make_grid(after.rows, column_labels=labels)


def _spread(folder: ImageFolder, count: int = _SHOWN) -> list[Sample]:
    """`count` samples, evenly spaced over the folder."""
    count = min(count, len(folder))
    return [folder.samples[i * len(folder) // count] for i in range(count)]


def latent_shape(pipe: Any, size: int | None) -> tuple[int, tuple[int, int, int]]:
    """Side of a picture in pixels (None: the pipeline's own), and the shape (C, H, W) of its latents.

    Raises:
        ModelError: the denoiser cannot halve the latents of this size as often as it must.
    """
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    if size is None:
        native = getattr(pipe, "default_sample_size", None)
        if native is None:
            native = pipe.unet.config.sample_size if hasattr(pipe, "unet") else pipe.transformer.config.sample_size
        size = int(native) * factor
    halvings = len(pipe.unet.config.block_out_channels) - 1 if hasattr(pipe, "unet") else 1
    step = factor * 2**halvings
    if size % step:
        raise ModelError(f"data.size is {size}; expected a multiple of {step} for this model")
    return size, (pipe.vae.config.latent_channels, size // factor, size // factor)


def training_scheduler(scheduler: Any) -> Any:
    """The DDPM scheduler with the betas and the prediction type of any sampling scheduler.

    Sampling schedulers scale their noise in ways of their own (Euler adds sigma * noise); a model is
    trained on the variance-preserving process of its betas.
    """
    from diffusers import DDPMScheduler

    if "beta_schedule" not in scheduler.config:
        raise ModelError(f"cannot train a model with a {type(scheduler).__name__}: it has no betas and no flow")
    return DDPMScheduler.from_config(scheduler.config)


def input_of(model: nn.Module, size: int | None) -> Pixels:
    """Size, mean and deviation of a classifier's pictures, from timm's config; else 224 and ImageNet's."""
    known = getattr(model, "pretrained_cfg", None) or {}
    patches = getattr(getattr(model, "patch_embed", None), "img_size", None)
    native = patches[0] if patches else known.get("input_size", (3, 224, 224))[-1]
    return Pixels(
        size or native,
        tuple(known.get("mean", (0.485, 0.456, 0.406))),
        tuple(known.get("std", (0.229, 0.224, 0.225))),
    )
