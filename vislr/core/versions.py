"""Versions of libraries, as results and files record them."""

from __future__ import annotations

import contextlib
from importlib import metadata


def versions_of(*libraries: str) -> dict[str, str]:
    """Version of each of these that is installed."""
    found = {}
    for library in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found
