"""The face: put changes on a pipeline or module, take them off, save, load; and the record of it.

Every change is an `Entry` in the changed module's record, in the order of application. `save`
writes the record as `vislr.json` into an ordinary diffusers folder.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core import registry
from vislr.core.errors import AdapterError, ModelError, OutputError, UndoError, VislrError, hint
from vislr.core.files import atomic_path, read_json, write_json
from vislr.core.hashing import content_hash
from vislr.core.registry import Attached
from vislr.core.report import Report
from vislr.core.versions import versions_of

if TYPE_CHECKING:
    from torch import nn

SCHEMA = 1
RECIPE_FILE = "vislr.json"
_RECORD = "_vislr_record"
# Applied later = larger, over all modules of a process: the order within a pipeline.
_order = itertools.count()


@dataclass
class Entry:
    """One applied change: what `vislr.json` keeps, and what `remove` needs."""

    report: Report
    change: dict[str, Any]
    attached: Attached

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the live part stays behind."""
        return {"change": self.change, "report": self.report.to_dict()}


def _record(module: nn.Module) -> list[Entry]:
    if _RECORD not in module.__dict__:
        # Not through nn.Module.__setattr__: the record is no part of the state.
        module.__dict__[_RECORD] = []
    return module.__dict__[_RECORD]


def _component(target: Any, change: object = None) -> tuple[str, Any]:
    """Where a change goes (name, module): the component that it names, else the denoiser, else the module itself."""
    from vislr.anatomy import denoiser_of

    named = getattr(change, "component", None)
    if named and hasattr(target, "components"):
        if named not in target.components:
            raise ModelError(f"the pipeline has no component '{named}'{hint(named, target.components)}")
        return named, target.components[named]
    return denoiser_of(target)


def recipe_of(target: Any) -> list[dict[str, Any]]:
    """The record of a pipeline or module: what was applied and not removed, in order, as plain data."""
    return [entry.to_dict() for entry in _entries(target)]


def _modules(target: Any) -> list[nn.Module]:
    from torch import nn

    if isinstance(target, nn.Module):
        return [target]
    return [part for part in getattr(target, "components", {}).values() if isinstance(part, nn.Module)]


def _entries(target: Any) -> list[Entry]:
    found = [entry for module in _modules(target) for entry in module.__dict__.get(_RECORD, [])]
    return sorted(found, key=lambda entry: entry.report.index)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _flops(module: nn.Module) -> tuple[int | None, dict | None, str]:
    """FLOPs at the model's own size; a model that no reader knows is counted by parameters alone."""
    from vislr.anatomy import flops, sample_of

    try:
        return flops(module), sample_of(module), ""
    except ModelError as error:
        return None, None, f"FLOPs not counted: {error}"


def apply(target: Any, change: Any, *, name: str = "default", undo: bool = True) -> Report:
    """Put an adapter config or a plan on a pipeline or module.

    Args:
        target: a diffusers pipeline (the change goes to its denoiser, or to the component that a
            plan names), or a bare module.
        change: ConvLoraConfig, FloraConfig, any config of peft, or a plan.
        name: the adapter's name; plans are recorded under it.
        undo: keep what `remove` needs. False frees what was removed at once.

    Returns:
        a Report: sites touched, parameters and FLOPs before and after.

    Raises:
        ConfigError: `change` is neither a config nor a plan.
        TargetError: it matches nothing in the model.
        AdapterError: it does not fit. In every case the model is as it was.
    """
    handler = registry.handler_of(registry.kind_of(change))
    return _put_on(target, change, name, handler.attach, undo)


def _put_on(target: Any, change: Any, name: str, attach: Callable[..., Attached], undo: bool = True) -> Report:
    """Count, let `attach(module, change, name)` work, count again, record."""
    kind = registry.kind_of(change)
    component, module = _component(target, change)
    parameters = _parameters(module)
    flops_before, sample, note = _flops(module)
    attached = attach(module, change, name)
    counted = None
    if flops_before is not None:
        flops_after, _, note = _flops(module)
        counted = None if flops_after is None else (flops_before, flops_after)
    report = Report(
        kind=kind.name,
        name=name,
        component=component,
        sites=attached.sites,
        parameters=(parameters, _parameters(module)),
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        flops=counted,
        sample=sample if counted else None,
        notes=attached.notes + ((note,) if note else ()),
        index=next(_order),
    )
    if not undo:
        attached.undo = None
    _record(module).append(Entry(report, attached.change, attached))
    return report


def remove(target: Any, report: Report) -> None:
    """Take the change of `report` off again, exactly.

    Raises:
        UndoError: it is not on the target, or it was applied with `undo=False`.
    """
    for module in _modules(target):
        for entry in module.__dict__.get(_RECORD, []):
            if entry.report.index == report.index:
                if entry.attached.undo is None:
                    raise UndoError(f"'{report.name}' was applied with undo=False; nothing was kept to undo it")
                registry.handler_of(registry.get_kind(report.kind)).detach(module, entry.attached)
                _record(module).remove(entry)
                if not _record(module):
                    del module.__dict__[_RECORD]
                return
    known = [entry.report.name for entry in _entries(target)]
    raise UndoError(f"'{report.name}' is not on this {type(target).__name__}{hint(report.name, known)}")


def set_adapters(target: Any, names: str | list[str], weights: float | list[float] | None = None) -> None:
    """Switch these adapters on, with these weights, and all others off. An empty list switches all off.

    Works on any model; on classes that have diffusers' own `set_adapters`, that one works too.

    Raises:
        AdapterError: a name is not on the target, or counts differ.
    """
    from vislr.adapters import inject

    inject.set_adapters(_component(target)[1], names, weights)


def _only_adapter(module: nn.Module, name: str | None) -> str:
    from vislr.adapters import inject

    names = inject.adapter_names(module)
    if name is None:
        if len(names) == 1:
            return names[0]
        raise AdapterError(f"say which adapter: {names}" if names else "the model carries no adapter")
    if name not in names:
        raise AdapterError(f"no adapter is called '{name}'{hint(name, names)}")
    return name


def save_adapter(target: Any, path: str | os.PathLike, *, name: str | None = None, format: str = "vislr") -> Path:
    """Write one adapter as a safetensors file.

    Args:
        target: pipeline or module that carries it.
        path: the file.
        name: which adapter; may be left out if there is only one.
        format: "vislr" (every kind, exact) or "diffusers" (plain LoRA, for `load_lora_weights`).

    Raises:
        AdapterError: no such adapter. FormatError: the format cannot hold this kind.
        OutputError: the file cannot be written.
    """
    from vislr import formats

    component, module = _component(target)
    chosen = _only_adapter(module, name)
    return formats.write_adapter(module, chosen, path, format=format, component=component)


def load_adapter(
    target: Any, path: str | os.PathLike, *, name: str | None = None, weight: float = 1.0, any_base: bool = False
) -> Report:
    """Read an adapter's file and put it on the pipeline or module. Every tensor finds its place or it fails.

    Args:
        target: pipeline or module.
        path: the file; its format is recognised.
        name: the adapter's name; default: the file's stem.
        weight: its weight.
        any_base: accept a base model whose weights differ from those that the adapter was made on.

    Raises:
        FormatError, AdapterError: the file is damaged or does not fit; the model is as it was.
    """
    from vislr import formats
    from vislr.adapters import inject

    path = Path(path)
    name = path.stem.replace(".", "_") if name is None else name
    file = formats.read_adapter(path)
    _, module = _component(target)
    active = inject.active_adapters(module)
    report = _put_on(
        target, file.config, name, lambda module, _, name: formats.attach_file(module, name, file, any_base=any_base)
    )
    for parameter in inject.adapter_parameters(module, name).values():
        parameter.requires_grad_(False)
    try:
        inject.set_adapters(module, [*active, name], [*active.values(), weight])
    except VislrError:
        remove(target, report)
        raise
    return report


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


def _without_adapters(module: Any) -> Any:
    """A module of the same class and config, for saving only: it shares the base's tensors and carries no adapter."""
    import torch

    with torch.device("meta"):
        plain = type(module).from_config(module.config)
    plain.load_state_dict(base_state(module), assign=True, strict=True)
    return plain


def save(target: Any, folder: str | os.PathLike) -> Path:
    """Write a pipeline (or a diffusers model) as an ordinary diffusers folder plus `vislr.json`.

    Unmerged adapters go to `adapters/NAME.safetensors`; the base's weights are stored under their
    own names, so that stock diffusers loads the folder, without the adapters. Merged (fused)
    adapters are part of the weights.

    Raises:
        OutputError: the folder holds other things, or cannot be written.
        ModelError: the target cannot be saved as a diffusers folder.
    """
    from vislr import formats
    from vislr.adapters import inject

    folder = Path(folder)
    if not hasattr(target, "save_pretrained"):
        raise ModelError(f"a {type(target).__name__} cannot be saved as a diffusers folder; use save_adapter")
    ours = any((folder / mark).exists() for mark in ("model_index.json", RECIPE_FILE, "config.json"))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise OutputError(f"'{folder}' holds other files; save into a new folder")
    component, module = _component(target)
    weights = inject.adapter_weights(module)
    merged = inject.merged_adapters(module)
    kept = {name: weight for name, weight in weights.items() if name not in merged}
    with atomic_path(folder) as temporary:
        if not weights:
            target.save_pretrained(temporary)
        elif component:
            parts = dict(target.components) | {component: _without_adapters(module)}
            # Options such as requires_safety_checker are config, not components.
            options = {key: value for key, value in target.config.items() if key in _options(type(target))}
            type(target)(**parts, **options).save_pretrained(temporary)
        else:
            _without_adapters(module).save_pretrained(temporary)
        adapters = {}
        for name in kept:
            file = f"adapters/{name}.safetensors"
            (temporary / "adapters").mkdir(exist_ok=True)
            formats.write_adapter(module, name, temporary / file, format="vislr", component=component)
            adapters[name] = {"file": file, "weight": kept[name], "active": name in inject.active_adapters(module)}
        record = {
            "schema": SCHEMA,
            "versions": versions_of("vislr", "torch", "diffusers", "peft", "transformers"),
            "component": component,
            "class": type(module).__name__,
            "base": content_hash(base_state(module)),
            "steps": [entry.to_dict() for entry in _entries(target)],
            "adapters": adapters,
            "merged": sorted(merged),
        }
        write_json(temporary / RECIPE_FILE, record)
    return folder


def _options(pipeline_class: type) -> set[str]:
    import inspect

    names = set(inspect.signature(pipeline_class).parameters)
    return {name for name in names if name.startswith(("requires_", "force_", "is_", "add_"))}


def load(source: str | os.PathLike, *, any_base: bool = False, **options: Any) -> Any:
    """Load a pipeline and put back what `save` recorded.

    Args:
        source: name of an embedded pipeline, a diffusers folder (pipeline or one model), or a hub id.
        any_base: accept adapters whose base weights differ.
        options: passed on to `from_pretrained` (dtype, revision, ...); dtype is float32 unless given.

    Returns:
        a diffusers pipeline, or a model if the folder is one.

    Raises:
        ModelError: `source` is neither. FormatError: `vislr.json` has an unknown schema.
    """
    from vislr.adapters import inject

    target, folder = _load_diffusers(source, options)
    if folder is None or not (folder / RECIPE_FILE).is_file():
        return target
    record = _read_recipe(folder)
    # Adapters that were on beside a fused one were made on the weights before fusing.
    accept = any_base or bool(record["merged"])
    for name, stored in record["adapters"].items():
        load_adapter(target, folder / stored["file"], name=name, weight=stored["weight"], any_base=accept)
    if record["adapters"]:
        on = {name: stored["weight"] for name, stored in record["adapters"].items() if stored["active"]}
        inject.set_adapters(_component(target)[1], list(on), list(on.values()))
    return target


def _read_recipe(folder: Path) -> dict[str, Any]:
    from vislr.core.errors import FormatError

    path = folder / RECIPE_FILE
    try:
        record = read_json(path)
        if record["schema"] != SCHEMA:
            raise FormatError(f"'{path}' has schema {record['schema']}; this vislr reads {SCHEMA}")
        for name, stored in record["adapters"].items():
            inside = (folder / stored["file"]).resolve()
            if not inside.is_relative_to(folder.resolve()) or not inside.is_file():
                raise FormatError(f"'{path}' names adapter '{name}' at '{stored['file']}', which is not in the folder")
            float(stored["weight"]), bool(stored["active"])
        list(record["merged"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"'{path}' is no record of vislr: {type(error).__name__}: {error}") from error
    return record


def _load_diffusers(source: str | os.PathLike, options: dict[str, Any]) -> tuple[Any, Path | None]:
    import diffusers
    import torch

    from vislr import zoo

    name, folder = str(source), Path(source)
    if not folder.exists() and name in zoo.pipeline_names():
        return zoo.pipeline(name, **options), zoo.pipeline_folder(name)
    if folder.is_dir():
        options = {"local_files_only": True, "dtype": torch.float32} | options
        if (folder / "model_index.json").is_file():
            loader: Any = diffusers.DiffusionPipeline
        elif (folder / "config.json").is_file():
            wanted = read_json(folder / "config.json").get("_class_name")
            loader = getattr(diffusers, str(wanted), None)
            if not (isinstance(loader, type) and issubclass(loader, diffusers.ModelMixin)):
                raise ModelError(f"'{folder}' holds a '{wanted}', which diffusers does not know as a model")
        else:
            raise ModelError(f"'{folder}' is no diffusers folder: neither model_index.json nor config.json in it")
    elif folder.exists():
        raise ModelError(f"'{folder}' is a file; expected a diffusers folder, an embedded name or a hub id")
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        loader, folder = diffusers.DiffusionPipeline, None  # type: ignore[assignment]
    else:
        raise ModelError(
            f"there is no folder '{name}', and no embedded pipeline of that name{hint(name, zoo.pipeline_names())}"
        )
    try:
        # Never a pickle, never code that came with the model.
        return loader.from_pretrained(name, use_safetensors=True, trust_remote_code=False, **options), folder
    except VislrError:
        raise
    except Exception as error:
        # Libraries raise a dozen types here; all mean that this is no pipeline that can be loaded.
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ModelError(f"cannot load '{name}': {type(error).__name__}: {reason}") from error
