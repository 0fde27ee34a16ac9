"""kohya's format (sd-scripts, LyCORIS, A1111/Forge, ComfyUI): `<prefix><joined name>.<suffix>`.

================  =================================================  =======================================
module            key                                                joined name
================  =================================================  =======================================
SD1.x/2.x UNet    `lora_unet_...`                                    diffusers' path
SDXL UNet         `lora_unet_...`                                    sgm's name (`vislr.formats.layouts`)
SD3, FLUX         `lora_unet_joint_blocks_...`, `..double_blocks..`  original name, q/k/v fused
PixArt            `lora_transformer_...`                             diffusers' path
DiT, timm         `lycoris_...`                                      the module's path
SD1.x/2.x text    `lora_te_text_model_encoder_layers_...`            transformers' path
SDXL, SD3 text    `lora_te1_` CLIP-L, `lora_te2_` bigG, `lora_te3_`  the same; T5: `encoder_block_...`
FLUX text         `lora_te1_` CLIP-L, `lora_te3_` T5                 the same; `lora_te2_` is read as T5, too
================  =================================================  =======================================

Suffixes and shapes are those of `vislr.formats.canonical` for lora, loha, lokr, diff and norm. Tucker cores
are written square, which LyCORIS and ComfyUI ask for. ConvLoRA is written as LoCon, FLoRA as Tucker LoCon,
SaRA as `diff`. `alpha` is always written.
"""

from __future__ import annotations

from vislr.core.errors import FormatError
from vislr.formats import layouts, naming
from vislr.formats.families import family as family_of
from vislr.formats.layouts import Piece, Row

KINDS = ("lora", "loha", "lokr", "diff", "norm")
_PREFIX = {"pixart": "lora_transformer_", "dit": "lycoris_", "timm": "lycoris_"}
_ORIGINAL = ("sdxl", "sd3", "flux")


def piece(family: str, component: str, path: str) -> Piece:
    """The name of a module, and its place in it where modules are fused.

    Raises:
        FormatError: the family has no such module, so nobody could read the name.
    """
    known = family_of(family)
    if component == known.denoiser:
        found = layouts.original(family, path) if family in _ORIGINAL else None
        if family in _ORIGINAL and found is None:
            raise FormatError(f"the family '{family}' has no module '{path}' in kohya's naming")
        prefix = _PREFIX.get(family, "lora_unet_")
    else:
        found = None
        prefix = next((p for p, owner in known.text_encoders.items() if owner == component), "")
        if not prefix:
            raise FormatError(f"kohya's format has no place for a '{component}' of the family '{family}'")
    placed = found or Piece(path, Row(path, (path,)), 0)
    name = prefix + placed.name.replace(".", "_")
    back = naming.locate(family, name)
    if back is None or (back.component, back.paths[placed.part]) != (component, path):
        raise FormatError(f"the family '{family}' has no module '{path}' in kohya's naming")
    return Piece(name, placed.row, placed.part)
