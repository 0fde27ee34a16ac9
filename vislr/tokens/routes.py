"""The live state of a span: who stayed, where the others' values come from, and how attention is looked at.

Selections carry no gradient; values do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vislr.core.context import StepContext
from vislr.core.errors import ModelError
from vislr.kernels.attention import attention_with_lse, recover
from vislr.tokens import ranking, selection
from vislr.tokens.plan import Span, TokenPlan
from vislr.tokens.selection import Selection


@dataclass
class Kept:
    """What one choice kept, for pictures.

    Attributes:
        timestep: of the call, or None.
        block: after which the tokens left.
        keep: (B, n) places among the span's tokens, on the CPU.
        tokens: how many there were.
        grid: (rows, columns), or None.
    """

    timestep: float | None
    block: str
    keep: torch.Tensor
    tokens: int
    grid: tuple[int, int] | None


class Route:
    """The state of one span in one phase."""

    def __init__(self, plan: TokenPlan, span: Span, image: str, prefix: int, context: StepContext):
        self.plan, self.span, self.context = plan, span, context
        self.image, self.prefix = image, prefix
        self.grid: tuple[int, int] | None = None
        self.total = 0  # image tokens before the first cut
        self.memory: torch.Tensor | None = None  # recovery "cached": (B, N, C) of the last call
        self.watcher: list[Kept] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the last call's choices."""
        self.chosen: Selection | None = None  # of the cut at work
        self.keep: torch.Tensor | None = None  # (B, n) among all `total` tokens
        self.source: torch.Tensor | None = None  # (B, total), place in `keep`
        self.base: torch.Tensor | None = None  # recovery "update": (B, total, C) at the last cut
        self.anchor: torch.Tensor | None = None  # (B, n, C), the kept rows of `base`

    @property
    def _sources_needed(self) -> bool:
        # Inside of a block values are always copied back: its residual keeps each token's own.
        parts = bool(self.span.parts)
        return parts or (self.span.until is not None and self.plan.recovery in ("copy", "update", "cached"))

    def merge(self, x: torch.Tensor, count: int, block: str) -> None:
        """Choose by similarity of features (ToMe)."""
        grid = self.grid if self.keep is None else None
        floor = selection.cells(x.shape[1], grid)
        if count < floor:
            raise ModelError(f"merging in 2 x 2 cells keeps {floor} of {x.shape[1]} tokens or more; {count} were asked")
        self._take(selection.merge_similar(x, count, grid, self.plan.seed, self.context.timestep), block)

    @torch.no_grad()
    def rank(self, maps: SelfMaps, count: int, block: str, cross: torch.Tensor | None) -> None:
        """Choose by attention, at random or evenly; sources by attention."""
        batch, _, tokens, _ = maps.q.shape
        device = maps.q.device
        if self.plan.criterion == "stride":
            keep = ranking.evenly(batch, tokens, count, device)
        else:
            if self.plan.criterion == "random":
                scores = ranking.random_scores(batch, tokens, self.plan.seed, self.context.timestep, device)
            elif cross is not None:
                scores = ranking.combine_heads(ranking.g_wpr_cross(cross, self.plan.iterations))
            else:
                scores = ranking.g_wpr_scores(maps.q, maps.k, maps.lse, self.plan.iterations, maps.scale)
            keep = ranking.best(self._shared(scores), count)
        source = None
        if self._sources_needed:
            symmetric = self.plan.similarity == "symmetric"
            source = selection.similar(maps.q, maps.k, maps.lse, keep, maps.scale, symmetric)
        self._take(Selection(keep, source), block)

    def _shared(self, scores: torch.Tensor) -> torch.Tensor:
        if self.plan.guidance == "separate" or scores.is_meta:
            return scores  # on meta only shapes count
        if scores.shape[0] % 2:
            raise ModelError(f"guidance 'shared' needs two halves of a batch; it has {scores.shape[0]} samples")
        return scores.unflatten(0, (2, -1)).mean(0).repeat(2, 1)

    def _take(self, chosen: Selection, block: str) -> None:
        self.chosen = chosen
        if self.watcher is not None:
            keep = chosen.keep if self.keep is None else self.keep.gather(1, chosen.keep)
            at = self.context.timestep
            time = None if at is None else float(at.float().mean())
            self.watcher.append(Kept(time, block, keep.cpu(), self.total, self.grid))

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, N, C) at the end of the block where tokens leave: (B, n, C). Maps of earlier cuts are chained."""
        chosen = self.chosen
        assert chosen is not None
        short = selection.shorten(x, chosen)
        if self.plan.recovery == "update" and self.span.until is not None:
            # What every token is worth now: its own value, or what it had plus what its source gained.
            self.base = x if self.base is None else self._updated(x)
            self.anchor = short
        if self.keep is None:
            self.keep, self.source = chosen.keep, chosen.source
        else:
            self.keep = self.keep.gather(1, chosen.keep)
            if self.source is not None and chosen.source is not None:
                self.source = chosen.source.gather(1, self.source)
        self.chosen = None
        return short

    def _updated(self, short: torch.Tensor) -> torch.Tensor:
        assert self.base is not None
        assert self.anchor is not None
        assert self.source is not None
        assert self.keep is not None
        full = self.base + recover(short - self.anchor, self.source)
        return selection.put_back(full, short, self.keep)

    def restore(self, short: torch.Tensor) -> torch.Tensor:
        """(B, n, C) back to (B, N, C); kept tokens exactly as they are."""
        assert self.keep is not None
        recovery = self.plan.recovery
        if recovery == "update":
            full = self._updated(short)
        elif recovery == "zeros":
            full = selection.put_back(short.new_zeros(short.shape[0], self.total, short.shape[2]), short, self.keep)
        elif recovery == "interpolate":
            if self.grid is None:
                raise ModelError("recovery 'interpolate' needs the image's rows and columns, which this model hides")
            full = selection.interpolated(short, self.keep, self.grid)
        else:
            assert self.source is not None
            shape = (short.shape[0], self.total, short.shape[2])
            if recovery == "cached" and self.memory is not None and self.memory.shape == shape:
                full = selection.put_back(self.memory.to(short), short, self.keep)
            else:
                full = recover(short, self.source)
            if recovery == "cached":
                self.memory = full.detach()
        if not torch.is_grad_enabled():
            # Gradient checkpointing runs blocks again, the last one first, and reads the choices of the forward.
            self.clear()
        return full


@dataclass
class SelfMaps:
    """Queries and keys of the image tokens (B, H, N, D), the rows' log-sum-exp (B, H, N), and the scale."""

    q: torch.Tensor
    k: torch.Tensor
    lse: torch.Tensor
    scale: float | None


class Attending(TorchFunctionMode):
    """While a block runs: sees its attention as it is computed, after norms, rotation and adapters.

    The first call is the block's self-attention (joint with the text in MMDiT), the second the cross-attention.

    Args:
        route: gets the choice, where `count` is given.
        count: tokens that stay after this block; None: no choice is made here.
        tokens: image tokens in the block.
        rotary: (cos, sin), each (B, S, D) with S all tokens of the attention, applied here because positions
            differ between samples; None: the block does it itself.
    """

    def __init__(
        self,
        route: Route,
        block: str,
        count: int | None,
        tokens: int,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ):
        super().__init__()
        self.route, self.block, self.count, self.tokens, self.rotary = route, block, count, tokens, rotary
        self.calls = 0
        self.maps: SelfMaps | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        self.calls += 1
        if self.calls == 1 and self.rotary is not None:
            query, key = rotated(query, *self.rotary), rotated(key, *self.rotary)
        plain = dropout_p == 0 and not is_causal and not enable_gqa
        if self.count is None or self.calls > 1 or not plain or attn_mask is not None:
            if self.count is not None and self.calls == 1:
                raise ModelError(f"the attention of '{self.block}' is masked or drops values; it cannot rank tokens")
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            if self.calls == 2 and self._cross and self.maps is not None and self.count is not None:
                maps = ranking.cross_maps(query, key, None, attn_mask, scale)
                self.route.rank(self.maps, self.count, self.block, maps)
            return out
        out, lse = attention_with_lse(query, key, value, scale)
        q, k = query.detach(), key.detach()
        image = slice(0, self.tokens) if self.route.image == "first" else slice(q.shape[2] - self.tokens, None)
        self.maps = SelfMaps(q[:, :, image], k[:, :, image], lse[:, :, image], scale)
        if not self._cross:
            self.route.rank(self.maps, self.count, self.block, None)
        elif self.tokens < q.shape[2]:
            # Joint attention: its image-by-text part.
            text = slice(self.tokens, None) if self.route.image == "first" else slice(0, q.shape[2] - self.tokens)
            joint = ranking.cross_maps(self.maps.q, k[:, :, text], self.maps.lse, None, scale)
            self.route.rank(self.maps, self.count, self.block, joint)
        return out

    @property
    def _cross(self) -> bool:
        return self.route.plan.ranking == "cross" and self.route.plan.criterion == "g-wpr"


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of each sample: x (B, H, S, D), cos and sin (B, S, D), pairs of neighbours turned."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return (x.float() * cos.unsqueeze(1) + turned.float() * sin.unsqueeze(1)).to(x.dtype)
