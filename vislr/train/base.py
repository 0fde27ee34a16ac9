"""How the frozen base is kept and run: fewer bits, gradient checkpointing, compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from vislr.core.errors import LaunchError, ModelError
from vislr.train.sections import ModelConfig

_KERNELS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Layers at the ends of a denoiser are few and need their precision.
_PRECISE = ("conv_in", "conv_out", "pos_embed", "patch_embed", "x_embedder", "context_embedder", "proj_out", "norm_out")
# Tensors of fewer elements are not worth a copy.
_SMALL = 1024


def store_base(model: nn.Module, storage: str, dtype: torch.dtype) -> int:
    """Keep the frozen layers of a denoiser, below its adapters, in fewer bits.

    Args:
        model: on the CPU or its device, adapters attached.
        storage: "fp8": linears and convs in float8_e4m3fn, cast to `dtype` while they run. "int8": linears by
            torchao, a scale for each output. "nf4": linears by bitsandbytes.
        dtype: in which the layers compute.

    Returns:
        the number of layers changed.

    Raises:
        LaunchError: the package is not installed.
        ModelError: there is no layer to change.
    """
    if storage == "plain":
        return 0
    changed = 0
    change = {"fp8": _to_fp8, "int8": _to_int8, "nf4": _to_nf4}[storage]
    for parent, attribute, layer in list(_frozen(model, _KERNELS if storage == "fp8" else (nn.Linear,))):
        try:
            changed += change(parent, attribute, layer, dtype)
        except ImportError as error:
            package = {"int8": "torchao", "nf4": "bitsandbytes"}[storage]
            raise LaunchError(f"model.storage {storage} needs {package}: pip install {package} ({error})") from error
    if not changed:
        raise ModelError(f"model.storage {storage}: this {type(model).__name__} has no frozen layer to keep so")
    return changed


def _frozen(model: nn.Module, kinds: tuple[type, ...]) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, attribute, layer) of every frozen layer of these kinds that is no part of an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, module in model.named_modules():
        parent, _, attribute = name.rpartition(".")
        inside = next((w for w in wrapped if name.startswith(f"{w}.") and not name.startswith(f"{w}.base_layer")), None)
        ends = any(part in _PRECISE for part in name.split("."))
        if isinstance(module, kinds) and inside is None and not ends:
            yield model.get_submodule(parent), attribute, module


def _to_fp8(parent: nn.Module, attribute: str, layer: Any, dtype: torch.dtype) -> bool:
    from diffusers.hooks import HookRegistry, ModelHook

    class Cast(ModelHook):
        """Computes with copies in `dtype`. diffusers' own hook swaps the storage of the weight itself, which the
        backward pass of a conv then finds in float8."""

        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            parameters: dict[str, Any] = module._parameters
            kept = dict(parameters)
            parameters.update({name: value.to(dtype) for name, value in kept.items() if value is not None})
            try:
                original: Any = self.fn_ref.original_forward
                return original(*args, **kwargs)
            finally:
                parameters.update(kept)

    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    HookRegistry.check_if_exists_or_initialize(layer).register_hook(Cast(), "vislr_fp8")
    return True


def _to_int8(parent: nn.Module, attribute: str, layer: Any, dtype: torch.dtype) -> bool:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer.requires_grad_(False)
    quantize_(layer, Int8WeightOnlyConfig())
    return True


def _to_nf4(parent: nn.Module, attribute: str, layer: Any, dtype: torch.dtype) -> bool:
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
    )
    new.load_state_dict(layer.state_dict())
    new.requires_grad_(False)
    # Moving is what quantises.
    setattr(parent, attribute, new.to(layer.weight.device))
    return True


@contextlib.contextmanager
def activations_aside(model: nn.Module) -> Iterator[None]:
    """Inside, what a forward keeps for its backward waits in main memory; weights and small tensors stay.

    The tensors come back when the backward pass asks for them. With gradient checkpointing these are the inputs of
    blocks alone.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(kept: torch.Tensor) -> Any:
        if kept.numel() < _SMALL or kept.untyped_storage().data_ptr() in weights:
            return kept
        # Pinned memory is what a GPU copies from and to while it computes.
        aside = torch.empty_like(kept, device="cpu", pin_memory=kept.is_cuda)
        return kept.device, aside.copy_(kept, non_blocking=kept.is_cuda)

    def unpack(packed: Any) -> torch.Tensor:
        if torch.is_tensor(packed):
            return packed
        device, aside = packed
        return aside.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def prepare_base(model: Any, config: ModelConfig) -> Callable[[], None]:
    """Gradient checkpointing and compilation, as a config says; returns what takes them off again.

    Raises:
        ModelError: the model has no gradient checkpointing.
    """
    # peft's DoRA takes convs with channels first alone.
    dora = any(len(getattr(module, "lora_magnitude_vector", ())) for module in model.modules())
    if not dora and any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)
    undo: list[Callable[[], Any]] = []
    if config.checkpointing:
        if hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing()
            undo.append(model.disable_gradient_checkpointing)
        elif hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(True)
            undo.append(lambda: model.set_grad_checkpointing(False))
        else:
            raise ModelError(f"model.checkpointing: a {type(model).__name__} has no gradient checkpointing")
    if config.compile:
        model.compile()
        undo.append(lambda: setattr(model, "_compiled_call_impl", None))

    def restore() -> None:
        for step in undo:
            step()

    return restore
