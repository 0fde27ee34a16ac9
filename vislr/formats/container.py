"""The safetensors container, read with suspicion: nothing is believed before it is checked, nothing is executed.

A file is 8 bytes (little-endian length of the header), the header (a JSON object), and the tensors' bytes. The
header maps each key to `dtype`, `shape` and `data_offsets` [begin, end) in the bytes; `__metadata__` maps text to
text. `read_header` reads and checks that much and no tensor; `read_tensors` reads values into one buffer.

Refused by name: no regular file, pickles and other things that were renamed, a cut or longer file, headers over
`MAX_HEADER` or with more than `MAX_TENSORS` keys, keys twice, keys that cannot be printed, types unknown to
`DTYPES`, sizes that disagree with shapes, overlaps, gaps, more bytes than this machine has memory.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from vislr.core.errors import FormatError, hint

MAX_HEADER = 16 * 2**20
MAX_TENSORS = 2**16
MAX_KEY = 512
MAX_DIMENSIONS = 8
METADATA = "__metadata__"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# First bytes of what people rename to .safetensors, or get when a download fails.
_OTHERS = (
    (b"PK\x03\x04", "a zip archive (a PyTorch pickle?); pickles can run code and are never opened"),
    (b"\x80", "a pickle; pickles can run code and are never opened"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself"),
    (b"<", "a web page; the download failed"),
    (b"{", "bare JSON"),
)


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor.

    Attributes:
        dtype: name in safetensors, a key of `DTYPES`.
        shape: sizes.
        begin, end: place among the tensors' bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Count of its values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        path: the file.
        tensors: key -> what it is, in the order of the header.
        metadata: text to text; empty if there is none.
        start: where in the file the tensors' bytes begin.
        size: how many there are.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    start: int
    size: int


def shown(text: Any, limit: int = 80) -> str:
    """Text out of a file as it may stand in a message: one line, no control characters, not endless."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[: limit + 1])
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


def read_header(path: str | os.PathLike) -> Header:
    """Read and check the header; no tensor's bytes are read.

    Raises:
        FormatError: see the module's list; names the key where there is one.
    """
    path = Path(path)
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(32)
        length = int.from_bytes(first[:8], "little")
        if len(first) < 8 or not 2 <= length <= size - 8 or first[8:9] != b"{":
            raise FormatError(f"'{path}' is no safetensors file: {_what_it_is(first, length, size)}")
        if length > MAX_HEADER:
            raise FormatError(f"'{path}' has a header of {length:,} bytes; expected at most {MAX_HEADER:,}")
        text = first[8:] + file.read(max(0, 8 + length - len(first)))
    header = _parsed(text[:length], path)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"'{path}': {METADATA} is not text to text")
    if len(header) > MAX_TENSORS:
        raise FormatError(f"'{path}' has {len(header):,} tensors; expected at most {MAX_TENSORS:,}")
    available = size - 8 - length
    tensors = {key: _info(key, value, available, path) for key, value in header.items()}
    _check_cover(tensors, available, path)
    return Header(path, tensors, metadata, 8 + length, available)


def read_tensors(
    path: str | os.PathLike, header: Header | None = None, keys: Iterable[str] | None = None
) -> dict[str, torch.Tensor]:
    """Key -> values on the CPU. All values share one buffer, that of the file's size.

    Args:
        header: from `read_header`, if at hand.
        keys: only these, each into memory of its own; default all.

    Raises:
        FormatError: as `read_header`; a key that the file lacks; the file changed; more than the memory.
    """
    header = read_header(path) if header is None else header
    chosen = list(header.tensors) if keys is None else list(keys)
    for key in chosen:
        if key not in header.tensors:
            raise FormatError(f"'{path}' has no tensor '{shown(key)}'{hint(key, header.tensors)}")
    _check_memory(sum(header.tensors[key].bytes for key in chosen), header.path)
    with _opened(header.path) as file:
        if keys is None:
            buffer = _filled(file, header.start, header.size, header.path)
            return {key: _view(buffer[info.begin : info.end], info) for key, info in header.tensors.items()}
        found = {}
        for key in chosen:
            info = header.tensors[key]
            found[key] = _view(_filled(file, header.start + info.begin, info.bytes, header.path), info)
        return found


def check_finite(tensors: Mapping[str, torch.Tensor], path: Any) -> None:
    """Refuse NaN and infinities.

    Raises:
        FormatError: names the first key that has one.
    """
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise FormatError(f"'{path}': '{shown(key)}' has NaN or infinite values")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is a number; integers are."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()
    # The extremes of a tensor with NaN are NaN: one pass, and no mask of its size.
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _opened(path: Path) -> IO[bytes]:
    """Open for reading without waiting on a pipe.

    Raises:
        FormatError: not there, not a regular file, or not readable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        near = [file.name for file in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
        raise FormatError(f"there is no file '{path}'{hint(path.name, near)}") from error
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read '{shown(path)}': {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"'{path}' is not a regular file")
    return os.fdopen(descriptor, "rb")


def _what_it_is(first: bytes, length: int, size: int) -> str:
    if size < 8:
        return f"it has {size} bytes"
    for start, what in _OTHERS:
        if first.startswith(start):
            return f"it is {what}"
    if length > size - 8:
        return f"its header would have {length:,} bytes, the file has {size:,}; cut short, or another kind of file"
    return "its header is no JSON object"


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"'{path}': key '{shown(twice)}' is there twice")
        return made

    # Every list and object costs far more memory than its two bytes.
    if text.count(b"[") + text.count(b"{") > 8 * MAX_TENSORS:
        raise FormatError(f"'{path}': its header nests too many lists and objects")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"'{path}': its header is no JSON: {shown(error)}") from error
    if not isinstance(header, dict):
        raise FormatError(f"'{path}': its header is no JSON object")
    return header


def _info(key: str, value: Any, available: int, path: Path) -> TensorInfo:
    name = f"'{path}': tensor '{shown(key)}'"
    if not key or len(key) > MAX_KEY or not key.isprintable():
        raise FormatError(f"{name} has a name that is empty, too long or cannot be printed")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{name} is of type '{shown(dtype)}'; expected one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"{name} has the shape {shown(shape)}; expected at most {MAX_DIMENSIONS} sizes of 0 or more")
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= available:
        raise FormatError(
            f"{name} lies at {shown(offsets)}; the file has {available:,} bytes of tensors: cut short or damaged"
        )
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        given = offsets[1] - offsets[0]
        raise FormatError(f"{name} of shape {shown(shape)} and type {dtype} needs {shown(needed)} bytes, has {given:,}")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    # bool is an int to Python. A size of 0 hides the others from the check of bytes, so these are bounded here.
    return (
        isinstance(value, list)
        and all(type(size) is int and size >= 0 for size in value)
        and math.prod(max(1, size) for size in value[: MAX_DIMENSIONS + 1]) < 2**62
    )


def _check_cover(tensors: Mapping[str, TensorInfo], available: int, path: Path) -> None:
    """Tensors follow one another without overlap or gap, to the end of the file."""
    place = 0
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != place:
            what = "overlaps another" if info.begin < place else "leaves a gap before it"
            raise FormatError(f"'{path}': tensor '{shown(key)}' {what} (byte {info.begin:,}, expected {place:,})")
        place = info.end
    if place != available:
        raise FormatError(f"'{path}' has {available:,} bytes of tensors, its header describes {place:,}")


def _check_memory(needed: int, path: Path) -> None:
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return
    if needed > memory:
        raise FormatError(
            f"'{path}' holds {needed / 2**30:.1f} GiB; this machine has {memory / 2**30:.1f} GiB of memory"
        )


def _filled(file: IO[bytes], start: int, count: int, path: Path) -> torch.Tensor:
    buffer = torch.empty(count, dtype=torch.uint8)
    if not count:
        return buffer
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    file.seek(start)
    done = 0
    while done < count:
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise FormatError(f"'{path}' became shorter while it was read")
        done += got
    return buffer


def _view(raw: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    dtype = DTYPES[info.dtype]
    # Only odd writers place values at addresses that their type cannot have.
    if raw.numel() and raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    elif not raw.numel():
        raw = torch.empty(0, dtype=torch.uint8)
    if dtype == torch.bool:
        return (raw != 0).reshape(info.shape)
    return raw.view(dtype).reshape(info.shape)
