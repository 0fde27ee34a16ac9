"""What each kind of adapter stores for one layer: suffix -> tensor, and back.

========  =====================================================================================
kind      suffixes (shapes: r rank, Cg = Ci / groups, K the kernel's axes, k1 its first)
========  =====================================================================================
convlora  `convlora_A` (r k1, Cg k2...), `convlora_B` (Co k1, r k1), `alpha`
flora     `flora_core` (r_out, r_in, r_k1...), `flora_out` (Co, r_out), `flora_in` (Cg, r_in),
          `flora_k1` (k1, r_k1) ..., `alpha` (the scale)
lora      `lora_down.weight` (r, Cg, *K), `lora_up.weight` (Co, r, 1...), `alpha`; DoRA adds
          `dora_scale` (Co, 1, ...), per output
loha      `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`, `alpha`; Tucker: `hada_t1`, `hada_t2`
lokr      `lokr_w1` or `lokr_w1_a`, `lokr_w1_b`; `lokr_w2` or `lokr_w2_a`, `lokr_w2_b`; `lokr_t2`; `alpha`
oft       `oft_blocks` (n, b, b): skew-symmetric, before peft's Cayley transform
sara      `sara_index` (n,) int32, places in the weight, then the bias; `sara_delta` (n,) float64;
          `sara_shape` of the weight, int64; `sara_kept` (k,) int32, places in `sara_index` still trained
qalora    `qalora_A` (r, Cg, *K), `qalora_B` (Co, r, 1...), `qalora_scale` (Co,), `alpha` (= r),
          `qalora_input_scale` (T,), `qalora_input_zero` (T,): step sizes of T timesteps
adabn     `adabn_mean` (C,), `adabn_var` (C,), `adabn_count` () int64, the batches behind them
imported  what came from a file of another tool: the suffixes of `vislr.formats.canonical`
========  =====================================================================================

`alpha` is a float32 scalar: delta = alpha / r times the product (FLoRA: alpha times).
"""

from __future__ import annotations

from typing import Any

import torch

from vislr.adapters.adabn_layer import AdaBnLayer
from vislr.adapters.inject import unit_scale
from vislr.adapters.layer import DeltaLayer
from vislr.adapters.qalora import QALoraLayer
from vislr.adapters.sara_layer import SaraLayer
from vislr.core.errors import FormatError, hint
from vislr.formats import canonical
from vislr.formats.imported import ATTACHED_KINDS

_LYCORIS = {
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
SUFFIXES: dict[str, tuple[str, ...]] = {
    "convlora": ("convlora_A", "convlora_B", "alpha"),
    "flora": ("flora_core", "flora_out", "flora_in", "flora_k1", "flora_k2", "flora_k3", "alpha"),
    "lora": ("lora_down.weight", "lora_up.weight", "dora_scale", "alpha"),
    **{kind: (*names, "alpha") for kind, names in _LYCORIS.items()},
    "oft": ("oft_blocks",),
    "sara": ("sara_index", "sara_delta", "sara_shape", "sara_kept"),
    "qalora": ("qalora_A", "qalora_B", "qalora_scale", "qalora_input_scale", "qalora_input_zero", "alpha"),
    "adabn": ("adabn_mean", "adabn_var", "adabn_count"),
    "imported": tuple(dict.fromkeys(suffix for kind in ATTACHED_KINDS for suffix in canonical.KINDS[kind])),
}


def kind_of_config(config: Any) -> str:
    """The kind's name.

    Raises:
        FormatError: no format of vislr stores this kind.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    if kind not in SUFFIXES:
        raise FormatError(f"adapters of kind '{kind}' cannot be stored{hint(kind, SUFFIXES)}")
    return kind


def stored(layer: Any, name: str, kind: str) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of adapter `name` on one layer.

    Raises:
        FormatError: the layer has parts that the kind's suffixes cannot hold.
    """
    if isinstance(layer, (DeltaLayer, SaraLayer, AdaBnLayer, QALoraLayer)):
        return layer.file_tensors(name)
    if kind == "oft":
        return {"oft_blocks": _blocks(layer.oft_R[name], layer.oft_R[name].weight.detach())}
    alpha = torch.tensor(unit_scale(layer, name) * layer.r[name], dtype=torch.float32)
    if kind in _LYCORIS:
        held = {part: getattr(layer, part) for part in _LYCORIS[kind]}
        return {part: holder[name].detach() for part, holder in held.items() if name in holder} | {"alpha": alpha}
    if name not in layer.lora_A:
        raise FormatError("LoRA on an embedding cannot be stored")
    if layer.lora_B[name].bias is not None:
        raise FormatError("LoRA with lora_bias cannot be stored")
    tensors = {
        "lora_down.weight": layer.lora_A[name].weight.detach(),
        "lora_up.weight": layer.lora_B[name].weight.detach(),
        "alpha": alpha,
    }
    if name in layer.lora_magnitude_vector:
        weight = layer.lora_magnitude_vector[name].weight.detach()
        tensors["dora_scale"] = weight.reshape(-1, *(1,) * (layer.get_base_layer().weight.dim() - 1))
    elif layer.lora_variant.get(name) is not None:
        raise FormatError(f"LoRA of the variant {layer.lora_variant[name].__name__} cannot be stored")
    return tensors


@torch.no_grad()
def put(layer: Any, name: str, kind: str, tensors: dict[str, torch.Tensor]) -> None:
    """Copy values of `stored`'s suffixes and shapes into adapter `name` of one layer."""
    if isinstance(layer, (DeltaLayer, SaraLayer, AdaBnLayer, QALoraLayer)):
        layer.load_file_tensors(name, tensors)
    elif kind == "oft":
        rotation = layer.oft_R[name]
        rotation.weight.copy_(tensors["oft_blocks"][:, rotation.rows, rotation.cols])
    elif kind in _LYCORIS:
        for part in _LYCORIS[kind]:
            if part in tensors:
                getattr(layer, part)[name].copy_(tensors[part])
    else:
        layer.lora_A[name].weight.copy_(tensors["lora_down.weight"])
        layer.lora_B[name].weight.copy_(tensors["lora_up.weight"])
        if "dora_scale" in tensors:
            magnitude = layer.lora_magnitude_vector[name].weight
            magnitude.copy_(tensors["dora_scale"].reshape(magnitude.shape))


def check_values(layer: Any, name: str, kind: str, tensors: dict[str, torch.Tensor], site: str) -> None:
    """Refuse tensors that are missing, unknown, of the wrong shape, or disagree with the config.

    Raises:
        FormatError: names the first such key.
    """
    if isinstance(layer, SaraLayer):
        # The file says how many entries there are.
        layer.check_file_tensors(tensors, site)
        return
    expected = stored(layer, name, kind)
    for suffix in expected:
        if suffix not in tensors:
            raise FormatError(f"the file lacks '{site}.{suffix}' of shape {tuple(expected[suffix].shape)}")
    for suffix, tensor in tensors.items():
        if suffix not in expected:
            raise FormatError(f"'{site}.{suffix}' has no place in this {kind} adapter")
        if tensor.shape != expected[suffix].shape:
            given, wanted = tuple(tensor.shape), tuple(expected[suffix].shape)
            raise FormatError(f"'{site}.{suffix}' has shape {given}; this model and config expect {wanted}")
    if isinstance(layer, AdaBnLayer):
        layer.check_file_tensors(tensors, site)
    if "alpha" in tensors and not isinstance(layer, DeltaLayer) and tensors["alpha"] != expected["alpha"]:
        raise FormatError(f"'{site}.alpha' is {tensors['alpha']:g}, its config says {expected['alpha']:g}")


def _blocks(rotation: Any, vector: torch.Tensor) -> torch.Tensor:
    """(n, b (b - 1) / 2) above the diagonal -> (n, b, b) skew-symmetric."""
    size = rotation.block_size
    upper = vector.new_zeros(vector.shape[0], size, size)
    upper[:, rotation.rows, rotation.cols] = vector
    return upper - upper.transpose(1, 2)
