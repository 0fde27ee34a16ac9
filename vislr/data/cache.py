"""Tensors kept by the content that they were made from: another content is another key, so nothing stale is served.

Entries are files of their own, written aside and renamed, so that several runs may share a folder. What was not used
for longest goes first when the folder grows over its limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from vislr.core.files import output_error

if TYPE_CHECKING:
    import torch

# What a write that was killed leaves behind is removed after this many seconds.
_ABANDONED = 3600.0
Tensors = dict[str, "torch.Tensor"]


def cache_key(kind: str, **parts: str | int | float | bool | None) -> str:
    """sha256 over everything that an entry depends on, 64 hex digits.

    Args:
        kind: "latent", "text", ...
        parts: all of it: content of the input, of the encoder's weights, number type, ...
    """
    return hashlib.sha256(json.dumps([kind, parts], sort_keys=True).encode()).hexdigest()


class TensorCache:
    """Tensors by key, in a folder or in memory, bounded in size.

    Args:
        folder: where entries are kept; None: in memory, for this process alone.
        limit: largest size in bytes. Each other run that writes at the same time may add a tenth of it.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path | None, limit: int) -> None:
        self.limit = limit
        self.hits = self.misses = 0
        self._memory: OrderedDict[str, Tensors] = OrderedDict()
        self._size = self._written = 0
        self.folder = None
        if folder is not None:
            self.folder = Path(folder).expanduser() / "tensors"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise output_error(self.folder, error) from error
            self._shrink()

    def get(self, key: str) -> Tensors | None:
        """The tensors under `key`, bit for bit as they were put; None: not there, or the file is damaged."""
        found = self._from_memory(key) if self.folder is None else self._from_file(self._path(self.folder, key))
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep copies of `tensors` on the CPU under `key`. An entry larger than the limit is not kept.

        Raises:
            OutputError: the disk is full, or the folder is not writable.
        """
        stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        size = sum(value.numel() * value.element_size() for value in stored.values())
        if size > self.limit:
            return
        if self.folder is None:
            old = self._memory.pop(key, None)
            self._size += size - (_bytes(old) if old else 0)
            self._memory[key] = stored
            while self._size > self.limit:
                self._size -= _bytes(self._memory.popitem(last=False)[1])
            return
        written = self._write(self._path(self.folder, key), stored)
        self._size += written
        self._written += written
        # What other runs have written is not in `_size` until it is counted again.
        if self._size > self.limit or self._written > self.limit / 10:
            self._shrink()

    def _from_memory(self, key: str) -> Tensors | None:
        if key in self._memory:
            self._memory.move_to_end(key)
        return self._memory.get(key)

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        # Two levels: a folder with a million entries is slow to open.
        return folder / key[:2] / f"{key}.tensors"

    def _from_file(self, path: Path) -> Tensors | None:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            data = path.read_bytes()
        except OSError:
            return None
        # After a power cut a renamed file may hold zeros where its data should be.
        if data[:64] != hashlib.sha256(data[64:]).hexdigest().encode():
            return None
        try:
            found = load(data[64:])
        except SafetensorError:
            return None
        # Removed by another run meanwhile: what was read is whole.
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def _write(self, path: Path, tensors: Tensors) -> int:
        from safetensors.torch import save

        body = save(tensors)
        data = hashlib.sha256(body).hexdigest().encode() + body
        temporary = path.with_name(f".{path.name}.tmp-{uuid4().hex[:8]}")
        try:
            path.parent.mkdir(exist_ok=True)
            # Not flushed to the disk, unlike results: the sum finds what a crash destroyed, and it is made again.
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise output_error(path, error) from error
        return len(data)

    def _shrink(self) -> None:
        """Count what is there, other runs' entries too; over the limit, remove the oldest down to 90 % of it."""
        assert self.folder is not None
        entries = []
        for path in self.folder.glob("*/*"):
            try:
                found = path.stat()
            except OSError:
                continue
            if path.name.startswith("."):
                if time.time() - found.st_mtime > _ABANDONED:
                    path.unlink(missing_ok=True)
            else:
                entries.append((found.st_mtime_ns, found.st_size, path))
        self._size, self._written = sum(size for _, size, _ in entries), 0
        if self._size <= self.limit:
            return
        for _, size, path in sorted(entries):
            if self._size <= 0.9 * self.limit:
                break
            path.unlink(missing_ok=True)
            self._size -= size


def _bytes(tensors: Tensors) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())
