"""Pruned models as stock ones: where fewer layers are all that a plan means, a stock config can say so.

==============  =========================================================================
class           what its own config can say
==============  =========================================================================
SD3             fewer joint blocks (the last that stays loses its context half, which nothing reads)
FLUX            fewer double and single blocks
PixArt, DiT     fewer blocks (a DiT keeps its first)
UNet (SD, XL)   fewer blocks in each transformer (`transformer_layers_per_block`); stages that lost all of
                their transformers; a middle of one resnet (SSD-1B's), or none
==============  =========================================================================
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import FormatError
from vislr.prune.skips import Removed

_DEPTHS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}


def as_stock(module: Any) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]]:
    """(class of diffusers, its config, its state) that answers exactly as this pruned model.

    Args:
        module: a pruned model of diffusers, without adapters.

    Returns:
        tensors are shared with the module, except where a layer had to be rewritten.

    Raises:
        FormatError: the stock class has no config for this plan; names the first unit that it cannot express.
    """
    module = unwrapped(module)
    name = type(module).__name__
    config = {key: value for key, value in module.config.items() if key != "vislr" and not key.startswith("_")}
    removed = {n: part for n, part in module.named_modules() if isinstance(part, Removed)}
    state = dict(module.state_dict())
    if name == "UNet2DConditionModel":
        config |= _unet_config(module, removed)
    elif hasattr(module, "transformer_blocks"):
        _only_blocks(name, removed)
        state = _last_context(module, state)
        config |= _block_depths(module, config, removed)
    else:
        raise FormatError(f"a {name} has no stock config for removed layers")
    state = _renumbered(state, removed)
    _check(name, config, state, removed)
    return name, config, state


def stock_model(module: Any) -> nn.Module:
    """The stock model itself; tensors are shared with the pruned one.

    Raises:
        FormatError: as `as_stock`.
    """
    import diffusers

    name, config, state = as_stock(module)
    with torch.device("meta"):
        model = getattr(diffusers, name).from_config(config)
    model.load_state_dict(state, strict=True, assign=True)
    own = dict(unwrapped(module).named_buffers())
    for key, buffer in list(model.named_buffers()):
        # Tables that a state dict leaves out (positions) are computed when a model is built; on meta they are not.
        if buffer.is_meta:
            path, _, tensor = key.rpartition(".")
            model.get_submodule(path)._buffers[tensor] = own[key]
    return model.train(module.training)


def _refuse(name: str, unit: str, kind: str) -> FormatError:
    return FormatError(
        f"no stock {name} can say that '{unit}' ({kind}) is removed; expected whole blocks of a transformer alone "
        "(granularity block; of a UNet also all transformers of a stage), or a vislr folder"
    )


def _only_blocks(name: str, removed: dict[str, Removed]) -> None:
    for unit, part in removed.items():
        if not re.fullmatch(r"(single_)?transformer_blocks\.\d+", unit):
            raise _refuse(name, unit, str(part.removed_unit))
        if any(True for _ in part.parameters()):
            # A DiT's output layer reads the embedding inside its first block.
            raise _refuse(name, unit, f"{part.removed_unit}, which the output layer reads")


def _block_depths(module: Any, config: dict[str, Any], removed: dict[str, Removed]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for blocks, key in _DEPTHS.items():
        if hasattr(module, blocks):
            kept = [i for i in range(len(getattr(module, blocks))) if f"{blocks}.{i}" not in removed]
            changes[key] = len(kept)
            if blocks == "transformer_blocks" and config.get("dual_attention_layers"):
                dual = config["dual_attention_layers"]
                changes["dual_attention_layers"] = tuple(new for new, old in enumerate(kept) if old in dual)
    return changes


def _last_context(module: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SD3's last block gives no context. Where another block comes to stand last, its context half goes.

    Its adaptive norm made shift and scale of the attention and more; the last block's makes scale and shift.
    """
    blocks = module.transformer_blocks
    kept = [i for i, block in enumerate(blocks) if not isinstance(block, Removed)]
    if type(module).__name__ != "SD3Transformer2DModel" or not kept or blocks[kept[-1]].context_pre_only:
        return state
    prefix = f"transformer_blocks.{kept[-1]}"
    gone = tuple(f"{prefix}.{part}." for part in ("ff_context", "attn.to_add_out"))
    state = {key: value for key, value in state.items() if not key.startswith(gone)}
    for tensor in ("weight", "bias"):
        key = f"{prefix}.norm1_context.linear.{tensor}"
        shift, scale = state[key].chunk(6)[:2]
        state[key] = torch.cat([scale, shift])
    return state


def _unet_config(module: Any, removed: dict[str, Removed]) -> dict[str, Any]:
    middle = {f"mid_block.{part}" for part in ("resnets.0", "attentions.0", "resnets.1")}
    changes: dict[str, Any] = {}
    said: set[str] = set()
    for side in ("down", "up"):
        types = list(getattr(module.config, f"{side}_block_types"))
        for i, stage in enumerate(getattr(module, f"{side}_blocks")):
            count = len(getattr(stage, "attentions", None) or ())
            whole = [f"{side}_blocks.{i}.attentions.{j}" for j in range(count)]
            if whole and set(whole) <= set(removed) and types[i].startswith("CrossAttn"):
                types[i] = types[i].removeprefix("CrossAttn")
                said |= set(whole)
        changes[f"{side}_block_types"] = types
    gone = middle & set(removed)
    if module.config.mid_block_type == "UNetMidBlock2DCrossAttn" and module.config.mid_block_scale_factor == 1:
        if gone == middle:
            changes["mid_block_type"] = None
        elif gone == middle - {"mid_block.resnets.0"}:
            changes["mid_block_type"] = "UNetMidBlock2D"
        said |= gone if "mid_block_type" in changes else set()
    for unit, part in removed.items():
        if unit not in said and not re.fullmatch(r".+\.attentions\.\d+\.transformer_blocks\.\d+", unit):
            raise _refuse(type(module).__name__, unit, str(part.removed_unit))
    return changes | _unet_depths(module)


def _unet_depths(module: Any) -> dict[str, Any]:
    given = module.config.transformer_layers_per_block
    levels = len(module.down_blocks)
    given = [given] * levels if isinstance(given, int) else list(given)
    turned = module.config.reverse_transformer_layers_per_block
    turned = list(turned) if turned is not None else given[:levels][::-1]

    def depths(stage: Any, old: Any) -> Any:
        attentions = [a for a in getattr(stage, "attentions", None) or () if hasattr(a, "transformer_blocks")]
        found = [sum(not isinstance(block, Removed) for block in one.transformer_blocks) for one in attentions]
        # The same number where one number says it: the plainest config that means this.
        return old if not found else found[0] if len(set(found)) == 1 else found

    down = [depths(stage, old) for stage, old in zip(module.down_blocks, given[:levels], strict=True)]
    up = [depths(stage, old) for stage, old in zip(module.up_blocks, turned, strict=True)]
    middle = depths(module.mid_block, down[-1])
    # The middle reads the last entry: one more than there are stages is its own.
    layers = down if middle == down[-1] else [*down, middle]
    return {"transformer_layers_per_block": layers, "reverse_transformer_layers_per_block": up}


def _renumbered(state: dict[str, torch.Tensor], removed: dict[str, Removed]) -> dict[str, torch.Tensor]:
    """Keys with the numbers that blocks have once the removed ones do not count."""
    gaps: dict[str, list[int]] = {}
    for unit in removed:
        holder, _, number = unit.rpartition(".")
        gaps.setdefault(holder, []).append(int(number))

    def new(key: str) -> str:
        for holder, missing in gaps.items():
            if key.startswith(f"{holder}."):
                number, _, rest = key.removeprefix(f"{holder}.").partition(".")
                return f"{holder}.{int(number) - sum(gap < int(number) for gap in missing)}.{rest}"
        return key

    return {new(key): value for key, value in state.items()}


def _check(name: str, config: dict[str, Any], state: dict[str, torch.Tensor], removed: dict[str, Removed]) -> None:
    """The stock class, built from the config, must have exactly these tensors."""
    import diffusers

    first, part = next(iter(removed.items()), ("", None))
    reason = _refuse(name, first, str(part.removed_unit)) if part is not None else FormatError(f"no stock {name} fits")
    try:
        with torch.device("meta"):
            built = getattr(diffusers, name).from_config(config)
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise reason from error
    shapes = {key: tuple(value.shape) for key, value in built.state_dict().items()}
    if shapes != {key: tuple(value.shape) for key, value in state.items()}:
        raise reason
