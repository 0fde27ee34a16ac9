"""Files are whole or not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vislr.core.errors import OutputError
from vislr.core.files import atomic_path, check_output, read_json, write_json, write_tensors


def test_json_round_trip_replaces_the_old_file(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": [1, 2.5, "é"]})
    write_json(path, {"b": None})
    assert read_json(path) == {"b": None}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_tensors_round_trip_with_metadata(tmp_path):
    tensors = {"x": torch.arange(6.0).reshape(2, 3).T, "y": torch.ones(2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"k": "v"})
    back = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(back[key], tensors[key]) and back[key].dtype == tensors[key].dtype for key in tensors)
    header = (tmp_path / "t.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + size])["__metadata__"] == {"format": "pt", "k": "v"}


@pytest.mark.parametrize("what", [RuntimeError, KeyboardInterrupt])
def test_a_broken_write_leaves_the_old_file_and_nothing_else(tmp_path, what):
    path = tmp_path / "a.json"
    write_json(path, 1)

    def write():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise what

    with pytest.raises(what):
        write()
    assert read_json(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "checkpoint"
    for content in ("old", "new"):
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_kill_inside_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, "old")
    script = (
        "import os, signal, sys\n"
        "from vislr.core.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -9
    assert read_json(path) == "old"


def test_path_below_a_regular_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="regular file"):
        check_output(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="regular file"):
        write_json(tmp_path / "file" / "a.json", 1)


def test_too_little_room_is_named_before_work(tmp_path):
    with pytest.raises(OutputError, match=r"needs about .* MiB"):
        check_output(tmp_path, needed=2**60)
    assert check_output(tmp_path / "new", needed=1).is_dir()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, where mounting is allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_keeps_the_old_file(small_disk: Path):
    write_tensors(small_disk / "a.safetensors", {"x": torch.zeros(10)})
    with pytest.raises(OutputError, match=r"No space left|no room left"):
        write_tensors(small_disk / "a.safetensors", {"x": torch.zeros(2**20)})
    assert torch.equal(load_file(small_disk / "a.safetensors")["x"], torch.zeros(10))
    assert os.listdir(small_disk) == ["a.safetensors"]
    with pytest.raises(OutputError, match="needs about"):
        check_output(small_disk, needed=2**20)
