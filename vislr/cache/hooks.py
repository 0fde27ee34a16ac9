"""What runs inside of a denoiser under a cache: hooks that skip, keep and hand back.

They look at sets and shapes alone: `torch.compile` makes one graph for each set of reused regions.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from vislr.cache.state import CacheState

HOOK_NAME = "vislr_cache"


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _blank(shape: Any, like: torch.Tensor) -> Any:
    """Zeros in the place of an output that nobody reads; the batch is that of `like`."""
    if isinstance(shape, torch.Size):
        return like.new_zeros((like.shape[0], *shape[1:]))
    return None if shape is None else tuple(_blank(one, like) for one in shape)


def _shape(output: Any) -> Any:
    if torch.is_tensor(output):
        return output.shape
    return None if output is None else tuple(_shape(one) for one in output)


class SkipHook(ModelHook):
    """On a block below a UNet's cached boundary: not run while its region is reused."""

    outermost = True

    def __init__(self, state: CacheState, region: int):
        super().__init__()
        self.state, self.region = state, region
        self.shape: Any = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.region in self.state.reused:
            # Controls are added to skip connections of skipped blocks, too: the shapes must fit.
            return _blank(self.shape, _hidden(args, kwargs))
        forward: Any = self.fn_ref.original_forward
        output = forward(*args, **kwargs)
        self.shape = _shape(output)
        return output


class BoundaryHook(ModelHook):
    """On the up block behind a UNet's cached region: keeps what enters, or enters what was kept."""

    outermost = False

    def __init__(self, state: CacheState, region: int):
        super().__init__()
        self.state, self.region = state, region

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        # FreeU scales the block's input in place.
        scaled = getattr(module, "s1", None) is not None
        if self.region not in self.state.reused:
            hidden = _hidden(args, kwargs)
            self.state.put(self.region, (hidden.clone() if scaled else hidden,))
            return args, kwargs
        kept = self.state.get(self.region)[0]
        assert kept is not None
        kept = kept.clone() if scaled else kept
        return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": kept})


class Stretch:
    """What the blocks of one region share during a pass.

    Attributes:
        entered: the streams (text and image, or one) that went into the first block.
    """

    def __init__(self, state: CacheState, region: int):
        self.state, self.region = state, region
        self.entered: tuple[Any, ...] = ()


class StretchHook(ModelHook):
    """On a block of a region of blocks, or on a lone module: what they add to their input is kept.

    Blocks that give two tensors (text, image) are given both, so each stream has its own change.
    """

    outermost = True

    def __init__(self, stretch: Stretch, first: bool, last: bool):
        super().__init__()
        self.stretch, self.first, self.last = stretch, first, last
        self.region = stretch.region
        # Of the output: 0 a tensor, else how many in a tuple; set by the first full pass.
        self.form = 0
        self.adds = True

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stretch, state = self.stretch, self.stretch.state
        if stretch.region in state.reused:
            streams = self._streams(args, kwargs)
            if self.last:
                kept = state.get(stretch.region)
                streams = tuple(_plus(one, part, self.adds) for one, part in zip(streams, kept, strict=True))
            return streams if self.form else streams[0]
        forward: Any = self.fn_ref.original_forward
        output = forward(*args, **kwargs)
        self.form = len(output) if isinstance(output, tuple) else 0
        if self.first:
            stretch.entered = self._streams(args, kwargs)
        if self.last:
            left = output if self.form else (output,)
            entered = stretch.entered
            self.adds = all(one is None or one.shape == other.shape for one, other in zip(left, entered, strict=True))
            state.put(
                stretch.region, tuple(_minus(one, other, self.adds) for one, other in zip(left, entered, strict=True))
            )
            stretch.entered = ()
        return output

    def _streams(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        hidden = _hidden(args, kwargs)
        if self.form < 2:
            return (hidden,)
        return (args[1] if len(args) > 1 else kwargs["encoder_hidden_states"], hidden)


def _minus(left: Any, entered: Any, adds: bool) -> Any:
    return left if left is None or not adds else left - entered


def _plus(entered: Any, kept: Any, adds: bool) -> Any:
    return kept if kept is None or not adds else entered + kept
