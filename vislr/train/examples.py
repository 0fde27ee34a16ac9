"""What stands at each position of training, and the fixed examples of the held-out loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset

from vislr.data import ImageFolder, epoch_order, generator, open_image, sample_at, square, to_tensor
from vislr.data.images import Crop

Batch = dict[str, torch.Tensor]
Key = tuple[int | str, ...]


@dataclass
class Pixels:
    """How pictures become tensors: (x / 255 - mean) / std, channel by channel."""

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    crop: Crop = "center"
    flip: bool = False

    @property
    def random(self) -> bool:
        """Whether a picture differs from one epoch to the next."""
        return self.crop == "random" or self.flip

    def read(self, folder: ImageFolder, index: int, rng: torch.Generator | None = None) -> torch.Tensor:
        """(3, size, size), float32. Without `rng`: the centre, not mirrored."""
        image = open_image(folder.samples[index].path)
        if rng is None:
            image = square(image, self.size)
        else:
            image = square(image, self.size, crop=self.crop, flip=self.flip, rng=rng)
        shape = (3, 1, 1)
        return (to_tensor(image).float() / 255 - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(
            shape
        )


@dataclass
class Source:
    """Pictures as tensors, by index.

    Attributes:
        folder, pixels: the pictures and how they are read.
        noise: shape of the noise of one example; () for none.
        latents: (mean, std) of every picture, each (n, C, H, W), in place of pixels; None: read pixels.
        captions: for every picture the row of its caption in a table that the task keeps; None: no captions.
    """

    folder: ImageFolder
    pixels: Pixels
    noise: tuple[int, ...] = ()
    latents: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)
    captions: torch.Tensor | None = field(default=None, repr=False)

    def batch(self, indices: list[int], keys: list[Key], rngs: list[torch.Generator | None]) -> Batch:
        """Pictures `indices`, with noise drawn by `keys` and augmented by `rngs` (None: as they are)."""
        batch = {"index": torch.tensor(indices), **_draws(self.noise, keys)}
        if self.latents is not None:
            batch["mean"], batch["std"] = (part[batch["index"]] for part in self.latents)
        else:
            read = [self.pixels.read(self.folder, i, rng) for i, rng in zip(indices, rngs, strict=True)]
            batch["pixels"] = torch.stack(read)
        if self.captions is not None:
            batch["caption"] = self.captions[batch["index"]]
        if self.folder.classes:
            batch["label"] = torch.tensor([self.folder.samples[i].label for i in indices])
        return batch


@dataclass
class Examples(Dataset):
    """Training examples by position: which sample, which augmentation, which noise.

    Position p is the running number of samples drawn since step 0, over all processes; everything
    about it follows from (seed, p). Asked for a list of positions, it gives their batch.
    """

    source: Source
    seed: int

    def __getitem__(self, positions: list[int]) -> Batch:
        indices = [sample_at(self.seed, position, len(self.source.folder)) for position in positions]
        keys: list[Key] = [(self.seed, "noise", position) for position in positions]
        augmented = self.source.pixels.random and self.source.latents is None
        rngs = [generator(self.seed, "augment", position) if augmented else None for position in positions]
        return self.source.batch(indices, keys, rngs)


@dataclass
class HeldOut(Dataset):
    """Held-out examples: every picture `repeats` times, with noise and times that never change.

    Times are spread evenly over (0, 1), so that few pictures still give a steady mean. Without noise
    every repeat would be the same, so there is one.
    """

    source: Source
    seed: int
    repeats: int

    def __len__(self) -> int:
        return len(self.source.folder) * (self.repeats if self.source.noise else 1)

    def __getitem__(self, positions: list[int]) -> Batch:
        count = len(self.source.folder)
        keys: list[Key] = [(self.seed, "held-out", position) for position in positions]
        batch = self.source.batch([position % count for position in positions], keys, [None] * len(positions))
        if self.source.noise:
            places = torch.tensor(epoch_order(self.seed, -1, len(self)))[positions]
            batch["u"] = (places + 0.5) / len(self)
        return batch


def _draws(shape: tuple[int, ...], keys: list[Key]) -> Batch:
    """Per key: u in (0, 1), the noise of the objective and the noise of the autoencoder's posterior."""
    if not shape:
        return {}
    times, noises, posteriors = [], [], []
    for key in keys:
        rng = generator(*key)
        times.append(torch.rand((), generator=rng))
        noises.append(torch.randn(shape, generator=rng))
        posteriors.append(torch.randn(shape, generator=rng))
    return {"u": torch.stack(times), "noise": torch.stack(noises), "posterior": torch.stack(posteriors)}


def step_positions(step: int, batch: int, accumulation: int, rank: int, world: int) -> list[list[int]]:
    """Positions of one process in one step: a list for each forward pass.

    A step takes the next batch x accumulation x world positions; over processes and passes each is
    taken once, so a step is the same set of samples however it is divided.
    """
    start = step * batch * accumulation * world
    offsets = [(micro * world + rank) * batch for micro in range(accumulation)]
    return [list(range(start + offset, start + offset + batch)) for offset in offsets]
