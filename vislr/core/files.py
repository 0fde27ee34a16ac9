"""Files that are whole or not there: written beside their place, flushed, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.errors import FormatError, OutputError

if TYPE_CHECKING:
    import torch
    from PIL import Image


# What the operating system says when writing itself fails; other errors of the body pass through.
_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def output_error(path: Path, error: OSError) -> OutputError:
    """The named form of an `OSError` met while writing to `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"no room left on the disk of '{path}'")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return OutputError(f"cannot write '{path}': a part of the path is a regular file")
    return OutputError(f"cannot write '{path}': {error.strerror or error}")


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it takes the place of `path`.

    The body writes a file or makes a folder there. An existing file is replaced in one step; an
    existing folder is moved aside first and removed after the rename. On an error nothing is left.

    Raises:
        OutputError: the path cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir():
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
        else:
            _flush(temporary)
        if path.is_dir() and temporary.is_dir():
            old = _beside(path)
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        _flush(path.parent)
    except BaseException as error:
        _discard(temporary)
        if isinstance(error, OSError) and error.errno in _WRITING:
            raise output_error(path, error) from error
        if type(error).__name__ == "SafetensorError" and "os error" in str(error).lower():
            # safetensors wraps the operating system's error in one of its own.
            raise OutputError(f"cannot write '{path}': {error}") from error
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write plain data as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all. Tensors are stored contiguous, on the CPU."""
    from safetensors.torch import save_file

    stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(stored, str(temporary), metadata={"format": "pt", **(metadata or {})})


def write_picture(path: str | os.PathLike, image: Image.Image, made: Mapping[str, Any]) -> None:
    """Write a PNG that says how it was made: text chunk `vislr`, a JSON object of `made` and the version."""
    from PIL.PngImagePlugin import PngInfo

    from vislr.core.versions import versions_of

    info, version = PngInfo(), versions_of("vislr").get("vislr", "unknown")
    info.add_text("vislr", json.dumps({"version": version, **made}, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image.save(temporary, format="png", pnginfo=info)


def read_picture(path: str | os.PathLike) -> dict[str, Any]:
    """What `write_picture` noted in a PNG; a picture without a note gives {}.

    Raises:
        FormatError: no PNG, or its note is damaged.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = dict(getattr(image, "text", {})).get("vislr", "{}")
        made = json.loads(text)
    except (OSError, ValueError, SyntaxError) as error:
        raise FormatError(f"'{path}' is no PNG that can be read: {str(error).splitlines()[0]}") from error
    if not isinstance(made, dict):
        raise FormatError(f"'{path}': its note 'vislr' is no JSON object")
    return made


def check_output(path: str | os.PathLike, needed: int = 0) -> Path:
    """Make sure, before work starts, that results of `needed` bytes can be written into folder `path`.

    Makes the folder. Returns it.

    Raises:
        OutputError: a parent is a regular file, the folder is not writable, or the disk has less room.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = _beside(path / "probe")
        probe.write_bytes(b"vislr")
        probe.unlink()
    except OSError as error:
        raise output_error(path, error) from error
    free = shutil.disk_usage(path).free
    if free < needed:
        raise OutputError(f"'{path}' needs about {needed / 2**20:.1f} MiB and its disk has {free / 2**20:.1f} MiB left")
    return path
