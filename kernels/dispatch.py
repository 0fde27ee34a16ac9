"""Which implementation runs: a switch, an environment variable, and the tables of tuned configurations.

`VISLR_KERNELS` is `auto` (kernels on GPUs that have them, the reference elsewhere), `reference`, or
`kernel` (an error where the kernel cannot run; with TRITON_INTERPRET=1 it runs on a CPU, for tests).
`use("reference")` does the same for a block of code.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vislr.kernels.errors import KernelError

VARIABLE = "VISLR_KERNELS"
MODES = ("auto", "reference", "kernel")
# Triton reads the variable when a kernel is defined, so it is read once here too.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# bf16 and asynchronous copies need it.
LOWEST_CAPABILITY = (8, 0)
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)

_tables: dict[str, dict[str, Any]] = {}


def _checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise KernelError(f"{source} is {mode!r}; choose from {', '.join(MODES)}")
    return mode


_mode = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def mode() -> str:
    """The mode in force: "auto", "reference" or "kernel"."""
    return _mode


def set_mode(mode: str) -> None:
    """Set the mode for the process.

    Raises:
        KernelError: no such mode.
    """
    global _mode
    _mode = _checked(mode, "the mode")


@contextlib.contextmanager
def use(mode: str) -> Iterator[None]:
    """Set the mode inside a `with` block.

    Raises:
        KernelError: no such mode.
    """
    before = _mode
    set_mode(mode)
    try:
        yield
    finally:
        set_mode(before)


@torch._dynamo.assume_constant_result
def _gpu_fits() -> bool:
    if not torch.cuda.is_available() or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability() >= LOWEST_CAPABILITY


def runs_kernel(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of this device."""
    if device.type == "cuda":
        return not INTERPRETED and _gpu_fits()
    return device.type == "cpu" and INTERPRETED


def use_kernel(x: torch.Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> bool:
    """Whether an operation on `x` takes its kernel, which exists for `dtypes`.

    Raises:
        KernelError: the mode is "kernel" and it cannot run.
    """
    if _mode == "reference":
        return False
    fits = x.dtype in dtypes and runs_kernel(x.device)
    if _mode == "kernel" and not fits and x.device.type != "meta":
        raise KernelError(f"no kernel for {x.dtype} on {x.device.type}: {VARIABLE}=kernel asks for one")
    # A CPU under the interpreter is for tests alone: it is slower than the reference by orders.
    return fits and (x.device.type == "cuda" or _mode == "kernel")


@torch._dynamo.assume_constant_result
def cpu_has(feature: str) -> bool:
    """Whether this CPU multiplies natively in "bfloat16", "float16" or "int8"."""
    if feature == "int8":
        return torch.cpu._is_vnni_supported()
    name = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[feature]
    return getattr(torch.ops.mkldnn, name)()


def device_name() -> str:
    """Name of the current GPU's generation in the tables, e.g. "sm_90"; "none" without one."""
    if INTERPRETED or not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def table_file(folder: str) -> Path:
    """Where the table of the kernels of one folder lies."""
    return Path(__file__).parent / folder / "table.json"


def tuned(folder: str, kernel: str, key: str) -> dict[str, Any]:
    """The tuned configuration of a kernel for shapes of `key` on this GPU; empty if there is none."""
    if folder not in _tables:
        file = table_file(folder)
        _tables[folder] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return _tables[folder].get(device_name(), {}).get(kernel, {}).get(key, {})


def remember(folder: str, kernel: str, key: str, config: dict[str, Any]) -> None:
    """Put a configuration into the table in memory; `python -m vislr.kernels.tune` writes tables to disk."""
    tuned(folder, kernel, key)
    _tables[folder].setdefault(device_name(), {}).setdefault(kernel, {})[key] = config


def forget(folder: str, kernel: str, key: str) -> None:
    """Take a configuration out of the table in memory."""
    _tables.get(folder, {}).get(device_name(), {}).get(kernel, {}).pop(key, None)


def table(folder: str) -> dict[str, Any]:
    """The whole table of a folder: GPU -> kernel -> key -> configuration."""
    tuned(folder, "", "")
    return _tables[folder]
