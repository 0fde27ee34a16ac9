"""What a classifier of timm was made with: the model itself does not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_KEY = "_vislr_made_with"


def note_made_with(
    model: Any, architecture: str, arguments: Mapping[str, Any], plans: Sequence[dict[str, Any]] = ()
) -> Any:
    """Remember a model's name in timm, its arguments, and the structural plans that it was loaded with."""
    # Not through nn.Module.__setattr__: it is no part of the state.
    model.__dict__[_KEY] = {"architecture": architecture, "model_args": dict(arguments), "plans": list(plans)}
    return model


def made_with(model: Any) -> dict[str, Any]:
    """What was noted: architecture, model_args, plans; empty if nothing was."""
    # A copy on the meta device has None there.
    return model.__dict__.get(_KEY) or {}
