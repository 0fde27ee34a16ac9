"""The content of a model as one short name: what a figure was measured with, what a change was made on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vislr.core.errors import ModelError

if TYPE_CHECKING:
    import torch


def content_hash(state: Mapping[str, torch.Tensor], note: str = "") -> str:
    """sha256 over names, dtypes, shapes and bytes of a state dict, 64 hex digits.

    Independent of the order of the keys, of the device and of the memory layout.

    Args:
        state: what `module.state_dict()` gives.
        note: text that belongs to the content, for example how inputs are prepared.

    Raises:
        ModelError: a tensor is on the meta device and has no content.
    """
    import torch

    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach()
        if type(value) is not torch.Tensor and hasattr(value, "dequantize"):
            # Quantised tensors of torchao keep codes and scales: their content is what they stand for.
            value = value.dequantize()
        if value.is_meta:
            raise ModelError(f"'{key}' is on the meta device: a model without values has no content to hash")
        flat = value.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(flat.numpy().tobytes())
    digest.update(note.encode())
    return digest.hexdigest()


# Of a long file `quick` reads this many bytes at its begin, middle and end.
_PIECE = 1 << 20


def file_hash(path: str | os.PathLike, quick: bool = False) -> str:
    """sha256 of a file, or of the names and contents of all files of a folder (links followed), 64 hex digits.

    Args:
        quick: of files above 4 MiB only the size and three pieces count: enough to tell a model that was trained or
            quantised anew, in a moment whatever its size.

    Raises:
        OSError: there is no such file or folder, or it cannot be read.
    """
    path, digest = Path(path), hashlib.sha256()
    files = {"": path}
    if path.is_dir():
        found = [Path(place) / name for place, _, names in os.walk(path, followlinks=True) for name in names]
        # Hidden files are no content: caches, a half-written neighbour.
        files = {one.relative_to(path).as_posix(): one for one in found}
        files = {name: one for name, one in files.items() if not any(part[0] == "." for part in name.split("/"))}
    for name in sorted(files):
        size = files[name].stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with files[name].open("rb") as stream:
            if quick and size > 4 * _PIECE:
                for start in (0, (size - _PIECE) // 2, size - _PIECE):
                    stream.seek(start)
                    digest.update(stream.read(_PIECE))
                continue
            while piece := stream.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()
