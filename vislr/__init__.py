"""vislr adapts and shrinks vision and diffusion models.

Everything is imported when it is first used, so `import vislr` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vislr.adapters import AdaBnConfig, ConvLoraConfig, FloraConfig, SaraConfig, adapt_statistics
    from vislr.anatomy import Anatomy, Site, describe
    from vislr.core.errors import VislrError
    from vislr.core.report import Report
    from vislr.recipe import apply, load, load_adapter, recipe_of, remove, save, save_adapter, set_adapters

# Public name -> module that defines it. No name here may be the name of a module.
_NAMES = {
    "AdaBnConfig": "vislr.adapters",
    "Anatomy": "vislr.anatomy",
    "ConvLoraConfig": "vislr.adapters",
    "FloraConfig": "vislr.adapters",
    "Report": "vislr.core.report",
    "SaraConfig": "vislr.adapters",
    "Site": "vislr.anatomy",
    "VislrError": "vislr.core.errors",
    "adapt_statistics": "vislr.adapters",
    "apply": "vislr.recipe",
    "describe": "vislr.anatomy",
    "load": "vislr.recipe",
    "load_adapter": "vislr.recipe",
    "recipe_of": "vislr.recipe",
    "remove": "vislr.recipe",
    "save": "vislr.recipe",
    "save_adapter": "vislr.recipe",
    "set_adapters": "vislr.recipe",
}
_ROOMS = ("adapters", "anatomy", "core", "data", "formats", "kernels", "measure", "recipe", "train", "zoo")

__all__ = [
    "AdaBnConfig",
    "Anatomy",
    "ConvLoraConfig",
    "FloraConfig",
    "Report",
    "SaraConfig",
    "Site",
    "VislrError",
    "adapt_statistics",
    "apply",
    "describe",
    "load",
    "load_adapter",
    "recipe_of",
    "remove",
    "save",
    "save_adapter",
    "set_adapters",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"vislr.{name}")
    raise AttributeError(f"module 'vislr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_ROOMS})
