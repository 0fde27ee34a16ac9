"""Vision transformers of timm: a patch embedding, then blocks of attention and MLP."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from vislr.anatomy.families import Layout, Reader, has_config, pair
from vislr.anatomy.residual import residual_names
from vislr.anatomy.wrapping import original


def _matches(model: Any) -> bool:
    blocks = getattr(model, "blocks", None)
    if has_config(model) or not hasattr(model, "patch_embed") or not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        return False
    return len(blocks) > 0 and all(hasattr(block, "attn") and hasattr(block, "mlp") for block in blocks)


def image_input(model: nn.Module) -> str:
    """The name of the forward's argument that takes the image."""
    return next(iter(inspect.signature(type(model).forward.__get__(model)).parameters))


def image_channels(model: nn.Module) -> int:
    """Channels of the image: what the first convolution reads."""
    convs = (original(module) for module in model.modules())
    first = next(module for module in convs if isinstance(module, nn.modules.conv._ConvNd))
    return first.in_channels


def image_sample(model: Any) -> dict[str, int]:
    """timm's own size where it says one, else 224."""
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    height, width = pair(size)
    return {"height": height, "width": width, "batch": 1}


def image_inputs(model: Any, sample: dict[str, int], draw: Any) -> dict[str, Any]:
    """One batch of images, (batch, channels, height, width)."""
    return {image_input(model): draw(sample["batch"], image_channels(model), sample["height"], sample["width"])}


def _layout(model: Any, inputs: dict[str, Any]) -> Layout:
    residual = residual_names(model, inputs)
    units: dict[str, bool] = {}
    stages = tuple(f"blocks.{i}" for i in range(len(model.blocks)))
    for path in stages:
        # A block that changes its width (hierarchical transformers) does not add to its input.
        units |= dict.fromkeys((path, f"{path}.attn", f"{path}.mlp"), residual.get(path, False))
    return Layout(stages, units)


READERS = (Reader("vit", "ViT of timm", _matches, image_sample, image_inputs, _layout),)
