"""Limits of config values, as named errors."""

from __future__ import annotations

from vislr.core.errors import ConfigError


def at_least(low: float, **values: float | None) -> None:
    """Refuse values below `low`; None passes. `section__key` is shown as section.key."""
    for name, value in values.items():
        if value is not None and value < low:
            raise ConfigError(f"{name.replace('__', '.')} is {value}; expected {low} or more")


def above_zero(**values: float | None) -> None:
    """Refuse values of 0 and below; None passes."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{name.replace('__', '.')} is {value}; expected more than 0")


def share(**values: float) -> None:
    """Refuse values outside of [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{name.replace('__', '.')} is {value}; expected 0 or more and less than 1")
