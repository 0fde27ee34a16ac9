"""WebDataset shards as a store: tar files, local or remote, whose pictures are read one by one where they lie.

A shard is listed once: where each picture begins, how large it is, its caption. After that a picture is one read (for a
URL one range request), so nothing is kept on the disk, every process reads only what it trains on, and any position
of training is found at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from vislr.core.errors import DataError
from vislr.core.files import write_tensors
from vislr.data.captions import caption_of, decode_text
from vislr.data.config import DataConfig, FolderConfig
from vislr.data.images import SUFFIXES, measure
from vislr.data.pictures import Picture, Problem, clean_name

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# What a file system tells of a file's version, under the names that fsspec's file systems use.
_STAMPS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created", "ino", "blob_id", "version_id")
_MASK = "mask.png"


def find_shards(path: str) -> list[str]:
    """The tar files that `path` stands for, sorted; none if it is a folder of pictures.

    Args:
        path: a .tar, a folder with .tar files and no pictures beside them, a range {000..041}, a glob, a URL.

    Raises:
        DataError: a glob or a remote folder without .tar files; a compressed tar.
    """
    if "://" not in path:
        path = os.path.expanduser(path)
    if path.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise DataError(f"'{path}' is compressed; expected a plain .tar, in which pictures can be found by their place")
    found = _RANGE.search(path)
    if found:
        low, high, width = int(found[1]), int(found[2]), len(found[1])
        if high < low:
            raise DataError(f"'{path}' has an empty range; expected {{{high}..{low}}}")
        parts = [f"{path[: found.start()]}{i:0{width}d}{path[found.end() :]}" for i in range(low, high + 1)]
        return [shard for part in parts for shard in find_shards(part)]
    remote = "://" in path
    if path.endswith(".tar") and "*" not in path:
        return [path]
    if not remote and "*" not in path:
        folder = Path(path)
        if not folder.is_dir():
            return []
        names = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        if any(entry.suffix.lower() in SUFFIXES or entry.is_dir() for entry in names):
            return []
        return sorted(str(entry) for entry in names if entry.suffix == ".tar")
    files, place = _file_system(path)
    pattern = place if "*" in place else f"{place.rstrip('/')}/*.tar"
    shards = sorted(name for name in files.glob(pattern) if name.endswith(".tar"))
    if not shards:
        raise DataError(f"'{path}' holds no .tar files")
    return [files.unstrip_protocol(name) if remote else name for name in shards]


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"'{url}' cannot be reached: {error}") from error


@dataclass
class _Texts:
    """Many texts as one array of bytes, which processes share and files hold."""

    data: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> _Texts:
        parts = [text.encode("utf-8", "replace") for text in texts]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), dtype=np.uint8), ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes().decode()


@dataclass
class _Listing:
    """One shard: a row of numbers, a name and a caption for every picture, and what is wrong with the others."""

    names: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    # offset, bytes, width, height, class, offset of the mask, its bytes (0: none)
    rows: list[tuple[int, ...]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def save(self, path: Path) -> None:
        import torch

        texts = {"names": _Texts.of(self.names), "captions": _Texts.of(self.captions)}
        problems = json.dumps([(p.path, p.reason, p.fatal) for p in self.problems])
        tensors = {"rows": torch.tensor(self.rows, dtype=torch.int64).view(-1, 7)}
        for name, value in texts.items():
            tensors[name] = torch.from_numpy(value.data.copy())
            tensors[f"{name}.ends"] = torch.from_numpy(value.ends)
        write_tensors(path, tensors, {"problems": problems})

    @classmethod
    def load(cls, path: Path) -> _Listing | None:
        """The listing in a file; None: there is none, or it is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                problems = json.loads(file.metadata()["problems"])
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        names, captions = (_Texts(found[name], found[f"{name}.ends"]) for name in ("names", "captions"))
        count = len(found["rows"])
        return cls(
            [names[i] for i in range(count)], [captions[i] for i in range(count)],
            [tuple(row) for row in found["rows"].tolist()], [Problem(*problem) for problem in problems],
        )  # fmt: skip


class ShardStore:
    """Pictures of shards, in the order of the shards; see `vislr.data.pictures.Store`."""

    streamed = True

    def __init__(self, root: str, shards: list[str], listings: list[_Listing], classes: tuple[str, ...]) -> None:
        self.root, self.shards, self.classes = root, shards, classes
        self.problems = [problem for listing in listings for problem in listing.problems]
        self._names = _Texts.of([name for listing in listings for name in listing.names])
        self._captions = _Texts.of([caption for listing in listings for caption in listing.captions])
        self._rows = np.array([row for one in listings for row in one.rows], dtype=np.int64).reshape(-1, 7)
        self._last: tuple[int, bytes] = (-1, b"")
        self._shard = np.repeat(np.arange(len(listings)), [len(listing.rows) for listing in listings])
        self.groups: np.ndarray | None = self._shard

    def __len__(self) -> int:
        return len(self._rows)

    def picture(self, index: int) -> Picture:
        _, _, width, height, label, _, _ = self._rows[index].tolist()
        return Picture(self._names[index], self._captions[index], label, width, height)

    def sizes(self) -> np.ndarray:
        return self._rows[:, 2:4]

    def _slice(self, index: int, offset: int, size: int) -> bytes:
        url = self.shards[int(self._shard[index])]
        try:
            if "://" not in url:
                with open(url, "rb") as file:
                    file.seek(offset)
                    return file.read(size)
            files, place = _file_system(url)
            return files.cat_file(place, start=offset, end=offset + size)
        except DataError:
            raise
        except Exception as error:
            # Every remote file system has errors of its own.
            raise DataError(f"'{self._names[index]}' cannot be read from '{url}': {error}") from error

    def read(self, index: int) -> bytes:
        # A cache asks for the digest, then for the bytes: one request serves both.
        number, data = self._last
        if number != index:
            data = self._slice(index, int(self._rows[index, 0]), int(self._rows[index, 1]))
            self._last = index, data
        return data

    def mask(self, index: int) -> bytes | None:
        offset, size = self._rows[index, 5:7].tolist()
        return self._slice(index, offset, size) if size else None

    def digest(self, index: int) -> str:
        return hashlib.sha256(self.read(index)).hexdigest()

    def fingerprint(self, index: int) -> bytes:
        # A shard is too large to be read for this; names, places, sizes and captions stand for the pictures.
        return repr((self._names[index], self._rows[index].tolist(), self._captions[index])).encode()


def read_shards(
    part: FolderConfig, shards: list[str], config: DataConfig, classes: bool | Sequence[str] = False, *,
    quiet: bool = True,
) -> ShardStore:  # fmt: skip
    """List shards. Listings of shards that have not changed are kept in `config.cache_folder`, if there is one.

    Args:
        part: what stands in for missing captions.
        shards: from `find_shards`.
        config: how captions are found; masks.
        classes: True or names: take the number in NAME.cls; False: captions from NAME.txt or NAME.json.
        quiet: no progress bar.

    Raises:
        DataError: a class that training has not.
    """
    default = config.caption if part.caption is None else part.caption

    def listing(url: str) -> _Listing:
        try:
            return _list_shard(url, config, default, classes is not False)
        except DataError as error:
            return _Listing(problems=[Problem(url, str(error))])

    with ThreadPoolExecutor(8) as pool:
        listings = list(tqdm(pool.map(listing, shards), total=len(shards), desc="listing shards", disable=quiet))
    names: tuple[str, ...] = ()
    if classes is not False:
        count = 1 + max((row[4] for one in listings for row in one.rows), default=-1)
        names = tuple(str(i) for i in range(count)) if classes is True else tuple(classes)
        if count > len(names):
            raise DataError(f"'{part.path}' has a class {count - 1}; training has {len(names)} classes")
    return ShardStore(part.path, shards, listings, names)


def _list_shard(url: str, config: DataConfig, default: str, labels: bool) -> _Listing:
    files, place = _file_system(url)
    try:
        info = files.info(place)
    except Exception as error:
        raise DataError(f"cannot be read: {error}" if str(error) else "is not there") from error
    stamps = {key: str(info[key]) for key in _STAMPS if info.get(key)}
    kept = None
    if config.cache_folder and stamps:
        key = repr((url, info.get("size"), stamps, default, labels, config.caption_suffix, config.masks))
        kept = Path(config.cache_folder).expanduser() / "shards" / f"{hashlib.sha256(key.encode()).hexdigest()}"
        kept = kept.with_suffix(".safetensors")
        known = _Listing.load(kept)
        if known is not None:
            return known
    made = _Listing()
    shard = clean_name(place.rsplit("/", 1)[-1])
    try:
        # A block cache, because captions and headers are read behind the place where the tar's reader stands.
        with files.open(place, "rb", cache_type="blockcache") as file:
            for key, fields, fault in _samples(file, info.get("size") or 0):
                name = f"{shard}/{key}" if key else shard
                try:
                    if fault:
                        raise DataError(fault)
                    _add(made, name, fields, file, config, default, labels)
                except DataError as error:
                    made.problems.append(Problem(name, str(error)))
    except OSError as error:
        made.problems.append(Problem(shard, f"cannot be read after {len(made.rows)} pictures: {error}"))
        return made
    if kept is not None:
        made.save(kept)
    return made


# Field ("jpg", "txt") -> where its bytes lie: offset and size.
_Fields = dict[str, tuple[int, int]]


def _samples(file: IO[bytes], size: int) -> Iterator[tuple[str, _Fields, str]]:
    """(key, fields, fault) of each run of members with one key, as WebDataset groups them.

    The key is the path up to the first dot of the file's name, the rest is the field.
    """
    current, fields, fault = "", _Fields(), ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it keeps every header otherwise
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                key = clean_name(f"{folder}/{stem}" if folder else stem)
                if key != current:
                    if fields:
                        yield current, fields, fault
                    current, fields, fault = key, {}, ""
                suffix = suffix.lower()
                if suffix in fields:
                    fault = f"has two members named .{suffix}"
                if size and member.offset_data + member.size > size:
                    fault = "is cut off: the shard ends inside it"
                fields[suffix] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        if fields:
            yield current, fields, fault
        yield "", {}, f"is no whole tar file: {error}"
        return
    if fields:
        yield current, fields, fault


def _add(
    made: _Listing, name: str, fields: _Fields, file: IO[bytes], config: DataConfig, default: str, labels: bool
) -> None:
    """One sample into the listing. Raises DataError, without a name, if it cannot be used."""

    def data(suffix: str) -> bytes:
        offset, size = fields[suffix]
        file.seek(offset)
        return file.read(size)

    pictures = [suffix for suffix in fields if f".{suffix}" in SUFFIXES]
    if not pictures:
        raise DataError(f"has no picture, only {', '.join('.' + suffix for suffix in fields)}")
    offset, size = fields[pictures[0]]
    if not size:
        raise DataError("is empty")
    # The header is nearly always in the first 64 kB; the few pictures with more before it are read whole.
    file.seek(offset)
    head = file.read(min(size, 65536))
    try:
        width, height = measure(io.BytesIO(head))
    except DataError:
        width, height = measure(io.BytesIO(data(pictures[0])))
    caption, label = "", -1
    if labels:
        try:
            label = int(data("cls")) if "cls" in fields else -1
        except ValueError as error:
            raise DataError("has a .cls that is no number") from error
        if label < 0:
            raise DataError("has no class: no .cls with a number from 0")
    else:
        caption = _caption(fields, data, config.caption_suffix[1:]) or default
        if not caption:
            raise DataError(f"has no caption: no {config.caption_suffix} with text, no .json with a 'caption'")
    mask = fields.get(_MASK, (0, 0)) if config.masks == "files" else (0, 0)
    made.names.append(f"{name}.{pictures[0]}")
    made.captions.append(caption)
    made.rows.append((offset, size, width, height, label, *mask))


def _caption(fields: _Fields, data: Any, suffix: str) -> str:
    if suffix in fields:
        try:
            return decode_text(data(suffix))
        except DataError as error:
            raise DataError(f"has a caption that {error}") from error
    if "json" in fields:
        try:
            return caption_of(json.loads(data("json"))) or ""
        except (ValueError, RecursionError) as error:
            raise DataError("has a .json that cannot be read") from error
    return ""
