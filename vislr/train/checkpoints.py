"""State of a run on disk: whole folders, written aside and renamed; safetensors and JSON only."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vislr.core.errors import ConfigError, FormatError
from vislr.core.files import atomic_path, read_json, write_json, write_tensors

SCHEMA = 2
_STATE, _WEIGHTS, _OPTIMIZER = "state.json", "trainable.safetensors", "optimizer.safetensors"
# Of a parameter group: what it holds, and what may differ between two machines.
_NOT_KEPT = ("params", "fused", "foreach", "capturable", "differentiable", "maximize")


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints below a run's folder, oldest first."""
    found = [path.parent for path in (folder / "checkpoints").glob(f"*/{_STATE}") if path.parent.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def save_checkpoint(
    folder: Path,
    step: int,
    trainable: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    keep: int,
    save_adapter: Callable[[Path], Any] | None = None,
    files: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> Path:
    """Write `folder/checkpoints/STEP`, then remove all but the newest `keep`.

    Args:
        folder: of the run.
        step: updates made so far.
        trainable: name -> parameter.
        optimizer: over those parameters.
        state: plain data to be given back by `load_checkpoint`.
        keep: checkpoints kept, this one included.
        save_adapter: writes the adapter as users load it to a path in the checkpoint.
        files: name of a further file -> its tensors; `read_part` gives them back.
    """
    tensors, numbers = optimizer_state(trainable, optimizer)
    path = folder / "checkpoints" / f"{step:06d}"
    with atomic_path(path) as temporary:
        temporary.mkdir()
        write_tensors(temporary / _WEIGHTS, trainable)
        write_tensors(temporary / _OPTIMIZER, tensors)
        for name, content in (files or {}).items():
            write_tensors(temporary / name, content)
        if save_adapter is not None:
            save_adapter(temporary / "adapter.safetensors")
        groups = [{key: _number(value) for key, value in group.items() if key not in _NOT_KEPT}
                  for group in optimizer.param_groups]  # fmt: skip
        write_json(
            temporary / _STATE, {"schema": SCHEMA, "step": step, "optimizer": numbers, "groups": groups, **state}
        )
    for old in checkpoints_in(folder)[:-keep]:
        remove_folder(old)
    return path


def remove_folder(path: Path) -> None:
    """Remove a checkpoint; one that is removed by half is none."""
    gone = path.with_name(f".{path.name}.tmp-old")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed writes left in a run's folder. No other process may be writing there."""
    for place in (folder, folder / "checkpoints", folder / "samples"):
        for path in place.glob(".*.tmp-*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def optimizer_state(
    trainable: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """An optimiser's state as tensors named PARAMETER/ENTRY, and as numbers by parameter.

    Entries that are tensors of a class of their own (8-bit moments of torchao) are taken apart into
    PARAMETER/ENTRY:PART.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in trainable.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if type(value) is torch.Tensor:
                # Optimisers share some tables between parameters; a file must hold each by itself.
                tensors[f"{name}/{key}"] = value.detach().clone()
            elif torch.is_tensor(value):
                whole: Any = value
                for part in whole.__tensor_flatten__()[0]:
                    tensors[f"{name}/{key}:{part}"] = getattr(whole, part).detach().clone()
                numbers.setdefault(name, {})[key] = {"class": type(whole).__name__, "signed": bool(whole.signed)}
            else:
                numbers.setdefault(name, {})[key] = _number(value)
    return tensors, numbers


def _number(value: Any) -> Any:
    return value.item() if torch.is_tensor(value) and value.numel() == 1 else value


def load_checkpoint(
    path: Path, trainable: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint's weights and optimiser state back, bit for bit.

    Returns:
        its `state.json`.

    Raises:
        FormatError: the checkpoint is damaged, of another schema, or of another adapter; nothing is changed.
    """
    try:
        state = read_json(path / _STATE)
    except (OSError, ValueError) as error:
        raise FormatError(f"checkpoint '{path}' cannot be read: {error}") from error
    weights, stored = read_part(path, _WEIGHTS), read_part(path, _OPTIMIZER)
    if state.get("schema") != SCHEMA:
        raise FormatError(f"checkpoint '{path}' has schema {state.get('schema')}; this vislr reads {SCHEMA}")
    shapes = {name: tuple(value.shape) for name, value in trainable.items()}
    if shapes != {name: tuple(value.shape) for name, value in weights.items()}:
        raise FormatError(f"checkpoint '{path}' holds another adapter: names or shapes of its weights differ")
    if len(state["groups"]) != len(optimizer.param_groups):
        raise FormatError(f"checkpoint '{path}' has {len(state['groups'])} groups of parameters; expected "
                          f"{len(optimizer.param_groups)}")  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    parts: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, value in stored.items():
        name, _, entry = key.rpartition("/")
        entry, _, part = entry.partition(":")
        like = trainable[name]
        if part:
            parts.setdefault((name, entry), {})[part] = value.to(like.device)
        elif value.shape == like.shape and value.dtype != torch.uint8:
            # The fused optimiser walks memory, not indices: state must lie in memory like its parameter.
            found.setdefault(name, {})[entry] = torch.empty_like(like, dtype=value.dtype).copy_(value)
        else:
            # AdamW's count of steps stays on the CPU unless the optimiser is fused or capturable.
            place = like.device if value.numel() > 1 or optimizer.param_groups[0].get("fused") else value.device
            found.setdefault(name, {})[entry] = value.to(place)
    for name, values in state["optimizer"].items():
        for entry, value in values.items():
            whole = _whole(value, parts[name, entry]) if isinstance(value, dict) else value
            found.setdefault(name, {})[entry] = whole
    with torch.no_grad():
        for name, target in trainable.items():
            target.copy_(weights[name])
    optimizer.state.clear()
    for name, values in found.items():
        optimizer.state[trainable[name]] = values
    for group, kept in zip(optimizer.param_groups, state["groups"], strict=True):
        for key, value in kept.items():
            set_number(group, key, tuple(value) if isinstance(value, list) else value)
    return state


def set_number(group: dict[str, Any], key: str, value: Any) -> None:
    """Set a number of a parameter group; one that is kept as a tensor stays that tensor."""
    if torch.is_tensor(group.get(key)):
        group[key].fill_(value)
    else:
        group[key] = value


def _whole(kept: dict[str, Any], parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """8-bit moments of torchao from their parts; the only class that is known here."""
    from torchao.optim.subclass_8bit import OptimState8bit

    if kept["class"] != OptimState8bit.__name__:
        raise FormatError(f"a checkpoint holds optimiser state of class '{kept['class']}'; expected OptimState8bit")
    return OptimState8bit(parts["codes"], parts["scale"], parts["qmap"], kept["signed"], dtype=torch.float32)


def read_part(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one file of a checkpoint.

    Raises:
        FormatError: the file is missing or damaged.
    """
    try:
        return load_file(path / name)
    except OSError as error:
        raise FormatError(f"checkpoint '{path}' cannot be read: {error}") from error
    except Exception as error:
        # safetensors' own error is no subclass of the above.
        raise FormatError(f"checkpoint '{path}' is damaged: {error}") from error


# What may differ between a run and its continuation without changing a single weight.
_FREE = (
    "output",
    "sample",
    "processes",
    "dry_run",
    "check_data",
    "data.workers",
    "data.cache_folder",
    "data.cache_limit_gb",
    "held_out.every",
    "model.offload",
    "model.offload_activations",
    "optim.batch",
    "optim.accumulation",
)


def check_same_run(stored: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse to go on with a config that would not give what the unbroken run gives.

    Raises:
        ConfigError: names the first key that differs.
    """
    old, new = _flat(stored), _flat(present)
    # Where the held-out loss decides what the result is, so does when it is taken.
    decides = new.get("held_out.patience") or new.get("held_out.keep") == "best"
    for key in sorted(old.keys() | new.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in _FREE)
        free = free and not (decides and key == "held_out.every")
        if not free and old.get(key) != new.get(key):
            raise ConfigError(
                f"cannot resume: {key} was {old.get(key)!r} and is {new.get(key)!r}; give the old value, "
                "or start anew with output.overwrite"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
