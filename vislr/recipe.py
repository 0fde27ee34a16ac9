"""The face for adapters: switch, save, load; and, with `record` and `folders`, all that happens to a pipeline.

Every change is an entry in the changed module's record (`vislr.record`); `vislr.folders` writes the
record as `vislr.json` into an ordinary diffusers folder.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.errors import AdapterError, VislrError, hint
from vislr.core.report import Report
from vislr.record import add_notes, apply, component_of, modules_of, put_on, recipe_of, remove

if TYPE_CHECKING:
    from torch import nn

__all__ = ["apply", "base_state", "fuse", "load_adapter", "recipe_of", "remove", "save_adapter", "set_adapters"]


def set_adapters(target: Any, names: str | list[str], weights: float | list[float] | None = None) -> None:
    """Switch these adapters on, with these weights, and all others off. An empty list switches all off.

    Works on any model; on classes that have diffusers' own `set_adapters`, that one works too.

    Raises:
        AdapterError: a name is not on the target, or counts differ.
    """
    from vislr.adapters import inject

    module = component_of(target)[1]
    others = [part for part in modules_of(target) if part is not module and inject.adapter_names(part)]
    if not others:
        inject.set_adapters(module, names, weights)
        return
    # Files may hold layers for text encoders, too: each component switches what it carries.
    chosen = [names] if isinstance(names, str) else list(names)
    values = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(chosen)
    known = {name for part in (module, *others) for name in inject.adapter_names(part)}
    for name in chosen:
        if name not in known:
            raise AdapterError(f"no adapter is called '{name}'{hint(name, known)}")
    if len(values) != len(chosen):
        raise AdapterError(f"{len(chosen)} adapters and {len(values)} weights")
    for part in (module, *others):
        own = [(name, 1.0 if value is None else value) for name, value in zip(chosen, values, strict=True)
               if name in inject.adapter_names(part)]  # fmt: skip
        inject.set_adapters(part, [name for name, _ in own], [value for _, value in own])


def _only_adapter(target: Any, name: str | None) -> str:
    from vislr.adapters import inject

    names = list(dict.fromkeys(name for part in modules_of(target) for name in inject.adapter_names(part)))
    if name is None:
        if len(names) == 1:
            return names[0]
        raise AdapterError(f"say which adapter: {names}" if names else "the model carries no adapter")
    if name not in names:
        raise AdapterError(f"no adapter is called '{name}'{hint(name, names)}")
    return name


def save_adapter(
    target: Any,
    path: str | os.PathLike,
    *,
    name: str | None = None,
    format: str = "vislr",
    rank: int | None = None,
    dora: str = "keep",
    aux: Mapping[str, Any] | None = None,
) -> Path:
    """Write one adapter as a safetensors file, or as a folder of peft.

    Args:
        target: pipeline or module that carries it.
        path: the file; for "peft" a folder.
        name: which adapter; may be left out if there is only one.
        format: "vislr" (every kind, exact), "kohya", "comfy", "diffusers" or "peft". Where a format has no
            exact form of a layer it is written by SVD, and a warning states the error.
        rank: bring layers that are written as LoRA to at most this rank; None: as exact as the format allows.
        dora: "keep", "bake" DoRA into plain LoRA (SVD), or write it as a "diff" (exact; kohya and comfy).
        aux: name -> tensor of a head that belongs to the adapter's training; stored beside it, never attached.

    Raises:
        AdapterError: no such adapter. FormatError: the format cannot hold this kind.
        OutputError: the file cannot be written.
    """
    from vislr import formats

    chosen = _only_adapter(target, name)
    component, module = component_of(target)
    if rank is None and dora == "keep" and formats.holds_config(target, chosen, module, format):
        return formats.write_adapter(module, chosen, path, format=format, component=component, aux=aux)
    if aux:
        raise AdapterError("an auxiliary head is stored in format 'vislr' without other changes alone")
    adapter = formats.canonical_of(target, chosen)
    weights = formats.base_of(target, chosen) if dora != "keep" else None
    done = formats.write_canonical(adapter, path, format, rank=rank, dora=dora, weights=weights)
    for note in done.lines():
        warnings.warn(note, stacklevel=2)
    return Path(path)


def load_adapter(
    target: Any, path: str | os.PathLike, *, name: str | None = None, weight: float = 1.0, any_base: bool = False
) -> Report:
    """Read an adapter's file and put it on the pipeline or module. Every tensor finds its place or it fails.

    On a pruned model, layers on removed units are dropped; a note of the report says how many, and the
    share of the change's norm that went with them.

    Args:
        target: pipeline or module.
        path: a file of any format, or a folder of peft; the format is recognised.
        name: the adapter's name; default: the file's stem.
        weight: its weight.
        any_base: accept a base model whose weights differ from those that the adapter was made on.

    Raises:
        FormatError, AdapterError: the file is damaged or does not fit; the model is as it was.
    """
    from vislr import formats

    name = formats.default_name(path) if name is None else name
    return read_onto(target, path, name, weight, any_base)


def read_onto(
    target: Any, path: str | os.PathLike, name: str, weight: float, any_base: bool, known: Report | None = None
) -> Report:
    """`load_adapter`; with a known report (out of a folder) nothing is counted."""
    from vislr import formats
    from vislr.adapters import inject
    from vislr.formats.surviving import without_removed

    file, survival = without_removed(formats.open_adapter(path, target), target)
    notes = () if survival is None else (str(survival),)
    if isinstance(file, formats.CanonicalAdapter):
        change = formats.FileChange(file, target)
        attach = formats.attach_change(weight)
        return add_notes(target, put_on(target, change, name, attach, known=known), notes)
    _, module = component_of(target)
    active = inject.active_adapters(module)
    # The file has one hash for all of its layers: with some of them gone it can no longer be checked.
    accept = any_base or survival is not None
    report = put_on(
        target,
        file.config,
        name,
        lambda module, _, name: formats.attach_file(module, name, file, any_base=accept),
        known=known,
    )
    report = add_notes(target, report, notes)
    for parameter in inject.adapter_parameters(module, name).values():
        parameter.requires_grad_(False)
    try:
        inject.set_adapters(module, [*active, name], [*active.values(), weight])
    except VislrError:
        remove(target, report)
        raise
    return report


def fuse(target: Any, names: str | Sequence[str] = (), *, name: str = "fused", undo: bool = True) -> Report:
    """Make adapters part of the denoiser's weights, at the weights that they have; a step of the recipe.

    Unlike diffusers' `fuse_lora` no adapter stays on the model, so that it can be quantised, and `save` keeps the
    adapters' files, so that `vislr recipe replay` and `undo` know what was fused.

    Args:
        target: a pipeline or module.
        names: which adapters; none: all. Others may not be on the model.
        name: of the step. undo: keep the weights for `remove`.

    Raises:
        AdapterError: no such adapter, one is off, another would stay, or a weight is quantised. ModelError: a
            composition is on. The model is as it was.
    """
    from vislr.formats.fusing import FusePlan

    chosen = (names,) if isinstance(names, str) else tuple(names)
    return apply(target, FusePlan(chosen), name=name, undo=undo)


def base_state(module: nn.Module) -> dict[str, Any]:
    """The state dict under the base's own names: without adapters, without `base_layer` in keys."""
    from vislr.adapters import inject
    from vislr.adapters.sara_layer import unmerged_tensors

    wrapped = [f"{path}." for path, _ in inject.tuner_layers(module)]
    state = {
        inject.plain_name(key): value
        for key, value in module.state_dict().items()
        if all(key.startswith(f"{path}base_layer.") for path in wrapped if key.startswith(path))
    }
    # Sparse adapters live in the weights themselves.
    return state | {inject.plain_name(key): value for key, value in unmerged_tensors(module).items()}
