"""Adapter files: write one adapter of a model, read a file of any known format, put its values in.

=============  ===================================================  ==============================
format         keys                                                 header
=============  ===================================================  ==============================
`vislr`        `<module path>.<suffix>`, no component prefix        `vislr.manifest` names the
               (the path in the model without adapters)             component, kind, config, base
`diffusers`    `<component>.<module path>.lora_A.weight` and        `lora_adapter_metadata`, and
               `.lora_B.weight`, as diffusers' `save_lora_weights`  `vislr.manifest` for the base
=============  ===================================================  ==============================

`vislr` holds every kind; suffixes are in `vislr.formats.kinds`. `diffusers` holds plain LoRA, on linears
and convs, and is what `pipe.load_lora_weights` reads. Files are safetensors: no code is ever run.
"""

from vislr.formats.adapter_file import AdapterFile
from vislr.formats.filling import attach_file, check_base, fill
from vislr.formats.reading import read_adapter
from vislr.formats.writing import write_adapter

__all__ = ["AdapterFile", "attach_file", "check_base", "fill", "read_adapter", "write_adapter"]
