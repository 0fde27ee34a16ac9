"""Which layers an adapter goes on: patterns to module names, before anything is changed.

Patterns mean what they mean in peft: a list holds whole names or their endings ("to_q", "conv1"), a
string is a regular expression over the whole name, "all-linear" is every linear of the backbone, and
None is every conv and linear of the backbone: stem, head and modulation layers are left alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vislr.adapters.geometry import geometry_of, why_not
from vislr.core.errors import AdapterError, ModelError, TargetError, hint

# Linears that map a timestep or a class to scales and shifts: few rows in, many weights.
_MODULATION = re.compile(r"(.*\.)?(time_emb_proj|adaln_single\..*|norm\w*\.linear|norm\w*\.emb\..*|emb_layers\..*)")


def innermost(module: nn.Module) -> nn.Module:
    """The layer below every tuner layer."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def modules_outside(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, without the insides of tuner layers; a tuner layer stands under its own name."""
    found: dict[str, nn.Module] = {}
    inside = None
    for name, module in model.named_modules():
        # A module's insides come right after it.
        if not name or (inside is not None and name.startswith(inside)):
            continue
        found[name] = module
        inside = name + "." if isinstance(module, BaseTunerLayer) else None
    return found


def adaptable(model: nn.Module) -> dict[str, Any]:
    """Name -> innermost layer of every Linear and Conv1d/2d/3d that can carry an adapter."""
    layers = {name: innermost(module) for name, module in modules_outside(model).items()}
    return {name: layer for name, layer in layers.items() if not why_not(layer)}


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """Name -> innermost layer of every BatchNorm that keeps running statistics."""
    layers = {name: innermost(module) for name, module in modules_outside(model).items()}
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    }


def backbone(model: nn.Module) -> tuple[list[str], str]:
    """Names of the convs and linears between stem and head without modulation layers, and a note.

    Read through `vislr.anatomy` where it knows the family; of any other model, every conv and linear.
    """
    from vislr.anatomy import describe

    layers = adaptable(model)
    try:
        anatomy = describe(model)
    except ModelError:
        return list(layers), "the family of this model is not known: every conv and linear is a target"
    sites = {s.name for s in anatomy.sites if s.kind in ("conv", "linear") and s.stage not in ("stem", "head")}
    return [name for name in layers if name in sites and not _MODULATION.fullmatch(name)], ""


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith("." + pattern)


def _by_list(patterns: Iterable[str], names: Sequence[str], what: str) -> set[str]:
    found: set[str] = set()
    for pattern in sorted(patterns):
        fitting = [name for name in names if _matches(pattern, name)]
        if not fitting:
            raise TargetError(f"{what} '{pattern}' matches no layer{_near(pattern, names)}")
        found.update(fitting)
    return found


def _by_expression(expression: str, names: Sequence[str], what: str) -> set[str]:
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise TargetError(f"{what} '{expression}' is no regular expression: {error}") from error
    found = {name for name in names if compiled.fullmatch(name)}
    if not found:
        raise TargetError(f"{what} '{expression}' matches no layer{_near(expression, names)}")
    return found


def _near(pattern: str, names: Sequence[str]) -> str:
    """The nearest of what could have been meant: parts of names, endings as long as the pattern, whole names."""
    plain = re.sub(r"[\\^$*?()|+\[\]]", "", pattern).strip(".")
    long = plain.count(".") + 1
    choices = dict.fromkeys(part for name in names for part in name.split("."))
    choices |= dict.fromkeys(".".join(name.split(".")[-long:]) for name in names) | dict.fromkeys(names)
    return hint(plain, choices)


def select_names(patterns: Any, names: Sequence[str], what: str) -> set[str]:
    """The names that a list (whole names or endings) or an expression means.

    Raises:
        TargetError: one matches nothing; names the nearest.
    """
    return _by_expression(patterns, names, what) if isinstance(patterns, str) else _by_list(patterns, names, what)


def _unfit(model: nn.Module, patterns: Iterable[str]) -> None:
    """Say why a listed name cannot be adapted, where it names a module that is there."""
    modules = modules_outside(model)
    for pattern in sorted(patterns):
        matched = {name: innermost(module) for name, module in modules.items() if _matches(pattern, name)}
        if matched and all(why_not(layer) for layer in matched.values()):
            name, layer = next(iter(matched.items()))
            inner = [n for n in adaptable(model) if n.startswith(name + ".")]
            near = f"; inside it are {', '.join(repr(n) for n in inner[:3])}" if inner else ""
            raise AdapterError(f"cannot adapt '{name}', a {type(layer).__name__}: it {why_not(layer)}{near}")


def check_shared(model: nn.Module, sites: Sequence[str]) -> None:
    """Refuse layers that the model holds twice: an adapter would reach one of the two places.

    Raises:
        AdapterError: a site, or its weight, is also reached under another name.
    """
    wanted = set(sites)
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        name = name.replace(".base_layer", "")
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        first = owners.setdefault(id(weight), name)
        if first != name and (first in wanted or name in wanted):
            raise AdapterError(f"'{first}' and '{name}' share one weight: an adapter cannot change only one of them")


def resolve(model: nn.Module, config: Any) -> list[str]:
    """The names of the layers that a vislr adapter config goes on, in the model's order."""
    return resolve_with_notes(model, config)[0]


def resolve_with_notes(model: nn.Module, config: Any) -> tuple[list[str], tuple[str, ...]]:
    """`resolve`, and lines on what the default targets left out.

    Raises:
        TargetError: a pattern matches nothing; names the nearest.
        AdapterError: a layer cannot be adapted, or the rank does not fit it.
    """
    layers = adaptable(model)
    names = list(layers)
    notes: list[str] = []
    if config.sites:
        missing = [name for name in config.sites if name not in layers]
        if missing:
            known = modules_outside(model)
            reason = (
                f"its {type(innermost(known[missing[0]])).__name__} {why_not(innermost(known[missing[0]]))}"
                if missing[0] in known
                else f"this {type(model).__name__} has no such layer{_near(missing[0], names)}"
            )
            raise AdapterError(f"the adapter has weights for '{missing[0]}': {reason}")
        chosen, forgiving = set(config.sites), False
    else:
        chosen, notes, forgiving = _chosen(model, config, names)
    left_out = []
    sites = []
    for name in names:
        if name not in chosen:
            continue
        geometry = geometry_of(layers[name])
        try:
            count = config.count(geometry)
        except AdapterError as error:
            if not forgiving:
                raise AdapterError(f"'{name}': {error}") from None
            left_out.append(name)
            continue
        if forgiving and count >= layers[name].weight.numel():
            left_out.append(name)
            continue
        sites.append(name)
    if not sites:
        raise AdapterError(f"every target is too small for this rank: {', '.join(left_out[:3])}")
    if left_out:
        notes.append(f"left out, too small for this rank: {', '.join(left_out[:3])}{_more(left_out)}")
    check_shared(model, sites)
    return sites, tuple(notes)


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""


def _chosen(model: nn.Module, config: Any, names: list[str]) -> tuple[set[str], list[str], bool]:
    """Names by `target_modules` less `exclude_modules`, notes, and whether layers may be left out."""
    target, notes, forgiving = config.target_modules, [], False
    if target is None or (isinstance(target, str) and target.lower() == "all-linear"):
        found, note = backbone(model)
        layers = adaptable(model)
        chosen = {name for name in found if target is None or isinstance(layers[name], nn.Linear)}
        notes += [note] if note else []
        forgiving = True
        if not chosen:
            raise TargetError(f"this {type(model).__name__} has no {'conv or linear' if target is None else 'linear'}")
    else:
        if not target:
            raise TargetError("target_modules is empty; leave it out for every conv and linear of the backbone")
        if not isinstance(target, str):
            _unfit(model, target)
        chosen = select_names(target, names, "target")
    if config.exclude_modules:
        chosen -= select_names(config.exclude_modules, names, "exclude_modules")
        if not chosen:
            raise TargetError("exclude_modules leaves no target")
    return chosen, notes, forgiving


def resolve_peft(model: nn.Module, config: Any) -> tuple[list[str], tuple[str, ...], bool]:
    """The layers that a config of peft's own goes on, notes, and whether peft needs them spelled out.

    Raises:
        TargetError: a pattern matches nothing.
        AdapterError: peft's layer would be wrong there: padding other than zeros, dilation.
    """
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    modules, kind = modules_outside(model), _peft_type(config)
    target = config.target_modules
    if getattr(config, "target_parameters", None):
        raise AdapterError("target_parameters is not supported; name layers in target_modules")
    if isinstance(target, str) and target.lower() == "all-linear":
        # peft turns the word into whole names, which it then also matches as endings: spell them out.
        spelled: Any = _maybe_include_all_linear_layers(copy.copy(config), model)
        sites = [n for n in modules if n in spelled.target_modules]
        check_shared(model, sites)
        return sites, (), True
    if target is None:
        chosen, notes, _ = _chosen(model, config, list(adaptable(model)))
        types = _PEFT_LAYERS.get(kind, (nn.Linear,))
        sites = [n for n in modules if n in chosen and isinstance(innermost(modules[n]), types)]
        # peft's LoRA cannot merge grouped convs, and takes only ranks that groups divide; OFT fails.
        fitting = [
            name
            for name, layer in ((name, innermost(modules[name])) for name in sites)
            if not peft_is_wrong(layer, kind) and not (kind in ("LORA", "OFT") and getattr(layer, "groups", 1) > 1)
        ]
        left = [n for n in sites if n not in fitting]
        if left:
            notes.append(f"left out, peft cannot adapt them rightly: {', '.join(left[:3])}{_more(left)}")
        if not fitting:
            raise TargetError(f"this {type(model).__name__} has no layer that {kind} can adapt")
        check_shared(model, fitting)
        return fitting, tuple(notes), True
    if not isinstance(target, str):
        _by_list(target, list(modules), "target")
    sites = [name for name in modules if check_target_module_exists(config, name)]
    if not sites:
        raise TargetError(f"target_modules '{target}' matches no layer{_near(str(target), list(adaptable(model)))}")
    for name in sites:
        reason = peft_is_wrong(innermost(modules[name]), kind)
        if reason:
            raise AdapterError(f"'{name}': peft's {kind} is wrong on a conv with {reason}; ConvLoRA is not")
    check_shared(model, sites)
    return sites, (), False


_PEFT_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "LORA": (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "LOHA": (nn.Linear, nn.Conv1d, nn.Conv2d),
    "LOKR": (nn.Linear, nn.Conv1d, nn.Conv2d),
    "OFT": (nn.Linear, nn.Conv2d),
}


def _peft_type(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def peft_is_wrong(layer: nn.Module, kind: str) -> str:
    """Why peft's layer of this kind fails on a conv or differs from the merged conv, or ""."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ""
    if layer.padding_mode != "zeros":
        return f"padding_mode '{layer.padding_mode}'"
    if kind == "LORA" and any(d != 1 for d in layer.dilation):
        return f"dilation {layer.dilation}"
    if kind != "LORA" and type(layer).__name__.startswith("Conv2dSame"):
        return "padding chosen from the input"
    return ""
