"""ComfyUI's own names, which are those of the original code (BFL's for FLUX), joined with dots.

==============  ======================================================================  ===================
module          key                                                                     names
==============  ======================================================================  ===================
UNets           `diffusion_model.input_blocks.4.1.proj_in.<suffix>`                     sgm
SD3             `diffusion_model.joint_blocks.0.x_block.attn.qkv.<suffix>`              MMDiT, q/k/v fused
FLUX            `diffusion_model.double_blocks.0.img_attn.qkv.<suffix>`                 BFL, q/k/v fused
PixArt          `transformer.<path>.<suffix>`                                           diffusers
CLIP, T5        `text_encoders.clip_l.transformer.text_model...`, `.clip_g.`,           transformers
                `.clip_h.`, `.t5xxl.transformer.encoder...`
==============  ======================================================================  ===================

Suffixes are kohya's (`lora_down.weight`, `lora_up.weight`, `lora_mid.weight`, `alpha`, `dora_scale`,
`hada_*`, `lokr_*`, `diff`, `diff_b`, `w_norm`, `b_norm`): ComfyUI reads them behind these names, and
diffusers reads such FLUX files. ComfyUI divides a DoRA magnitude per output by another norm than everybody
else (18 % wrong on random data): bake it.
"""

from __future__ import annotations

from vislr.core.errors import FormatError
from vislr.formats import layouts
from vislr.formats.families import family as family_of
from vislr.formats.layouts import Piece, Row

KINDS = ("lora", "loha", "lokr", "diff", "norm")


def piece(family: str, component: str, path: str) -> Piece:
    """The name of a module, and its place in it where modules are fused.

    Raises:
        FormatError: ComfyUI has no such module.
    """
    known = family_of(family)
    if component != known.denoiser:
        prefix = next((p for p, owner in known.comfy_text.items() if owner == component), "")
        found: Piece | None = Piece(path, Row(path, (path,)), 0) if prefix else None
    elif family == "pixart":
        prefix, found = "transformer.", Piece(path, Row(path, (path,)), 0)
    else:
        prefix, found = "diffusion_model.", layouts.original(family, path)
    if found is None:
        raise FormatError(f"ComfyUI has no module '{component}.{path}' in the family '{family}'")
    return Piece(prefix + found.name, found.row, found.part)
