"""What runs inside of a backbone under a token plan: hooks on blocks, on parts of blocks, and on what holds them.

Hooks only look at the phase and at static counts, so `torch.compile` makes one graph for each phase.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from vislr.core.context import StepContext
from vislr.core.errors import ModelError
from vislr.kernels.attention import recover
from vislr.tokens import selection
from vislr.tokens.plan import LATE
from vislr.tokens.routes import Attending, Route

OWNER = "tokens"


@dataclass
class Work:
    """What one block does in one phase.

    Attributes:
        route: of its span.
        block: its name.
        keep: share of the span's tokens that stays after it; None: none leaves here.
        first: whether it is the span's first cut.
        last: whether the tokens come back after it.
    """

    route: Route
    block: str
    keep: float | None
    first: bool
    last: bool

    def run(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The block's forward, with the tokens that leave and come back."""
        route = self.route
        tokens = args[0] if args else kwargs["hidden_states"]
        count = tokens.shape[1] - route.prefix
        if self.first:
            route.clear()
            route.total = count
        goal = None if self.keep is None else selection.kept_count(self.keep, route.total)
        if goal is not None and goal >= count:
            goal = None  # everything stays: the block is left alone
        merging = route.plan.criterion == "tome"
        within = bool(route.span.parts) and self.first
        rotary = None
        if route.keep is not None:
            args, kwargs, rotary = _take_rotary(args, kwargs, route)
        if goal is not None and merging and within:
            route.merge(tokens, goal, self.block)
        if (goal is not None and not merging) or rotary is not None:
            seen = Attending(route, self.block, None if merging else goal, count, rotary)
            with seen:
                output = forward(*args, **kwargs)
            if goal is not None and not merging and route.chosen is None:
                raise ModelError(
                    f"the attention of '{self.block}' does not run through scaled_dot_product_attention, so it cannot "
                    "be ranked by; set its processor before the token plan, which then takes torch's there"
                )
        else:
            output = forward(*args, **kwargs)
        if self.first and self.last:
            route.clear()  # tokens were only missing inside
            return output
        if goal is None and not (self.last and route.keep is not None):
            return output
        # MMDiT blocks give (text, image).
        x = output[1] if isinstance(output, tuple) else output
        head, x = x[:, : route.prefix], x[:, route.prefix :]
        if goal is not None:
            if merging and not within:
                route.merge(x, goal, self.block)
            x = route.cut(x)
        if self.last:
            x = route.restore(x)
        if route.prefix:
            x = torch.cat([head, x], 1)
        return (output[0], x) if isinstance(output, tuple) else x


def _take_rotary(args: tuple, kwargs: dict[str, Any], route: Route) -> tuple[tuple, dict[str, Any], Any]:
    """Take FLUX's positions out of the arguments and gather them for the tokens that are left."""
    given = kwargs.get("image_rotary_emb", args[3] if len(args) > 3 else None)
    if not isinstance(given, tuple) or route.image != "last":
        return args, kwargs, None
    if "image_rotary_emb" in kwargs:
        kwargs = {**kwargs, "image_rotary_emb": None}
    else:
        args = (*args[:3], None, *args[4:])
    assert route.keep is not None
    keep = route.keep
    gathered = []
    for table in given:
        text = table.shape[0] - route.total
        image = table[text:][keep]
        gathered.append(torch.cat([table[:text].expand(keep.shape[0], -1, -1), image], 1))
    return args, kwargs, tuple(gathered)


class BlockHook(ModelHook):
    """On a block: looks up what it does in the phase of this call."""

    def __init__(self, context: StepContext, works: dict[str, Work]):
        super().__init__()
        self.context, self.works = context, works

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        work = self.works.get(self.context.phases.get(OWNER, LATE))
        forward: Any = self.fn_ref.original_forward
        return forward(*args, **kwargs) if work is None else work.run(forward, args, kwargs)


class PartHook(ModelHook):
    """On a part of a cut block: it sees the kept tokens only; its result is copied to the others."""

    def __init__(self, context: StepContext, routes: dict[str, Route]):
        super().__init__()
        self.context, self.routes = context, routes

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        route = self.routes.get(self.context.phases.get(OWNER, LATE))
        chosen = None if route is None else route.chosen
        forward: Any = self.fn_ref.original_forward
        if chosen is None:
            return forward(*args, **kwargs)
        if args:
            args = (selection.shorten(args[0], chosen), *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": selection.shorten(kwargs["hidden_states"], chosen)}
        assert chosen.source is not None
        return recover(forward(*args, **kwargs), chosen.source)


class GridHook(ModelHook):
    """On the module that turns an image into tokens: notes rows and columns for the routes inside."""

    def __init__(self, routes: list[Route], patch: int):
        super().__init__()
        self.routes, self.patch = routes, patch

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        image = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        grid = None
        if image is not None and image.dim() == 4:
            grid = (image.shape[-2] // self.patch, image.shape[-1] // self.patch)
        for route in self.routes:
            route.grid = grid
            route.clear()
        return args, kwargs
