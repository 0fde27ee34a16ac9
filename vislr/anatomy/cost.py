"""What one forward costs, counted on the meta device: no memory, no arithmetic, exact shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vislr.anatomy.families import reader_of
from vislr.anatomy.shapes import RememberedShapes
from vislr.anatomy.text import noted_text_tokens
from vislr.anatomy.wrapping import unwrapped
from vislr.core.context import HOOK_NAME
from vislr.core.errors import ConfigError, ModelError, hint
from vislr.core.hooks import hook_of, rebind

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def denoiser_of(target: Any) -> tuple[str, nn.Module]:
    """The part of a pipeline that runs at every step, and its component name.

    Args:
        target: a diffusers pipeline, or any module.

    Returns:
        ("unet" or "transformer", module); a bare module gives ("", module).

    Raises:
        ModelError: a pipeline without either, or neither pipeline nor module.
    """
    if isinstance(target, nn.Module):
        return "", target
    parts = getattr(target, "components", None)
    if not isinstance(parts, dict):
        raise ModelError(f"expected a diffusers pipeline or a module, not a {type(target).__name__}")
    for name in ("unet", "transformer"):
        if isinstance(parts.get(name), nn.Module):
            return name, parts[name]
    raise ModelError(f"the {type(target).__name__} has no 'unet' and no 'transformer'; it has {sorted(parts)}")


class _OntoMeta(TorchFunctionMode):
    """While it is on, copying a tensor gives one of its shape and dtype without memory."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = torch.empty_like(tensor, device="meta")
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def meta_copy(model: nn.Module) -> nn.Module:
    """The same structure, adapters and run-time changes included, with every tensor on meta.

    Forward hooks (which may keep what they see), hooks of accelerate that move weights, and the
    record of vislr stay behind. diffusers' ModelHooks are put on the copy anew, in their order.
    """
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            empty = torch.empty_like(tensor, device="meta")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = empty
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_forward_hooks", "_forward_pre_hooks"):
                memo[id(value)] = type(value)()
            elif name.startswith("_vislr"):
                memo[id(value)] = None
    with _OntoMeta():
        twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        _rebind(module)
    return twin


def _rebind(module: nn.Module) -> None:
    """Make the forwards that hooks installed on the original those of the copy; drop vislr's own notes."""
    own = vars(module)
    for name in [name for name in own if name.startswith("_vislr")]:
        del own[name]
    if "_hf_hook" in own:
        for name in ("forward", "_old_forward", "_hf_hook"):
            own.pop(name, None)
    rebind(module)
    context = hook_of(module, HOOK_NAME)
    if context is not None:
        # What a call costs does not depend on which call of a run was the last.
        context.reset_state(module)


def sample_of(model: nn.Module, sample: dict[str, int] | None = None, batch: int = 1) -> dict[str, int]:
    """The shapes of one forward: the model's own, with those of `sample` in their place.

    The length of the text is that of the pipeline which the model was loaded with by vislr, else the family's.

    Args:
        model: any supported model.
        sample: some of "height", "width" (latent units for denoisers, pixels for classifiers),
            "tokens" (denoisers that read text) and "batch".
        batch: used where `sample` names none.

    Raises:
        ConfigError: a key that this family does not have, or a value below 1.
        ModelError: an unsupported model.
    """
    model = unwrapped(model)
    reader = reader_of(model)
    own = reader.sample(model) | {"batch": batch}
    noted = noted_text_tokens(model)
    if noted is not None and "tokens" in own:
        own["tokens"] = noted
    for key, value in (sample or {}).items():
        if key not in own:
            raise ConfigError(f"a sample of a {reader.family} model has no '{key}'{hint(key, own)}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"sample {key} is {value!r}; expected a whole number from 1 on")
    return own | (sample or {})


def _drawer(model: nn.Module, device: str | torch.device) -> Callable[..., torch.Tensor]:
    dtype = next((p.dtype for p in model.parameters() if p.dtype in _FLOATS), torch.float32)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, fill: float | None = None) -> torch.Tensor:
        if fill is not None:
            kind = torch.int64 if isinstance(fill, int) else dtype
            return torch.full(shape, fill, dtype=kind, device=device)
        if torch.device(device).type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.randn(shape, generator=generator).to(device, dtype)

    return draw


def sample_inputs(
    model: nn.Module, sample: dict[str, int] | None = None, device: str | torch.device = "meta", batch: int = 1
) -> dict[str, Any]:
    """Keyword arguments of one forward of any supported model.

    Args:
        model: the model; its first floating parameter gives the dtype.
        sample: as in `sample_of`.
        device: where the tensors lie. Off meta they are the same normal numbers at every call.
        batch: used where `sample` names none.

    Raises:
        ConfigError, ModelError: as in `sample_of`; a side that is no multiple of the patch.
    """
    sample = sample_of(model, sample, batch)
    model = unwrapped(model)
    return reader_of(model).inputs(model, sample, _drawer(model, device))


@dataclass
class Counts:
    """One counted forward.

    Attributes:
        total: FLOPs of the whole.
        flops: module -> FLOPs inside it, over all its calls.
        order: module -> its place in the order of first calls; modules not called are missing.
    """

    total: int = 0
    flops: dict[nn.Module, int] = field(default_factory=dict)
    order: dict[nn.Module, int] = field(default_factory=dict)


def count(model: nn.Module, inputs: dict[str, Any]) -> Counts:
    """Count one forward of a model that lies on meta.

    Raises:
        ModelError: the forward does not run at these shapes.
    """
    counts, running = Counts(), []
    counter = FlopCounterMode(display=False)

    def enter(module: nn.Module, args: tuple) -> None:
        counts.order.setdefault(module, len(counts.order))
        running.append(counter.get_total_flops())

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        counts.flops[module] = counts.flops.get(module, 0) + counter.get_total_flops() - running.pop()

    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with torch.no_grad(), RememberedShapes(), counter:
            model.eval()(**inputs)
    except Exception as error:
        shapes = {key: tuple(value.shape) for key, value in inputs.items() if torch.is_tensor(value)}
        raise ModelError(f"one forward of {type(model).__name__} with {shapes} failed: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    counts.total = counter.get_total_flops()
    return counts


def flops(model: Any, sample: dict[str, int] | None = None) -> int:
    """FLOPs of one forward, 2 per multiply-add; matrix products, convolutions and attention are counted.

    Args:
        model: any supported model, adapters and run-time changes on it or not; or a pipeline, whose
            denoiser is counted.
        sample: as in `sample_of`, which gives the whole sample that the figure belongs to.

    Raises:
        ConfigError, ModelError: as in `sample_of`; or the forward does not run at these shapes.
    """
    twin = meta_copy(unwrapped(denoiser_of(model)[1]))
    return count(twin, sample_inputs(twin, sample)).total
