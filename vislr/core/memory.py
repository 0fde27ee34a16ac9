"""Memory of this process that nothing uses any more."""

from __future__ import annotations

import contextlib
import ctypes


def return_freed_heap() -> None:
    """Give freed heap back to the system: glibc keeps it, where what needs large blocks next cannot use it."""
    # Another libc may not trim.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
