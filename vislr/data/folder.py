"""Folders of pictures as people keep them: captions beside the files, or one folder a class."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from vislr.core.errors import DataError, hint
from vislr.data.captions import METADATA, read_metadata, with_trigger
from vislr.data.files import checked_root, list_pictures, read_sidecar
from vislr.data.images import open_image
from vislr.data.pictures import some


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
        root = checked_root(root)
        paths, _ = list_pictures(root)
        listed, faults = read_metadata(root)
        fault = next((fault for fault in faults if fault.fatal), None)
        if fault is not None:
            raise DataError(f"in '{root}': {fault.path} {fault.reason}")
        samples, missing = [], []
        for path in paths:
            try:
                caption = listed.get(path) or read_sidecar(path)
            except DataError as error:
                raise DataError(f"'{path}' {error}") from error
            if caption:
                samples.append(Sample(path, caption))
            else:
                missing.append(path)
        if missing:
            raise DataError(
                f"{len(missing)} of {len(paths)} pictures in '{root}' have no caption: {_names(missing, root)}; "
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
        root = checked_root(root)
        paths, _ = list_pictures(root)
        stray = [path for path in paths if path.parent == root]
        if stray:
            raise DataError(
                f"{len(stray)} of {len(paths)} pictures lie directly in '{root}': {_names(stray, root)}; "
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
            raise DataError(f"{len(broken)} of {len(self)} pictures cannot be read: {_names(broken, self.root)}")
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
        return replace(self, samples=tuple(replace(s, caption=with_trigger(s.caption, words)) for s in self.samples))

    def fingerprint(self) -> str:
        """sha256 over names, bytes, captions and labels of all samples, 16 hex digits."""
        digest = hashlib.sha256()
        for sample in self.samples:
            contents = hashlib.sha256(sample.path.read_bytes()).hexdigest()
            name = sample.path.relative_to(self.root).as_posix()
            digest.update(repr((name, contents, sample.caption, sample.label)).encode())
        return digest.hexdigest()[:16]


def _names(paths: Iterable[Path], root: Path) -> str:
    return some([path.relative_to(root).as_posix() for path in paths])
