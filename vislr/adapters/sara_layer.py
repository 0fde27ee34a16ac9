"""The layer under SaRA: a sparse set of its own weight's entries is trained in place.

Source: SaRA (arXiv 2409.06633), section 4 and equations 6 and 7. The weight of the base layer holds the
current values; the leaf parameter is a vector of n trained values, so gradient and optimiser state have n
entries too. In a forward that needs a gradient the base layer runs with an alias of its own weight: no
copy, but a node of the graph whose backward keeps only the gathered n entries of the dense gradient. The
engine runs that node right after the layer's own backward, so one dense gradient is alive at a time.

Index space of a layer: the weight's entries in row-major order, then the bias's.

Who writes the vector into the weight: a hook that torch calls after every optimiser's step
(`vislr.adapters.sara_steps`), the methods here that change what is active, and, outside of compiled
graphs, the forward itself if a vector has changed in another way (a checkpoint loaded, a value set). The
hook is no part of the forward: compiled graphs only read the weight, and optimisers whose kernels write
past torch's version counters are covered.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.func import functional_call

from vislr.core.errors import AdapterError, FormatError

# Every layer that is alive: the optimiser hooks look here for the owners of the vectors they step.
LIVE: weakref.WeakSet[SaraLayer] = weakref.WeakSet()
INDEX_LIMIT = 2**31 - 1


@dataclass
class Entries:
    """The sparse set of one adapter on one layer, and how it is trained.

    Attributes:
        index: (n,) int32, increasing, every entry that the adapter changes.
        cut: how many of them belong to the weight; the others are the bias's.
        base: (n,) the base's values there.
        threshold: magnitude below which an entry is trained on at the re-selection.
        rank_weight: factor of the nuclear-norm term.
        rank_matrices: matrices that get it in a step; None: all.
        reselect_after: optimiser steps before the re-selection; None: none.
        trained: (k,) int32, the part of `index` that the vector trains; `index` itself at first.
        kept: (k,) int64, places of `trained` in `index`; None before a re-selection.
        frozen: (n,) learned values of all entries at the re-selection; None before it.
        steps: optimiser steps so far, for optimisers that do not count them.
        trained_cut: how many trained entries belong to the weight.
        resizable: whoever shares the vector's gradients among processes minds no shorter ones; DistributedDataParallel
            does, and so it is not assumed.
    """

    index: torch.Tensor
    cut: int
    base: torch.Tensor
    threshold: float
    rank_weight: float
    rank_matrices: int | None
    reselect_after: int | None
    trained: torch.Tensor
    kept: torch.Tensor | None = None
    frozen: torch.Tensor | None = None
    steps: int = 0
    resizable: bool = False
    trained_cut: int = field(init=False)

    def __post_init__(self) -> None:
        self.trained_cut = self.cut

    def move(self, fn: Any) -> None:
        """Follow the layer to another device or dtype."""
        same = self.trained is self.index
        self.index, self.base = fn(self.index), fn(self.base)
        self.trained = self.index if same else fn(self.trained)
        self.kept = None if self.kept is None else fn(self.kept)
        self.frozen = None if self.frozen is None else fn(self.frozen)


def gather(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of a tensor at row-major positions `index`, without a copy of the tensor in any layout."""
    if tensor.is_contiguous():
        return tensor.reshape(-1).index_select(0, index)
    return tensor[torch.unravel_index(index.long(), tensor.shape)]


def scatter_(tensor: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Set the entries at row-major positions `index`, in any layout; rounds to the tensor's dtype."""
    values = values.to(tensor.dtype)
    if tensor.is_contiguous():
        tensor.view(-1)[index.long()] = values
    else:
        tensor[torch.unravel_index(index.long(), tensor.shape)] = values


class _Held(torch.autograd.Function):
    """Weight and bias as functions of the vector: aliases forward, the gathered gradient backward."""

    @staticmethod
    def forward(ctx: Any, values: Any, index: Any, cut: int, size: int, scale: float, *parts: Any) -> Any:
        ctx.save_for_backward(index)
        ctx.cut, ctx.size, ctx.scale, ctx.dtype = cut, size, scale, values.dtype
        return tuple(part.detach() for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (index,) = ctx.saved_tensors
        pieces = []
        if ctx.cut:
            pieces.append(gather(grads[0], index[: ctx.cut]))
        if ctx.cut < len(index):
            pieces.append(gather(grads[-1], index[ctx.cut :] - ctx.size))
        sparse = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(ctx.dtype)
        passed = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[5:], strict=True)]
        return (sparse * ctx.scale if ctx.scale != 1 else sparse, None, None, None, None, *passed)


class SaraLayer(nn.Module, BaseTunerLayer):
    """A layer with a weight (and a bias), and sparse adapters that live inside them.

    Several adapters: every entry is base + sum of scale * (value - base), computed in float64 and rounded
    once. One adapter at scale 1: its values themselves.

    Attributes:
        base_layer: what was there before; any layer, or a tuner layer of another kind.
        sara_values: adapter name -> trained vector (k,), float32 (float64 on a float64 layer).
        entries: adapter name -> Entries.
        scaling: adapter name -> weight of its change, 1 as trained.
    """

    # Its change is in the base layer's weight itself.
    in_weight = True
    adapter_layer_names = ("sara_values",)
    other_param_names = ("scaling", "entries")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.sara_values = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.entries: dict[str, Entries] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self._off = False
        # (name, scale, version of the vector) of what the weight holds now.
        self._written: tuple[tuple[str, float, int], ...] = ()
        # The weight's entries as they were written; None: as the vectors say, if their versions are those of then.
        self._held: torch.Tensor | None = None
        LIVE.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies and unpickled layers: their vectors count versions anew.
        super().__setstate__(state)
        self._written = tuple((name, scale, -1) for name, scale, _ in self._written)
        LIVE.add(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Models read `eps`, `out_features`, ... of their layers.
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.get_base_layer(), name)

    def _apply(self, fn: Any, recurse: bool = True) -> SaraLayer:
        # Not buffers: DistributedDataParallel would send them around at every step.
        super()._apply(fn, recurse)
        self._held = None
        for entries in self.entries.values():
            entries.move(fn)
        return self

    # `adapters_off` of the trainer and peft's `disable_adapter` set this attribute and no more.
    @property
    def _disable_adapters(self) -> bool:
        return self._off

    @_disable_adapters.setter
    def _disable_adapters(self, value: bool) -> None:
        self._off = value
        self.sync()

    def prefix(self) -> str:
        """Where the layer itself is below `base_layer`, if other kinds lie between: "" or "base_layer."..."""
        depth = 0
        layer: Any = self.base_layer
        while isinstance(layer, BaseTunerLayer):
            depth, layer = depth + 1, layer.base_layer  # type: ignore[attr-defined]
        return "base_layer." * depth

    def parts(self) -> dict[str, torch.Tensor]:
        """The live "weight", and "bias" if there is one."""
        own = self.get_base_layer()._parameters
        return {key: own[key] for key in ("weight", "bias") if own.get(key) is not None}  # type: ignore[misc]

    def add(self, name: str, index: torch.Tensor, config: Any) -> None:
        """Put an adapter on: nothing of the weight changes.

        Args:
            index: (n,) int32, increasing, in the layer's index space.
        """
        self._restore()
        parts = self.parts()
        size = parts["weight"].numel()
        cut = int((index < size).sum())
        base = self._gathered(index, cut, {key: part.detach() for key, part in parts.items()})
        self.entries[name] = Entries(
            index, cut, base, float(config.threshold or 0.0), config.rank_weight, config.rank_matrices,
            config.reselect_after, index,
        )  # fmt: skip
        wide = torch.promote_types(parts["weight"].dtype, torch.float32)
        self.sara_values[name] = nn.Parameter(base.to(wide, copy=True))
        self.scaling[name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer with the weight as it stands, differentiable in the vectors of active adapters."""
        if not torch.compiler.is_compiling():
            self.sync()
        live = [] if self._off or not torch.is_grad_enabled() else self._live()
        if not live:
            return self.base_layer(x, *args, **kwargs)
        parts = self.parts()
        size = parts["weight"].numel()
        held: dict[str, torch.Tensor] = {}
        for name in live:
            entries = self.entries[name]
            cut = entries.trained_cut
            keys = [key for key, used in (("weight", cut > 0), ("bias", cut < len(entries.trained))) if used]
            given = [held.get(key, parts[key]) for key in keys]
            if given:
                outputs = _Held.apply(self.sara_values[name], entries.trained, cut, size, self.scaling[name], *given)
                held.update(zip(keys, outputs, strict=True))
        swapped = {self.prefix() + key: part for key, part in held.items()}
        return functional_call(self.base_layer, swapped, (x, *args), kwargs, tie_weights=False)

    def _live(self) -> list[str]:
        names = [name for name in self.active_adapters if name in self.entries and name not in self.merged_adapters]
        return [name for name in names if self.sara_values[name].requires_grad]

    # What the weight holds.

    def _wanted(self) -> tuple[tuple[str, float, int], ...]:
        active = [] if self._off else self.active_adapters
        names = dict.fromkeys([*self.merged_adapters, *active])
        return tuple(
            (name, self.scaling[name], _version(self.sara_values[name])) for name in names if name in self.entries
        )

    def sync(self) -> None:
        """Write into the weight what is active, if anything has changed since it was last written."""
        if self._wanted() != self._written:
            self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Write into the weight what is active now."""
        wanted = self._wanted()
        now, before = [part[:2] for part in wanted], [part[:2] for part in self._written]
        parts = self.parts()
        if not parts["weight"].is_meta:
            if now == before and len(now) == 1 and now[0][1] == 1:
                # An optimiser's step: the same entries, with other values.
                entries = self.entries[now[0][0]]
                self._scattered(entries.index, entries.cut, parts, self.current(now[0][0]))
                self._held = None
            else:
                self._held = self._put(parts, now)
        self._written = wanted

    @torch.no_grad()
    def _restore(self) -> None:
        parts = self.parts()
        if not parts["weight"].is_meta:
            self._put(parts, [])
        self._written, self._held = (), None

    @torch.no_grad()
    def tensors_with(self, names: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """Copies of "weight" and "bias" as they are with these adapters in; with none, the base bit for bit."""
        copies = {key: part.detach().clone() for key, part in self.parts().items()}
        self._put(copies, [(name, self.scaling[name]) for name in names])
        return copies

    @torch.no_grad()
    def restored(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of `weight`, which holds what is written now, with the base's entries in their places."""
        copy = weight.detach().clone()
        for name, *_ in self._written:
            entries = self.entries[name]
            scatter_(copy, entries.index[: entries.cut], entries.base[: entries.cut])
        return copy

    def current(self, name: str) -> torch.Tensor:
        """(n,) the values of all entries of an adapter, frozen ones included."""
        entries, values = self.entries[name], self.sara_values[name].detach()
        if entries.kept is None or entries.frozen is None:
            return values
        full = entries.frozen.clone()
        full[entries.kept] = values
        return full

    def _put(self, parts: dict[str, torch.Tensor], now: Sequence[tuple[str, float]]) -> torch.Tensor | None:
        """Bring what `_written` says is in `parts` to `now`; what another kind has merged there since stays.

        Returns:
            the entries without what another kind has merged.
        """
        if not self.entries:
            return None
        union, place = torch.unique(torch.cat([e.index.long() for e in self.entries.values()]), return_inverse=True)
        places = dict(zip(self.entries, place.split([len(e.index) for e in self.entries.values()]), strict=True))
        dtype, cut = parts["weight"].dtype, int((union < parts["weight"].numel()).sum())
        wanted = own = self._values(len(union), places, now).to(dtype)
        if all(seen in (-1, _version(self.sara_values[name])) for name, _, seen in self._written):
            expected = self._held
            if expected is None:
                expected = self._values(len(union), places, [part[:2] for part in self._written]).to(dtype)
            found = self._gathered(union, cut, parts)
            carried = (wanted.double() + (found.double() - expected.double())).to(dtype)
            wanted = torch.where(found == expected, wanted, carried)
        self._scattered(union, cut, parts, wanted)
        return own

    def _values(self, count: int, places: dict[str, torch.Tensor], now: Sequence[tuple[str, float]]) -> torch.Tensor:
        """(count,) float64: every entry of any adapter with these in it."""
        result = torch.empty(count, dtype=torch.float64, device=next(iter(places.values())).device)
        for name, place in places.items():
            result[place] = self.entries[name].base.double()
        if len(now) == 1 and now[0][1] == 1:
            result[places[now[0][0]]] = self.current(now[0][0]).double()
            return result
        for name, scale in now:
            change = scale * (self.current(name).double() - self.entries[name].base.double())
            result.index_add_(0, places[name], change)
        return result

    def _gathered(self, index: torch.Tensor, cut: int, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        pieces = [gather(parts["weight"], index[:cut])]
        if cut < len(index):
            pieces.append(gather(parts["bias"], index[cut:] - parts["weight"].numel()))
        return torch.cat(pieces)

    def _scattered(self, index: torch.Tensor, cut: int, parts: dict[str, torch.Tensor], values: torch.Tensor) -> None:
        scatter_(parts["weight"], index[:cut], values[:cut])
        if cut < len(index) and "bias" in parts:
            scatter_(parts["bias"], index[cut:] - parts["weight"].numel(), values[cut:])

    @torch.no_grad()
    def reselect(self, name: str) -> torch.Tensor:
        """Train on only what is still below the threshold; the other entries stay at their learned values.

        The weight does not change. The vector stays the same Parameter, shorter.

        Returns:
            (k,) int64, places in the old vector of what is trained on.
        """
        entries, vector = self.entries[name], self.sara_values[name]
        keep = (vector.detach().float().abs() < entries.threshold).nonzero().flatten()
        entries.frozen = self.current(name).clone()
        entries.kept = keep if entries.kept is None else entries.kept[keep]
        entries.trained = entries.trained[keep]
        entries.trained_cut = int((entries.kept < entries.cut).sum())
        resize_(vector, vector.detach()[keep])
        self.write_back()
        return keep

    # Switches and scales, with the meaning that peft's layers give these names.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters active: the weight holds them and no others."""
        super().set_adapter(adapter_names, inference_mode)
        self.sync()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Weight an adapter's change; 1 is as trained, 0 is the base."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale
            self.sync()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.set_scale(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Take `scale_layer(scale)` back; None: back to 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.set_scale(name, 1.0 if scale is None else self.scaling[name] / scale)

    def delete_adapter(self, adapter_name: str) -> None:
        """Write the base's entries back, bit for bit, and forget the adapter.

        Raises:
            AdapterError: it is merged.
        """
        if adapter_name in self.merged_adapters:
            raise AdapterError(f"adapter '{adapter_name}' is merged into the weights; unmerge (unfuse_lora) it first")
        self._restore()
        super().delete_adapter(adapter_name)
        self.sync()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make adapters part of the weight for good: they stay in whatever is active or off after.

        Args:
            safe_merge: refuse values that are not finite.
            adapter_names: which; None: the active ones.

        Raises:
            AdapterError: `safe_merge` found a value that is not finite; nothing is changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.entries]
        for name in names:
            if safe_merge and not torch.isfinite(self.sara_values[name]).all():
                raise AdapterError(f"adapter '{name}' has weights that are not finite; nothing was merged")
        self.merged_adapters += names
        self.sync()

    def unmerge(self) -> None:
        """Take merged adapters out again, bit for bit, where they are not active."""
        self.merged_adapters = []
        self.sync()

    # Files.

    def file_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Suffix -> tensor, as the `vislr` format stores adapter `name`.

        The change is stored in float64: in float32, base + change would not always be the trained value.
        """
        entries = self.entries[name]
        tensors = {
            "sara_index": entries.index,
            "sara_delta": self.current(name).double() - entries.base.double(),
            "sara_shape": torch.tensor(self.parts()["weight"].shape, dtype=torch.int64),
        }
        return tensors if entries.kept is None else {**tensors, "sara_kept": entries.kept.to(torch.int32)}

    def check_file_tensors(self, tensors: dict[str, torch.Tensor], site: str) -> None:
        """Refuse a file's tensors that do not fit this layer.

        Raises:
            FormatError: names the key, what it is and what was expected.
        """
        for suffix in ("sara_index", "sara_delta", "sara_shape"):
            if suffix not in tensors:
                raise FormatError(f"the file lacks '{site}.{suffix}'")
        parts = self.parts()
        shape, total = tuple(parts["weight"].shape), sum(part.numel() for part in parts.values())
        if tuple(tensors["sara_shape"].flatten().tolist()) != shape:
            given = tuple(tensors["sara_shape"].flatten().tolist())
            raise FormatError(f"'{site}.sara_shape' is {given}; the layer's weight has shape {shape}")
        if tensors["sara_delta"].shape != tensors["sara_index"].shape:
            given, wanted = tuple(tensors["sara_delta"].shape), tuple(tensors["sara_index"].shape)
            raise FormatError(f"'{site}.sara_delta' has shape {given}, its index {wanted}")
        _check_places(tensors["sara_index"], total, f"'{site}.sara_index'")
        if "sara_kept" in tensors:
            _check_places(tensors["sara_kept"], len(tensors["sara_index"]), f"'{site}.sara_kept'")

    @torch.no_grad()
    def load_file_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Take entries and values of `file_tensors` instead of those selected here; the scale goes back to 1."""
        self._restore()
        entries, vector = self.entries[name], self.sara_values[name]
        device = vector.device
        parts = {key: part.detach() for key, part in self.parts().items()}
        entries.index = entries.trained = tensors["sara_index"].to(device)
        entries.cut = entries.trained_cut = int((entries.index < parts["weight"].numel()).sum())
        entries.base = self._gathered(entries.index, entries.cut, parts)
        values = (entries.base.double() + tensors["sara_delta"].to(device).double()).to(vector.dtype)
        entries.kept = entries.frozen = None
        if "sara_kept" in tensors:
            entries.kept, entries.frozen = tensors["sara_kept"].to(device).long(), values
            entries.trained = entries.index[entries.kept]
            entries.trained_cut = int((entries.kept < entries.cut).sum())
            values = values[entries.kept]
        resize_(vector, values)
        self.scaling[name] = 1.0
        self.sync()

    def extra_repr(self) -> str:
        return f"adapters={ {name: len(entries.trained) for name, entries in self.entries.items()} }"


def unmerged_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Key in the state dict -> a copy of each weight and bias under SaRA, with merged adapters in and no others."""
    return {
        f"{path}.base_layer.{layer.prefix()}{key}": tensor
        for path, layer in module.named_modules()
        if isinstance(layer, SaraLayer)
        for key, tensor in layer.tensors_with(layer.merged_adapters).items()
    }


def resize_(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Give the same Parameter other values of another length."""
    parameter.grad = None
    # A graph of the last step may still be alive and with it the node that expects gradients of the old
    # length; torch makes a new one when the dtype changes.
    other = torch.float16 if values.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=values.device)
    parameter.data = values


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _check_places(index: torch.Tensor, total: int, what: str) -> None:
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise FormatError(f"{what} is {index.dtype} of shape {tuple(index.shape)}; expected a vector of int32")
    if len(index) and (int(index[0]) < 0 or int(index[-1]) >= total or not bool((index[1:] > index[:-1]).all())):
        raise FormatError(f"{what} is not increasing within 0 .. {total - 1}")
