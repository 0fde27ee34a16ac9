"""The UNets of Stable Diffusion 1, 2 and XL (diffusers' UNet2DConditionModel)."""

from __future__ import annotations

from typing import Any

from torch import nn

from vislr.anatomy.families import Layout, Reader, has_config, pair
from vislr.core.errors import ModelError


def _matches(model: nn.Module) -> bool:
    parts = ("conv_in", "down_blocks", "up_blocks", "conv_out", "time_embedding")
    return all(hasattr(model, part) for part in parts) and has_config(model, "cross_attention_dim", "in_channels")


def _sample(model: Any) -> dict[str, int]:
    height, width = pair(model.config.sample_size or 64)
    return {"height": height, "width": width, "tokens": 77, "batch": 1}


def _text_width(config: Any) -> int:
    if config.encoder_hid_dim is not None:
        return config.encoder_hid_dim
    widths = config.cross_attention_dim
    return widths if isinstance(widths, int) else widths[0]


def _inputs(model: Any, sample: dict[str, int], draw: Any) -> dict[str, Any]:
    config, batch = model.config, sample["batch"]
    inputs = {
        "sample": draw(batch, config.in_channels, sample["height"], sample["width"]),
        "timestep": draw(batch, fill=500),
        "encoder_hidden_states": draw(batch, sample["tokens"], _text_width(config)),
    }
    if config.addition_embed_type == "text_time":
        # Six numbers (original size, crop, target size) are embedded beside the pooled text.
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": draw(batch, pooled),
            "time_ids": draw(batch, 6, fill=1024.0),
        }
    elif config.addition_embed_type not in (None, "text"):
        raise ModelError(
            f"a UNet with addition_embed_type '{config.addition_embed_type}' cannot be counted; "
            "supported are none, 'text' and 'text_time'"
        )
    if config.class_embed_type in ("projection", "simple_projection"):
        inputs["class_labels"] = draw(batch, config.projection_class_embeddings_input_dim)
    elif config.class_embed_type is not None or config.num_class_embeds is not None:
        inputs["class_labels"] = draw(batch, fill=0)
    return inputs


def _layout(model: Any, inputs: dict[str, Any]) -> Layout:
    blocks = {f"down_blocks.{i}": block for i, block in enumerate(model.down_blocks)}
    if model.mid_block is not None:
        blocks["mid_block"] = model.mid_block
    blocks |= {f"up_blocks.{i}": block for i, block in enumerate(model.up_blocks)}
    units: dict[str, bool] = {}
    for name, block in blocks.items():
        for i, resnet in enumerate(getattr(block, "resnets", None) or ()):
            # A resnet that also resizes has no path around it; one that changes channels has its shortcut.
            resizes = getattr(resnet, "up", False) or getattr(resnet, "down", False)
            units[f"{name}.resnets.{i}"] = not resizes
        for i, attention in enumerate(getattr(block, "attentions", None) or ()):
            path = f"{name}.attentions.{i}"
            if not hasattr(attention, "transformer_blocks"):
                units[path] = bool(getattr(attention, "residual_connection", False))
                continue
            units[path] = True
            for j, inner in enumerate(attention.transformer_blocks):
                units |= branches(inner, f"{path}.transformer_blocks.{j}")
    return Layout(tuple(blocks), units)


def branches(block: nn.Module, path: str) -> dict[str, bool]:
    """A transformer block and its residual branches, all removable."""
    names = ("attn", "attn1", "attn2", "ff", "ff_context", "mlp")
    return {path: True} | {f"{path}.{n}": True for n in names if isinstance(getattr(block, n, None), nn.Module)}


READERS = (Reader("unet", "UNet2DConditionModel (SD 1, 2, XL)", _matches, _sample, _inputs, _layout),)
