"""Which reader reads which model: one file per family of backbones, one line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vislr.core.errors import ModelError

# Asked in this order; the last one takes any net of convolutions.
_FILES = ("unet", "dit", "vit", "conv")


@dataclass(frozen=True)
class Layout:
    """What a reader says of a model's structure.

    Attributes:
        stages: module names that are stages, in the order of the forward.
        units: module name -> removable, for units and for attention modules that are residual branches.
    """

    stages: Sequence[str]
    units: dict[str, bool]


@dataclass(frozen=True)
class Reader:
    """How one family is read. Every function gets the model, adapters and all.

    Attributes:
        family: short name.
        title: what it reads, for the message that lists the supported ones.
        matches: whether the model's structure is of this family.
        sample: the model's own shapes: height, width (latent units for denoisers, pixels for
            classifiers), tokens where it reads text, batch 1.
        inputs: `(model, sample, draw)` -> keyword arguments of one forward. `draw(*shape)` gives
            normal floats, `draw(*shape, fill=v)` a constant.
        layout: `(model on meta, inputs on meta)` -> stages and units.
    """

    family: str
    title: str
    matches: Callable[[nn.Module], bool]
    sample: Callable[[nn.Module], dict[str, int]]
    inputs: Callable[[nn.Module, dict[str, int], Any], dict[str, Any]]
    layout: Callable[[nn.Module, dict[str, Any]], Layout]


def readers() -> list[Reader]:
    """Every reader, in the order in which they are asked."""
    return [reader for file in _FILES for reader in importlib.import_module(f"vislr.anatomy.{file}").READERS]


def reader_of(model: nn.Module) -> Reader:
    """The reader of this model.

    Raises:
        ModelError: none fits; lists what is supported.
    """
    for reader in readers():
        if reader.matches(model):
            return reader
    known = "; ".join(f"{reader.family}: {reader.title}" for reader in readers())
    raise ModelError(f"no reader for a {type(model).__name__}; supported are {known}")


def has_config(model: nn.Module, *keys: str) -> bool:
    """Whether the model has a diffusers config with all of these keys."""
    config = getattr(model, "config", None)
    return config is not None and all(hasattr(config, key) for key in keys)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A size given as one number or as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
