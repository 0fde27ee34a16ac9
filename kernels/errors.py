"""The error that a wrong argument of a kernel causes."""

from __future__ import annotations


class KernelError(ValueError):
    """Shapes, dtypes or devices do not fit; the text says what was given and what was expected."""
