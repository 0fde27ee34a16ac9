"""Adapter files: read any known format, write any, attach what was read; all through one canonical form.

===========  ======================================================  ==============================
format       keys                                                    tables
===========  ======================================================  ==============================
`vislr`      `<module path>.<suffix>`                                `vislr.formats.kinds`
`kohya`      `lora_unet_<joined name>.<suffix>`                      `vislr.formats.kohya`
`diffusers`  `<component>.<module path>.lora_A.weight`               `vislr.formats.diffusers_files`
`comfy`      `diffusion_model.<original name>.<suffix>`              `vislr.formats.comfy`
`peft`       folders: adapter_config.json and                        `vislr.formats.peft_folders`
             `base_model.model.<module path>.lora_A.weight`
===========  ======================================================  ==============================

`read_canonical` reads all of them, `write_canonical` writes all of them; neither needs a model. Files are
safetensors: no code is ever run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vislr.formats.adapter_file import AdapterFile
    from vislr.formats.canonical import CanonicalAdapter, Entry
    from vislr.formats.exchange import Conversion, parse, read_canonical, render, write_canonical
    from vislr.formats.filling import attach_file, check_base, fill
    from vislr.formats.live import (
        FileChange,
        attach_adapter,
        attach_change,
        base_of,
        canonical_of,
        default_name,
        holds_config,
        open_adapter,
    )
    from vislr.formats.reading import read_adapter
    from vislr.formats.writing import remember_adapters_base, write_adapter

# Name -> module: reading a file needs neither peft nor diffusers.
_NAMES = {
    "AdapterFile": "adapter_file",
    "CanonicalAdapter": "canonical",
    "Conversion": "exchange",
    "Entry": "canonical",
    "attach_adapter": "live",
    "FileChange": "live",
    "attach_change": "live",
    "base_of": "live",
    "default_name": "live",
    "holds_config": "live",
    "attach_file": "filling",
    "canonical_of": "live",
    "check_base": "filling",
    "fill": "filling",
    "open_adapter": "live",
    "parse": "exchange",
    "read_adapter": "reading",
    "read_canonical": "exchange",
    "remember_adapters_base": "writing",
    "render": "exchange",
    "write_adapter": "writing",
    "write_canonical": "exchange",
}

__all__ = [
    "AdapterFile",
    "CanonicalAdapter",
    "Conversion",
    "Entry",
    "attach_adapter",
    "FileChange",
    "attach_change",
    "base_of",
    "default_name",
    "holds_config",
    "attach_file",
    "canonical_of",
    "check_base",
    "fill",
    "open_adapter",
    "parse",
    "read_adapter",
    "read_canonical",
    "remember_adapters_base",
    "render",
    "write_adapter",
    "write_canonical",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"vislr.formats.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'vislr.formats' has no attribute {name!r}")
