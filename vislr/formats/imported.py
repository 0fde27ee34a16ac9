"""The layer that computes with a file's own tensors: every kind that is no plain LoRA, on any layer.

peft's layers hold one kind of adapter a name; files of LyCORIS mix kinds under one, add changes of norms and
biases, and use forms that peft lacks. Here each layer keeps the canonical tensors of its `Entry`, and the
change of its weight is `Entry.delta`. LoRA keeps its two products; other kinds make the change and add it.

DoRA: the weight of the adapter (`set_adapters`) mixes W and W', so 0 is the base, exactly, and 1 the file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from torch.func import functional_call

from vislr.adapters.geometry import Geometry, geometry_of, why_not
from vislr.adapters.layer import DeltaLayer, DeltaTuner, chain, delta_dtype
from vislr.adapters.targets import check_shared, innermost, modules_outside
from vislr.core.errors import AdapterError, FormatError, hint
from vislr.formats import algebra
from vislr.formats.canonical import KINDS, Entry

PEFT_TYPE = "IMPORTED"
_INTEGER = {"sara_index": torch.int32, "sara_shape": torch.int64, "sara_kept": torch.int32}
ATTACHED_KINDS = ("lora", "loha", "lokr", "diff", "norm", "convlora", "flora", "sara")


@dataclass(frozen=True)
class _Sites:
    index: tuple[str, ...]

    def notes(self) -> tuple[str, ...]:
        return ()


@dataclass
class ImportedConfig(PeftConfig):
    """What an imported adapter is made of; written by the loader, not by hand.

    Attributes:
        kinds: layer -> kind.
        shapes: layer -> suffix -> shape of the tensor.
        sites: exact names of the layers, the keys of `kinds`.
        target_modules, exclude_modules: peft looks for them; not used.

    Raises:
        AdapterError: kinds or suffixes that no layer can have.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    sites: list[str] | None = field(default=None)
    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if set(self.kinds) != set(self.shapes):
            raise AdapterError("kinds and shapes of an imported adapter name different layers")
        for site, kind in self.kinds.items():
            if kind not in ATTACHED_KINDS:
                raise AdapterError(
                    f"'{site}' is of kind '{kind}', which cannot be attached{hint(kind, ATTACHED_KINDS)}"
                )
            for suffix, shape in self.shapes[site].items():
                good = isinstance(shape, list) and len(shape) <= 6 and all(type(n) is int and n >= 0 for n in shape)
                if suffix not in KINDS[kind] or not good:
                    raise AdapterError(f"'{site}' of kind '{kind}' has '{suffix}' of shape {shape}")

    @classmethod
    def of(cls, entries: dict[str, Entry]) -> ImportedConfig:
        """The config for these layers of one model: name -> entry."""
        return cls(
            kinds={site: entry.kind for site, entry in entries.items()},
            shapes={site: {k: list(t.shape) for k, t in entry.tensors.items()} for site, entry in entries.items()},
        )

    def resolve(self, model: nn.Module) -> _Sites:
        """The layers, checked against the model.

        Raises:
            AdapterError: a layer is not there, or cannot take a change of this kind; names it.
        """
        modules = modules_outside(model)
        for site, kind in self.kinds.items():
            if site not in modules:
                raise AdapterError(f"this {type(model).__name__} has no layer '{site}'{hint(site, modules)}")
            _check_layer(innermost(modules[site]), site, kind, self.shapes[site])
        check_shared(model, list(self.kinds))
        self.sites = list(self.kinds)
        return _Sites(tuple(self.sites))


def _is_norm(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and "norm" in type(layer).__name__.lower()


def _check_layer(layer: Any, site: str, kind: str, shapes: dict[str, list[int]]) -> None:
    norm = _is_norm(layer)
    if not norm and why_not(layer):
        raise AdapterError(f"cannot adapt '{site}', a {type(layer).__name__}: it {why_not(layer)}")
    if norm != (kind == "norm") and kind not in ("diff", "sara"):
        raise AdapterError(f"the file has a '{kind}' change for '{site}', a {type(layer).__name__}")
    weight: Any = layer.weight
    bias: Any = getattr(layer, "bias", None)
    if any(suffix in shapes for suffix in ("diff_b", "b_norm")) and bias is None:
        raise AdapterError(f"the file changes the bias of '{site}', which has none")
    for suffix in ("diff_b", "b_norm"):
        if suffix in shapes and tuple(shapes[suffix]) != tuple(bias.shape):
            given = tuple(shapes[suffix])
            raise AdapterError(f"'{site}.{suffix}' has shape {given}; the bias has {tuple(bias.shape)}")
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items() if key != "alpha"}
    if kind == "sara":
        return  # its shape is a tensor: checked with the values
    try:
        Entry(kind, meta, tuple(weight.shape)).product()
    except (FormatError, RuntimeError, IndexError, KeyError) as error:
        raise AdapterError(f"the tensors for '{site}' do not fit its weight {tuple(weight.shape)}: {error}") from error


class _Held(nn.Module):
    """Tensors of one adapter on one layer: parameters, and buffers for indices."""

    def __init__(self, shapes: dict[str, list[int]], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for suffix, shape in shapes.items():
            kind = _INTEGER.get(suffix, dtype)
            tensor = torch.zeros(shape, dtype=kind, device=device)
            if kind.is_floating_point:
                self.register_parameter(_key(suffix), nn.Parameter(tensor))
            else:
                self.register_buffer(_key(suffix), tensor)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(suffix, tensor)."""
        for key, tensor in (*self._parameters.items(), *self._buffers.items()):
            assert tensor is not None
            yield key.replace("__", "."), tensor


def _key(suffix: str) -> str:
    # torch's names hold no dots.
    return suffix.replace(".", "__")


class ImportedLayer(DeltaLayer):
    """A linear, conv or norm with adapters out of files."""

    adapter_layer_names = ("imported_tensors",)
    other_param_names = (*DeltaLayer.other_param_names, "imported_kinds")  # type: ignore[assignment]
    imported_tensors: nn.ModuleDict
    imported_kinds: dict[str, str]
    _bias: torch.Tensor | None = None

    def read_geometry(self) -> Geometry:
        """As `DeltaLayer`'s; a norm counts as a linear of one row."""
        layer: Any = self.get_base_layer()
        return Geometry(tuple(layer.weight.shape)) if _is_norm(layer) else geometry_of(layer)

    def add(self, name: str, config: Any) -> None:
        """Make the tensors of adapter `name` for the layer `config.site`: zeros of the config's shapes."""
        if not isinstance(self.imported_tensors, nn.ModuleDict):
            self.imported_tensors = nn.ModuleDict()
            self.imported_kinds = {}
        weight, shapes = self._base.weight, config.shapes[config.site]
        dtype = delta_dtype(weight.dtype)
        self.imported_tensors[name] = _Held(
            {key: shapes[key] for key in shapes if key != "alpha"}, dtype, weight.device
        )
        self.imported_kinds[name] = config.kinds[config.site]
        self.r[name] = 1
        self.alpha[name] = 0.0 if "alpha" in shapes else None  # type: ignore[assignment]
        self.scaling[name] = self.unit_scale(name)
        self.dropout[name] = 0.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def create(self, name: str, config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        raise NotImplementedError("parameters are made by `add`, whose shapes come from a file")

    def unit_scale(self, name: str) -> float:
        return 1.0

    def entry(self, name: str) -> Entry:
        """The adapter on this layer in canonical form; its tensors are the live parameters."""
        tensors = dict(self._named_tensors(name))
        if self.alpha[name] is not None:
            tensors["alpha"] = torch.tensor(self.alpha[name], dtype=torch.float32)
        return Entry(self.imported_kinds[name], tensors, tuple(self._base.weight.shape))

    def _delta(self, name: str, scale: float, dtype: torch.dtype) -> torch.Tensor:
        entry = self.entry(name)
        change = entry.product(dtype)
        if entry.dora:
            weight = self.original_weight()
            if weight is None:
                raise AdapterError("DoRA needs the base weight, which was not kept when an adapter was merged")
            change = algebra.dora(weight.to(dtype), change, entry.tensors["dora_scale"])
        return scale * change

    def _bias_delta(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        return self.entry(name).bias_delta(dtype)

    def activation(self, name: str, x: torch.Tensor) -> torch.Tensor:
        entry, scale, base = self.entry(name), self.scaling[name], self._base
        bias = entry.bias_delta(x.dtype)
        if _is_norm(base):
            changed = {"weight": self.delta(name).to(x.dtype)}
            if getattr(base, "bias", None) is not None:
                changed["bias"] = torch.zeros_like(base.bias) if bias is None else (scale * bias).to(x.dtype)
            # Running statistics are read, and counted by the base layer's own forward alone.
            buffers = {key: value.clone() for key, value in base.named_buffers()}
            return functional_call(base, changed | buffers, (x,))
        t = entry.tensors
        plain = entry.kind == "lora" and "lora_mid.weight" not in t and not entry.dora and self.geometry.groups == 1
        if plain:
            down = t["lora_down.weight"].to(x.dtype).reshape(-1, *self.geometry.shape[1:])
            up = t["lora_up.weight"].to(x.dtype).flatten(1)
            added = self.geometry.pointwise(self.geometry.convolve(x, down), up * (scale * entry.scale))
        elif entry.kind == "diff" and "diff" not in t:
            added = x.new_zeros(())
        else:
            added = self.geometry.convolve(x, self.delta(name).to(x.dtype), self.geometry.groups)
        if bias is None:
            return added
        shift = (scale * bias).reshape(-1, *(1,) * self.geometry.dims)
        return added + shift

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep_base: bool = True) -> None:
        """As `DeltaLayer.merge`, biases too (their original is always kept)."""
        before = set(self.merged_adapters)
        super().merge(safe_merge, adapter_names, keep_base)
        base = self._base
        for name in self.merged_adapters:
            shift = None if name in before else self._bias_delta(name, self._wide())
            if shift is not None:
                self._bias = base.bias.data if self._bias is None else self._bias
                base.bias.data = (
                    (base.bias.data.to(self._wide()) + self.scaling[name] * shift).to(base.bias.dtype).detach()
                )

    def unmerge(self) -> None:
        """As `DeltaLayer.unmerge`."""
        super().unmerge()
        if self._bias is not None:
            self._base.bias.data, self._bias = self._bias, None

    def _named_tensors(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        held: Any = self.imported_tensors[name]
        return held.items()

    def file_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Suffix -> tensor of adapter `name`; `alpha` is a float32 scalar, where the file had one."""
        return {key: tensor.detach() for key, tensor in self.entry(name).tensors.items()}

    @torch.no_grad()
    def load_file_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Take the values of a file: same suffixes, same shapes.

        Raises:
            FormatError: other suffixes or shapes.
        """
        expected = {key: tuple(tensor.shape) for key, tensor in self._named_tensors(name)}
        given = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key != "alpha"}
        if expected != given:
            raise FormatError(f"adapter '{name}' expects {sorted(expected)}, got {sorted(given)} or other shapes")
        if "sara_shape" in tensors and tuple(tensors["sara_shape"].tolist()) != tuple(self._base.weight.shape):
            given_shape = tuple(tensors["sara_shape"].tolist())
            raise FormatError(f"sara_shape is {given_shape}; the weight has shape {tuple(self._base.weight.shape)}")
        for key, tensor in self._named_tensors(name):
            tensor.copy_(tensors[key])
        self.alpha[name] = float(tensors["alpha"]) if "alpha" in tensors else None  # type: ignore[assignment]


class ImportedModel(DeltaTuner):
    """peft's tuner of imported adapters."""

    prefix: str = "imported_"
    tuner_layer_cls = ImportedLayer

    def _resolve(self, model: nn.Module, config: Any) -> list[str]:
        return list(config.resolve(model).index)

    def _place(self, layer: Any, name: str, site: str, parent: nn.Module, attribute: str, target: nn.Module) -> None:
        config: Any = copy.copy(self.peft_config[name])
        config.site = site
        found = next((inner for inner in chain(target) if isinstance(inner, ImportedLayer)), None)
        if found is None:
            self._replace_module(parent, attribute, ImportedLayer(target, name, config), target)
        else:
            found.add(name, config)


def register() -> None:
    """Enter the kind where peft looks for it."""
    from peft import mapping

    kind: dict = {"config": ImportedConfig, "tuner": ImportedModel, "prefix": ImportedModel.prefix}
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = kind["config"]  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = kind["tuner"]  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = kind["prefix"]  # type: ignore[index]


register()
