"""Denoisers in the layout of their original releases, which ComfyUI's "Load Diffusion Model" reads.

The state of diffusers' UNet (SD 1, 2, XL), SD3 and FLUX under the names of the releases: convolutions
and linears renamed, q, k and v (FLUX's single blocks: and the MLP's first layer) joined in one matrix,
shift before scale in the last modulation. ComfyUI reads FLUX's numbers of blocks and those of a UNet from
the keys; what it does not is refused in `vislr.exporting`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from vislr.core.errors import FormatError

PREFIX = "model.diffusion_model."
State = Mapping[str, torch.Tensor]

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
_UNET = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
         "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
         "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
_SD3 = {"pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder", "proj_out": "final_layer.linear",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2"}  # fmt: skip
_SD3_BLOCK = {"attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
              "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
              "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
              "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
              "attn2.to_out.0": "x_block.attn2.proj", "norm1.linear": "x_block.adaLN_modulation.1",
              "norm1_context.linear": "context_block.adaLN_modulation.1", "ff.net.0.proj": "x_block.mlp.fc1",
              "ff.net.2": "x_block.mlp.fc2", "ff_context.net.0.proj": "context_block.mlp.fc1",
              "ff_context.net.2": "context_block.mlp.fc2"}  # fmt: skip
_SD3_JOINED = {"x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
               "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
               "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v")}  # fmt: skip
_FLUX = {"context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear"} | {
    f"time_text_embed.{ours}.linear_{i}": f"{theirs}.{layer}"
    for ours, theirs in (("timestep_embedder", "time_in"), ("text_embedder", "vector_in"),
                         ("guidance_embedder", "guidance_in"))
    for i, layer in ((1, "in_layer"), (2, "out_layer"))
}  # fmt: skip
_FLUX_DOUBLE = {"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
                "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
                "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
                "attn.norm_added_q": "txt_attn.norm.query_norm",
                "attn.norm_added_k": "txt_attn.norm.key_norm"}  # fmt: skip
_FLUX_DOUBLE_JOINED = {"img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                       "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")}  # fmt: skip
_FLUX_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2", "attn.norm_q": "norm.query_norm",
                "attn.norm_k": "norm.key_norm"}  # fmt: skip
_FLUX_SINGLE_JOINED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def original_state(class_name: str, config: Mapping[str, Any], state: State) -> dict[str, torch.Tensor]:
    """The state of a stock diffusers model in its release's layout, keys with `PREFIX`.

    Args:
        class_name: of diffusers. config: of the model. state: its state dict.

    Raises:
        FormatError: no release's layout for this class, or a tensor that it has no place for.
    """
    if class_name == "UNet2DConditionModel":
        found = _unet(config, state)
    elif class_name == "SD3Transformer2DModel":
        found = _sd3(state)
    elif class_name == "FluxTransformer2DModel":
        found = _flux(state)
    else:
        known = "UNet2DConditionModel, SD3Transformer2DModel and FluxTransformer2DModel"
        raise FormatError(f"a {class_name} has no single-file layout here; supported are {known}")
    return {PREFIX + key: value.contiguous() for key, value in found.items()}


def _renamed(key: str, table: Mapping[str, str]) -> str | None:
    module, _, tensor = key.rpartition(".")
    return f"{table[module]}.{tensor}" if module in table else None


def _unet(config: Mapping[str, Any], state: State) -> dict[str, torch.Tensor]:
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    if not isinstance(layers, int):
        raise FormatError(f"a UNet with layers_per_block {layers} has no release's layout; expected one number")
    table = dict(_UNET)
    place = 0
    for level in range(levels):
        for j in range(layers):
            place += 1
            table |= _pair(f"down_blocks.{level}", j, f"input_blocks.{place}")
        if level < levels - 1:
            place += 1
            table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
    table |= {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in (0, 1)}
    table["mid_block.attentions.0"] = "middle_block.1"
    place = 0
    for level in range(levels):
        for j in range(layers + 1):
            table |= _pair(f"up_blocks.{level}", j, f"output_blocks.{place}")
            place += 1
        after = 2 if any(key.startswith(f"up_blocks.{level}.attentions.{layers}.") for key in state) else 1
        table[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{after}.conv"
    return {_unet_key(key, table): value for key, value in state.items()}


def _pair(stage: str, j: int, block: str) -> dict[str, str]:
    return {f"{stage}.resnets.{j}": f"{block}.0", f"{stage}.attentions.{j}": f"{block}.1"}


def _unet_key(key: str, table: Mapping[str, str]) -> str:
    whole = _renamed(key, table)
    if whole is not None:
        return whole
    match = re.fullmatch(r"((?:down_blocks\.\d+|up_blocks\.\d+|mid_block)\.(resnets|attentions)\.\d+)\.(.+)", key)
    if match is not None and match[1] in table:
        inside = match[3] if match[2] == "attentions" else _renamed(match[3], _RESNET)
        if inside is not None:
            return f"{table[match[1]]}.{inside}"
    raise FormatError(f"tensor '{key}' has no place in the release's layout of a UNet")


def _swapped(value: torch.Tensor) -> torch.Tensor:
    """Halves in the other order: releases make shift and scale, diffusers scale and shift."""
    return torch.cat(value.chunk(2)[::-1])


def _blocks(
    state: State, stage: str, target: str, table: Mapping[str, str], joined: Mapping[str, tuple[str, ...]], norm: str
) -> dict[str, torch.Tensor]:
    """All blocks of one list. `norm`: what releases call the weight of the norms of q and k."""
    found: dict[str, torch.Tensor] = {}
    pattern = re.compile(rf"{stage}\.(\d+)\.(.+)\.(weight|bias)")
    inside = {part for parts in joined.values() for part in parts}
    for key, value in state.items():
        match = pattern.fullmatch(key)
        if match is None or match[2] in inside:
            continue
        if match[2] not in table:
            raise FormatError(f"tensor '{key}' has no place in the release's layout")
        tensor = norm if ".norm" in match[2] and norm != "weight" else match[3]
        found[f"{target}.{match[1]}.{table[match[2]]}.{tensor}"] = value
    for number in sorted({int(m[1]) for m in map(pattern.fullmatch, state) if m is not None}):
        for new, parts in joined.items():
            for tensor in ("weight", "bias"):
                keys = [f"{stage}.{number}.{part}.{tensor}" for part in parts]
                if keys[0] in state:
                    found[f"{target}.{number}.{new}.{tensor}"] = torch.cat([state[key] for key in keys])
    return found


def _outside(state: State, table: Mapping[str, str], stages: tuple[str, ...]) -> dict[str, torch.Tensor]:
    found = {}
    for key, value in state.items():
        if key.startswith(stages) or key == "pos_embed.pos_embed":
            continue
        if key.startswith("norm_out.linear."):
            found[f"final_layer.adaLN_modulation.1.{key.rpartition('.')[2]}"] = _swapped(value)
            continue
        new = _renamed(key, table)
        if new is None:
            raise FormatError(f"tensor '{key}' has no place in the release's layout")
        found[new] = value
    return found


def _sd3(state: State) -> dict[str, torch.Tensor]:
    found = _outside(state, _SD3, ("transformer_blocks.",)) | {"pos_embed": state["pos_embed.pos_embed"]}
    found |= _blocks(state, "transformer_blocks", "joint_blocks", _SD3_BLOCK, _SD3_JOINED, "weight")
    last = max(int(key.split(".")[1]) for key in found if key.startswith("joint_blocks."))
    for tensor in ("weight", "bias"):
        key = f"joint_blocks.{last}.context_block.adaLN_modulation.1.{tensor}"
        found[key] = _swapped(found[key])
    return found


def _flux(state: State) -> dict[str, torch.Tensor]:
    found = _outside(state, _FLUX, ("transformer_blocks.", "single_transformer_blocks."))
    found |= _blocks(state, "transformer_blocks", "double_blocks", _FLUX_DOUBLE, _FLUX_DOUBLE_JOINED, "scale")
    return found | _blocks(
        state, "single_transformer_blocks", "single_blocks", _FLUX_SINGLE, _FLUX_SINGLE_JOINED, "scale"
    )
