"""What stands where a unit was: no parameters of its own, the same name in the tree, the same call.

Names stay what they were, so keys of adapters and of checkpoints still say where they belong. Every
class here takes whatever its unit took and gives what the unit would give if its residual branch
were zero ("skip"), or, for attention and feed-forward, if it were the identity (the reference code of
HierarchicalPrune).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn


class Removed(nn.Module):
    """Marks the place of a removed unit.

    Attributes:
        removed_unit: class name of what stood here.
    """

    def __init__(self, removed_unit: str) -> None:
        super().__init__()
        self.removed_unit = removed_unit

    def extra_repr(self) -> str:
        return self.removed_unit


class Pass(Removed):
    """The first argument: blocks of one stream (BasicTransformerBlock, timm), norms of a removed branch."""

    # A timm model is read as a ViT if its blocks have these.
    attn = None
    mlp = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x


class PassTransformer2D(Removed):
    """A whole Transformer2DModel: the feature map itself, in the form that was asked for."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        if not return_dict:
            return (hidden_states,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=hidden_states)


class PassStreams(Removed):
    """A block of two streams (SD3, FLUX): both untouched, context first, as the blocks return them."""

    def __init__(self, removed_unit: str, context_pre_only: bool = False) -> None:
        super().__init__(removed_unit)
        # SD3's forward asks its blocks for this beside a ControlNet.
        self.context_pre_only = context_pre_only

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return encoder_hidden_states, hidden_states


class PassBlockKeepingEmbedding(Pass):
    """The first block of a DiT: the model's output layer reads the embedding inside its norm."""

    def __init__(self, removed_unit: str, embedding: nn.Module) -> None:
        super().__init__(removed_unit)
        self.norm1 = nn.Module()
        self.norm1.emb = embedding


class PassResnet(Removed):
    """A ResnetBlock2D without its main branch: `conv_shortcut(x) / output_scale_factor`."""

    def __init__(self, removed_unit: str, conv_shortcut: nn.Module | None, output_scale_factor: float) -> None:
        super().__init__(removed_unit)
        self.conv_shortcut = conv_shortcut
        self.output_scale_factor = output_scale_factor

    def forward(self, input_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return input_tensor if self.output_scale_factor == 1 else input_tensor / self.output_scale_factor


class PassResidual(Removed):
    """A residual block of a conv net without its main branch: shortcut, then the activation after the sum.

    Both keep the names that they have in the block.
    """

    def __init__(self, removed_unit: str, shortcut: dict[str, nn.Module], activation: dict[str, nn.Module]) -> None:
        super().__init__(removed_unit)
        self.order = (*shortcut, *activation)
        # With nothing before it, an activation in place would change what other layers read.
        self.copies = not shortcut and any(getattr(module, "inplace", False) for module in activation.values())
        for name, module in (shortcut | activation).items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone() if self.copies else x
        for name in self.order:
            x = getattr(self, name)(x)
        return x


class Zero(Removed):
    """A branch of one stream: zeros in the shape of its input, without memory of their own."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states.new_zeros(()).expand(hidden_states.shape)


class Same(Removed):
    """A branch of one stream as the identity: the block adds its own (gated) norm."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class ZeroJoint(Removed):
    """A joint attention: zeros for both streams."""

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        zero = hidden_states.new_zeros(())
        return zero.expand(hidden_states.shape), zero.expand(encoder_hidden_states.shape)


class SameJoint(Removed):
    """A joint attention as the identity."""

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states, encoder_hidden_states


class PlainNorm(Removed):
    """An adaptive norm without its modulation: LayerNorm without weights, gates 1, shifts and scales 0.

    Args:
        removed_unit: AdaLayerNormZero, SD35AdaLayerNormZeroX or AdaLayerNormContinuous.
        width: of the last axis.
    """

    # What the class gives after the normed stream: 1 for a gate, 0 for shift and scale, None for a second norm.
    OUTPUTS: ClassVar[dict[str, tuple[int | None, ...]]] = {
        "AdaLayerNormZero": (1, 0, 0, 1),
        "SD35AdaLayerNormZeroX": (1, 0, 0, 1, None, 1),
        "AdaLayerNormContinuous": (),
    }

    def __init__(self, removed_unit: str, width: int) -> None:
        super().__init__(removed_unit)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.outputs = self.OUTPUTS[removed_unit]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = self.norm(x)
        if not self.outputs:
            return normed
        return (normed, *(normed if each is None else x.new_full((1, 1), float(each)) for each in self.outputs))
