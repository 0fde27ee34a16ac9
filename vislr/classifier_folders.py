"""A classifier of timm as a folder: timm's own layout, with structural plans beside it in `config.json`.

`config.json` has what `timm.create_model("local-dir:FOLDER", pretrained=True)` reads (architecture, model_args,
num_classes, pretrained_cfg) and vislr's key with the plans. timm alone loads a folder without plans, and fails on the
keys of the weights of one with plans.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr import models
from vislr.core.errors import FormatError, ModelError, VislrError, hint
from vislr.core.files import write_json, write_tensors
from vislr.core.made_with import made_with, note_made_with

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "model.safetensors"
# Of timm's `pretrained_cfg`: where other weights come from.
_PLACES = ("architecture", "file", "url", "hf_hub_id", "source")


def is_timm(module: Any) -> bool:
    """Whether a module is a model of timm that has a name there."""
    return type(module).__module__.startswith("timm.") and bool(_architecture(module))


def is_folder_of_timm(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is one of timm."""
    return isinstance(config.get("architecture"), str)


def write(module: nn.Module, state: dict[str, Any], entries: list[dict[str, Any]], folder: Path) -> None:
    """Write `config.json` and the weights.

    Args:
        state: the weights under the base's own names.
        entries: structural plans that the model carries.

    Raises:
        ModelError: the model was made with arguments that its name does not tell.
    """
    cfg = {
        key: value for key, value in sorted(dict(getattr(module, "pretrained_cfg", None) or {}).items())
        if value is not None and _plain(value) and key not in _PLACES
    }  # fmt: skip
    config = {
        "architecture": _architecture(module), "num_classes": int(getattr(module, "num_classes", 0)),
        "model_args": _arguments(module, state, entries),
        "pretrained_cfg": cfg,
        **({models.KEY: entries} if entries else {}),
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_tensors(folder / WEIGHTS, state)


def read(folder: Path, config: dict[str, Any]) -> nn.Module:
    """The model of a folder, in evaluation mode and float32, its plans replayed, its weights loaded strictly.

    Raises:
        ModelError: timm has no such model, or not with these arguments.
        FormatError: a plan is edited or unknown, or the weights do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not all(isinstance(config.get(key, {}), dict) for key in ("model_args", "pretrained_cfg")):
        raise FormatError(
            f"'{folder}/config.json' is no config of timm: model_args and pretrained_cfg are objects there"
        )
    model: Any = _build(config, str(folder))
    entries = config.get(models.KEY) or []
    models.replay(model, entries)
    file = folder / WEIGHTS
    if not file.is_file():
        raise FormatError(f"'{folder}' has no {WEIGHTS}")
    try:
        model.load_state_dict(load_file(file), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise FormatError(f"the weights in '{folder}' do not fit their config: {str(error)[:300]}") from error
    model.pretrained_cfg = {**dict(config.get("pretrained_cfg") or {}), "architecture": config["architecture"]}
    note_made_with(model, config["architecture"], config.get("model_args") or {}, entries)
    return model.eval()


def _architecture(module: Any) -> str:
    noted = made_with(module).get("architecture")
    cfg = dict(getattr(module, "pretrained_cfg", None) or {})
    return str(noted or cfg.get("architecture") or "")


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(one) for one in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _build(config: dict[str, Any], where: str) -> nn.Module:
    import timm

    name, arguments = str(config["architecture"]), config.get("model_args", {})
    if not timm.is_model(name):
        raise ModelError(f"'{where}' holds a '{name}', which timm does not know{hint(name, timm.list_models())}")
    options = {"num_classes": config.get("num_classes", 1000)}
    # Only what the class itself takes: others fetch or read files.
    known = set(_signature(name))
    for key, value in arguments.items():
        if key not in known or not _plain(value):
            raise ModelError(
                f"'{where}' gives '{name}' the argument '{key}'{hint(str(key), known)}, which it does not take"
            )
        options[key] = value
    try:
        return timm.create_model(name, pretrained=False, **options)
    except Exception as error:
        # Constructors raise a dozen types for arguments that do not fit.
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"timm cannot make the '{name}' of '{where}': {type(error).__name__}: {reason}") from error


def _signature(name: str) -> dict[str, inspect.Parameter]:
    import timm
    import torch

    with torch.device("meta"):
        kind = type(timm.create_model(name, pretrained=False))
    return {k: p for k, p in inspect.signature(kind).parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}


def _arguments(module: Any, state: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What the model was made with, beside its classes: noted, or tried until the shapes are those of the model."""
    import torch

    name, noted = _architecture(module), made_with(module).get("model_args")
    side = getattr(getattr(module, "patch_embed", None), "img_size", None)
    guesses: list[dict[str, Any]] = [{}, {"img_size": list(side)}] if side is not None else [{}]
    wanted = {key: tuple(value.shape) for key, value in state.items()}
    for arguments in guesses if noted is None else [noted]:
        config = {"architecture": name, "model_args": arguments, "num_classes": int(getattr(module, "num_classes", 0))}
        try:
            with torch.device("meta"):
                made = _build(config, name)
                models.replay(made, entries)
        except VislrError:
            # A plan that does not fit is of a model made otherwise.
            continue
        if {key: tuple(value.shape) for key, value in made.state_dict().items()} == wanted:
            return arguments
    raise ModelError(
        f"this model is no plain '{name}' of timm, and its arguments are not known: load it with vislr.load from a "
        "folder that says its model_args; or keep its weights and plans (recipe_of), and adapters with save_adapter"
    )
