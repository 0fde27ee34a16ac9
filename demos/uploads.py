"""Files from outside: named and measured before anything reads them; what is in them is judged by `formats`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vislr.core.errors import FormatError
from vislr.formats.container import shown
from vislr.formats.peft_folders import folders as folders_of_peft

# A folder of peft: its config and its weights.
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG_BYTES = 2**20
# Levels of folders that are searched, and how many adapters are listed.
DEPTH = 4
MOST_LISTED = 500


@dataclass(frozen=True)
class Taken:
    """An adapter's file or folder.

    Attributes:
        label: what the user sees.
        path: where it lies now.
        owned: whether it lies in the session's folder and goes with it.
    """

    label: str
    path: Path
    owned: bool


def slug(text: str) -> str:
    """Letters, digits, `_` and `-` alone, at most 40; never empty."""
    return re.sub(r"[^A-Za-z0-9_\-]+", "_", text)[:40].strip("_") or "adapter"


def take(files: Sequence[str | os.PathLike], folder: Path, limit: int, component: str = "") -> list[Taken]:
    """Copy uploaded files into the session's folder: each file an adapter, the two files of peft one together.

    Args:
        limit: bytes of the largest file.
        component: of the pipeline, that the two files of peft are for; they often do not say.

    Raises:
        FormatError: a file is larger than `limit` bytes, is no regular file, or half of a folder of peft.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.is_file() or path.is_symlink():
            raise FormatError(f"'{shown(path.name)}' did not arrive; upload it again")
        allowed = min(limit, CONFIG_BYTES) if path.name == PEFT_FILES[0] else limit
        if path.stat().st_size > allowed:
            size, most = path.stat().st_size / 2**20, allowed / 2**20
            raise FormatError(f"'{shown(path.name)}' has {size:,.1f} MiB; at most {most:,.1f} MiB are taken here")
    config = next((path for path in paths if path.name == PEFT_FILES[0]), None)
    weights = next((path for path in paths if path.name == PEFT_FILES[1]), None)
    found = []
    if config is not None:
        if weights is None:
            raise FormatError(f"'{PEFT_FILES[0]}' alone is no adapter; upload it together with '{PEFT_FILES[1]}'")
        inside = _place(folder, "peft")
        (inside / component).mkdir(parents=True)
        for path in (config, weights):
            shutil.copyfile(path, inside / component / path.name)
        found.append(Taken("peft", inside, True))
    for path in paths:
        if path in (config, weights) and config is not None:
            continue
        place = _place(folder, f"{slug(path.stem)}.safetensors")
        shutil.copyfile(path, place)
        found.append(Taken(shown(path.stem, 40), place, True))
    return found


def _place(folder: Path, name: str) -> Path:
    number = sum(1 for _ in folder.iterdir())
    while (folder / f"{number:02d}-{name}").exists():
        number += 1
    return folder / f"{number:02d}-{name}"


def list_adapters(folder: str | os.PathLike) -> dict[str, Path]:
    """Name below the folder -> safetensors file, or folder of peft; links that lead out of it are left out.

    Raises:
        FormatError: there is no such folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FormatError(f"there is no folder '{shown(root)}'")
    root = root.resolve()
    found: dict[str, Path] = {}
    for place, folders, files in os.walk(root):
        inside = Path(place)
        folders.sort()
        if len(inside.relative_to(root).parts) >= DEPTH:
            folders.clear()
        if folders_of_peft(inside):
            found[_below(inside, root)] = inside
            folders.clear()
            continue
        for file in sorted(files):
            path = inside / file
            if file.endswith(".safetensors") and path.resolve().is_relative_to(root):
                found[_below(path, root)] = path
        if len(found) >= MOST_LISTED:
            break
    return dict(list(found.items())[:MOST_LISTED])


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else root.name


def label_of(path: Path) -> str:
    """What a file or folder of a listing is called: of `style/adapter.safetensors` the folder says more."""
    plain = path.stem if path.is_file() else path.name
    return shown(path.parent.name if plain in ("adapter", "adapter_model", "pytorch_lora_weights") else plain, 40)


def discard(path: Path) -> None:
    """Remove a file or folder that was taken and is of no use."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
