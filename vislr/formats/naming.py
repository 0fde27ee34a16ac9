"""Module names of files to canonical names: which family a file is for, which modules a name stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vislr.formats import families, layouts
from vislr.formats.canonical import COMPONENTS
from vislr.formats.families import FAMILIES
from vislr.formats.layouts import Row

PEFT = "base_model.model."
COMFY = ("diffusion_model.", "model.diffusion_model.")
DENOISERS = ("lora_unet_", "lora_transformer_", "lycoris_")
_TEXT = re.compile(r"lora_te[123]?_")
# Width of the text that a UNet attends to.
_CONTEXT = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
_CONTEXT_KEYS = re.compile(r"attn2[._]to_[kv]$")
_CLIP_ROOTS = ("encoder.layers.", "embeddings.", "final_layer_norm")


@dataclass(frozen=True)
class Located:
    """The modules that a name in a file stands for, of one component; `row` says how they share its rows."""

    component: str
    paths: tuple[str, ...]
    row: Row


def _one(component: str, path: str) -> Located:
    if component.startswith("text_encoder") and path.startswith(_CLIP_ROOTS) and not path.startswith("encoder.block"):
        path = f"text_model.{path}"
    return Located(component, (path,), Row(path, (path,)))


def is_flat(name: str) -> bool:
    """Whether a module's name is `_`-joined, as kohya's."""
    return name.startswith(DENOISERS) or _TEXT.match(name) is not None


def locate(family: str, name: str, component: str = "") -> Located | None:
    """Where `name` (a key without its suffix) belongs in a family; None: nowhere.

    Args:
        family: "": not known; then only names that say it all are found.
        component: where names without a prefix belong; "": the family's denoiser.
    """
    name = name.removeprefix(PEFT)
    known = FAMILIES.get(family)
    if is_flat(name):
        return _flat(family, name) if known else None
    for prefix in COMFY:
        if name.startswith(prefix):
            return _denoiser(family, name.removeprefix(prefix)) if known else None
    for prefix, owner in known.comfy_text.items() if known else ():
        if name.startswith(prefix):
            return _one(owner, name.removeprefix(prefix))
    first, dot, path = name.partition(".")
    if dot and first in COMPONENTS:
        return _one(first, path)
    if component or known is None:
        return _one(component, name)
    found = layouts.paths(family, name)
    return Located(known.denoiser, found[1], found[0]) if found else _one(known.denoiser, name)


def _denoiser(family: str, name: str) -> Located | None:
    component = FAMILIES[family].denoiser
    found = layouts.paths(family, name)
    if found:
        return Located(component, found[1], found[0])
    return _one(component, name) if families.knows(family, component, name) else None


def _flat(family: str, name: str) -> Located | None:
    known = FAMILIES[family]
    for prefix in DENOISERS:
        if name.startswith(prefix):
            flat = name.removeprefix(prefix)
            original = layouts.unflatten(family, flat)
            found = None if original is None else layouts.paths(family, original)
            if found:
                return Located(known.denoiser, found[1], found[0])
            path = families.unflatten(family, known.denoiser, flat)
            return None if path is None else _one(known.denoiser, path)
    for prefix, component in known.text_encoders.items():
        if name.startswith(prefix):
            path = families.unflatten(family, component, name.removeprefix(prefix))
            if path is not None:
                return _one(component, path)
    return None


def detect(
    names: Iterable[str], metadata: Mapping[str, str], width: Callable[[str], int | None], hint: str = ""
) -> str:
    """The family that a file is for; "" if nothing tells.

    In this order: names that only one family has, the width of the text that its cross attention reads,
    the header, `hint`, the prefixes, the golden lists.

    Args:
        names: modules.
        width: name -> inputs of that module, None if the tensors do not tell.
        hint: the family of the model that the file is to go on.
    """
    names = [name.removeprefix(PEFT) for name in names]
    text = "\n".join(names)
    if "single_blocks" in text or "double_blocks" in text or "single_transformer_blocks" in text:
        return "flux"
    if "joint_blocks" in text:
        return "sd3"
    for name in names:
        if _CONTEXT_KEYS.search(name) and ("_blocks" in name or "middle_block" in name):
            found = _CONTEXT.get(width(name) or 0)
            if found and not name.startswith("transformer"):
                return found
    by_header = _by_header(metadata)
    if by_header or hint:
        return by_header or hint
    if "lora_unet_input_blocks" in text or "lora_unet_output_blocks" in text or "lora_te2_" in text:
        return "sdxl"
    if "text_encoder_2.text_model" in text or "label_emb" in text or "add_embedding" in text:
        return "sd3" if "transformer." in text else "sdxl"
    if text.startswith("lora_te1_"):
        return "sdxl"
    if "down_blocks" in text or "up_blocks" in text or "mid_block" in text or "input_blocks" in text:
        return "sd15"
    if "context_embedder" in text or "add_q_proj" in text or "ff_context" in text or "norm1_context" in text:
        return "sd3"
    if "lora_te_" in text or "lora_unet_" in text:
        return "sd15"
    return _by_lists(names)


def _by_header(metadata: Mapping[str, str]) -> str:
    version, architecture = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    for family in FAMILIES.values():
        if version in family.base_versions or architecture in family.architectures:
            return family.name
    return ""


def _by_lists(names: list[str]) -> str:
    best, count = "", 0
    for family in FAMILIES.values():
        hits = 0
        for name in names:
            found = locate(family.name, name)
            lists = families.golden(family.name)
            hits += found is not None and any(path in lists.get(found.component, ()) for path in found.paths)
        if hits > count:
            best, count = family.name, hits
    return best
