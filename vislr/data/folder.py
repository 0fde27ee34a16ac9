"""Folders of pictures as people keep them: captions beside the files, or one folder a class."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from vislr.core.errors import DataError, hint
from vislr.data.images import SUFFIXES, open_image

METADATA = "metadata.jsonl"
_CAPTION_KEYS = ("text", "caption")


@dataclass(frozen=True)
class Sample:
    """One picture of a folder: its file, and its caption or its class (an index into `classes`)."""

    path: Path
    caption: str = ""
    label: int = -1


@dataclass(frozen=True)
class ImageFolder:
    """Pictures with captions or classes, in a fixed order.

    Attributes:
        root: the folder.
        samples: sorted by path.
        classes: names of the classes; empty for captions.
    """

    root: Path
    samples: tuple[Sample, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @classmethod
    def with_captions(cls, root: str | Path) -> ImageFolder:
        """Pictures at any depth, each with a `.txt` file of the same stem or a line in `metadata.jsonl`.

        A line is `{"file_name": "a.png", "text": "a cat"}` ("caption" in place of "text" is read too),
        paths relative to the file. A picture that has a line needs no `.txt`.

        Raises:
            DataError: not a folder, no pictures, pictures without captions (named), a damaged line.
        """
        root = _checked_root(root)
        paths = _pictures(root)
        listed = _read_metadata(root)
        samples, missing = [], []
        for path in paths:
            caption = listed.get(path) or _sidecar(path)
            if caption:
                samples.append(Sample(path, caption))
            else:
                missing.append(path)
        if missing:
            raise DataError(
                f"{len(missing)} of {len(paths)} pictures in '{root}' have no caption: {_some(missing, root)}; "
                f"expected a .txt file of the same name with text, or a line in {METADATA}"
            )
        return cls(root, tuple(samples))

    @classmethod
    def with_classes(cls, root: str | Path, classes: Sequence[str] | None = None) -> ImageFolder:
        """Pictures in one folder a class; deeper folders belong to the class above them.

        Args:
            root: the folder.
            classes: names that must be used (of the training set, for a held-out folder); default: all
                folders that hold pictures, sorted.

        Raises:
            DataError: not a folder, no pictures, pictures outside of class folders, fewer than two classes,
                a class that is not among `classes`.
        """
        root = _checked_root(root)
        paths = _pictures(root)
        stray = [path for path in paths if path.parent == root]
        if stray:
            raise DataError(
                f"{len(stray)} of {len(paths)} pictures lie directly in '{root}': {_some(stray, root)}; "
                "expected one folder for each class"
            )
        found = sorted({path.relative_to(root).parts[0] for path in paths})
        if classes is None:
            if len(found) < 2:
                raise DataError(f"'{root}' has one class folder, '{found[0]}'; expected two or more")
            classes = found
        unknown = [name for name in found if name not in classes]
        if unknown:
            raise DataError(f"'{root}' has a class '{unknown[0]}' that training has not{hint(unknown[0], classes)}")
        index = {name: i for i, name in enumerate(classes)}
        samples = tuple(Sample(path, label=index[path.relative_to(root).parts[0]]) for path in paths)
        return cls(root, samples, tuple(classes))

    def check(self) -> int:
        """Decode every picture.

        Returns:
            the length of the shortest side found, in pixels.

        Raises:
            DataError: pictures cannot be read; names them.
        """

        def shortest(sample: Sample) -> int | DataError:
            try:
                return min(open_image(sample.path).size)
            except DataError as error:
                return error

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(shortest, self.samples))
        broken = [s.path for s, result in zip(self.samples, results, strict=True) if isinstance(result, DataError)]
        if len(broken) == 1:
            raise next(result for result in results if isinstance(result, DataError))
        if broken:
            raise DataError(f"{len(broken)} of {len(self)} pictures cannot be read: {_some(broken, self.root)}")
        return min(result for result in results if isinstance(result, int))

    def split(self, fraction: float) -> tuple[ImageFolder, ImageFolder]:
        """Training and held-out part. Which pictures are held out depends on their names alone.

        Args:
            fraction: share held out, in [0, 1). Above 0 at least one picture is held out and one is left.

        Raises:
            DataError: fewer than two pictures.
        """
        if fraction <= 0:
            return self, replace(self, samples=())
        if len(self) < 2:
            raise DataError(f"'{self.root}' has one picture; a held-out part needs two or more (or set it to 0)")
        count = min(max(1, math.floor(len(self) * fraction + 0.5)), len(self) - 1)

        def place(sample: Sample) -> bytes:
            return hashlib.sha256(sample.path.relative_to(self.root).as_posix().encode()).digest()

        held = set(sorted(self.samples, key=place)[:count])
        return (
            replace(self, samples=tuple(s for s in self.samples if s not in held)),
            replace(self, samples=tuple(s for s in self.samples if s in held)),
        )

    def triggered(self, words: str) -> ImageFolder:
        """The folder with `words` put before every caption that does not hold them."""
        if not words:
            return self

        def caption(text: str) -> str:
            return text if words.lower() in text.lower() else f"{words}, {text}"

        return replace(self, samples=tuple(replace(s, caption=caption(s.caption)) for s in self.samples))

    def fingerprint(self) -> str:
        """sha256 over names, bytes, captions and labels of all samples, 16 hex digits."""
        digest = hashlib.sha256()
        for sample in self.samples:
            contents = hashlib.sha256(sample.path.read_bytes()).hexdigest()
            name = sample.path.relative_to(self.root).as_posix()
            digest.update(repr((name, contents, sample.caption, sample.label)).encode())
        return digest.hexdigest()[:16]


def _checked_root(root: str | Path) -> Path:
    root = Path(root).expanduser()
    if not root.exists():
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(f"there is no folder '{root}'{hint(root.name, siblings) if len(siblings) > 12 else ''}")
    if not root.is_dir():
        raise DataError(f"'{root}' is a file; expected a folder of pictures")
    return root


def _pictures(root: Path) -> list[Path]:
    found = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        # Resource forks and thumbnails of archives and file managers.
        and not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(root).parts)
    ]
    if not found:
        files = sum(path.is_file() for path in root.rglob("*"))
        raise DataError(f"'{root}' holds no pictures ({files} other files); expected {', '.join(SUFFIXES)}")
    return found


def _sidecar(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return ""
    try:
        return " ".join(text.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise DataError(f"'{text}' is not UTF-8 text") from error


def _read_metadata(root: Path) -> dict[Path, str]:
    """Captions of every `metadata.jsonl` under `root`, by picture."""
    captions: dict[Path, str] = {}
    for file in sorted(root.rglob(METADATA)):
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = row["file_name"]
                caption = next((row[key] for key in _CAPTION_KEYS if key in row), None)
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"'{file}' line {number} is no JSON object with a 'file_name'") from error
            if not isinstance(caption, str) or not isinstance(name, str):
                raise DataError(f"'{file}' line {number} has no text under {' or '.join(map(repr, _CAPTION_KEYS))}")
            if not (file.parent / name).is_file():
                raise DataError(f"'{file}' line {number} names '{name}', which is not there")
            captions[file.parent / name] = " ".join(caption.split())
    return captions


def _some(paths: Iterable[Path], root: Path, count: int = 5) -> str:
    names = [path.relative_to(root).as_posix() for path in paths]
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
