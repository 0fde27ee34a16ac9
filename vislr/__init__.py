"""vislr adapts and shrinks vision and diffusion models.

Everything is imported when it is first used, so `import vislr` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffusers import (
        DiTTransformer2DModel,
        FluxTransformer2DModel,
        ModelMixin,
        PixArtTransformer2DModel,
        SD3Transformer2DModel,
        UNet2DConditionModel,
    )

    from vislr.adapters import AdaBnConfig, ConvLoraConfig, FloraConfig, QALoraConfig, SaraConfig, adapt_statistics
    from vislr.anatomy import Anatomy, Site, describe
    from vislr.core.errors import VislrError
    from vislr.core.report import Report
    from vislr.folders import load, save
    from vislr.recipe import fuse, load_adapter, save_adapter, set_adapters
    from vislr.record import apply, note_measurement, recipe_of, remove

# Public name -> module that defines it. No name here may be the name of a module.
_NAMES = {
    "AdaBnConfig": "vislr.adapters",
    "Anatomy": "vislr.anatomy",
    "ConvLoraConfig": "vislr.adapters",
    "FloraConfig": "vislr.adapters",
    "QALoraConfig": "vislr.adapters",
    "Report": "vislr.core.report",
    "SaraConfig": "vislr.adapters",
    "Site": "vislr.anatomy",
    "VislrError": "vislr.core.errors",
    "adapt_statistics": "vislr.adapters",
    "apply": "vislr.record",
    "describe": "vislr.anatomy",
    "fuse": "vislr.recipe",
    "load": "vislr.folders",
    "load_adapter": "vislr.recipe",
    "note_measurement": "vislr.record",
    "recipe_of": "vislr.record",
    "remove": "vislr.record",
    "save": "vislr.folders",
    "save_adapter": "vislr.recipe",
    "set_adapters": "vislr.recipe",
    # diffusers looks these up for ["vislr", NAME] in model_index.json, and asks which of them can load.
    "DiTTransformer2DModel": "vislr.models",
    "FluxTransformer2DModel": "vislr.models",
    "ModelMixin": "vislr.models",
    "PixArtTransformer2DModel": "vislr.models",
    "SD3Transformer2DModel": "vislr.models",
    "UNet2DConditionModel": "vislr.models",
}
_ROOMS = (
    "adapters",
    "anatomy",
    "cache",
    "compose",
    "core",
    "data",
    "folders",
    "formats",
    "kernels",
    "measure",
    "models",
    "prune",
    "quantize",
    "recipe",
    "record",
    "tokens",
    "train",
    "zoo",
)

__all__ = [
    "AdaBnConfig",
    "Anatomy",
    "ConvLoraConfig",
    "DiTTransformer2DModel",
    "FloraConfig",
    "FluxTransformer2DModel",
    "ModelMixin",
    "PixArtTransformer2DModel",
    "QALoraConfig",
    "Report",
    "SD3Transformer2DModel",
    "SaraConfig",
    "Site",
    "UNet2DConditionModel",
    "VislrError",
    "adapt_statistics",
    "apply",
    "describe",
    "fuse",
    "load",
    "load_adapter",
    "note_measurement",
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
