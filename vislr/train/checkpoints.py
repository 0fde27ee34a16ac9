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

SCHEMA = 1
_STATE, _WEIGHTS, _OPTIMIZER = "state.json", "trainable.safetensors", "optimizer.safetensors"


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
) -> Path:
    """Write `folder/checkpoints/STEP`, then remove all but the newest `keep`.

    Args:
        folder: of the run.
        step: updates made so far.
        trainable: name -> parameter.
        optimizer: over those parameters, in that order.
        state: plain data to be given back by `load_checkpoint`.
        keep: checkpoints kept, this one included.
        save_adapter: writes the adapter as users load it to a path in the checkpoint.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    names = list(trainable)
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{names[index]}/{key}"] = value
            else:
                numbers.setdefault(names[index], {})[key] = value
    path = folder / "checkpoints" / f"{step:06d}"
    with atomic_path(path) as temporary:
        temporary.mkdir()
        write_tensors(temporary / _WEIGHTS, trainable)
        write_tensors(temporary / _OPTIMIZER, tensors)
        if save_adapter is not None:
            save_adapter(temporary / "adapter.safetensors")
        write_json(temporary / _STATE, {"schema": SCHEMA, "step": step, "optimizer": numbers, **state})
    for old in checkpoints_in(folder)[:-keep]:
        shutil.rmtree(old)
    return path


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
        weights, stored = load_file(path / _WEIGHTS), load_file(path / _OPTIMIZER)
    except (OSError, ValueError) as error:
        raise FormatError(f"checkpoint '{path}' cannot be read: {error}") from error
    except Exception as error:
        # safetensors' own error is no subclass of the above.
        raise FormatError(f"checkpoint '{path}' is damaged: {error}") from error
    if state.get("schema") != SCHEMA:
        raise FormatError(f"checkpoint '{path}' has schema {state.get('schema')}; this vislr reads {SCHEMA}")
    shapes = {name: tuple(value.shape) for name, value in trainable.items()}
    if shapes != {name: tuple(value.shape) for name, value in weights.items()}:
        raise FormatError(f"checkpoint '{path}' holds another adapter: names or shapes of its weights differ")
    per_name: dict[str, dict[str, Any]] = {name: dict(state["optimizer"].get(name, {})) for name in trainable}
    for key, value in stored.items():
        name, _, entry = key.rpartition("/")
        if value.shape == trainable[name].shape:
            # The fused optimiser walks memory, not indices: state must lie in memory like its parameter.
            value = torch.empty_like(trainable[name], dtype=value.dtype).copy_(value)
        per_name[name][entry] = value
    with torch.no_grad():
        for name, value in trainable.items():
            value.copy_(weights[name])
    optimizer.load_state_dict(
        {
            "state": {index: per_name[name] for index, name in enumerate(trainable) if per_name[name]},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
    return state


# What may differ between a run and its continuation without changing a single weight.
_FREE = (
    "output",
    "sample",
    "processes",
    "dry_run",
    "data.workers",
    "held_out.every",
    "optim.batch",
    "optim.accumulation",
)


def check_same_run(stored: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse to go on with a config that would not give what the unbroken run gives.

    Raises:
        ConfigError: names the first key that differs.
    """
    old, new = _flat(stored), _flat(present)
    for key in sorted(old.keys() | new.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in _FREE)
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
