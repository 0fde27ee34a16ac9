"""diffusers' format: `<component>.<module path>.<suffix>`, as `save_lora_weights` writes it.

===========================  ================================================================
suffix                       shape
===========================  ================================================================
`lora_A.weight`              (r, in), of convs (r, Cg, *K)
`lora_B.weight`              (out, r), of convs (Co, r, 1...)
`lora_magnitude_vector`      DoRA: (out,), of convs (1, Co, 1...); the norm per output alone
===========================  ================================================================

Components: `unet`, `transformer`, `text_encoder`, `text_encoder_2`, `text_encoder_3`. There are no `.alpha`
tensors: ranks and alphas are in the header's `lora_adapter_metadata` (`vislr.formats.lora_metadata`).
Plain LoRA is all it holds; other kinds are written as LoRA where that is exact, else by SVD. A component has
DoRA on all of its layers or on none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vislr.core.errors import FormatError
from vislr.formats.canonical import Entry

KINDS = ("lora",)


def tensors_of(entry: Entry, prefix: str) -> dict[str, torch.Tensor]:
    """Key -> tensor of one plain LoRA layer, behind `prefix` (with its dot)."""
    t = entry.tensors
    found = {f"{prefix}lora_A.weight": t["lora_down.weight"], f"{prefix}lora_B.weight": t["lora_up.weight"]}
    if "dora_scale" in t:
        axes = t["lora_down.weight"].dim()
        shape = (-1,) if axes == 2 else (1, -1, *(1,) * (axes - 2))
        found[f"{prefix}lora_magnitude_vector"] = t["dora_scale"].reshape(shape)
    return found


def check(entries: Mapping[str, Entry], where: str) -> None:
    """Refuse what a LoraConfig cannot say of the layers of one component.

    Raises:
        FormatError: DoRA on some layers only, or per input.
    """
    doras = {entry.dora for entry in entries.values()}
    if "in" in doras:
        raise FormatError(f"{where} has DoRA with a norm per input, which peft and diffusers do not know; bake it")
    if len(doras) > 1:
        raise FormatError(f"{where} has DoRA on some layers only, which peft and diffusers cannot hold; bake it")
