"""Attention that ranks goes through torch's scaled_dot_product_attention, whatever the user has switched on.

xformers, attention slicing and diffusers' other backends give no log-sum-exp and cannot be looked at. Only the blocks
that rank (and FLUX's, whose positions are turned there) are switched, when a plan comes on; the rest keep theirs.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

# Processors of diffusers -> the one that computes the same by torch's function.
TWINS = {
    "AttnProcessor": "AttnProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "XFormersAttnProcessor": "AttnProcessor2_0",
    "XFormersJointAttnProcessor": "JointAttnProcessor2_0",
}
NATIVE = "native"


def switch_to_torch(blocks: list[nn.Module]) -> list[tuple[nn.Module, Any, Any]]:
    """Give the attentions inside of blocks torch's processor; returns (attention, processor before, processor now)."""
    from diffusers.models import attention_processor

    switched: list[tuple[nn.Module, Any, Any]] = []
    for block in blocks:
        for attention in block.modules():
            before: Any = getattr(attention, "processor", None)
            now: Any = None
            if type(before).__name__ in TWINS:
                now = getattr(attention_processor, TWINS[type(before).__name__])()
            elif not str(_backend(before)).lstrip("_").startswith(NATIVE):
                now = copy.copy(before)
                now._attention_backend = NATIVE
            if now is not None:
                attention.processor = now
                switched.append((attention, before, now))
    return switched


def _backend(processor: Any) -> str:
    """Name of the backend that a processor asks diffusers for; where it leaves that open, the one in force."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    if processor is None or not hasattr(processor, "_attention_backend"):
        return NATIVE
    chosen = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    return getattr(chosen, "value", chosen)


def switch_back(switched: list[tuple[nn.Module, Any, Any]]) -> None:
    """Undo `switch_to_torch`, but for attentions that have got another processor since."""
    for attention, before, now in switched:
        if getattr(attention, "processor", None) is now:
            attention.processor = before
