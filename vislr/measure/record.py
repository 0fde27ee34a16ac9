"""Records: one folder a claim, with the figures, the log, the command and the machine."""

from __future__ import annotations

import datetime
import functools
import getpass
import os
import platform
import re
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.errors import ConfigError, DataError, OutputError
from vislr.core.files import atomic_path, read_json, write_json
from vislr.core.versions import versions_of
from vislr.measure.measurement import Measurement

if TYPE_CHECKING:
    import torch

RECORDS = Path("benchmarks/records")
LIBRARIES = ("vislr", "torch", "diffusers", "transformers", "peft", "accelerate", "timm", "torchao", "triton", "numpy")
# Instruction sets that decide which kernels run.
FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """What a record's folder holds; see `write_record`."""

    name: str
    date: str
    measurements: dict[str, Measurement]
    seed: int | None
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    log: str
    command: str


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.partition(":") for line in lines if ":" in line]
    return {key.strip(): value.strip() for key, _, value in reversed(pairs)}


@functools.cache
def _cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """What the vendor calls the device: "NVIDIA H200", "AMD EPYC", ..."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def machine() -> dict[str, Any]:
    """What of this machine decides a figure. Nothing that says whose it is."""
    import torch

    flags = set((_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        described["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if torch.cuda.is_available():
        described["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        described["cuda"] = torch.version.cuda
    return described


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that figures depend on."""
    return {"python": platform.python_version(), **versions_of(*LIBRARIES)}


def commit() -> str:
    """The commit that vislr runs from, with "+changes" if tracked files differ; "" outside of its repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # An installed vislr may lie inside somebody else's repository: then this file is not tracked.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def anonymous(text: str) -> str:
    """Text without what says whose machine it was: absolute paths, the user's and the host's name.

    Paths below the current folder become relative, other absolute paths keep their last part.
    """
    text = text.replace(f"{Path.cwd()}/", "")
    text = re.sub(r"(?<![\w.:/~…])/(?:[^\s/'\":,;()\[\]]+/)+([^\s/'\":,;()\[\]]*)", r"…/\1", text)
    text = re.sub(r"\b[A-Za-z]:\\(?:[^\s\\'\":,;]+\\)+", "…/", text)
    names = {socket.gethostname(): "<host>", _user(): "<user>"}
    for name, mark in names.items():
        # Short and general names ("vm", "root") are also words; they name nobody.
        if len(name) > 3 and name not in ("root", "user", "ubuntu", "localhost"):
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", mark, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def write_record(
    name: str,
    measurements: Mapping[str, Measurement],
    *,
    log: str,
    command: str | Sequence[str],
    seed: int | None = None,
    folder: str | os.PathLike = RECORDS,
) -> Path:
    """Write `folder/DATE-NAME/{record.json,log,command}`, all three or none.

    Args:
        name: lower-case words joined by hyphens, what is claimed: "convlora-against-peft".
        measurements: the figures by name.
        log: what the run printed.
        command: what was typed, as text or as arguments; one that can be run from the repository's root.
        seed: of the run as a whole.
        folder: where records are kept.

    Absolute paths, user and host names are taken out of log, command, names and settings.

    Returns:
        the new folder. The date is today's in UTC.

    Raises:
        ConfigError: the name is not of that form.
        DataError: no measurements, or no command.
        OutputError: there is a record of this name and date, or the place cannot be written.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ConfigError(f"'{name}' names no record; expected lower-case words joined by hyphens")
    command = anonymous(command if isinstance(command, str) else shlex.join(command)).strip()
    if not measurements or not command:
        raise DataError(f"record '{name}' needs at least one measurement and the command that made it")
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = Path(folder) / f"{date}-{name}"
    if path.exists():
        raise OutputError(f"there is a record '{path.name}' already; claims are not overwritten, give another name")
    content = {
        "name": name,
        "date": date,
        "seed": seed,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "measurements": {key: _anonymous_data(one.to_dict()) for key, one in measurements.items()},
    }
    with atomic_path(path) as temporary:
        temporary.mkdir()
        write_json(temporary / "record.json", content)
        (temporary / "log").write_text(anonymous(log), encoding="utf-8")
        (temporary / "command").write_text(command + "\n", encoding="utf-8")
    return path


def _anonymous_data(value: Any) -> Any:
    if isinstance(value, str):
        return anonymous(value)
    if isinstance(value, dict):
        return {key: _anonymous_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_anonymous_data(item) for item in value]
    return value


def read_record(path: str | os.PathLike) -> Record:
    """Read what `write_record` wrote.

    Raises:
        DataError: the folder is no record.
    """
    path = Path(path)
    try:
        content = read_json(path / "record.json")
        content["measurements"] = {key: Measurement.from_dict(one) for key, one in content["measurements"].items()}
        log, command = (path / "log").read_text("utf-8"), (path / "command").read_text("utf-8").strip()
        return Record(**content, log=log, command=command)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{path}' is no record: expected record.json, log and command ({error})") from error
