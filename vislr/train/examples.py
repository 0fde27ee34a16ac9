"""What one forward of training sees: pictures of one size with their draws; and the fixed held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset

from vislr.data import Item, Source, TensorCache, cache_key, epoch_order, generator

# Tensors by name; "captions" and "classes" are lists of texts, "stored" a list of latents or None.
Batch = dict[str, Any]
Key = tuple[int | str, ...]


@dataclass
class Pixels:
    """How pictures become numbers: (x / 255 - mean) / std, channel by channel, at `size` where a size is fixed."""

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def scaled(self, pixels: torch.Tensor) -> torch.Tensor:
        """(3, H, W) uint8 -> float32."""
        shape = (3, 1, 1)
        return (pixels.float() / 255 - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)


@dataclass
class Latents:
    """How a picture's latents are kept.

    Attributes:
        channels, factor: latents of a picture are (channels, height / factor, width / factor).
        table: by index, where they are kept in memory.
        cache, prefix: where they are kept on disk, and what their keys begin with; None: nowhere.
    """

    channels: int
    factor: int
    table: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    cache: TensorCache | None = None
    prefix: dict[str, str] = field(default_factory=dict)

    def key(self, content: str) -> str:
        """Name of a picture's latents in the cache: its content and cut, the encoder, the number type."""
        return cache_key("latent", content=content, **self.prefix)

    def shape(self, item: Item) -> tuple[int, int, int]:
        """(C, h, w) of one picture."""
        return self.channels, item.height // self.factor, item.width // self.factor

    def find(self, source: Source, item: Item) -> dict[str, torch.Tensor] | None:
        """What is kept of a picture: mean, std, sizes, mask. None: nothing."""
        if item.index in self.table:
            return self.table[item.index]
        return self.cache.get(self.key(source.content_key(item))) if self.cache is not None else None


@dataclass
class Examples(Dataset):
    """Training examples: asked for the items of one forward, it gives their batch.

    Everything random about an item follows from (seed, item.position): noise, time, crop, caption.

    Attributes:
        source: the pictures. pixels: how they are scaled. seed: of the run.
        latents: None for classifiers. extra: names of further normal draws, "offset" or "perturbation".
        stored: whether a picture's latents never change, so that they are looked up.
    """

    source: Source
    pixels: Pixels
    seed: int
    latents: Latents | None = None
    extra: Sequence[str] = ()
    stored: bool = False

    def __getitem__(self, items: list[Item]) -> Batch:
        keys: list[Key] = [(self.seed, "noise", item.position) for item in items]
        return self.batch(items, keys)

    def batch(self, items: list[Item], keys: list[Key]) -> Batch:
        """The batch of these items, with noise drawn by `keys`."""
        parts = [self.one(item) for item in items]
        batch: Batch = {name: [part[name] for part in parts] for name in ("stored", "pixels", "frame", "mask", "key")}
        # A picture that could not be read was replaced: what counts is what was read.
        read = [part["item"] for part in parts]
        batch["index"] = torch.tensor([item.index for item in read])
        batch["weight"] = torch.tensor([item.weight for item in read])
        batch["captions"] = [item.caption for item in read]
        if self.source.pool.classes:
            batch["label"] = torch.tensor([item.label for item in read])
        if self.latents is None:
            batch["pixels"] = torch.stack(batch["pixels"])
            return batch
        return batch | self._draws(self.latents.shape(items[0]), keys)

    def one(self, item: Item) -> dict[str, Any]:
        """What is kept of a picture ("stored"), or its pixels, frame, mask, and the key to keep its latents under."""
        found: dict[str, Any] = dict.fromkeys(("stored", "pixels", "frame", "mask", "key")) | {"item": item}
        latents = self.latents
        if latents is not None and self.stored:
            found["stored"] = latents.find(self.source, item)
        if found["stored"] is not None:
            return found
        keyed = latents is not None and latents.cache is not None
        loaded = self.source.read(item, keyed=keyed)
        found |= {"item": loaded.item, "pixels": self.pixels.scaled(loaded.pixels)}
        if latents is not None:
            found["frame"] = frame_of(loaded)
            found["mask"] = small_mask(loaded.mask, latents.shape(item)[1:])
            found["key"] = latents.key(loaded.content) if keyed else None
        return found

    def _draws(self, shape: tuple[int, ...], keys: list[Key]) -> Batch:
        """Per key: u in (0, 1), the noise of the objective, the noise of the autoencoder's posterior, and `extra`."""
        drawn: dict[str, list[torch.Tensor]] = {}
        for key in keys:
            rng = generator(*key)
            drawn.setdefault("u", []).append(torch.rand((), generator=rng))
            for name in ("noise", "posterior"):
                drawn.setdefault(name, []).append(torch.randn(shape, generator=rng))
            for name in self.extra:
                own = (shape[0], 1, 1) if name == "offset" else shape
                drawn.setdefault(name, []).append(torch.randn(own, generator=rng))
        return {name: torch.stack(values) for name, values in drawn.items()}


class HeldOut(Examples):
    """Held-out examples: every picture `repeats` times, with noise and times that never change.

    Times are spread evenly over (0, 1), so that few pictures still give a steady mean. Without noise
    every repeat would be the same, so there is one.
    """

    def __init__(
        self, source: Source, pixels: Pixels, seed: int, repeats: int, *, latents: Latents | None = None,
        stored: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(source, pixels, seed, latents, (), stored)
        self.repeats = repeats if latents is not None else 1

    def __len__(self) -> int:
        return self.source.count * self.repeats

    def __getitem__(self, positions: list[int]) -> Batch:  # type: ignore[override]
        items = [self.source.item(position % self.source.count) for position in positions]
        batch = self.batch(items, [(self.seed, "held-out", position) for position in positions])
        if self.latents is not None:
            places = torch.tensor(epoch_order(self.seed, -1, len(self)))[positions]
            batch["u"] = (places + 0.5) / len(self)
        return batch

    def batches(self, size: int, rank: int, world: int) -> list[list[int]]:
        """This process's positions, in lists of at most `size` whose pictures have one size."""
        found: dict[tuple[int, int], list[int]] = {}
        for position in range(rank, len(self), world):
            found.setdefault(self.source.size_of(position % self.source.count), []).append(position)
        return [part[i : i + size] for part in found.values() for i in range(0, len(part), size)]


def frame_of(loaded: Any) -> torch.Tensor:
    """(6,): height and width of the picture as it was, top and left of the crop, height and width of the crop."""
    height, width = loaded.pixels.shape[1:]
    return torch.tensor([*loaded.original[::-1], *loaded.corner, height, width], dtype=torch.float32)


def small_mask(mask: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor | None:
    """(1, H, W) in [0, 1] -> (1, h, w), the mean of what falls on each position."""
    if mask is None:
        return None
    return torch.nn.functional.adaptive_avg_pool2d(mask[None], size)[0]
