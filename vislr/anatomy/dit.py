"""Diffusion transformers of diffusers: SD3, FLUX.1, PixArt, DiT."""

from __future__ import annotations

from typing import Any

from torch import nn

from vislr.anatomy.families import Layout, Reader, has_config, pair
from vislr.anatomy.unet import branches
from vislr.core.errors import ConfigError


def _layout(model: Any, inputs: dict[str, Any]) -> Layout:
    units: dict[str, bool] = {}
    stages = []
    for i, block in enumerate(model.transformer_blocks):
        stages.append(f"transformer_blocks.{i}")
        units |= branches(block, stages[-1])
    for i, _ in enumerate(getattr(model, "single_transformer_blocks", ())):
        # Attention and MLP of a single-stream block share one output projection: only the whole is a branch.
        stages.append(f"single_transformer_blocks.{i}")
        units[stages[-1]] = True
    return Layout(tuple(stages), units)


def _parts(model: nn.Module, *names: str) -> bool:
    return all(hasattr(model, name) for name in ("transformer_blocks", *names))


def _check_patches(sample: dict[str, int], patch: int) -> None:
    for side in ("height", "width"):
        if sample[side] % patch:
            raise ConfigError(f"sample {side} {sample[side]} is no multiple of the patch size {patch}")


def _is_sd3(model: nn.Module) -> bool:
    keys = ("joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size")
    return _parts(model, "context_embedder", "time_text_embed", "pos_embed") and has_config(model, *keys)


def _sd3_sample(model: Any) -> dict[str, int]:
    height, width = pair(model.config.sample_size)
    # 77 tokens of CLIP and the pipeline's default 256 of T5.
    return {"height": height, "width": width, "tokens": 333, "batch": 1}


def _sd3_inputs(model: Any, sample: dict[str, int], draw: Any) -> dict[str, Any]:
    config, batch = model.config, sample["batch"]
    _check_patches(sample, config.patch_size)
    return {
        "hidden_states": draw(batch, config.in_channels, sample["height"], sample["width"]),
        "encoder_hidden_states": draw(batch, sample["tokens"], config.joint_attention_dim),
        "pooled_projections": draw(batch, config.pooled_projection_dim),
        "timestep": draw(batch, fill=500),
    }


def _is_flux(model: nn.Module) -> bool:
    keys = ("joint_attention_dim", "pooled_projection_dim", "axes_dims_rope", "guidance_embeds")
    return _parts(model, "single_transformer_blocks", "x_embedder", "context_embedder") and has_config(model, *keys)


def _flux_sample(model: Any) -> dict[str, int]:
    # The config names no size; 128 latents a side are 1024 pixels, 512 is the pipeline's text length.
    return {"height": 128, "width": 128, "tokens": 512, "batch": 1}


def _flux_inputs(model: Any, sample: dict[str, int], draw: Any) -> dict[str, Any]:
    config, batch = model.config, sample["batch"]
    _check_patches(sample, 2)
    rows, columns = sample["height"] // 2, sample["width"] // 2  # the pipeline packs 2x2 latents into a token
    positions = draw(rows, columns, 3, fill=0.0)
    positions[..., 1] = positions[..., 1].cumsum(0) + draw(rows, 1, fill=1.0).cumsum(0) - 1
    positions[..., 2] = positions[..., 2].cumsum(1) + draw(1, columns, fill=1.0).cumsum(1) - 1
    inputs = {
        "hidden_states": draw(batch, rows * columns, config.in_channels),
        "encoder_hidden_states": draw(batch, sample["tokens"], config.joint_attention_dim),
        "pooled_projections": draw(batch, config.pooled_projection_dim),
        "timestep": draw(batch, fill=0.5),  # sigma: FLUX multiplies by 1000 itself
        "img_ids": positions.reshape(rows * columns, 3),
        "txt_ids": draw(sample["tokens"], 3, fill=0.0),
    }
    if config.guidance_embeds:
        inputs["guidance"] = draw(batch, fill=3.5)
    return inputs


def _is_pixart(model: nn.Module) -> bool:
    return _parts(model, "adaln_single", "pos_embed", "proj_out") and has_config(model, "caption_channels")


def _pixart_sample(model: Any) -> dict[str, int]:
    height, width = pair(model.config.sample_size)
    # What the pipeline of PixArt-alpha pads to; that of sigma pads to 300, and the config does not tell them apart.
    return {"height": height, "width": width, "tokens": 120, "batch": 1}


def _pixart_inputs(model: Any, sample: dict[str, int], draw: Any) -> dict[str, Any]:
    config, batch = model.config, sample["batch"]
    _check_patches(sample, config.patch_size)
    width = config.caption_channels or config.cross_attention_dim
    conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if getattr(model, "use_additional_conditions", False):
        conditions = {"resolution": draw(batch, 2, fill=1024.0), "aspect_ratio": draw(batch, 1, fill=1.0)}
    return {
        "hidden_states": draw(batch, config.in_channels, sample["height"], sample["width"]),
        "encoder_hidden_states": draw(batch, sample["tokens"], width),
        "timestep": draw(batch, fill=500),
        "added_cond_kwargs": conditions,
    }


def _is_dit(model: nn.Module) -> bool:
    return _parts(model, "pos_embed", "proj_out_1", "proj_out_2") and has_config(model, "num_embeds_ada_norm")


def _dit_sample(model: Any) -> dict[str, int]:
    height, width = pair(model.config.sample_size)
    return {"height": height, "width": width, "batch": 1}


def _dit_inputs(model: Any, sample: dict[str, int], draw: Any) -> dict[str, Any]:
    config, batch = model.config, sample["batch"]
    _check_patches(sample, config.patch_size)
    return {
        "hidden_states": draw(batch, config.in_channels, sample["height"], sample["width"]),
        "timestep": draw(batch, fill=500),
        "class_labels": draw(batch, fill=0),
    }


READERS = (
    Reader("sd3", "SD3Transformer2DModel", _is_sd3, _sd3_sample, _sd3_inputs, _layout),
    Reader("flux", "FluxTransformer2DModel", _is_flux, _flux_sample, _flux_inputs, _layout),
    Reader("pixart", "PixArtTransformer2DModel", _is_pixart, _pixart_sample, _pixart_inputs, _layout),
    Reader("dit", "DiTTransformer2DModel", _is_dit, _dit_sample, _dit_inputs, _layout),
)
