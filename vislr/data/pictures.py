"""What a set of pictures is made of: a picture's facts, what is wrong with it, and where its bytes come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vislr.core.errors import DataError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Picture:
    """What is known of a picture without its pixels.

    Attributes:
        name: path below the folder, or SHARD/KEY.SUFFIX; for messages and for the choice of the held-out part.
        caption: as written; no trigger, nothing shuffled.
        label: number of the class; -1 for none.
        width, height: pixels, upright.
        repeats: times that it comes up in an epoch, by the name of its folder.
    """

    name: str
    caption: str = ""
    label: int = -1
    width: int = 0
    height: int = 0
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a file.

    Attributes:
        path: the file, and a line in it.
        reason: what is wrong, in a few words.
        fatal: the picture or line is left out. False: it is used, and this is how.
    """

    path: str
    reason: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Store(Protocol):
    """Pictures of one folder or of one set of shards, in a fixed order.

    Attributes:
        root: what was asked for.
        problems: what was found wrong.
        classes: names of the classes; empty for captions.
        streamed: the bytes come from shards: neighbours are cheap to read together, and no pass over all is made.
        groups: (n,) number of the shard of every picture, ascending; None for folders.
    """

    root: str
    problems: list[Problem]
    classes: tuple[str, ...]
    streamed: bool
    groups: np.ndarray | None

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Picture: ...

    def sizes(self) -> np.ndarray:
        """(n, 2) width and height of every picture."""

    def read(self, index: int) -> bytes:
        """The file's bytes. Raises DataError if they are gone."""

    def mask(self, index: int) -> bytes | None:
        """The bytes of the picture's mask file; None: it has none."""

    def digest(self, index: int) -> str:
        """sha256 of the file's bytes, 64 hex digits."""

    def fingerprint(self, index: int) -> bytes:
        """What a resumed run must find again: name, content, caption, class."""


def clean_name(name: str) -> str:
    """A file name that can be printed, whatever bytes it is made of."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def some(names: list[str], count: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def refuse(problems: Sequence[Problem], usable: int) -> None:
    """Raise DataError if something had to be left out; names the first few."""
    fatal = [str(problem) for problem in problems if problem.fatal]
    if fatal:
        raise DataError(f"{len(fatal)} faults in the pictures ({usable} are fine): {some(fatal)}")
