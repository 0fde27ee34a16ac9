"""Eight-bit weights as torchao's tensors, in a folder that stock diffusers and torchao load without vislr."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vislr.anatomy.wrapping import original, unwrapped
from vislr.core.errors import FormatError, LaunchError, ModelError
from vislr.core.files import atomic_path
from vislr.quantize.layers import QuantLayer, QuantLinear, quant_layers


def export_torchao(module: Any, folder: str | os.PathLike) -> tuple[str, ...]:
    """Write a quantised diffusers model as `TorchAoConfig(Int8WeightOnlyConfig)` does: codes and scales as they are.

    Linears with symmetric 8-bit weights, one scale a row, inputs whole, become torchao's Int8Tensor. Every other
    quantised layer is written as the float values that it stands for.

    Args:
        module: a model of diffusers, quantised; no adapters, no layer plan.
        folder: for `diffusers.AutoModel.from_pretrained(folder)`; or in the place of a pipeline's component.

    Returns:
        names of the quantised layers that torchao's format does not hold.

    Raises:
        LaunchError: torchao is not installed. FormatError: adapters are on the model, or no layer fits.
        ModelError: no model of diffusers.
    """
    try:
        from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
    except ImportError as error:
        raise LaunchError(f"torchao's format needs torchao 0.16 or newer: pip install torchao ({error})") from error
    import diffusers
    from diffusers import TorchAoConfig
    from diffusers.quantizers.torchao import TorchAoHfQuantizer

    module = unwrapped(module)
    stock = getattr(diffusers, type(module).__name__, None)
    if stock is None or not hasattr(module, "config"):
        raise ModelError(f"a {type(module).__name__} is no model of diffusers")
    if any(original(layer) is not layer for layer in module.modules()):
        raise FormatError("torchao's format holds no adapters; remove them, or merge before quantising")
    layers = quant_layers(module)
    held = {name for name, layer in layers.items() if _fits(layer)}
    if not held:
        raise FormatError("no layer has 8-bit weights with one scale a row, a fixed zero and whole inputs, on a linear")
    with torch.device("meta"):
        plain: Any = stock.from_config({key: value for key, value in module.config.items() if key != "vislr"})
    state = {
        name: value for name, value in module.state_dict().items() if name.rpartition(".")[0] not in layers
    }  # fmt: skip
    for name, layer in layers.items():
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
        if name in held:
            state[f"{name}.weight"] = Int8Tensor(
                layer.codes, layer.weight_scale.to(layer.compute_dtype), [1, layer.columns], layer.compute_dtype
            )
        else:
            state[f"{name}.weight"] = layer.dequantized()
    for name, value in state.items():
        parent, _, leaf = name.rpartition(".")
        owner = plain.get_submodule(parent)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        elif leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            raise FormatError(f"the stock {type(plain).__name__} has no '{name}': its structure was changed")
    left = [name for name, value in plain.named_parameters() if value.device.type == "meta"]
    if left:
        raise FormatError(f"the stock {type(plain).__name__} has a '{left[0]}' that this model lacks")
    linears = [name for name, layer in plain.named_modules() if isinstance(layer, nn.Linear) and name not in held]
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=linears)
    plain.hf_quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
    plain.hf_quantizer.validate_environment()
    plain.register_to_config(quantization_config=config)
    with atomic_path(Path(folder)) as temporary:
        plain.save_pretrained(temporary)
    return tuple(name for name in layers if name not in held)


def _fits(layer: QuantLayer) -> bool:
    spec = layer.spec
    symmetric = spec.bits == 8 and spec.symmetric and spec.format == "uniform" and spec.group is None
    return isinstance(layer, QuantLinear) and symmetric and spec.inputs == "none"
