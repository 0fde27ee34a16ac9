"""The weights of a model on disk, layer by layer, without building the model.

Read are safetensors: a diffusers pipeline folder, the folder of one of its components, a file of one component
in diffusers' names, and the original code bases' single files (the denoiser and CLIP-L of SD1.x, SD2.x, SDXL; the
denoiser of SD3 and FLUX), whose fused layers are taken apart. Names are canonical: "unet.down_blocks.0...".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vislr import zoo
from vislr.core.errors import ModelError, hint
from vislr.formats import naming
from vislr.formats.canonical import COMPONENTS, join_name
from vislr.formats.container import Header, read_header, read_tensors, shown
from vislr.formats.families import knows

_TEXT_PREFIXES = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
_INDEX = ".safetensors.index.json"
_MAX_INDEX = 32 * 2**20


@dataclass(frozen=True)
class Place:
    """Where a parameter is: the file's header, its key, and the ranges of rows there, in order (none: all)."""

    header: Header
    key: str
    rows: tuple[range, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        shape = self.header.tensors[self.key].shape
        return (sum(map(len, self.rows)), *shape[1:]) if self.rows else shape


class Parameters(Mapping[str, torch.Tensor]):
    """Layer -> its weight (or bias), read from the file at each access."""

    def __init__(self, places: dict[str, Place]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> torch.Tensor:
        place = self.places[name]
        tensor = read_tensors(place.header.path, place.header, [place.key])[place.key]
        return torch.cat([tensor[rows.start : rows.stop] for rows in place.rows]) if place.rows else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        path: what was opened.
        family: a key of `families.FAMILIES`; "": not known.
        weights: canonical name of a layer -> its weight.
        biases: the same for biases.
    """

    path: Path
    family: str
    weights: Parameters
    biases: Parameters


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Find the parameters of a folder, a file or an embedded pipeline; values are read when they are asked for.

    Raises:
        ModelError: no folder or file, nothing in safetensors, or no parameter with a known place.
        FormatError: a file is damaged.
    """
    path, embedded = Path(path), zoo.pipeline_names()
    if not path.exists() and str(path) in embedded:
        path = zoo.pipeline_folder(str(path))
    places: dict[str, Place] = {}
    if path.is_dir():
        owners = [name for name in COMPONENTS if (path / name).is_dir()]
        for owner in owners:
            for header in _headers(path / owner):
                places |= {_canonical(owner, key): Place(header, key) for key in header.tensors}
        if not owners:
            owner = _component_of(path)
            for header in _headers(path):
                places |= {_canonical(owner, key): Place(header, key) for key in header.tensors}
        family = _family_of(places)
    elif path.is_file():
        family, places = _single_file(read_header(path))
    else:
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near += embedded
        raise ModelError(f"there is no folder or file '{path}'{hint(path.name, near)}")
    weights, biases = (
        {name.removesuffix(end): place for name, place in places.items() if name.endswith(end)}
        for end in (".weight", ".bias")
    )
    if not weights:
        raise ModelError(
            f"'{path}' has no weights that vislr can name: expected a diffusers folder or a safetensors file"
        )
    return Checkpoint(path, family, Parameters(weights), Parameters(biases))


def _canonical(component: str, key: str) -> str:
    located = naming.locate("", join_name(component, key)) if component else None
    return join_name(located.component, located.paths[0]) if located else key


def _headers(folder: Path) -> list[Header]:
    """Headers of one component's weights: the files that its index names, else the one without a variant's name."""
    index = sorted(folder.glob(f"*{_INDEX}"), key=lambda file: (len(file.name), file.name))
    if index:
        if index[0].stat().st_size > _MAX_INDEX:
            raise ModelError(f"'{index[0]}' has more than {_MAX_INDEX:,} bytes")
        try:
            names = sorted(set(json.loads(index[0].read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"'{index[0]}' is no index of weights: {shown(error)}") from error
        # A name out of a file must not lead out of its folder.
        wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if wrong:
            raise ModelError(f"'{index[0]}' names '{shown(wrong[0])}'; expected files beside it")
        return [read_header(folder / name) for name in names]
    # "model.safetensors" before "model.fp16.safetensors".
    files = sorted(folder.glob("*.safetensors"), key=lambda file: (len(file.name), file.name))
    if not files:
        others = [file.name for ending in ("*.bin", "*.ckpt", "*.pt") for file in folder.glob(ending)]
        pickled = f"; '{others[0]}' is a pickle, which is never opened" if others else ""
        raise ModelError(f"'{folder}' has no safetensors weights{pickled}")
    return [read_header(files[0])]


def _component_of(folder: Path) -> str:
    """The component that a folder of one model would be: by its class."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    name = str(config.get("_class_name", "")) if isinstance(config, dict) else ""
    if "UNet" in name:
        return "unet"
    return "transformer" if "Transformer" in name else ""


def _family_of(places: Mapping[str, Place]) -> str:
    layers = [name.removesuffix(".weight") for name in places if name.endswith(".weight")]

    def width(name: str) -> int | None:
        shape = places[f"{name}.weight"].shape
        return shape[1] if len(shape) > 1 else None

    return naming.detect(layers, {}, width)


def _single_file(header: Header) -> tuple[str, dict[str, Place]]:
    layers = {key.rpartition(".")[0] for key in header.tensors}

    def width(name: str) -> int | None:
        info = header.tensors.get(f"{name}.weight")
        return info.shape[1] if info is not None and len(info.shape) > 1 else None

    family = naming.detect(sorted(layers), {}, width)
    places: dict[str, Place] = {}
    for key in header.tensors:
        layer, _, parameter = key.rpartition(".")
        text = next((prefix for prefix in _TEXT_PREFIXES if key.startswith(prefix)), None)
        if text is not None:
            places[f"text_encoder.{key.removeprefix(text)}"] = Place(header, key)
            continue
        located = naming.locate(family, layer) if family else None
        if located is None:
            if not family:  # a bare model, timm's for example
                places[key] = Place(header, key)
            continue
        # A whole checkpoint also holds an autoencoder and schedules.
        if located.component and not all(knows(family, located.component, path) for path in located.paths):
            continue
        shape = header.tensors[key].shape
        length, start = shape[0] if shape else 0, 0
        for path, share in zip(located.paths, located.row.sizes, strict=True):
            size = length * share // sum(located.row.sizes)
            rows: tuple[range, ...] = (range(start, start + size),) if len(located.paths) > 1 else ()
            if located.row.swap == "halves" or (located.row.swap == "last" and width(layer) == length // 2):
                rows = (range(length // 2, length), range(length // 2))
            places[f"{join_name(located.component, path)}.{parameter}"] = Place(header, key, rows)
            start += size
    return family, places


def shared(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Layers of both, in the order of the first.

    Raises:
        ModelError: there are none, or a layer has another shape.
    """
    names = [name for name in first.weights if name in second.weights.places]
    if not names:
        raise ModelError(f"'{first.path}' and '{second.path}' have no layer in common")
    for name in names:
        one, two = first.weights.places[name].shape, second.weights.places[name].shape
        if one != two:
            raise ModelError(f"'{name}' is {one} in '{first.path}' and {two} in '{second.path}': different models")
    return names
