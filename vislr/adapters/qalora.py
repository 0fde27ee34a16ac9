"""QALoRA: a low-rank update that is merged into a quantised weight before it is rounded.

Source: EfficientDM (arXiv 2310.03270), equation 6, for linears and convs. Shapes: weight (Co, Cg, *K), rank r::

    A (r, Cg, *K)    B (Co, r, 1...)    delta[o, i, *k] = sum_r B[o, r] A[r, i, *k]      (no alpha / r)
    codes' = clip(codes + round(delta / scale), 0, L)      weight = (codes' - zero) * scale

So the update is not additive: one adapter is active at a time, at weight 1. Beside A and B it trains the
weight's scales (one an output) and the input's step sizes and zeros (one a timestep, TALSQ); it holds all of them
itself, so that one file is the whole fine-tune of a quantised base. Merged, the base's codes and scales are the
adapter's: an ordinary quantised layer.

In files: `.qalora_A`, `.qalora_B`, `.alpha` (= r), `.qalora_scale` (Co,), `.qalora_input_scale` (T,),
`.qalora_input_zero` (T,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from vislr.adapters.layer import DeltaTuner, chain
from vislr.adapters.targets import innermost, modules_outside, select_names
from vislr.core.errors import AdapterError
from vislr.core.quantizing import holds_codes

PEFT_TYPE = "QALORA"
_SCALES = ("qalora_scale", "qalora_input_scale", "qalora_input_zero")
_FORWARDED = frozenset(
    ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
     "groups", "padding_mode", "weight", "bias")
)  # fmt: skip


@dataclass
class QALoraConfig(PeftConfig):
    """Config of a QALoRA adapter.

    Attributes:
        r: rank, at least 1 (the paper: 32).
        target_modules: list of names or their endings, or a regular expression over whole names, of quantised
            layers; None: those of fewer than 8 bits, or all if there are none.
        exclude_modules: list or expression of names to leave alone.
        scales: names of quantised layers of which only the weight's scales are trained.
        sites: exact names of the layers; filled in when the adapter goes on.

    Raises:
        AdapterError: the rank is no whole number of at least 1.
    """

    r: int = 32
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    scales: list[str] = field(default_factory=list)
    sites: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise AdapterError(f"rank r is {self.r!r}; expected a whole number of at least 1")

    def resolve(self, model: nn.Module) -> Sites:
        """The quantised layers that the adapter goes on; changes nothing.

        Raises:
            TargetError: a pattern matches no quantised layer.
            AdapterError: the model has none, or one cannot carry the adapter.
        """
        layers = {name: innermost(module) for name, module in modules_outside(model).items()}
        codes: dict[str, Any] = {name: layer for name, layer in layers.items() if holds_codes(layer)}
        if not codes:
            raise AdapterError(
                f"this {type(model).__name__} has no quantised layer; QALoRA goes on one: apply a QuantPlan first"
            )
        names = list(codes)
        if self.sites:
            chosen = set(self.sites)
            missing = chosen.difference(names)
            if missing:
                raise AdapterError(f"the adapter has weights for '{min(missing)}', which is no quantised layer here")
        elif self.target_modules is None:
            few = {name for name in names if codes[name].spec.bits < 8}
            chosen = few or set(names)
        else:
            chosen = select_names(self.target_modules, names, "target")
        chosen |= set(self.scales) & set(names)
        if self.exclude_modules:
            chosen -= select_names(self.exclude_modules, names, "exclude_modules")
        sites = [name for name in names if name in chosen]
        for name in sites:
            spec = codes[name].spec
            if spec.group is not None or spec.format != "uniform":
                raise AdapterError(f"'{name}' has scales by group or no steps of one size; QALoRA needs one a row")
        if not sites:
            raise AdapterError("no quantised layer is left to adapt")
        return Sites(sites)


@dataclass(frozen=True)
class Sites:
    """What a config resolves to: `inject` reads `index` and `notes`."""

    index: list[str]

    def notes(self) -> tuple[str, ...]:
        """Nothing that the report would not say."""
        return ()


def delta_weight(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """sum_r B[:, r] A[r]: A (r, Cg, *K), B (Co, r, 1...) -> (Co, Cg, *K), the kernel of the two convs in a row."""
    return (B.flatten(1) @ A.flatten(1)).reshape(B.shape[0], *A.shape[1:])


class QALoraLayer(nn.Module, BaseTunerLayer):
    """A quantised linear or conv and its QALoRA adapters, of which at most one is active.

    Attributes:
        base_layer: the quantised layer.
        r: rank by adapter; 0 where only the weight's scales are trained.
    """

    adapter_layer_names = ("qalora_A", "qalora_B", *_SCALES)
    other_param_names = ("r",)

    def __init__(self, base_layer: nn.Module, name: str, config: Any, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())
        self.r: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = name
        self._base_state: dict[str, torch.Tensor | None] = {}
        self.add(name, config, rank)

    def add(self, name: str, config: Any, rank: int) -> None:
        """Make the tensors of an adapter that changes nothing: B 0, scales the base's."""
        base: Any = self.get_base_layer()
        place: dict[str, Any] = {"device": base.codes.device, "dtype": torch.float32}
        self.r[name] = rank
        holder: Any = self
        if rank:
            A = torch.empty(rank, *base.shape[1:], **place)
            torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            holder.qalora_A[name] = nn.Parameter(A)
            holder.qalora_B[name] = nn.Parameter(torch.zeros(base.rows, rank, *(1,) * (len(base.shape) - 2), **place))
        holder.qalora_scale[name] = nn.Parameter(base.weight_scale[:, 0].clone())
        if rank and base.input_scale is not None:
            holder.qalora_input_scale[name] = nn.Parameter(base.input_scale.clone())
            holder.qalora_input_zero[name] = nn.Parameter(base.input_zero.float())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def __getattr__(self, name: str) -> Any:
        if name in _FORWARDED:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = {id(p): p.data for own in _SCALES for p in getattr(self, own).values()}
        super()._apply(fn, recurse)
        for own in _SCALES:
            for parameter in getattr(self, own).values():
                if parameter.dtype != torch.float32 and id(parameter) in kept:
                    parameter.data = kept[id(parameter)].to(parameter.device)
        return self

    def in_use(self) -> str | None:
        """The adapter that the forward merges; None: the base's own codes run."""
        if self.disable_adapters or self.merged:
            return None
        return next((name for name in self.active_adapters if name in self.r), None)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer with the active adapter merged before quantising."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        name = self.in_use()
        if name is None:
            return self.base_layer(x, *args, **kwargs)
        return self.base_layer(
            x,
            delta=self.delta(name),
            weight_scale=self.qalora_scale[name][:, None],
            input_scale=self._of("qalora_input_scale", name),
            input_zero=self._of("qalora_input_zero", name),
        )

    def _of(self, attribute: str, name: str) -> Any:
        return getattr(self, attribute).get(name, None)

    def delta(self, name: str) -> torch.Tensor:
        """The update of the weight, before rounding; float32, shape of the weight."""
        if not self.r[name]:
            base: Any = self.get_base_layer()
            return torch.zeros(base.shape, device=base.codes.device)
        return delta_weight(self.qalora_A[name].float(), self.qalora_B[name].float())

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """peft's name for `delta`."""
        return self.delta(adapter)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters active.

        Raises:
            AdapterError: two of them are of this layer: updates that are merged before rounding do not add.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        own = [name for name in names if name in self.r]
        if len(own) > 1:
            raise AdapterError(f"'{own[0]}' and '{own[1]}' are both QALoRA; only one can be active")
        super().set_adapter(names, inference_mode=inference_mode)

    # peft and diffusers call these on every layer; the update is merged whole or not at all.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Refuse any weight but 1."""
        if adapter in self.r and scale != 1:
            raise AdapterError(f"'{adapter}' is QALoRA, which has no weight but 1; given {scale}")

    def scale_layer(self, scale: float) -> None:
        """Refuse any weight but 1."""
        for name in self.active_adapters:
            self.set_scale(name, scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Nothing: the weight is 1."""

    # Merging: codes and scales of the base become the adapter's.

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Make the base's codes and scales those that the forward computed with; `unmerge` puts its own back.

        Raises:
            AdapterError: a second adapter, or with `safe_merge` values that are not finite; nothing is changed.
        """
        chosen = check_adapters_to_merge(self, None if adapter_names is None else list(adapter_names))
        names = [name for name in chosen if name in self.r]
        if not names:
            return
        if len(names) + len(self.merged_adapters) > 1:
            raise AdapterError(f"'{names[-1]}' would be the second QALoRA in the weight; unmerge the first")
        base: Any = self.get_base_layer()
        name = names[0]
        delta, scale = self.delta(name), self.qalora_scale[name].detach()
        if safe_merge and not (torch.isfinite(delta).all() and torch.isfinite(scale).all()):
            raise AdapterError(f"adapter '{name}' has weights that are not finite; nothing was merged")
        self._base_state = dict(base._buffers)
        base.set_codes(base.merged(delta, scale[:, None]), scale[:, None], base.weight_zero)
        if name in self.qalora_input_scale:
            base.set_input(self.qalora_input_scale[name], self.qalora_input_zero[name])
        self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's own codes and scales back, bit for bit."""
        base: Any = self.get_base_layer()
        for key, value in self._base_state.items():
            base._buffers[key] = None if value is None else value.to(base.codes.device)
        base.forget()
        self._base_state, self.merged_adapters = {}, []

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter's tensors off this layer.

        Raises:
            AdapterError: it is merged.
        """
        if adapter_name in self.merged_adapters:
            raise AdapterError(f"adapter '{adapter_name}' is merged into the weights; unmerge (unfuse_lora) it first")
        super().delete_adapter(adapter_name)

    # Files.

    def file_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Suffix -> tensor, as the `vislr` format stores them."""
        held = {part: getattr(self, part) for part in self.adapter_layer_names}
        found = {part: holder[name].detach() for part, holder in held.items() if name in holder}
        if not self.r[name]:
            # Factors of rank 0 tell every reader that the weight's update is 0.
            base: Any = self.get_base_layer()
            found["qalora_A"] = torch.zeros(0, *base.shape[1:])
            found["qalora_B"] = torch.zeros(base.rows, 0, *(1,) * (len(base.shape) - 2))
        return found | {"alpha": torch.tensor(float(self.r[name]))}

    @torch.no_grad()
    def load_file_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Take the values of `file_tensors`."""
        for part, tensor in tensors.items():
            holder = getattr(self, part, {})
            if name in holder:
                holder[name].copy_(tensor)


class QALoraModel(DeltaTuner):
    """peft's tuner of QALoRA."""

    prefix: str = "qalora_"
    tuner_layer_cls = QALoraLayer  # type: ignore[assignment]

    def _resolve(self, model: nn.Module, config: Any) -> list[str]:
        return config.resolve(model).index

    def _place(self, layer: Any, name: str, site: str, parent: nn.Module, attribute: str, target: nn.Module) -> None:
        config: Any = self.peft_config[name]
        rank = 0 if site in config.scales else config.r
        if layer is None:
            # The update goes into the quantised layer itself: below whatever else is on it.
            inner: Any = list(chain(target))
            if len(inner) > 1:
                raise AdapterError(f"another adapter is on '{site}'; put QALoRA on first, then others around it")
            self._replace_module(parent, attribute, QALoraLayer(target, name, config, rank), target)
        else:
            layer.add(name, config, rank)


def scale_means(module: nn.Module, name: str) -> dict[str, float]:
    """Site -> mean of the weight's scales of an adapter: EfficientDM's measure of how far an update must reach."""
    found = {}
    for path, layer in module.named_modules():
        if isinstance(layer, QALoraLayer) and name in layer.r:
            found[path.replace(".base_layer", "")] = float(layer.qalora_scale[name].detach().mean())
    return found
