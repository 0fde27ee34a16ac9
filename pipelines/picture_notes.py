"""What a picture says of how it was made, so that it can be made again: of `vislr generate` and of the studio.

The note is the text chunk `vislr` of the PNG (`vislr.core.files.write_picture`): the fields of `vislr generate`, and

=============  ======================================================================================
prompts        the picture's own prompt, in a list of one; seeds the same
negative       its own
beside         prompts, seeds, negatives of the batch that it was made in, and its place there: kernels
               round differently for batches of other sizes
plan           how adapters were composed; null
hashes         of the model, the adapters and the first picture: sha256 of files
machine        device, threads, versions: where the same bits can be expected
=============  ======================================================================================
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.errors import AdapterError, DataError, FormatError, ModelError
from vislr.core.files import read_picture
from vislr.core.hashing import file_hash
from vislr.core.versions import versions_of

if TYPE_CHECKING:
    from vislr.pipelines.generate import GenerateConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture of a batch."""

    prompt: str
    seed: int
    negative: str = ""


def hashes_of(model: str, base: str | None, adapters: Sequence[Path], image: str | None) -> dict[str, Any]:
    """The note's `hashes`. A hub id has none: its files are not here before it is loaded.

    Raises:
        DataError: there is no file `image`.
    """
    if image is not None and not Path(image).is_file():
        raise DataError(f"there is no picture '{image}'")
    return {
        "model": model_hash(model),
        "base": None if base is None else model_hash(base),
        "adapter": [file_hash(path) for path in adapters],
        "image": None if image is None else file_hash(image),
    }


def model_hash(name: str, quick: bool = True) -> str | None:
    """Of the files of an embedded pipeline, a folder, or a recipe's folder; None: a hub id. `quick`: of `file_hash`."""
    from vislr import zoo

    path = Path(name)
    if path.is_file():
        # A recipe: its folder has the adapters that it names.
        return file_hash(path.parent, quick)
    if not path.exists() and name in zoo.pipeline_names():
        path = zoo.pipeline_folder(name)
    return file_hash(path, quick) if path.is_dir() else None


def note_of(
    made: Mapping[str, Any], batch: Sequence[Job], place: int, hashes: Mapping[str, Any], plan: dict[str, Any] | None
) -> dict[str, Any]:
    """The note of one picture.

    Args:
        made: fields of `GenerateConfig`, and `device`.
        batch: what was drawn at once. place: of the picture among these.
        hashes: of `hashes_of`. plan: of the composition, with the files' adapters last.
    """
    import torch

    job = batch[place]
    return {
        **made,
        "prompts": [job.prompt],
        "seeds": [job.seed],
        "negative": job.negative,
        "beside": {
            "prompts": [one.prompt for one in batch],
            "seeds": [one.seed for one in batch],
            "negatives": [one.negative for one in batch],
            "place": place,
        },
        "plan": plan,
        "hashes": dict(hashes),
        "machine": {"threads": torch.get_num_threads(), **versions_of("torch", "diffusers", "transformers", "peft")},
    }


def read_again(path: str, config: GenerateConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """A picture's note, and the fields of the `GenerateConfig` that makes it again.

    Args:
        config: where moved files are: `adapter` (in the picture's order, weights are the picture's), `image`,
            `model`; `device` in place of the picture's.

    Raises:
        FormatError: the picture has no note, or that of a grid. AdapterError, ModelError, DataError: a file is gone
            or is not the one that the picture was made with.
    """
    from vislr.pipelines.generate import GenerateConfig, split_weight

    note = read_picture(path)
    if not {"beside", "hashes", "model", "seeds"} <= set(note):
        grid = " (a grid: take one of its pictures)" if "pictures" in note else ""
        raise FormatError(f"'{path}' does not say how it was made{grid}; expected a picture of vislr generate")
    try:
        names = {field.name for field in dataclasses.fields(GenerateConfig)} - {"again", "out", "grid", "prompts_file"}
        fields = {key: value for key, value in note.items() if key in names}
        hashes, beside = note["hashes"], note["beside"]
        count = len(beside["prompts"])
        if not (count == len(beside["seeds"]) == len(beside["negatives"]) and beside["place"] in range(count)):
            raise ValueError("its batch is not whole")
        if note["plan"] is not None and len(note["plan"]["adapters"]) < len(note["adapter"]):
            raise ValueError("its plan lacks adapters")
        if config.adapter and len(config.adapter) != len(note["adapter"]):
            raise AdapterError(
                f"{len(config.adapter)} adapters given; the picture was made with {len(note['adapter'])}"
            )
        if config.adapter:
            weights = [split_weight(one)[1] for one in note["adapter"]]
            given = zip(config.adapter, weights, strict=True)
            fields["adapter"] = [f"{file}:{weight:.12g}" for file, weight in given]
        fields |= {"batch": count, "prompts": list(beside["prompts"]), "compose": None}
        fields |= {"image": config.image or note.get("image"), "device": config.device or note.get("device")}
        default = GenerateConfig.__dataclass_fields__["model"].default
        fields["model"] = note["model"] if config.model == default else config.model
        _check(path, fields, hashes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"the note of '{path}' cannot be read: {type(error).__name__}: {error}") from error
    _compare_machines(note)
    return note, fields


def _check(path: str, fields: Mapping[str, Any], hashes: Mapping[str, Any]) -> None:
    from vislr.pipelines.generate import adapter_file

    for text, expected in zip(fields["adapter"], hashes["adapter"], strict=True):
        try:
            file, _ = adapter_file(text)
        except AdapterError as error:
            raise AdapterError(f"{error}; say where the files are now, in the picture's order, by adapter") from error
        if file_hash(file) != expected:
            raise AdapterError(f"'{file}' is not the file that '{path}' was made with: its content differs")
    image = fields["image"]
    if image is not None:
        if not Path(image).is_file():
            raise DataError(f"there is no picture '{image}'; say where it is now, by image")
        if file_hash(image) != hashes["image"]:
            raise DataError(f"'{image}' is not the picture that '{path}' was made from: its content differs")
    for key in ("model", "base"):
        name, expected = fields.get(key), hashes.get(key)
        if name is not None and expected is not None and model_hash(name) != expected:
            raise ModelError(f"'{name}' is not the {key} that '{path}' was made with: its files differ")


def _compare_machines(note: Mapping[str, Any]) -> None:
    import torch

    now = {"threads": torch.get_num_threads(), **versions_of("torch", "diffusers", "transformers", "peft")}
    then = note.get("machine", {})
    other = [f"{key} {value} (now {now.get(key)})" for key, value in then.items() if now.get(key) != value]
    if other:
        warnings.warn(f"made with {', '.join(other)}: last bits may differ", stacklevel=2)
