"""Named errors: what was given, what was expected, and the nearest valid choice.

Every error that a user can cause is a `VislrError`. Its text is one line, the command line
prints it without a traceback and leaves with its `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VislrError(Exception):
    """Base of every error that vislr raises on purpose."""

    exit_code = 2


class ConfigError(VislrError):
    """A config or a flag is wrong: unknown key, wrong type, impossible value."""


class DataError(VislrError):
    """A folder of images is empty, lacks captions, or holds a file that cannot be read."""


class ModelError(VislrError):
    """A folder or object is not the pipeline or model that was asked for."""


class TargetError(VislrError):
    """A pattern or a name matches nothing in the model."""


class AdapterError(VislrError):
    """An adapter does not fit: rank, name, shape, architecture or file."""


class FormatError(AdapterError):
    """An adapter's file has keys, shapes or a version that its format does not know."""


class UndoError(VislrError):
    """A change cannot be taken back exactly, and why."""


class OutputError(VislrError):
    """A result cannot be written there: the path, the permission, or the room on the disk."""

    exit_code = 3


class LaunchError(VislrError):
    """The number of processes, or a device, is not what was asked for."""

    exit_code = 4


class TrainingError(VislrError):
    """Training cannot go on: the loss is not finite."""

    exit_code = 5


class Interrupted(VislrError):
    """The run was asked to stop, saved its state, and can go on with resume."""

    exit_code = 130


def nearest(given: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The up to `count` choices that are spelled most like `given`, best first; of long lists the first 8,000 count."""
    return difflib.get_close_matches(given, list(choices)[:8000], n=count, cutoff=0.4)


def hint(given: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'a', 'b'?"`, or the choices themselves if they are few, or nothing."""
    choices = list(choices)
    close = nearest(given, choices)
    if close:
        return "; did you mean " + ", ".join(repr(c) for c in close) + "?"
    if 0 < len(choices) <= 12:
        return "; choose from " + ", ".join(repr(c) for c in choices)
    return ""
