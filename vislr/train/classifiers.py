"""Classifiers of timm and torchvision, with a head for the classes of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from vislr.core.errors import ModelError, hint
from vislr.core.files import write_tensors

SOURCES = ("timm/", "torchvision/")


def is_classifier(base: str) -> bool:
    """Whether a base is named like a classifier."""
    return base.startswith(SOURCES)


def load_classifier(
    base: str, classes: int, *, pretrained: bool, size: int | None = None
) -> tuple[nn.Module, nn.Module]:
    """A classifier with a new head.

    Args:
        base: "timm/NAME" or "torchvision/NAME".
        classes: outputs of the head.
        pretrained: fetch the weights; the head's are random in any case.
        size: side of the pictures, for models that are built for one; None: their own.

    Returns:
        the model and its head, a module of it.

    Raises:
        ModelError: no such model, or its weights cannot be fetched.
    """
    source, _, name = base.partition("/")
    try:
        if source == "timm":
            return _timm(name, classes, pretrained, size)
        return _torchvision(name, classes, pretrained)
    except ModelError:
        raise
    except Exception as error:
        # Hubs and libraries raise a dozen types here.
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"cannot load '{base}': {type(error).__name__}: {reason}") from error


def _timm(name: str, classes: int, pretrained: bool, size: int | None) -> tuple[nn.Module, nn.Module]:
    import timm

    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise ModelError(f"timm has no model '{name}'{hint(name, known)}")
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": classes}
    model: Any
    try:
        model = timm.create_model(name, **(options if size is None else options | {"img_size": size}))
    except TypeError:
        # Conv nets take any size and have no such argument.
        model = timm.create_model(name, **options)
    head = model.get_classifier()
    if not isinstance(head, nn.Module) or not list(head.parameters()):
        raise ModelError(f"timm's '{name}' has no head to train")
    return model, head


def _torchvision(name: str, classes: int, pretrained: bool) -> tuple[nn.Module, nn.Module]:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelError(f"torchvision has no model '{name}'{hint(name, known)}")
    model = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ModelError(f"torchvision's '{name}' has no linear head to train")
    parent, _, last = linears[-1].rpartition(".")
    old: Any = model.get_submodule(linears[-1])
    head = nn.Linear(old.in_features, classes)
    setattr(model.get_submodule(parent), last, head)
    return model, head


def save_head(model: nn.Module, head: nn.Module, path: Path, classes: tuple[str, ...]) -> None:
    """Write the head's weights under their names in the model, and the names of the classes."""
    import json

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {names[id(parameter)]: parameter for parameter in head.parameters()}
    write_tensors(path, tensors, metadata={"classes": json.dumps(classes)})
