"""The content of a model as one short name: what a figure was measured with, what a change was made on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vislr.core.errors import ModelError

if TYPE_CHECKING:
    import torch


def content_hash(state: Mapping[str, torch.Tensor], note: str = "") -> str:
    """sha256 over names, dtypes, shapes and bytes of a state dict, 64 hex digits.

    Independent of the order of the keys, of the device and of the memory layout.

    Args:
        state: what `module.state_dict()` gives.
        note: text that belongs to the content, for example how inputs are prepared.

    Raises:
        ModelError: a tensor is on the meta device and has no content.
    """
    import torch

    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach()
        if type(value) is not torch.Tensor and hasattr(value, "dequantize"):
            # Quantised tensors of torchao keep codes and scales: their content is what they stand for.
            value = value.dequantize()
        if value.is_meta:
            raise ModelError(f"'{key}' is on the meta device: a model without values has no content to hash")
        flat = value.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(flat.numpy().tobytes())
    digest.update(note.encode())
    return digest.hexdigest()
