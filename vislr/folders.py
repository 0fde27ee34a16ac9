"""Folders: a pipeline or model as an ordinary diffusers folder and `vislr.json`, and back.

=====================  =========================================================================
what                   where
=====================  =========================================================================
structural plans       `config.json` of the component, key `vislr`; they come with `from_pretrained`
run-time plans         `vislr.json`, key `plans`; put back by `load`
unmerged adapters      `adapters/NAME.safetensors`; put back by `load`
fused adapters         `fused/STEP-NAME.safetensors`; read by `vislr recipe replay` and `undo`
the record             `vislr.json`, key `steps`: every change and its report, in order
=====================  =========================================================================
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vislr import classifier_folders, models
from vislr.core.errors import FormatError, ModelError, OutputError, VislrError, hint
from vislr.core.files import atomic_path, read_json, write_json
from vislr.core.hashing import content_hash
from vislr.core.report import Report
from vislr.core.versions import versions_of
from vislr.recipe import base_state, read_onto
from vislr.record import (
    attach_for,
    component_of,
    entries_of,
    measurements_of,
    modules_of,
    note_measurement,
    put_on,
    record_of,
    restore,
    structure_of,
)

SCHEMA = 1
RECIPE_FILE = "vislr.json"


def _without_adapters(module: Any) -> Any:
    """A module of the same class and config, for saving only: it shares the base's tensors and carries no adapter."""
    import torch

    with torch.device("meta"):
        plain = type(module).from_config(module.config)
    plain.load_state_dict(base_state(module), assign=True, strict=True)
    return plain


def save(target: Any, folder: str | os.PathLike) -> Path:
    """Write a pipeline (or a model of diffusers or timm) as an ordinary folder of its library plus `vislr.json`.

    Unmerged adapters go to `adapters/NAME.safetensors`; the base's weights are stored under their
    own names, so that stock diffusers loads the folder, without the adapters. Merged (fused)
    adapters are part of the weights. A pruned component is loaded by `import vislr` and diffusers.

    Raises:
        OutputError: the folder holds other things, or cannot be written.
        ModelError: the target cannot be saved as a diffusers folder.
    """
    from vislr import formats
    from vislr.adapters import inject

    folder = Path(folder)
    if not hasattr(target, "save_pretrained") and not classifier_folders.is_timm(target):
        raise ModelError(
            f"a {type(target).__name__} cannot be saved as a diffusers folder; use save_adapter, or keep its weights "
            "and plans (recipe_of)"
        )
    ours = any((folder / known).exists() for known in ("model_index.json", RECIPE_FILE, "config.json"))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise OutputError(f"'{folder}' holds other files; save into a new folder")
    _check_structure(target)
    component, module = component_of(target)
    for part in modules_of(target):
        if part is not module and inject.adapter_names(part):
            owner = next(other for other, own in target.components.items() if own is part)
            raise ModelError(
                f"'{owner}' carries the adapter '{inject.adapter_names(part)[0]}', which a folder cannot keep; "
                "write it with save_adapter, remove it, and save"
            )
    weights = inject.adapter_weights(module)
    merged = inject.merged_adapters(module)
    kept = {name: weight for name, weight in weights.items() if name not in merged}
    with atomic_path(folder) as temporary:
        if classifier_folders.is_timm(target):
            classifier_folders.write(target, base_state(module), structure_of(module), temporary)
        elif not weights:
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
            "steps": _steps(target, temporary),
            "plans": _run_time_plans(target),
            "adapters": adapters,
            "merged": sorted(merged),
            "measurements": measurements_of(target),
        }
        write_json(temporary / RECIPE_FILE, record)
    return folder


def _steps(target: Any, folder: Path) -> list[dict[str, Any]]:
    """The record as data; files of its steps are written into the folder."""
    steps = []
    for number, entry in enumerate(entries_of(target)):
        step, files = entry.to_dict(), {}
        # In memory it counts all changes of the process; the same recipe gives the same file.
        step["report"]["index"] = number
        for name, content in entry.attached.files.items():
            files[name] = f"fused/{number:02d}-{name}.safetensors"
            (folder / "fused").mkdir(exist_ok=True)
            (folder / files[name]).write_bytes(content)
        steps.append(step | ({"files": files} if files else {}))
    return steps


def fused_in(steps: list[dict[str, Any]]) -> dict[int, int]:
    """Place of an adapter's step -> place of the step that fused it into the weights."""
    found: dict[int, int] = {}
    for place, step in enumerate(steps):
        for name in step["change"].get("adapters", {}) if step["report"]["kind"] == "fuse" else ():
            own = [i for i in range(place) if steps[i]["report"]["name"] == name and "plan" not in steps[i]["change"]]
            found |= {i: place for i in own if i not in found}
    return found


def _check_structure(target: Any) -> None:
    """Every pruned part must say so in its config, also where the plan was applied to the bare component."""
    for module in modules_of(target):
        carries = models.can_carry(module) or classifier_folders.is_timm(module)
        if any(entry.structural for entry in record_of(module)) and not carries:
            raise ModelError(
                f"a {type(module).__name__} with changed structure has no config to keep the plan in; "
                f"supported are {', '.join(models.GUARDS)}"
            )
    for name, part in getattr(target, "components", {}).items():
        if models.can_carry(part) and part.config.get(models.KEY):
            target.register_modules(**{name: part})


def _run_time_plans(target: Any) -> list[dict[str, Any]]:
    return [
        models.entry_of(entry.report.kind, entry.report.name, entry.change["plan"])
        | {"component": entry.report.component}
        for entry in entries_of(target)
        if entry.is_plan and not entry.structural
    ]


def _options(pipeline_class: type) -> set[str]:
    import inspect

    names = set(inspect.signature(pipeline_class).parameters)
    return {name for name in names if name.startswith(("requires_", "force_", "is_", "add_"))}


def load(source: str | os.PathLike, *, any_base: bool = False, **options: Any) -> Any:
    """Load a pipeline and put back what `save` recorded.

    Args:
        source: name of an embedded pipeline, a diffusers folder (pipeline or one model), folder of timm,
            embedded classifier, or a hub id.
        any_base: accept adapters whose base weights differ.
        options: passed on to `from_pretrained` (dtype, revision, ...); dtype is float32 unless given.

    Returns:
        a diffusers pipeline, or a model if the folder is one (of timm in evaluation mode).

    Raises:
        ModelError: `source` is neither. FormatError: `vislr.json` has an unknown schema.
    """
    from vislr.adapters import inject
    from vislr.anatomy.text import note_text_tokens

    target, folder = _load_diffusers(source, options)
    note_text_tokens(target)
    for module in modules_of(target):
        models.align(module)
    if folder is None or not (folder / RECIPE_FILE).is_file():
        return target
    record = read_recipe(folder)
    _restore_reports(target, record["steps"], folder)
    # Adapters that were on beside a fused one were made on the weights before fusing.
    accept = any_base or bool(record["merged"])
    for name, stored in record["adapters"].items():
        known = _report_of(record, name)
        inject.rest_carriers(component_of(target)[1])
        read_onto(target, folder / stored["file"], name, stored["weight"], any_base=accept, known=known)
    if record["adapters"]:
        on = {name: stored["weight"] for name, stored in record["adapters"].items() if stored["active"]}
        inject.set_adapters(component_of(target)[1], list(on), list(on.values()))
    for stored in record["plans"]:
        _, name, plan = models.read_entry(stored)
        known = _report_of(record, name, stored["plan"])
        put_on(target, plan, name, attach_for(target, plan), known=known)
    for name, figures in record["measurements"].items():
        note_measurement(target, name, figures.get("before"), figures.get("after"))
    return target


def _restore_reports(target: Any, steps: list[dict[str, Any]], folder: Path) -> None:
    """Reports of what is in the weights: structure, fused adapters; a config that disagrees stands above them."""
    fused = fused_in(steps)
    settled = {*fused, *fused.values()}
    for module in modules_of(target):
        own = [entry.change for entry in record_of(module)]
        mine = module is component_of(target)[1]
        stored = [
            (Report.from_dict(step["report"]), step["change"], _read_files(step, folder))
            for place, step in enumerate(steps)
            if step["change"] in own or (mine and place in settled)
        ]
        if stored and sum(change in own for _, change, _ in stored) == len(own):
            restore(module, stored)


def _report_of(record: dict[str, Any], name: str, plan: Any = None) -> Report | None:
    """What was counted when an adapter, or a plan, went on: loading counts nothing again."""
    steps = [step for step in record["steps"] if step["report"]["name"] == name and step["change"].get("plan") == plan]
    return Report.from_dict(steps[-1]["report"]) if steps else None


def _read_files(step: dict[str, Any], folder: Path) -> dict[str, bytes]:
    return {name: (folder / file).read_bytes() for name, file in step.get("files", {}).items()}


def read_recipe(folder: str | os.PathLike) -> dict[str, Any]:
    """The checked `vislr.json` of a folder.

    Raises:
        FormatError: there is none, it is damaged, of another schema, or names files outside the folder.
    """
    folder = Path(folder)
    path = folder / RECIPE_FILE
    if not path.is_file():
        raise FormatError(f"'{folder}' has no {RECIPE_FILE}: it was not written by vislr.save")
    try:
        record = read_json(path)
        if record["schema"] != SCHEMA:
            raise FormatError(f"'{path}' has schema {record['schema']}; this vislr reads {SCHEMA}")
        record = {"plans": [], "measurements": {}, **record}
        for name, stored in record["adapters"].items():
            _check_inside(folder, stored["file"], path, f"adapter '{name}'")
            float(stored["weight"]), bool(stored["active"])
        list(record["merged"])
        for step in record["steps"]:
            kind = Report.from_dict(step["report"]).kind
            files = dict(step.get("files", {}))
            if kind == "fuse" and set(files) != set(step["change"]["adapters"]):
                raise FormatError(f"'{path}' does not keep a file for every adapter that was fused")
            for file in files.values():
                _check_inside(folder, file, path, "a fused adapter")
        for stored in record["plans"]:
            models.read_entry(stored)
        for figures in record["measurements"].values():
            dict(figures)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"'{path}' is no record of vislr: {type(error).__name__}: {error}") from error
    return record


def _check_inside(folder: Path, file: str, path: Path, what: str) -> None:
    inside = (folder / file).resolve()
    if not inside.is_relative_to(folder.resolve()) or not inside.is_file():
        raise FormatError(f"'{path}' names {what} at '{file}', which is not in the folder")


def _load_diffusers(source: str | os.PathLike, options: dict[str, Any]) -> tuple[Any, Path | None]:
    import diffusers
    import torch

    from vislr import zoo

    name, folder = str(source), Path(source)
    if not folder.exists() and name in zoo.pipeline_names():
        return zoo.pipeline(name, **options), zoo.pipeline_folder(name)
    if not folder.exists() and name in zoo.classifier_names():
        return zoo.classifier(name), None
    if folder.is_dir():
        options = {"local_files_only": True, "dtype": torch.float32} | options
        if (folder / "model_index.json").is_file():
            loader: Any = diffusers.DiffusionPipeline
            index = read_json(folder / "model_index.json")
            # SD3 without T5 is refused unless its absence is said twice.
            options = {key: None for key, value in index.items() if value == [None, None]} | options
        elif (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            if classifier_folders.is_folder_of_timm(config):
                return classifier_folders.read(folder, config), folder
            wanted = config.get("_class_name")
            loader = getattr(diffusers, str(wanted), None)
            if not (isinstance(loader, type) and issubclass(loader, diffusers.ModelMixin)):
                raise ModelError(f"'{folder}' holds a '{wanted}', which diffusers does not know as a model")
            loader = models.planned_class(str(wanted)) if config.get(models.KEY) else loader
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
        with _known_to_diffusers(folder is None):
            return loader.from_pretrained(name, use_safetensors=True, trust_remote_code=False, **options), folder
    except VislrError:
        raise
    except Exception as error:
        # Libraries raise a dozen types here; all mean that this is no pipeline that can be loaded.
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ModelError(f"cannot load '{name}': {type(error).__name__}: {reason}") from error


@contextlib.contextmanager
def _known_to_diffusers(on: bool) -> Iterator[None]:
    """While a hub repository is fetched: its index may name classes of vislr, which are no code of the repository."""
    if not on:
        yield
        return
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    LOADABLE_CLASSES.setdefault("vislr", {"ModelMixin": ["save_pretrained", "from_pretrained"]})
    try:
        yield
    finally:
        LOADABLE_CLASSES.pop("vislr", None)
