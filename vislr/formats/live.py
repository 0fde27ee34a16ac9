"""Between adapters on models and the canonical form: take one off as entries, put entries on as peft layers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from vislr.adapters.adabn_layer import AdaBnLayer
from vislr.adapters.inject import (
    active_adapters,
    adapter_layers,
    adapter_names,
    adapter_parameters,
    exactly,
    set_adapters,
)
from vislr.adapters.inject import (
    attach as attach_config,
)
from vislr.adapters.inject import (
    detach as detach_config,
)
from vislr.adapters.targets import innermost, modules_outside, peft_is_wrong
from vislr.core.errors import AdapterError, FormatError, hint
from vislr.core.registry import Attached
from vislr.formats.adapter_file import AdapterFile, base_weights
from vislr.formats.canonical import COMPONENTS, CanonicalAdapter, Entry, join_name
from vislr.formats.container import read_header
from vislr.formats.exchange import read_canonical
from vislr.formats.families import FAMILIES
from vislr.formats.imported import ImportedConfig, ImportedLayer
from vislr.formats.kinds import kind_of_config, put, stored
from vislr.formats.lora_metadata import config_values
from vislr.formats.manifest import MANIFEST, SCHEMA, read_manifest
from vislr.formats.reading import read_adapter

_CLIP_ROOT = "text_model."


def family_of_model(module: Any) -> str:
    """The family of names that a denoiser or a timm model is of; "" if none."""
    name, config = type(module).__name__, getattr(module, "config", None)
    if name == "UNet2DConditionModel":
        if getattr(config, "addition_embed_type", None) == "text_time":
            return "sdxl"
        return "sd2" if getattr(config, "cross_attention_dim", None) == 1024 else "sd15"
    known = {
        "SD3Transformer2DModel": "sd3",
        "FluxTransformer2DModel": "flux",
        "PixArtTransformer2DModel": "pixart",
        "DiTTransformer2DModel": "dit",
    }
    if name in known:
        return known[name]
    return "timm" if type(module).__module__.startswith("timm.") else ""


def parts_of(target: Any) -> dict[str, nn.Module]:
    """Component -> module of a pipeline; of a bare model one entry, under its family's component or ""."""
    if isinstance(target, nn.Module):
        family = family_of_model(target)
        return {FAMILIES[family].denoiser if family else "": target}
    found = {name: getattr(target, name, None) for name in COMPONENTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def family_of_target(target: Any) -> str:
    """The family of a pipeline or model, by its denoiser."""
    return next((family for family in map(family_of_model, parts_of(target).values()) if family), "")


def carrying(target: Any, name: str) -> dict[str, nn.Module]:
    """Component -> module of those that carry adapter `name`.

    Raises:
        AdapterError: none does.
    """
    parts = parts_of(target)
    found = {component: module for component, module in parts.items() if name in adapter_names(module)}
    if not found:
        names = sorted({other for module in parts.values() for other in adapter_names(module)})
        raise AdapterError(f"no adapter is called '{name}'{hint(name, names) or '; there is none'}")
    return found


def canonical_of(target: Any, name: str) -> CanonicalAdapter:
    """Adapter `name` of a pipeline or model in canonical form; tensors are those of the layers, not copies.

    Raises:
        AdapterError: no such adapter. FormatError: a kind or a part that has no canonical form.
    """
    entries = {}
    for component, module in carrying(target, name).items():
        kind = kind_of_config(module.peft_config[name])  # type: ignore[index]
        for site, layer in adapter_layers(module, name).items():
            weight = getattr(layer.get_base_layer(), "weight", None)  # a BatchNorm may have none
            shape = () if weight is None else tuple(weight.shape)
            path = _canonical_path(component, site)
            if isinstance(layer, ImportedLayer):
                entry = Entry(layer.imported_kinds[name], layer.file_tensors(name), shape)
            else:
                own = "adabn" if isinstance(layer, AdaBnLayer) else kind
                entry = Entry(own, stored(layer, name, own), shape)
            entries[join_name(component, path)] = entry
    return CanonicalAdapter(entries, family_of_target(target))


def base_of(target: Any, name: str) -> dict[str, torch.Tensor]:
    """Full canonical name -> base weight under adapter `name`, for what needs it (DoRA)."""
    found = {}
    for component, module in carrying(target, name).items():
        modules = modules_outside(module)
        sites = [site for site, layer in adapter_layers(module, name).items() if not isinstance(layer, AdaBnLayer)]
        for site, weight in base_weights({site: modules[site] for site in sites}).items():
            found[join_name(component, _canonical_path(component, site))] = weight
    return found


def _canonical_path(component: str, site: str) -> str:
    from vislr.formats.golden import canonical_clip

    clip = component.startswith("text_encoder") and site.startswith(("encoder.layers.", "embeddings."))
    return canonical_clip(site) if clip else site


def open_adapter(path: str | os.PathLike, target: Any) -> AdapterFile | CanonicalAdapter:
    """Read a file for a pipeline or model: one that vislr wrote with the base it was made on, or any other.

    Raises:
        FormatError: damaged, or a tensor has no place; names the key.
        AdapterError: the file is for another family of models.
    """
    if not Path(path).is_dir():
        header = read_header(path)
        if MANIFEST in header.metadata and read_manifest(header.metadata[MANIFEST], path)["schema"] == SCHEMA:
            return read_adapter(path)
    own = family_of_target(target)
    adapter = read_canonical(path, family=own or None)
    if own and adapter.family and adapter.family != own and not _alike(own, adapter):
        raise AdapterError(f"'{path}' is for the family '{adapter.family}'; this {type(target).__name__} is '{own}'")
    return adapter


def _alike(own: str, adapter: CanonicalAdapter) -> bool:
    # SD1.x and SD2.x have the same module names; the shapes decide.
    return {own, adapter.family} <= {"sd15", "sd2"}


@dataclass
class FileChange:
    """An adapter out of a file, for `vislr.record`: what is put on, and on what.

    Attributes:
        adapter: what was read.
        target: the pipeline or model.
        component: where it is recorded: the denoiser if the adapter touches it.
    """

    adapter: CanonicalAdapter
    target: Any
    component: str = ""

    def __post_init__(self) -> None:
        touched, parts = self.adapter.components(), parts_of(self.target)
        if len(touched) == 1 and len(parts) == 1:
            # A bare model, whose file may or may not name its component.
            touched = list(parts)
        missing = [component for component in touched if component not in parts]
        if missing:
            count = len(self.adapter.of(missing[0]))
            raise AdapterError(
                f"the adapter has {count} layers for '{missing[0]}', which this {type(self.target).__name__} lacks; "
                "`vislr convert --components` writes a file without them"
            )
        self.component = touched[0]

    def modules(self) -> Iterator[tuple[str, nn.Module, dict[str, Entry]]]:
        """(component, module, path -> entry) of every component that the adapter touches."""
        parts, touched = parts_of(self.target), self.adapter.components()
        for component in touched:
            module = parts.get(component) or next(iter(parts.values()))
            yield component, module, self.adapter.of(component)


def attach_adapter(target: Any, adapter: CanonicalAdapter, name: str, weight: float = 1.0) -> Attached:
    """Put an adapter on a pipeline or model as peft layers, switched on beside what is on; all or nothing.

    Plain LoRA and DoRA (per output) become peft's own layers, everything else `ImportedLayer`s.

    Raises:
        AdapterError: a layer is not there or its shape does not fit; a kind that cannot be attached.
    """
    return attach(None, FileChange(adapter, target), name, weight)


def attach(module: Any, change: FileChange, name: str, weight: float = 1.0) -> Attached:
    """The handler of the kind "file"; `module` is not asked, the change knows all of its modules."""
    done: list[tuple[nn.Module, Attached]] = []
    sites: list[str] = []
    try:
        for component, part, entries in change.modules():
            active = active_adapters(part)
            bound = _bound(part, component, entries)
            done.append((part, _attach_entries(part, bound, name)))
            for parameter in adapter_parameters(part, name).values():
                parameter.requires_grad_(False)
            set_adapters(part, [*active, name], [*active.values(), weight])
            prefix = "" if component == change.component else f"{component}."
            sites += [f"{prefix}{site}" for site in bound]
    except BaseException:
        for part, attached in reversed(done):
            detach_config(part, attached)
        raise
    plain = {"kind": "file", "format": change.adapter.format, "family": change.adapter.family}
    return Attached(tuple(sites), plain, {"parts": done}, tuple(change.adapter.notes))


def attach_change(weight: float) -> Callable[[Any, FileChange, str], Attached]:
    """`attach` with the adapter's weight."""
    return lambda module, change, name: attach(module, change, name, weight)


def holds_config(target: Any, name: str, denoiser: Any, format: str) -> bool:
    """Whether `write_adapter` can write this adapter as it is, config and hash of the base with it."""
    if format not in ("vislr", "diffusers") or set(map(id, carrying(target, name).values())) != {id(denoiser)}:
        return False
    if format == "vislr":
        return True
    layers = adapter_layers(denoiser, name).values()
    return all(isinstance(layer, LoraLayer) and not layer.use_dora.get(name) for layer in layers)


def detach(module: nn.Module, attached: Attached) -> None:
    """Take everything of one file off again."""
    for part, inner in reversed(attached.undo["parts"]):
        detach_config(part, inner)


def _bound(module: nn.Module, component: str, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Entries under the names that the installed library gives the modules."""
    modules = modules_outside(module)
    found = {}
    for path, entry in entries.items():
        other = path.removeprefix(_CLIP_ROOT) if path.startswith(_CLIP_ROOT) else _CLIP_ROOT + path
        site = next((site for site in (path, other) if site in modules), None)
        if site is None:
            raise AdapterError(
                f"this {type(module).__name__} has no layer '{path}'{hint(path, modules)}; "
                f"the file has {len(entries)} layers for '{component or 'the model'}'"
            )
        found[site] = entry
    return found


def _attach_entries(module: nn.Module, entries: dict[str, Entry], name: str) -> Attached:
    for site, entry in entries.items():
        if entry.kind in ("adabn", "qalora", "oft"):
            needs = {"adabn": "a file that vislr wrote", "qalora": "a quantised base", "oft": "a file that vislr wrote"}
            raise AdapterError(f"'{site}' is of kind '{entry.kind}', which needs {needs[entry.kind]}")
    modules = modules_outside(module)
    layers = {site: innermost(modules[site]) for site in entries}
    if all(_is_plain(layers[site], entry) for site, entry in entries.items()) and _one_way_of_dora(entries):
        shaped = {site: _shaped(entry, layers[site], site) for site, entry in entries.items()}
        values = config_values(shaped) | {"target_modules": exactly(list(shaped)), "inference_mode": False}
        config: Any = LoraConfig(**{key: value for key, value in values.items() if key != "peft_type"})
        attached = attach_config(module, config, name)
    else:
        shaped = {site: _fitted(entry) for site, entry in entries.items()}
        attached = attach_config(module, ImportedConfig.of(shaped), name)
    try:
        own = adapter_layers(module, name)
        for site, entry in shaped.items():
            layer = own[site]
            if isinstance(layer, ImportedLayer):
                layer.load_file_tensors(name, entry.tensors)
            else:
                put(layer, name, "lora", entry.tensors)
    except BaseException:
        detach_config(module, attached)
        raise
    return attached


def _is_plain(layer: Any, entry: Entry) -> bool:
    """Whether peft's LoRA holds an entry, and is right on the layer."""
    parts = set(entry.tensors) <= {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}
    kinds = isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    wrong = peft_is_wrong(layer, "LORA") or getattr(layer, "groups", 1) > 1
    return parts and entry.kind == "lora" and entry.dora != "in" and kinds and not wrong


def _one_way_of_dora(entries: dict[str, Entry]) -> bool:
    return len({entry.dora for entry in entries.values()}) == 1


def _shaped(entry: Entry, layer: Any, site: str) -> Entry:
    """A LoRA whose factors have the layer's own axes: 1x1 convs are stored as linears by some tools."""
    weight = layer.weight
    rank, t = entry.tensors["lora_down.weight"].shape[0], entry.tensors
    down, up = (rank, *weight.shape[1:]), (weight.shape[0], rank, *(1,) * (weight.dim() - 2))
    for key, shape in (("lora_down.weight", down), ("lora_up.weight", up)):
        if t[key].numel() != torch.Size(shape).numel():
            raise AdapterError(
                f"'{site}.{key}' has shape {tuple(t[key].shape)}; a weight of {tuple(weight.shape)} needs {shape}"
            )
    made = t | {
        "lora_down.weight": t["lora_down.weight"].reshape(down),
        "lora_up.weight": t["lora_up.weight"].reshape(up),
    }
    return Entry("lora", made, tuple(weight.shape))


def _fitted(entry: Entry) -> Entry:
    """An entry whose integers have the widths that layers keep."""
    if entry.kind != "sara":
        return entry
    t = dict(entry.tensors)
    t["sara_shape"] = t["sara_shape"].flatten().to(torch.int64)
    t["sara_index"] = t["sara_index"].to(torch.int32)
    t.pop("sara_kept", None)
    return Entry("sara", t, entry.shape)


def default_name(path: str | os.PathLike) -> str:
    """A file's stem as an adapter's name."""
    stem = re.sub(r"[^A-Za-z0-9_\-]", "_", Path(path).stem)
    if not stem:
        raise FormatError(f"'{path}' has no name to call the adapter by; give one")
    return stem
