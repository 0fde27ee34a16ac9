"""A folder of picture files as a store: listed, captioned and checked; what cannot be used is named."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vislr.core.errors import DataError, hint
from vislr.data.captions import METADATA, decode_text, read_metadata, repeats_of
from vislr.data.config import DataConfig, FolderConfig
from vislr.data.images import SUFFIXES, decode, measure
from vislr.data.pictures import Picture, Problem, clean_name

MASK_SUFFIX = "-masklabel.png"
# Pictures and films that people keep in such folders and that are not read.
_FOREIGN = (
    ".heic", ".heif", ".jxl", ".jp2", ".psd", ".xcf", ".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw",
    ".mp4", ".mov", ".webm", ".avi", ".mkv", ".jfif", ".tga", ".ico", ".exr", ".hdr", ".npy", ".part", ".crdownload",
)  # fmt: skip
# A file changed within this time of being read may change again without its time stamp showing it.
_RACY_NS = 2_000_000_000
# What the file system says of a file: if it is the same, so are the bytes (see `_RACY_NS`).
_State = tuple[int, int, int, int]


@dataclass
class PictureFile:
    """A picture, its file, and the file of its mask."""

    path: Path
    picture: Picture
    mask: Path | None = None


class FileStore:
    """Pictures of a folder; see `vislr.data.pictures.Store`."""

    streamed = False
    groups: np.ndarray | None = None

    def __init__(
        self, root: str, files: Sequence[PictureFile], classes: tuple[str, ...] = (),
        problems: Sequence[Problem] = (), digests: dict[Path, tuple[_State, str]] | None = None,
    ) -> None:  # fmt: skip
        self.root, self.classes, self.problems = root, classes, list(problems)
        self._files, self._digests = list(files), digests or {}

    def __len__(self) -> int:
        return len(self._files)

    def picture(self, index: int) -> Picture:
        return self._files[index].picture

    def path(self, index: int) -> Path:
        return self._files[index].path

    def sizes(self) -> np.ndarray:
        pictures = [(file.picture.width, file.picture.height) for file in self._files]
        return np.array(pictures, dtype=np.int64).reshape(-1, 2)

    def read(self, index: int) -> bytes:
        path = self._files[index].path
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"'{path}' cannot be read: {error.strerror}") from error

    def mask(self, index: int) -> bytes | None:
        path = self._files[index].mask
        try:
            return path.read_bytes() if path is not None else None
        except OSError as error:
            raise DataError(f"the mask '{path}' cannot be read: {error.strerror}") from error

    def digest(self, index: int) -> str:
        path = self._files[index].path
        known = self._digests.get(path)
        if known is not None and known[0] == _state(path):
            return known[1]
        state = _state(path)
        digest = hashlib.sha256(self.read(index)).hexdigest()
        _remember(self._digests, path, state, digest)
        return digest

    def fingerprint(self, index: int) -> bytes:
        picture = self._files[index].picture
        return repr((picture.name, self.digest(index), picture.caption, picture.label)).encode("utf-8", "replace")


def _state(path: Path) -> _State | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _remember(digests: dict[Path, tuple[_State, str]], path: Path, state: _State | None, digest: str) -> None:
    """Keep a digest, if a later change of the file is sure to show in its state."""
    if state is not None and state == _state(path) and time.time_ns() - max(state[2:]) > _RACY_NS:
        digests[path] = state, digest


def checked_root(root: str | Path) -> Path:
    """The folder.

    Raises:
        DataError: it is not there, or is a file.
    """
    root = Path(root).expanduser()
    if not root.exists():
        siblings = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
        raise DataError(f"there is no folder '{root}'{hint(root.name, siblings) if len(siblings) > 12 else ''}")
    if not root.is_dir():
        raise DataError(f"'{root}' is a file; expected a folder of pictures")
    return root


def list_pictures(root: Path) -> tuple[list[Path], list[Problem]]:
    """Files below `root` that are named like pictures, sorted; and entries that look like ones but are none.

    Raises:
        DataError: there are none.
    """
    found, problems, others = [], [], 0
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        # Resource forks and thumbnails of archives and file managers.
        if any(part.startswith((".", "__MACOSX")) for part in relative.parts):
            continue
        name = clean_name(relative.as_posix())
        if path.is_dir() and path.is_symlink():
            problems.append(
                Problem(name, "is a link to a folder, which is not followed; give it in data.folders", False)
            )
        elif path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            problems.append(Problem(name, "is a folder that cannot be opened"))
        suffix = path.suffix.lower()
        others += suffix not in SUFFIXES and path.is_file()
        if suffix in SUFFIXES and path.is_file():
            found.append(path)
        elif suffix in SUFFIXES:
            what = "is a folder" if path.is_dir() else "is a link to nothing" if path.is_symlink() else "is no file"
            problems.append(Problem(name, what))
        elif suffix in _FOREIGN:
            problems.append(Problem(name, f"{suffix} is not read; expected {', '.join(SUFFIXES)}"))
    if not found:
        raise DataError(f"'{root}' holds no pictures ({others} other files); expected {', '.join(SUFFIXES)}")
    return found, problems


def read_folder(
    part: FolderConfig, config: DataConfig, classes: bool | Sequence[str] = False, *, quiet: bool = True
) -> FileStore:
    """List and check the pictures of a folder.

    Args:
        part: which folder, and what stands in for missing captions.
        config: how captions are found, whether everything is decoded, masks.
        classes: True: one folder is one class; names: only these; False: captions.
        quiet: no progress bar.

    Returns:
        the pictures that can be used, in the order of their names; `problems` says what is wrong with the others.

    Raises:
        DataError: no folder, or no picture in it at all.
    """
    root = checked_root(part.path)
    paths, problems = list_pictures(root)
    if config.masks == "files":
        paths = [path for path in paths if not path.name.endswith(MASK_SUFFIX)]
    if classes is False:
        names: tuple[str, ...] = ()
        files = _captioned(root, paths, part, config, problems)
    else:
        files, names = _classified(root, paths, None if classes is True else classes, problems)
    digests: dict[Path, tuple[_State, str]] = {}
    lock = threading.Lock()

    def check(file: PictureFile) -> PictureFile | None:
        name = file.picture.name
        try:
            width, height, notes = _inspect(file, config, digests)
        except DataError as error:
            notes = [Problem(name, str(error))]
            width = 0
        with lock:
            problems.extend(notes)
        return PictureFile(file.path, _sized(file.picture, width, height), file.mask) if width else None

    with ThreadPoolExecutor(8) as pool:
        checked = list(
            tqdm(pool.map(check, files), total=len(files), desc="checking pictures", leave=False, disable=quiet)
        )
    problems.sort(key=lambda problem: problem.path)
    return FileStore(part.path, [file for file in checked if file is not None], names, problems, digests)


def _sized(picture: Picture, width: int, height: int) -> Picture:
    return Picture(picture.name, picture.caption, picture.label, width, height, picture.repeats)


def _inspect(
    file: PictureFile, config: DataConfig, digests: dict[Path, tuple[_State, str]]
) -> tuple[int, int, list[Problem]]:
    """Width, height and notes of a picture.

    Raises:
        DataError: it cannot be used; without its name.
    """
    name, notes = file.picture.name, []
    state = _state(file.path)
    try:
        if config.decode_all:
            data = file.path.read_bytes()
            _remember(digests, file.path, state, hashlib.sha256(data).hexdigest())
            decoded = decode(data)
            width, height = decoded.image.size
            if decoded.frames > 1:
                notes.append(Problem(name, f"has {decoded.frames} frames; the first is used", False))
        elif not file.path.stat().st_size:
            raise DataError("is empty")
        else:
            with file.path.open("rb") as opened:
                width, height = measure(opened)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error
    if file.mask is not None:
        shape = _mask_size(file.mask)
        if shape != (width, height):
            raise DataError(f"is {width} x {height} and its mask '{file.mask.name}' {shape[0]} x {shape[1]} pixels")
    return width, height, notes


def _mask_size(path: Path) -> tuple[int, int]:
    try:
        return decode(path.read_bytes()).image.size
    except OSError as error:
        raise DataError(f"has a mask '{path.name}' that cannot be read: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"has a mask '{path.name}' that {error}") from error


def _captioned(
    root: Path, paths: list[Path], part: FolderConfig, config: DataConfig, problems: list[Problem]
) -> list[PictureFile]:
    listed, faults = read_metadata(root)
    problems += faults
    masks = Path(part.masks).expanduser() if part.masks else None
    if masks is not None and not masks.is_dir():
        raise DataError(f"there is no folder of masks '{masks}'")
    default = config.caption if part.caption is None else part.caption
    known = set(paths)
    for path in listed:
        if path not in known:
            problems.append(Problem(METADATA, f"names '{path.name}', which is none of the pictures"))
    stems: dict[Path, Path] = {}
    files = []
    numbered = []
    for path in paths:
        relative = path.relative_to(root)
        name = clean_name(relative.as_posix())
        times = repeats_of(relative.parts[0]) if len(relative.parts) > 1 else None
        if times is not None and not config.repeats_from_names:
            numbered.append(relative.parts[0])
            times = None
        try:
            caption = listed.get(path) or read_sidecar(path, config.caption_suffix)
        except DataError as error:
            problems.append(Problem(name, str(error)))
            continue
        caption = caption or (times[1] if times else "") or default
        if not caption:
            problems.append(
                Problem(name, f"has no caption: no {config.caption_suffix} file with text, no line in metadata.jsonl")
            )
            continue
        twin = stems.setdefault(path.with_suffix(""), path)
        if twin != path and path not in listed:
            problems.append(Problem(name, f"shares its caption file with '{twin.name}'", False))
        mask = _mask_of(path, relative, masks) if config.masks == "files" else None
        if config.masks == "files" and mask is None:
            problems.append(Problem(name, "has no mask; all of it counts", False))
        files.append(PictureFile(path, Picture(name, caption, repeats=times[0] if times else 1), mask))
    if numbered:
        first = numbered[0]
        problems.append(
            Problem(first, "is named like a folder of repeats; data.repeats_from_names counts it as one", False)
        )
    return files


def read_sidecar(path: Path, suffix: str = ".txt") -> str:
    """The caption in the file beside a picture; empty if there is none.

    Raises:
        DataError: it cannot be read; without the picture's name.
    """
    text = path.with_suffix(suffix)
    try:
        return decode_text(text.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        return ""
    except OSError as error:
        raise DataError(f"has a caption '{text.name}' that cannot be read: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"has a caption '{text.name}' that {error}") from error


def _mask_of(path: Path, relative: Path, masks: Path | None) -> Path | None:
    if masks is None:
        beside = path.with_name(path.stem + MASK_SUFFIX)
        return beside if beside.is_file() else None
    choices = [(masks / relative).with_suffix(suffix) for suffix in (path.suffix, *SUFFIXES)]
    return next((choice for choice in choices if choice.is_file()), None)


def _classified(
    root: Path, paths: list[Path], names: Sequence[str] | None, problems: list[Problem]
) -> tuple[list[PictureFile], tuple[str, ...]]:
    inside = []
    for path in paths:
        if path.parent == root:
            problems.append(Problem(clean_name(path.name), "lies outside of the class folders"))
        else:
            inside.append(path)
    found = sorted({path.relative_to(root).parts[0] for path in inside})
    if names is None:
        names = found
    if len(names) < 2:
        raise DataError(f"'{root}' has {len(found)} class folders ({', '.join(found)}); expected two or more")
    number = {name: i for i, name in enumerate(names)}
    files = []
    for path in inside:
        relative = path.relative_to(root)
        name, folder = clean_name(relative.as_posix()), relative.parts[0]
        if folder in number:
            files.append(PictureFile(path, Picture(name, label=number[folder])))
        else:
            problems.append(Problem(name, f"is of a class '{folder}' that training has not{hint(folder, names)}"))
    return files, tuple(names)
