"""A run that is killed with SIGKILL, at any moment and inside a save, loses nothing and ends in the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

SCRIPT = Path(__file__).with_name("kills.py")


def kills(mode, count, pictures, out):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tiny.__file__).parent)}
    command = [sys.executable, str(SCRIPT), str(pictures), str(out), mode, str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("count", [20])
def test_kills_at_random_moments(count, pictures, tmp_path):
    found = kills("random", count, pictures, tmp_path)
    assert found["kills"] == count
    assert found["same"]
    # At every stage: before the first save, and at each of the later ones.
    assert len(set(found["steps"])) >= 4


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_inside_a_save(count, pictures, tmp_path):
    found = kills("inside", count, pictures, tmp_path)
    places = {what for what, _ in found["points"]}
    assert "before the save" in places
    assert len(places) >= min(count, 12)
    if count == 20:
        assert {
            "in the middle of optimizer.safetensors",
            "before replacing a folder",
            "after replacing a folder",
            "in the middle of removing a folder",
            "after the save",
        } <= places
        # Both outcomes come up: the last good one is left, or the new one is there already.
        assert {left for _, left in found["points"]} == {4, 6}
