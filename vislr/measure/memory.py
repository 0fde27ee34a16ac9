"""Peak memory of a call, over what the process held before it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.errors import ConfigError, LaunchError
from vislr.core.memory import return_freed_heap
from vislr.measure.measurement import Measurement, median_interval
from vislr.measure.record import device_name

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_memory(
    function: Callable[[], Any], *, rounds: int = 3, device: str | torch.device | None = None
) -> Measurement:
    """By how many bytes a call raises the memory in use at its highest point.

    On a CPU: the resident set of this process. Before a round, garbage is collected, free heap is
    given back to the system and the kernel's high-water mark is reset; the figure is that mark
    after the call (`VmHWM`) less the resident set before it (`VmRSS`). It counts touched pages
    of every allocator and thread of the process, shared libraries that the call loads included;
    not what child processes use, nor pages that were allocated and never touched. The kernel
    counts pages per core in lots of 32 (of twice the number of cores, if that is more), so a figure
    can be off by such a lot for every core that took part: below 1 MiB on a small machine. Heap that
    the allocator could not give back is reused without a trace: calls under some MiB cannot be told
    apart.

    On CUDA: bytes in tensors (`torch.cuda.max_memory_allocated` less what was allocated before);
    not what the caching allocator reserves beyond that, nor the context, nor libraries' own memory.

    The first round includes what a first call makes and keeps (kernels, workspaces, lazy imports);
    with the default of three rounds the median is a later call.

    Args:
        function: called without arguments; its result is dropped before the next round.
        rounds: calls.
        device: "cpu" or "cuda"; default: "cuda" if anything has used CUDA.

    Returns:
        the median over rounds, in bytes.

    Raises:
        ConfigError: no rounds.
        LaunchError: resident memory is asked for and the system is no Linux or forbids the reset.
    """
    import torch

    if rounds < 1:
        raise ConfigError(f"cannot measure memory in {rounds} rounds; give 1 or more")
    if device is None:
        device = "cuda" if torch.cuda.is_initialized() else "cpu"
    device = torch.device(device)
    measure = _cuda_peak if device.type == "cuda" else _resident_peak
    peaks = [measure(function, device) for _ in range(rounds)]
    value, interval, how = median_interval(peaks)
    kind = "allocated tensors" if device.type == "cuda" else "resident set"
    settings = {"device": device_name(device), "threads": torch.get_num_threads(), "memory": kind}
    return Measurement(value, interval, rounds, None, "bytes", f"peak of the {kind} over before, {how}", "", settings)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LaunchError(f"this system's {_STATUS} has no {field}; resident memory cannot be measured here")


def _resident_peak(function: Callable[[], Any], device: torch.device) -> int:
    gc.collect()
    # What the heap still holds would hide as much of the next call's need.
    return_freed_heap()
    try:
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
    except OSError as error:
        raise LaunchError(f"peak resident memory needs Linux's {_CLEAR}: {error.strerror}") from error
    function()
    return max(0, _resident("VmHWM") - before)


def _cuda_peak(function: Callable[[], Any], device: torch.device) -> int:
    import torch

    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
