"""The original code bases' module names against diffusers', per family, as tables that read both ways.

kohya's files (SDXL, SD3, FLUX) join these names with "_", ComfyUI's with ".". UNets (SD1.x, SD2.x, SDXL):

==============================  =================================  ==================  ===================
sgm                             diffusers                          sgm                 diffusers
==============================  =================================  ==================  ===================
`input_blocks.{3b+l+1}.0`       `down_blocks.b.resnets.l`          `in_layers.0`       `norm1`
`input_blocks.{3b+l+1}.1`       `down_blocks.b.attentions.l`       `in_layers.2`       `conv1`
`input_blocks.{3b+3}.0.op`      `down_blocks.b.downsamplers.0...`  `emb_layers.1`      `time_emb_proj`
`middle_block.0`, `.1`, `.2`    `mid_block.resnets.0`,             `out_layers.0`      `norm2`
                                `.attentions.0`, `.resnets.1`      `out_layers.3`      `conv2`
`output_blocks.{3b+l}.0`        `up_blocks.b.resnets.l`            `skip_connection`   `conv_shortcut`
`output_blocks.{3b+l}.1`        `up_blocks.b.attentions.l`         `time_embed.0/2`    `time_embedding...`
`output_blocks.{3b+2}.1.conv`   `up_blocks.b.upsamplers.0.conv`    `label_emb.0.0/2`   `add_embedding...`
or `.2.conv` behind attention                                      `out.0`, `out.2`    `conv_norm_out/out`
==============================  =================================  ==================  ===================

Transformers (`SD3`, `FLUX` below): "#" is any number, several paths in one row are fused along the output
axis in the given proportions, and "swap" marks adaptive norms whose scale and shift halves changed places.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from vislr.formats.families import filled, golden, knows, template


@dataclass(frozen=True)
class Row:
    """One original module and what it is in diffusers.

    Attributes:
        original: its name, "#" for numbers.
        paths: the diffusers modules that are fused in it, in order.
        sizes: their shares of the output axis.
        swap: "": rows as they are; "halves": the two halves of the output axis changed places; "last":
            they did where the output is twice as wide as the input (the last block of SD3).
    """

    original: str
    paths: tuple[str, ...]
    sizes: tuple[int, ...] = (1,)
    swap: str = ""


@dataclass(frozen=True)
class Piece:
    """A path as a part of an original module: `name`, its `row`, and its place in the row."""

    name: str
    row: Row
    part: int


_QKV = (1, 1, 1)


def _rows(table: dict[str, str | tuple[str, ...]], old: str, new: str) -> tuple[Row, ...]:
    found = []
    for left, right in table.items():
        paths = (right,) if isinstance(right, str) else right
        sizes = (1, 1, 1, 4) if len(paths) == 4 else (1,) * len(paths)
        found.append(Row(f"{old}.{left}", tuple(f"{new}.{path}" for path in paths), sizes))
    return tuple(found)


FLUX = (
    *_rows(
        {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn.proj": "attn.to_out.0",
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.norm.key_norm": "attn.norm_k",
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn.proj": "attn.to_add_out",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
        },
        "double_blocks.#",
        "transformer_blocks.#",
    ),
    *_rows(
        {
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
        },
        "single_blocks.#",
        "single_transformer_blocks.#",
    ),
    Row("img_in", ("x_embedder",)),
    Row("txt_in", ("context_embedder",)),
    *(
        Row(f"{old}_in.{side}_layer", (f"time_text_embed.{new}_embedder.linear_{number}",))
        for old, new in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for number, side in ((1, "in"), (2, "out"))
    ),
    Row("final_layer.linear", ("proj_out",)),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap="halves"),
)

SD3 = (
    *_rows(
        {
            "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn.ln_q": "attn.norm_q",
            "x_block.attn.ln_k": "attn.norm_k",
            "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.attn2.ln_q": "attn2.norm_q",
            "x_block.attn2.ln_k": "attn2.norm_k",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.attn.ln_q": "attn.norm_added_q",
            "context_block.attn.ln_k": "attn.norm_added_k",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
        },
        "joint_blocks.#",
        "transformer_blocks.#",
    ),
    Row("joint_blocks.#.context_block.adaLN_modulation.1", ("transformer_blocks.#.norm1_context.linear",), swap="last"),
    Row("x_embedder.proj", ("pos_embed.proj",)),
    Row("context_embedder", ("context_embedder",)),
    *(
        Row(f"{old}_embedder.mlp.{2 * number - 2}", (f"time_text_embed.{new}_embedder.linear_{number}",))
        for old, new in (("t", "timestep"), ("y", "text"))
        for number in (1, 2)
    ),
    Row("final_layer.linear", ("proj_out",)),
    Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap="halves"),
)

TABLES = {"flux": FLUX, "sd3": SD3}
UNETS = ("sd15", "sd2", "sdxl")

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_STEM = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
# Where the decoder's upsampler stands behind an attention, its index is 2.
_UP_ATTENTION = {"sd15": (1, 2, 3), "sd2": (1, 2, 3), "sdxl": (0, 1)}
_IN = re.compile(r"input_blocks\.(\d+)\.([01])\.(.+)")
_OUT = re.compile(r"output_blocks\.(\d+)\.([012])\.(.+)")
_MID = re.compile(r"middle_block\.([012])\.(.+)")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_INVERSE_STEM = {path: name for name, path in _STEM.items()}
_INVERSE_RESNET = {path: name for name, path in _RESNET.items()}
_INVERSE_MIDDLE = {path: name for name, path in _MIDDLE.items()}


def _unet_original(family: str, path: str) -> str | None:
    if path in _INVERSE_STEM:
        return _INVERSE_STEM[path]
    parts = path.split(".")
    if parts[0] == "mid_block" and len(parts) > 3:
        slot, rest = _INVERSE_MIDDLE.get(".".join(parts[1:3])), ".".join(parts[3:])
        inner = _INVERSE_RESNET.get(rest) if parts[1] == "resnets" else rest
        return None if slot is None or inner is None else f"middle_block.{slot}.{inner}"
    match = _BLOCK.fullmatch(path)
    if match is None:
        return None
    side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op" if rest == "conv" else None
    if kind == "upsamplers":
        index = 2 if block in _UP_ATTENTION[family] else 1
        return f"output_blocks.{3 * block + 2}.{index}.conv" if rest == "conv" else None
    inner = _INVERSE_RESNET.get(rest) if kind == "resnets" else rest
    number = f"input_blocks.{3 * block + layer + 1}" if side == "down" else f"output_blocks.{3 * block + layer}"
    return None if inner is None else f"{number}.{int(kind == 'attentions')}.{inner}"


def _unet_path(name: str) -> str | None:
    if name in _STEM:
        return _STEM[name]
    if match := _MID.fullmatch(name):
        inner = match[2] if match[1] == "1" else _RESNET.get(match[2])
        return None if inner is None else f"mid_block.{_MIDDLE[match[1]]}.{inner}"
    if match := _IN.fullmatch(name):
        block, layer = divmod(int(match[1]) - 1, 3)
        if match[3] == "op" and layer == 2:
            return f"down_blocks.{block}.downsamplers.0.conv"
        stem = f"down_blocks.{block}"
    elif match := _OUT.fullmatch(name):
        block, layer = divmod(int(match[1]), 3)
        if match[3] == "conv" and match[2] != "0":
            return f"up_blocks.{block}.upsamplers.0.conv"
        stem = f"up_blocks.{block}"
    else:
        return None
    if match[2] == "1":
        return f"{stem}.attentions.{layer}.{match[3]}"
    inner = _RESNET.get(match[3])
    return None if inner is None or match[2] != "0" else f"{stem}.resnets.{layer}.{inner}"


@functools.cache
def _by_path(family: str) -> dict[str, tuple[Row, int]]:
    return {path: (row, part) for row in TABLES[family] for part, path in enumerate(row.paths)}


@functools.cache
def _by_original(family: str) -> dict[str, Row]:
    return {row.original: row for row in TABLES[family]}


def original(family: str, path: str) -> Piece | None:
    """Where a denoiser's module is in the original code; None: the family has no such table, or not this module."""
    if family in UNETS:
        name = _unet_original(family, path)
        return None if name is None else Piece(name, Row(name, (path,)), 0)
    found = _by_path(family).get(_bare(path)) if family in TABLES else None
    if found is None:
        return None
    row, part = found
    return Piece(filled(row.original, _numbers(path)), row, part)


def paths(family: str, name: str) -> tuple[Row, tuple[str, ...]] | None:
    """The row of an original module and the diffusers paths in it, with their numbers; None: not known."""
    if family in UNETS:
        path = _unet_path(name)
        if path is None or not knows(family, "unet", path):
            return None
        return Row(name, (path,)), (path,)
    row = _by_original(family).get(_bare(name)) if family in TABLES else None
    if row is None:
        return None
    return row, tuple(filled(path, _numbers(name)) for path in row.paths)


def _bare(path: str) -> str:
    """ "transformer_blocks.7.ff.net.2" -> "transformer_blocks.#.ff.net.2": only the block's number goes."""
    return re.sub(r"^((?:single_)?transformer_blocks|(?:double|single|joint)_blocks)\.\d+\.", r"\1.#.", path)


def _numbers(name: str) -> str:
    """The block's number of a name, in a form that `filled` reads."""
    match = re.match(r"^[a-z_]+_blocks\.(\d+)\.", name)
    return f".{match[1]}." if match else ""


@functools.cache
def _flat_originals(family: str) -> dict[str, str]:
    """Template of the `_`-joined original name -> template of the original name."""
    if family in TABLES:
        names = [row.original for row in TABLES[family]]
    else:
        found = (_unet_original(family, path) for path in golden(family)["unet"])
        names = [name for name in found if name is not None]
    return {template(name).replace(".", "_"): template(name) for name in names}


def unflatten(family: str, flat: str) -> str | None:
    """The original name whose `_`-joined form is `flat`; None: the family has none."""
    pattern = _flat_originals(family).get(template(flat)) if family in (*TABLES, *UNETS) else None
    return None if pattern is None else filled(pattern, flat)
