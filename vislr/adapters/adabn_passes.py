"""Computing BatchNorm statistics of a target: exact in passes, or by running averages.

Exact mode: what a BatchNorm sees depends on the statistics of those before it, so its moments are only
right once those are final. The depth of a BatchNorm is the number of BatchNorms on the longest way
to it; all of one depth are measured in one pass, in the order of depth. (One pass over the whole net
measures inputs that no longer occur once the earlier layers have changed.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vislr.adapters.adabn_layer import AdaBnLayer
from vislr.adapters.inject import plain_name
from vislr.core.errors import AdapterError, DataError, hint


@dataclass(frozen=True)
class Adaptation:
    """What `adapt_statistics` did.

    Attributes:
        mode: "exact" or "ema".
        images: images of the target.
        batches: batches that they came in.
        passes: times that the images were read.
        unreached: BatchNorms that the forward never calls: they keep the source's statistics.
    """

    mode: str
    images: int
    batches: int
    passes: int
    unreached: tuple[str, ...]


@torch.no_grad()
def adapt_statistics(model: nn.Module, batches: Iterable[Any], *, name: str | None = None) -> Adaptation:
    """Compute the statistics of an active AdaBN adapter from images of the target, by its config's mode.

    The rest of the model runs in eval mode (no dropout); weights, gamma, beta, the source's statistics and the
    modes of all modules are the same afterwards.

    Args:
        model: carries an adapter made from `AdaBnConfig`, or one that such statistics were added to.
        batches: images (N, C, H, W) as the model takes them; or tuples or lists whose first entry they are (a
            DataLoader of (image, label)); or dicts of the forward's arguments. Moved to the model's
            device. Exact mode reads them once per depth level and must see the same images each time:
            a list or a DataLoader, no generator.
        name: the adapter; None: the one whose statistics are in use.

    Raises:
        AdapterError: no such adapter, it is merged or not active; or, in exact mode, a BatchNorm is fed by
            its own output, so that no exact statistics exist.
        DataError: no images, images of another kind, another number in a later pass, one value a
            channel, or values that are not finite. The adapter's statistics are as they were.
    """
    layers, mode = _layers(model, name)
    before = {site: [tensor.clone() for tensor in _tensors(entry)] for site, entry in layers.items()}
    run = _Run(model, batches, next(iter(layers.values())).statistics.mean.device)
    try:
        with _eval(model):
            result = _exact(run, layers) if mode == "exact" else _ema(run, layers)
        for site, entry in layers.items():
            _check_finite(site, entry.statistics.mean, entry.statistics.var)
    except BaseException:
        for site, entry in layers.items():
            for tensor, old in zip(_tensors(entry), before[site], strict=True):
                tensor.copy_(old)
        raise
    return result


@dataclass(frozen=True)
class _Entry:
    """A layer, and the statistics on it that are computed."""

    layer: AdaBnLayer
    statistics: Any


def _tensors(entry: _Entry) -> tuple[torch.Tensor, ...]:
    return entry.statistics.mean, entry.statistics.var, entry.statistics.count


def _layers(model: nn.Module, name: str | None) -> tuple[dict[str, _Entry], str]:
    found = {plain_name(path): layer for path, layer in model.named_modules() if isinstance(layer, AdaBnLayer)}
    names = {key for layer in found.values() for key in layer.adabn_statistics}
    if not names:
        raise AdapterError("no adapter on the model carries statistics; first vislr.apply(model, vislr.AdaBnConfig())")
    if name is None:
        carried = {layer.carried() for layer in found.values()} - {None}
        name = next(iter(carried), None) or (next(iter(names)) if len(names) == 1 else None)
        if name is None:
            raise AdapterError(f"say which adapter, and switch it on: {', '.join(sorted(names))}")
    if name not in names:
        raise AdapterError(f"adapter '{name}' carries no statistics{hint(name, names)}")
    chosen = {site: layer for site, layer in found.items() if name in layer.adabn_statistics}
    for layer in chosen.values():
        if layer.merged:
            raise AdapterError(f"adapter '{layer.merged_adapters[0]}' is merged into the weights; unmerge it first")
        if layer.carried() != name:
            raise AdapterError(f"adapter '{name}' is not active; switch it on first (set_adapters)")
    mode = next(iter(chosen.values())).configs[name].mode
    return {site: _Entry(layer, layer.statistics(name)) for site, layer in chosen.items()}, mode


@dataclass
class _Run:
    """The model over all batches, counting."""

    model: nn.Module
    source: Iterable[Any]
    device: torch.device
    images: int = 0
    batches: int = 0
    passes: int = 0

    def first(self) -> Any:
        """The first batch, ready for `forward`."""
        return next(self._prepared())[0]

    def forward(self, batch: Any) -> None:
        if isinstance(batch, dict):
            self.model(**batch)
        else:
            self.model(batch)

    def over_all(self, each: Callable[[Any], None]) -> None:
        """Call `each` with every batch, once; the count of images must be that of the last time."""
        images = batches = 0
        for batch, count in self._prepared():
            each(batch)
            images, batches = images + count, batches + 1
        if self.passes and images != self.images:
            raise DataError(f"{self.images} images in the first pass and {images} in a later one; give the same ones")
        self.images, self.batches, self.passes = images, batches, self.passes + 1

    def _prepared(self) -> Iterator[tuple[Any, int]]:
        empty = True
        for batch in self.source:
            if isinstance(batch, Mapping):
                ready: Any = {
                    key: value.to(self.device) if isinstance(value, torch.Tensor) else value
                    for key, value in batch.items()
                }
                first = next((value for value in ready.values() if isinstance(value, torch.Tensor)), None)
            else:
                first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
                first = ready = first.to(self.device) if isinstance(first, torch.Tensor) else None
            if first is None or not first.dim():
                raise DataError(f"a batch is a {type(batch).__name__}; expected a tensor of images (N, C, H, W)")
            if not len(first):
                continue
            empty = False
            yield ready, len(first)
        if empty:
            raise DataError("there are no images to take statistics of")


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in training:
            module.training = flag


def _ema(run: _Run, layers: dict[str, _Entry]) -> Adaptation:
    reached = set()

    def watch(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            reached.add(site)
            _check_several(site, inputs[0].numel() // inputs[0].shape[1])

        return hook

    handles = [entry.layer.register_forward_pre_hook(watch(site)) for site, entry in layers.items()]
    try:
        for entry in layers.values():
            # The flag of the norm alone: timm's carry dropout and activation inside.
            entry.layer.get_base_layer().training = True
        run.over_all(run.forward)
    finally:
        for handle in handles:
            handle.remove()
    return Adaptation("ema", run.images, run.batches, run.passes, tuple(s for s in layers if s not in reached))


def _exact(run: _Run, layers: dict[str, _Entry]) -> Adaptation:
    if isinstance(run.source, Iterator):
        raise DataError("exact statistics read the images several times; give a list or a DataLoader, no iterator")
    depths, calls = _depths(run, layers)
    for depth in sorted(set(depths.values())):
        level = {site: entry for site, entry in layers.items() if depths.get(site) == depth}
        pooled = _measure(run, level, calls)
        for site, entry in level.items():
            _check_several(site, pooled[site].count)
            mean, var = pooled[site].mean, pooled[site].squares / pooled[site].count
            _check_finite(site, mean, var)
            entry.statistics.mean.copy_(mean)
            entry.statistics.var.copy_(var)
            entry.statistics.count.fill_(run.batches)
    return Adaptation("exact", run.images, run.batches, run.passes, tuple(s for s in layers if s not in depths))


class _Depth(TorchDispatchMode):
    """Follows every operation: storage -> most BatchNorms on a way from the input to it.

    By storages and not by autograd's graph, which ends at `detach` and `no_grad` inside of models.
    """

    def __init__(self) -> None:
        super().__init__()
        self.depth: dict[int, int] = {}

    def of(self, values: Any) -> int:
        return max((self.depth.get(key, 0) for key in _storages(values)), default=0)

    def set(self, values: Any, depth: int) -> None:
        self.depth.update(dict.fromkeys(_storages(values), depth))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        depth = self.of((args, kwargs))
        result = func(*args, **(kwargs or {}))
        # A result may lie in memory that was freed, or be an argument changed in place: both are right.
        self.set(result, depth)
        return result


def _storages(values: Any) -> list[int]:
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [leaf.untyped_storage().data_ptr() for leaf in leaves if leaf.layout == torch.strided and leaf.numel()]


def _depths(run: _Run, layers: dict[str, _Entry]) -> tuple[dict[str, int], dict[str, int]]:
    """Depth of every BatchNorm that the forward reaches, and how often it calls it."""
    tracker, calls = _Depth(), dict.fromkeys(layers, 0)
    depths: dict[str, int] = {}

    def enter(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            depth = tracker.of(inputs)
            if depths.setdefault(site, depth) != depth:
                raise AdapterError(
                    f"'{site}' is used at several depths of one forward: it has no exact statistics; use mode 'ema'"
                )
            calls[site] += 1

        return hook

    def leave(site: str) -> Callable[..., None]:
        return lambda module, inputs, output: tracker.set(output, depths[site] + 1)

    handles = [entry.layer.register_forward_pre_hook(enter(site)) for site, entry in layers.items()]
    handles += [entry.layer.register_forward_hook(leave(site)) for site, entry in layers.items()]
    try:
        batch = run.first()
        with tracker:
            run.forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return depths, calls


class _Enough(Exception):
    """Every BatchNorm of the level has been seen: the rest of this forward is not needed."""


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations, joined in float64: the order does not matter."""

    count: int = 0
    mean: torch.Tensor | float = 0.0
    squares: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor) -> None:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = x.numel() // x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # On the CPU, as not every device has float64.
        var, mean = (part.cpu().double() for part in torch.var_mean(wide, axes, correction=0))
        total, step = self.count + count, mean - self.mean
        self.squares = self.squares + var * count + step.square() * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total


def _measure(run: _Run, level: dict[str, _Entry], calls: dict[str, int]) -> dict[str, _Moments]:
    """Moments of what the BatchNorms of one level are given, over all images."""
    pooled = {site: _Moments() for site in level}
    expected = sum(calls[site] for site in level)
    seen = 0

    def watch(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal seen
            pooled[site].add(inputs[0])
            seen += 1
            if seen == expected:
                raise _Enough

        return hook

    def each(batch: Any) -> None:
        nonlocal seen
        seen = 0
        with suppress(_Enough):
            run.forward(batch)

    handles = [entry.layer.register_forward_pre_hook(watch(site)) for site, entry in level.items()]
    try:
        run.over_all(each)
    finally:
        for handle in handles:
            handle.remove()
    return pooled


def _check_several(site: str, count: int) -> None:
    if count < 2:
        raise DataError(f"'{site}' gets one value a channel: a variance needs more images, or larger ones")


def _check_finite(site: str, mean: Any, var: Any) -> None:
    if not (torch.isfinite(mean).all() and torch.isfinite(var).all()):
        raise DataError(f"the images give '{site}' values that are not finite")
