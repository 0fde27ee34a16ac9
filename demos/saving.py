"""What a user takes home: the adapters as one file, or the pipeline with them in its weights."""

from __future__ import annotations

import shutil
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vislr.adapters import inject
from vislr.core.errors import AdapterError, ConfigError, FormatError
from vislr.core.files import atomic_path, check_output
from vislr.demos.session import Loaded, Picture, Session
from vislr.demos.studio import Studio
from vislr.demos.uploads import slug

MOST_RANK = 4096


def save_merged_adapter(
    session: Session,
    weights: Mapping[str, float],
    *,
    name: str,
    way: str = "sum",
    format: str = "vislr",
    rank: int = 0,
    density: float = 0.5,
) -> tuple[Path, list[str]]:
    """One adapter out of those of the session, as a file (of format peft: a zip of its folder).

    Args:
        weights: label -> weight.
        name: of the file, without suffix.
        way: as the method of `vislr merge`. format: as that of `vislr convert`.
        rank: the largest of a layer; 0: whatever is exact, or the largest in the adapters.
        density: share of entries that the sparse ways keep.

    Returns:
        the file, and what the user should know, a line each.

    Raises:
        AdapterError, ConfigError, FormatError: adapters that cannot be added, or not in this format.
        OutputError: no room on the disk.
    """
    from vislr import formats
    from vislr.formats.weights import merge_adapters

    if not 0 <= rank <= MOST_RANK:
        raise ConfigError(f"rank is {rank}; expected 0 (exact) to {MOST_RANK}")
    adapters, values = _some(session, weights)
    with session.pipeline.held() as pipe:
        parts = [formats.canonical_of(pipe, adapter.name) for adapter in adapters]
        base: dict[str, Any] = {}
        for adapter, part in zip(adapters, parts, strict=True):
            if any(entry.dora for entry in part.entries.values()):
                base |= formats.base_of(pipe, adapter.name)
        outcome = merge_adapters(parts, values, way, rank=rank or None, density=density, base=base or None)
    folder = check_output(session.folder / f"out-{uuid.uuid4().hex[:6]}")
    path = folder / (slug(name) + (".safetensors" if format != "peft" else ""))
    try:
        written = formats.write_canonical(outcome.adapter, path, format)
    except FormatError as error:
        raise FormatError(f"{error}; format 'vislr' holds every adapter") from error
    notes = [*outcome.notes, *written.lines()]
    if outcome.errors:
        notes.append(f"{len(outcome.errors)} layers were cut to their rank; relative error {outcome.error:.2g}")
    return (_zipped(path) if format == "peft" else path), notes


def save_merged_pipeline(
    studio: Studio, session: Session, weights: Mapping[str, float], *, name: str
) -> tuple[Path, list[str]]:
    """The pipeline with these adapters in its weights, as a zip of a diffusers folder.

    It is made out of a fresh copy, so nobody else's work waits or changes.

    Raises:
        AdapterError: no adapter is on. OutputError: no room on the disk.
    """
    from vislr import folders, recipe
    from vislr.record import modules_of

    adapters, values = _some(session, weights)
    pipe = studio.fresh(session.pipeline.name)
    size = sum(p.numel() * p.element_size() for part in modules_of(pipe) for p in part.parameters())
    folder = check_output(session.folder / f"out-{uuid.uuid4().hex[:6]}", needed=2 * size)
    names = [f"{number}_{slug(adapter.label)}" for number, adapter in enumerate(adapters)]
    for adapter, own in zip(adapters, names, strict=True):
        recipe.load_adapter(pipe, adapter.path, name=own, any_base=True)
    recipe.set_adapters(pipe, names, values)
    for part in modules_of(pipe):
        _bake(part, names)
    place = folders.save(pipe, folder / slug(name))
    return _zipped(place), [
        f"{len(adapters)} adapters are in the weights; a folder of diffusers, {size / 2**20:,.1f} MiB"
    ]


def save_grid(session: Session, pictures: Sequence[Picture]) -> Path:
    """These pictures, row by row with a column for each method, as one PNG that says how each was made.

    Raises:
        ConfigError: there are none.
    """
    from PIL import Image

    from vislr.core.files import write_picture
    from vislr.data import make_grid

    if not pictures:
        raise ConfigError("there is no picture yet; generate some first")
    titles = list(dict.fromkeys(str(picture.made["method"]) for picture in pictures))
    seeds = list(dict.fromkeys(picture.made["seeds"][0] for picture in pictures))
    images = []
    for picture in pictures:
        with Image.open(picture.path) as image:
            images.append(image.convert("RGB"))
    rows = [images[start : start + len(titles)] for start in range(0, len(images), len(titles))]
    cell = max(128, min(images[0].width, 512))
    grid = make_grid(
        rows, row_labels=[f"seed {seed}" for seed in seeds], column_labels=titles,
        title=pictures[0].made["prompts"][0], cell=cell,
    )  # fmt: skip
    path = session.folder / f"grid-{uuid.uuid4().hex[:6]}.png"
    write_picture(path, grid, {"pictures": [picture.made for picture in pictures]})
    return path


def _bake(module: nn.Module, names: Sequence[str]) -> None:
    """Merge these adapters and put the layers themselves back in the place of their tuner layers."""
    layers = list(inject.tuner_layers(module))
    for _, layer in layers:
        layer.merge(adapter_names=[name for name in names if name in layer._get_available_adapters()])
    for path, layer in layers:
        # Of several kinds on one layer the outer one is in the layer's place.
        if path == inject.plain_name(path):
            parent, _, child = path.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())


def _some(session: Session, weights: Mapping[str, float]) -> tuple[list[Loaded], list[float]]:
    adapters, values = session.chosen(weights)
    if not adapters:
        raise AdapterError("no adapter is on; load one and give it a weight")
    return adapters, values


def _zipped(folder: Path) -> Path:
    """The folder as a zip beside it, not compressed: weights do not shrink. The folder goes."""
    path = folder.with_name(f"{folder.name}.zip")
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{folder.name}/{file.relative_to(folder).as_posix()}")
    shutil.rmtree(folder)
    return path
