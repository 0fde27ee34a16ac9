"""Models built from a name or a config alone: structure on meta, no weights read, no memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vislr.anatomy.architectures import ARCHITECTURES
from vislr.anatomy.text import TOKENIZERS, text_tokens
from vislr.core.errors import ModelError, hint
from vislr.core.files import read_json

_COMPONENTS = ("unet", "transformer")


def skeleton(reference: str | Path, folders: Mapping[str, Path] | None = None) -> nn.Module:
    """A model without weights, all tensors on meta.

    Args:
        reference: a diffusers folder (of a pipeline, whose denoiser is taken, or of one model), of
            which only the JSON is read; "timm:NAME"; "torchvision:NAME"; or a name in `ARCHITECTURES`.
        folders: more names, of diffusers folders that the caller knows.

    Raises:
        ModelError: none of these; names the nearest.
    """
    name = str(reference)
    source, separator, inner = name.partition(":")
    if separator and source in ("timm", "torchvision"):
        return _from_library(source, inner)
    if name in ARCHITECTURES:
        class_name, config = ARCHITECTURES[name]
        return _from_config(class_name, config, name)
    folders = folders or {}
    folder = Path(folders.get(name, name))
    if folder.is_dir():
        return _from_folder(folder)
    raise ModelError(
        f"'{name}' is no folder and no known model{hint(name, [*folders, *ARCHITECTURES])}"
        " (also possible: timm:NAME, torchvision:NAME)"
    )


def _on_meta(build: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:
        # Some constructors compute with tensors; then only what they register goes to meta.
        from accelerate import init_empty_weights

        with init_empty_weights():
            return build().to("meta")
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"cannot build '{name}': {type(error).__name__}: {error}") from error


def _from_library(source: str, name: str) -> nn.Module:
    if source == "timm":
        import timm

        if not timm.is_model(name):
            raise ModelError(f"timm has no model '{name}'{hint(name, timm.list_models())}")
        return _on_meta(lambda: timm.create_model(name, pretrained=False), name)
    import torchvision

    known = torchvision.models.list_models()
    if name not in known:
        raise ModelError(f"torchvision has no model '{name}'{hint(name, known)}")
    plain = {"weights": None}
    if "weights_backbone" in torchvision.models.get_model_builder(name).__annotations__:
        plain["weights_backbone"] = None
    return _on_meta(lambda: torchvision.models.get_model(name, **plain), name)


def _from_folder(folder: Path) -> nn.Module:
    tokens = None
    if (folder / "model_index.json").is_file():
        index = _json(folder / "model_index.json")
        found = next((name for name in _COMPONENTS if index.get(name, [None])[0] is not None), None)
        if found is None:
            raise ModelError(f"the pipeline in '{folder}' has none of {list(_COMPONENTS)}")
        tokens = text_tokens(str(index.get("_class_name")), _text_limits(folder), found)
        folder = folder / found
    if not (folder / "config.json").is_file():
        raise ModelError(f"'{folder}' is no diffusers folder: neither model_index.json nor config.json in it")
    config = _json(folder / "config.json")
    model = _from_config(str(config.get("_class_name")), config, str(folder))
    model.text_tokens = tokens  # type: ignore[assignment]
    return model


def _text_limits(folder: Path) -> dict[str, int]:
    """Longest text of each tokenizer of a pipeline's folder that says it."""
    limits = {}
    for name in TOKENIZERS:
        path = folder / name / "tokenizer_config.json"
        limit = _json(path).get("model_max_length") if path.is_file() else None
        if isinstance(limit, int):
            limits[name] = limit
    return limits


def _json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except ValueError as error:
        raise ModelError(f"'{path}' is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"'{path}' is no config: it holds a {type(value).__name__}")
    return value


def _from_config(class_name: str, config: dict[str, Any], name: str) -> nn.Module:
    import diffusers

    found = getattr(diffusers, class_name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise ModelError(f"'{name}' holds a '{class_name}', which diffusers does not know as a model")
    return _on_meta(lambda: found.from_config(config), name)
