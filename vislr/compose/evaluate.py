"""The hook on the denoiser: evaluates the adapters of a step and mixes their predictions.

`pipe(...)` runs its own loop: schedulers, callbacks, image to image and guidance stay diffusers' own. Mixing
is linear, so mixing the guided halves of a batch and then guiding is the guidance of the mix.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from vislr.adapters.inject import adapter_names, check_unmerged
from vislr.anatomy.wrapping import unwrapped
from vislr.cache.handler import schedule_of
from vislr.cache.state import CacheState
from vislr.compose.fourier import latent_share
from vislr.compose.merged import Change
from vislr.compose.plan import MERGED, ComposePlan
from vislr.compose.routing import HOOK_NAME, Route
from vislr.compose.schedule import Program, Turn
from vislr.core.clock import Clock
from vislr.core.context import StepContext
from vislr.core.errors import AdapterError, hint

OWNER = "compose"
# Arguments of denoisers that have no batch axis.
_SHARED = ("img_ids", "txt_ids")
_SCALES = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


class Conductor:
    """Says what each call does; asked once a call, outside of graphs.

    Attributes:
        turn: of the current call.
        branch: which call of the step it is.
        reused: the cached region that the step may take from the store.
    """

    def __init__(self, plan: ComposePlan, clock: Clock, context: StepContext, state: CacheState | None):
        self.plan, self.clock, self.context, self.state = plan, clock, context, state
        self.program = Program(plan, plan.steps)
        self.turn: Turn = self.program.turn(0)
        self.branch = 0
        self.channels = 4
        self.ready: Callable[[], None] = lambda: None

    def __call__(self, timestep: Any) -> Turn:
        if timestep is None:
            return self.turn
        moment = self.clock.tick(timestep)
        if moment.first:
            self.ready()
            if self.state is not None:
                self.state.clear()
            self.program = Program(self.plan, moment.steps or self.plan.steps)
        if moment.branch == 0:
            share = None
            if self.program.reads_latent:
                lead = self.plan.dominance
                share = latent_share(self.context.inputs, self.channels, lead.eta, lead.log_amplitude)
            self.turn = self.program.turn(moment.step, share)
        self.branch = moment.branch
        return self.turn

    def restart(self) -> None:
        """As before the first call."""
        self.turn, self.branch = Program(self.plan, self.plan.steps).turn(0), 0
        if self.state is not None:
            self.state.clear()


class ComposeHook(ModelHook):
    """On the denoiser.

    Attributes:
        batched: whether several adapters share a forward.
        changes: layer -> its merged change.
        others: modules beside the denoiser whose layers carry hooks (text encoders).
        cached: names of the modules that carry a hook of the cache.
    """

    def __init__(self, plan: ComposePlan, conductor: Conductor, route: Route, state: CacheState | None, batched: bool):
        super().__init__()
        self.plan, self.conductor, self.route, self.state = plan, conductor, route, state
        self.batched = batched
        self.merged = plan.method in MERGED and not plan.alone
        self.changes: dict[str, Change] = {}
        self.others: tuple[weakref.ref[nn.Module], ...] = ()
        self.cached: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> ComposeHook:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        own = {key: value for key, value in vars(self).items() if key not in ("others", "fn_ref")}
        twin.__dict__.update(copy.deepcopy(own, memo))
        # Text encoders that are not copied with the denoiser belong to the original.
        parts = [other() for other in self.others]
        twin.others = tuple(weakref.ref(memo[id(part)]) for part in parts if id(part) in memo)
        return twin

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward: Any = self.fn_ref.original_forward
        turn, plan = self.conductor.turn, self.plan
        kwargs, factor = _own_scale(kwargs)
        running = turn.running
        if turn.together or len(running) == 1:
            names = plan.adapters if turn.together else (plan.adapters[running[0]],)
            reuse = not turn.together and bool(turn.cached)
            self._begin(module, (-1,) if turn.together else running, reuse)
            with self.route.on((names,), factor, self.merged):
                return forward(*args, **kwargs)
        outputs: dict[int, Any] = {}
        for group, reuse in ((turn.full, False), (turn.cached, True)):
            outputs |= self._group(module, forward, group, reuse, factor, args, kwargs)
        return mixed([outputs[place] for place in running], [turn.mix[place] for place in running])

    def _group(
        self,
        module: nn.Module,
        forward: Any,
        group: tuple[int, ...],
        reuse: bool,
        factor: float,
        args: tuple,
        kwargs: Any,
    ) -> dict[int, Any]:
        """place -> output of each adapter of a group, all of them whole or all from their caches."""
        names = [(self.plan.adapters[place],) for place in group]
        if len(group) > 1 and self.batched:
            try:
                self._begin(module, group, reuse)
                with self.route.on(tuple(names), factor):
                    many = forward(*repeated(args, len(group)), **repeated(kwargs, len(group)))
                return dict(zip(group, _parts(many, len(group)), strict=True))
            except torch.OutOfMemoryError:
                if self.plan.passes == "batched":
                    raise
                self.batched = False
                warnings.warn("no memory for several adapters in one forward: one after another now", stacklevel=2)
        outputs = {}
        for place, name in zip(group, names, strict=True):
            self._begin(module, (place,), reuse)
            with self.route.on((name,), factor):
                outputs[place] = forward(*args, **kwargs)
        return outputs

    def _begin(self, module: nn.Module, places: Sequence[int], reuse: bool) -> None:
        """Tell the caches whom the pass is for: each adapter finds its own features again."""
        keys = [(self.conductor.branch, place) for place in places]
        if self.state is not None:
            self.state.begin(keys, frozenset({0}) if reuse else frozenset())
        beside = schedule_of(module)
        if beside is not None:
            beside.state.begin(keys, beside.wanted)


def check_adapters(module: nn.Module, plan: ComposePlan, parts: Sequence[nn.Module]) -> None:
    """Refuse a plan whose adapters are not there, or merged into weights.

    Raises:
        AdapterError: names the missing one and the nearest.
    """
    known = list(dict.fromkeys(name for part in (module, *parts) for name in adapter_names(part)))
    for name in plan.adapters:
        if name not in known:
            raise AdapterError(f"no adapter is called '{name}'{hint(name, known) or '; the model has none'}")
    for part in (module, *parts):
        check_unmerged(part)


def _own_scale(kwargs: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """A call's own LoRA scale taken out of its arguments: layers get it with the route."""
    for key in _SCALES:
        given = kwargs.get(key)
        if given and "scale" in given:
            rest = {name: value for name, value in given.items() if name != "scale"}
            return {**kwargs, key: rest or None}, float(given["scale"])
    return kwargs, 1.0


def repeated(value: Any, count: int, name: str = "") -> Any:
    """Arguments of a denoiser for `count` times the batch, each part behind the other."""
    if torch.is_tensor(value):
        return value if value.dim() == 0 or name in _SHARED else torch.cat([value] * count)
    if isinstance(value, dict):
        return {key: repeated(one, count, key) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(repeated(one, count) for one in value)
    return value


def _parts(output: Any, count: int) -> list[Any]:
    """The output of a forward of `count` equal parts, part by part."""
    return [_like(output, part) for part in output[0].chunk(count)]


def _like(output: Any, tensor: torch.Tensor) -> Any:
    return (tensor,) if isinstance(output, tuple) else type(output)(sample=tensor)


def mixed(outputs: Sequence[Any], coefficients: Sequence[float]) -> Any:
    """The weighted sum of predictions, in float32 at least; of one output, that output itself."""
    first = outputs[0][0]
    wide = torch.promote_types(first.dtype, torch.float32)
    total = coefficients[0] * first.to(wide)
    for output, coefficient in zip(outputs[1:], coefficients[1:], strict=True):
        total = total + coefficient * output[0].to(wide)
    return _like(outputs[0], total.to(first.dtype))


def compose_hook(module: Any) -> ComposeHook | None:
    """The composition on this denoiser, or None."""
    from vislr.core.hooks import hook_of

    found = hook_of(unwrapped(module), HOOK_NAME)
    return found if isinstance(found, ComposeHook) else None
