"""The one door through which adapters go on a model and come off: ours and peft's, on any model.

`attach` checks everything first and changes the model after; if peft then refuses, the model is put back.
`detach` takes exactly one adapter off; with the last one the original modules are back in their places.
"""

from __future__ import annotations

import copy
import enum
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from torch import nn

from vislr.adapters.adabn_layer import AdaBnLayer, check_one_carrier
from vislr.adapters.layer import DeltaLayer
from vislr.adapters.sara_layer import SaraLayer
from vislr.adapters.targets import innermost, modules_outside, resolve_peft, resolve_with_notes
from vislr.core.errors import AdapterError, UndoError, VislrError, hint
from vislr.core.registry import Attached

# On the model while adapters of ours are on it: what must be given back with the last one.
_MARK = "_vislr_adapters"
# Initialisations that change the base weights: such an adapter could not come off.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class _Before:
    """The model before the first `attach`: flags by name (without `.base_layer`), peft's attributes."""

    trainable: dict[str, bool]
    attributes: dict[str, Any]
    names: list[str]


def tuner_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(full name, layer) of every tuner layer, the outer ones of a nest first."""
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield name, layer


def plain_name(name: str) -> str:
    """A module's or parameter's name in the model without adapters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def adapter_names(module: nn.Module) -> list[str]:
    """Names of all adapters on the model, in the order in which they went on."""
    found = {name for _, layer in tuner_layers(module) for name in layer._get_available_adapters()}
    order = [name for name in getattr(module, "peft_config", {}) if name in found]
    return order + sorted(found.difference(order))


def adapter_weights(module: nn.Module) -> dict[str, float]:
    """Every adapter on the model -> its weight, 1 as trained (read on the first layer that has it)."""
    found: dict[str, float] = {}
    # Statistics have no weight: of an adapter with a delta too, the delta's is meant.
    layers = sorted((layer for _, layer in tuner_layers(module)), key=lambda layer: isinstance(layer, AdaBnLayer))
    for layer in layers:
        for name in layer._get_available_adapters():
            if name not in found:
                unit = unit_scale(layer, name)
                # Twelve digits: what was set as 0.8 is read as 0.8.
                found[name] = float(f"{layer.scaling[name] / unit:.12g}") if unit else 1.0
    return {name: found[name] for name in adapter_names(module)}


def active_adapters(module: nn.Module) -> dict[str, float]:
    """The adapters that are active and switched on somewhere -> their weights, in the order they went on."""
    active = _chosen(layer for _, layer in tuner_layers(module) if not layer.disable_adapters)
    return {name: weight for name, weight in adapter_weights(module).items() if name in active}


def _chosen(layers: Iterable[Any]) -> set[str]:
    return {name for layer in layers for name in set(layer.active_adapters) & layer._get_available_adapters()}


def chosen_names(module: nn.Module) -> list[str]:
    """The adapters that would be active if all layers were switched on, in the order they went on."""
    chosen = _chosen(layer for _, layer in tuner_layers(module))
    return [name for name in adapter_names(module) if name in chosen]


def merged_adapters(module: nn.Module) -> set[str]:
    """Names of the adapters that are merged into weights (fused) somewhere."""
    return {name for _, layer in tuner_layers(module) for name in layer.merged_adapters}


def carriers(module: nn.Module) -> list[str]:
    """Names of the adapters that carry BatchNorm statistics, in the order in which they went on."""
    found = {name for _, layer in tuner_layers(module) if isinstance(layer, AdaBnLayer) for name in layer.configs}
    return [name for name in adapter_names(module) if name in found]


def rest_carriers(module: nn.Module) -> None:
    """Switch off adapters with BatchNorm statistics, so that another may come on: never two at once."""
    held, active = set(carriers(module)), active_adapters(module)
    if held & active.keys():
        rest = {name: weight for name, weight in active.items() if name not in held}
        set_adapters(module, list(rest), list(rest.values()))


def unit_scale(layer: Any, name: str) -> float | None:
    """What this layer multiplies the delta of adapter `name` with at weight 1; None: the kind has no scale."""
    if isinstance(layer, DeltaLayer):
        return layer.unit_scale(name)
    if isinstance(layer, SaraLayer):
        return 1.0
    if isinstance(layer, LoraLayer):
        r = layer.r[name]
        return layer.lora_alpha[name] / (math.sqrt(r) if layer.use_rslora.get(name) else r)
    if isinstance(layer, LycorisLayer):
        return layer.alpha[name] / layer.r[name]
    return None


def adapter_parameters(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter: full name in the model -> parameter.

    Raises:
        AdapterError: no adapter has this name.
    """
    check_present(module, name)
    found: dict[str, nn.Parameter] = {}
    for path, layer in tuner_layers(module):
        for attribute in layer.adapter_layer_names:
            holder = getattr(layer, attribute)
            if not isinstance(holder, (nn.ModuleDict, nn.ParameterDict)) or name not in holder:
                continue
            item, prefix = holder[name], f"{path}.{attribute}.{name}"
            if isinstance(item, nn.Parameter):
                found[prefix] = item
            else:
                found.update({f"{prefix}.{key}": parameter for key, parameter in item.named_parameters()})
    return found


def adapter_layers(module: nn.Module, name: str) -> dict[str, Any]:
    """Site (name without `.base_layer`) -> the tuner layer that holds adapter `name` there."""
    check_present(module, name)
    return {plain_name(path): layer for path, layer in tuner_layers(module) if name in layer._get_available_adapters()}


def check_present(module: nn.Module, name: str) -> None:
    """Refuse a name that no adapter on the model has."""
    names = adapter_names(module)
    if name not in names:
        raise AdapterError(f"no adapter is called '{name}'{hint(name, names) or '; the model has none'}")


def set_adapters(module: nn.Module, names: str | Sequence[str], weights: Any = None) -> None:
    """Make exactly these adapters active, with these weights; on any model.

    What is trainable stays: peft's layers would make every active adapter trainable.

    Args:
        names: one name or several; none at all leaves every adapter on the model but inactive.
        weights: one number for all, or one per name; None: 1.

    Raises:
        AdapterError: an unknown name, another number of weights than names, adapters are merged, a kind
            that cannot be weighted, or two adapters with BatchNorm statistics. Nothing is changed.
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        check_present(module, name)
    if len(set(names)) != len(names):
        raise AdapterError(f"an adapter is named twice: {names}")
    if weights is None or isinstance(weights, (int, float)):
        weights = [1.0 if weights is None else weights] * len(names)
    if len(weights) != len(names):
        raise AdapterError(f"{len(names)} adapters and {len(weights)} weights")
    for name, weight in zip(names, weights, strict=True):
        if not isinstance(weight, (int, float)) or not torch.isfinite(torch.tensor(float(weight))):
            raise AdapterError(f"the weight of '{name}' is {weight!r}; expected a finite number")
    check_unmerged(module)
    check_one_carrier([name for name in carriers(module) if name in names])
    layers = [layer for _, layer in tuner_layers(module)]
    deltas = {name for layer in layers if not isinstance(layer, AdaBnLayer) for name in layer._get_available_adapters()}
    for layer in layers:
        for name, weight in zip(names, weights, strict=True):
            if isinstance(layer, AdaBnLayer) and name in deltas:
                continue
            if weight != 1 and name in layer._get_available_adapters() and unit_scale(layer, name) is None:
                raise AdapterError(f"'{name}' is of a kind that has no weight but 1, given {weight}")
    trainable = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.set_adapter(names)
        for name, weight in zip(names, weights, strict=True):
            if name in layer._get_available_adapters() and unit_scale(layer, name) is not None:
                layer.set_scale(name, weight)
    for parameter, flag in trainable:
        parameter.requires_grad_(flag)


def check_unmerged(module: nn.Module) -> None:
    """Refuse a model into whose weights an adapter is merged."""
    merged = merged_adapters(module)
    if merged:
        raise AdapterError(f"adapter '{min(merged)}' is merged into the weights; unmerge (unfuse_lora) it first")


def attach(module: Any, change: Any, name: str = "default") -> Attached:
    """Put an adapter on a model: the only active one, the only trainable thing.

    Args:
        module: any model whose layers are torch's linears and convs.
        change: ConvLoraConfig, FloraConfig, SaraConfig, or a config of peft's (LoRA, DoRA, LoHa, LoKr, OFT, ...); not
            changed. A peft config without target_modules gets every conv and linear of the backbone.
        name: free so far; letters, digits, "_" and "-".

    Raises:
        TargetError: a pattern matches nothing; names the nearest.
        AdapterError: name taken or impossible, rank, layer or base weights do not fit. The model is
            untouched.
    """
    if isinstance(change, PeftConfig) and _kind(change) == "adabn":
        from vislr.adapters import adabn  # it stands on this module

        return adabn.attach(module, cast(adabn.AdaBnConfig, change), name)
    check_name(module, name)
    check_unmerged(module)
    config, sites, notes = _resolved(module, change)
    _check_weights(module, sites)
    before = opening(module)
    flags = {key: parameter.requires_grad for key, parameter in _plain_parameters(module)}
    active = chosen_names(module)
    try:
        with warnings.catch_warnings():
            # peft warns that the model has adapters already, which is what several adapters mean.
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, module, name)
        cast_adapter_dtype(module, name)
        if _has_flag(module):
            module._hf_peft_config_loaded = True
        for _, layer in tuner_layers(module):
            layer.set_adapter([name])
        trainable = {id(parameter) for parameter in adapter_parameters(module, name).values()}
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in trainable and not config.inference_mode)
    except Exception as error:
        _take_off(module, name)
        _give_back(module, before if not before.names else None, active, flags)
        if isinstance(error, VislrError):
            raise
        raise AdapterError(f"peft refuses this {_kind(config)} adapter: {' '.join(str(error).split())}") from error
    remember(module, before, name)
    return Attached(
        sites=tuple(sites),
        change={"kind": _kind(config), "config": plain_config(module.peft_config[name])},
        undo={"name": name, "active": active, "trainable": flags},
        notes=notes,
    )


def detach(module: nn.Module, attached: Attached) -> None:
    """Take the adapter of one `attach` off; with the last one the model is what it was before the first.

    Layers that lose their last adapter leave the model, also from inside a nest of two kinds. The
    adapters that were active before are active again, flags of `requires_grad` are as before.

    Raises:
        UndoError: the adapter is not on the model any more, or is merged into its weights.
    """
    if not attached.undo or "name" not in attached.undo:
        raise UndoError("this adapter was put on without what is needed to take it off")
    name, part = attached.undo["name"], attached.undo.get("part", "deltas")
    if not any(name in layer._get_available_adapters() for layer in _layers_of(module, part)):
        raise UndoError(f"adapter '{name}' is not on the model any more")
    if name in merged_adapters(module):
        raise UndoError(f"adapter '{name}' is merged into the weights; unmerge (unfuse_lora) it first")
    was_active = chosen_names(module)
    # Statistics left the flags alone when they went on, and do so when they come off.
    flags = attached.undo.get("trainable") or {key: p.requires_grad for key, p in _plain_parameters(module)}
    _take_off(module, name, part)
    before: _Before | None = getattr(module, _MARK, None)
    remaining = adapter_names(module)
    if before is not None:
        before.names = [other for other in before.names if other in remaining]
    active = [other for other in was_active if other in remaining]
    if not active:
        active = [other for other in attached.undo["active"] if other in remaining]
    last = before if before is not None and not before.names else None
    _give_back(module, last, active, flags if name in was_active else None)


def opening(module: nn.Module) -> _Before:
    """What `detach` of the last adapter gives back: the state before the first one went on."""
    before: _Before | None = getattr(module, _MARK, None)
    if before is not None:
        # diffusers and peft can take adapters off too, without telling.
        before.names = [other for other in before.names if other in adapter_names(module)]
    return before if before is not None and before.names else _before(module)


def remember(module: nn.Module, before: _Before, name: str) -> None:
    """Note that adapter `name` is on the model."""
    if name not in before.names:
        before.names.append(name)
    setattr(module, _MARK, before)


def announce(module: Any, name: str, config: Any) -> None:
    """Enter an adapter where peft and diffusers look for it; injecting through peft does that by itself."""
    if not hasattr(module, "peft_config"):
        module.peft_config = {}
    module.peft_config[name] = config
    if _has_flag(module):
        module._hf_peft_config_loaded = True


def _before(module: nn.Module) -> _Before:
    kept = {key: vars(module)[key] for key in ("_hf_peft_config_loaded",) if key in vars(module)}
    return _Before({key: parameter.requires_grad for key, parameter in _plain_parameters(module)}, kept, [])


def _resolved(module: nn.Module, change: Any) -> tuple[Any, list[str], tuple[str, ...]]:
    """A config that peft can inject, the layers it goes on, and notes. Changes nothing."""
    if not isinstance(change, PeftConfig):
        raise AdapterError(
            f"cannot attach a {type(change).__name__}; expected a config of ConvLoRA, FLoRA, SaRA or peft"
        )
    config: Any = copy.deepcopy(change)
    if hasattr(config, "resolve"):
        selection = config.resolve(module)
        return config, list(selection.index), selection.notes()
    if hasattr(config, "sites"):
        config.sites, notes = resolve_with_notes(module, config)
        return config, config.sites, notes
    if not hasattr(config, "target_modules"):
        raise AdapterError(f"a {type(config).__name__} is no adapter of layers")
    _check_peft(config)
    sites, notes, spell_out = resolve_peft(module, config)
    if spell_out:
        config.target_modules = exactly(sites)
        config.exclude_modules = None
    return config, sites, notes


def exactly(sites: Sequence[str]) -> str:
    """An expression that matches these names and no other; peft's lists match endings too."""
    return "(?:" + "|".join(re.escape(site) for site in sites) + ")"


def _check_peft(config: Any) -> None:
    for field in ("r", "oft_block_size"):
        rank = getattr(config, field, None)
        # OFT takes one of the two and leaves the other 0.
        lowest = 0 if _kind(config) == "oft" else 1
        if rank is not None and (not isinstance(rank, int) or rank < lowest):
            raise AdapterError(f"rank {field} is {rank!r}; expected a whole number of at least {lowest}")
    if getattr(config, "bias", "none") != "none":
        raise AdapterError(f"bias='{config.bias}' trains the base; expected 'none'")
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field, None):
            raise AdapterError(f"{field} trains modules of the base, which could not be taken off; leave it out")
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise AdapterError(f"init_lora_weights='{init}' changes the base weights, which could not be taken back")


def check_name(module: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        raise AdapterError(f"an adapter's name is letters, digits, '_' and '-', not {name!r}")
    taken = adapter_names(module)
    if name in taken:
        raise AdapterError(f"an adapter called '{name}' is on the model already; its adapters are {', '.join(taken)}")
    if name in nn.ParameterDict.__dict__ or hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"'{name}' cannot name an adapter: torch's dictionaries use it")


def _check_weights(module: nn.Module, sites: Sequence[str]) -> None:
    layers = modules_outside(module)
    for site in sites:
        weight = getattr(innermost(layers[site]), "weight", None)
        # Integer codes of quantised layers are always finite; tensors on meta have no values.
        if weight is None or weight.device.type == "meta" or not weight.is_floating_point():
            continue
        if not torch.isfinite(weight).all():
            raise AdapterError(f"the base weight of '{site}' has NaN or infinite values")


def _layers_of(module: nn.Module, part: str) -> list[Any]:
    """Tuner layers of one part of an adapter: "deltas", "statistics", or "all" of it."""
    statistics = {"deltas": (False,), "statistics": (True,), "all": (False, True)}[part]
    return [layer for _, layer in tuner_layers(module) if isinstance(layer, AdaBnLayer) in statistics]


def _take_off(module: nn.Module, name: str, part: str = "deltas") -> None:
    """Delete the adapter, or the part of it, everywhere and pull out tuner layers that hold none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in _layers_of(module, part):
            if name in layer._all_available_adapter_names():
                layer.delete_adapter(name)
    for path, layer in list(tuner_layers(module))[::-1]:
        if not layer._all_available_adapter_names():
            parent, _, child = path.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.base_layer)
    configs = getattr(module, "peft_config", None)
    if isinstance(configs, dict):
        left = [layer for layer in _layers_of(module, "statistics") if name in layer.configs]
        if name not in adapter_names(module):
            configs.pop(name, None)
        elif left:
            configs[name] = left[0].configs[name]


def _give_back(
    module: nn.Module, before: _Before | None, active: Sequence[str], trainable: dict[str, bool] | None
) -> None:
    """Set the active adapters and flags where they have changed; with `before`, all that the first `attach` found."""
    if trainable is not None:
        for _, layer in tuner_layers(module):
            layer.set_adapter(list(active))
    flags = before.trainable if before is not None else trainable
    for key, parameter in _plain_parameters(module):
        if flags is not None and key in flags:
            parameter.requires_grad_(flags[key])
    if before is None:
        return
    if hasattr(module, _MARK):
        delattr(module, _MARK)
    if not getattr(module, "peft_config", True):
        del module.peft_config
        if _has_flag(module):
            module.__dict__.pop("_hf_peft_config_loaded", None)
            module.__dict__.update(before.attributes)


def _plain_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((plain_name(key), parameter) for key, parameter in module.named_parameters())


def take_traces(module: Any) -> dict[str, Any]:
    """Forget that adapters were on a model whose tuner layers were pulled out; gives what `give_traces` takes."""
    kept = {key: vars(module)[key] for key in (_MARK, "peft_config", "_hf_peft_config_loaded") if key in vars(module)}
    flags = {key: parameter.requires_grad for key, parameter in _plain_parameters(module)}
    before: _Before | None = kept.get(_MARK)
    for key in kept:
        delattr(module, key)
    if before is not None:
        module.__dict__.update(before.attributes)
        for key, parameter in _plain_parameters(module):
            parameter.requires_grad_(before.trainable.get(key, parameter.requires_grad))
    return {"kept": kept, "trainable": flags}


def give_traces(module: Any, traces: dict[str, Any]) -> None:
    """The inverse of `take_traces`, once the tuner layers are back."""
    module.__dict__.update(traces["kept"])
    for key, parameter in _plain_parameters(module):
        if key in traces["trainable"]:
            parameter.requires_grad_(traces["trainable"][key])


def _has_flag(module: nn.Module) -> bool:
    # diffusers and transformers ask this flag before they touch adapters; other models have none.
    return hasattr(type(module), "_hf_peft_config_loaded")


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def plain_config(config: Any) -> dict[str, Any]:
    """A config as JSON data: sets sorted, enums as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (set, frozenset)):
            return sorted(plain(item) for item in value)
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return plain(config.to_dict())
