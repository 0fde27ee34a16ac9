"""Two processes on a CPU do what one does with twice the batch; a launch that is not what was asked for fails."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import vislr
from vislr.core.errors import ConfigError, LaunchError
from vislr.core.files import read_json
from vislr.pipelines import train_adapter
from vislr.train import AdapterSection, make_accelerator

SCRIPT = Path(__file__).with_name("two_processes.py")


def launch(count, *arguments, **extra):
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tiny.__file__).parent), **extra,
    }  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    command = [sys.executable, *torchrun, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_are_one_with_twice_the_batch(pictures, tmp_path):
    done = launch(2, SCRIPT, pictures, tmp_path / "2", 3)
    assert done.returncode == 0, done.stderr[-2000:]
    runpy.run_path(str(SCRIPT))["main"](str(pictures), str(tmp_path / "1"), 6)
    parts = [read_json(tmp_path / "2" / f"seen-{rank}.json") for rank in (0, 1)]
    whole = read_json(tmp_path / "1" / "seen-0.json")
    # 18 pictures, 6 a step: 3 steps are an epoch, in which each is seen once by one of the two.
    for epoch in (0, 1):
        steps = range(epoch * 3, epoch * 3 + 3)
        seen = [index for part in parts for step in steps for index in part["seen"][step]]
        assert sorted(seen) == list(range(18))
    for step in range(6):
        assert sorted(parts[0]["seen"][step] + parts[1]["seen"][step]) == sorted(whole["seen"][step])
    assert whole["seen"][:3] != whole["seen"][3:]
    one, two = (load_file(tmp_path / str(count) / "gradients-0.safetensors") for count in (1, 2))
    largest = max(value.abs().max() for value in one.values())
    assert largest > 1e-4
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=float(1e-5 * largest))
    weights = {key: load_file(tmp_path / key[0] / f"weights-{key[1]}.safetensors") for key in ("20", "21", "10")}
    for name, value in weights["20"].items():
        assert torch.equal(value, weights["21"][name])
        torch.testing.assert_close(value, weights["10"][name], rtol=0, atol=1e-4)
    for loss_two, loss_one in zip(parts[0]["held_out"]["loss"], whole["held_out"]["loss"], strict=True):
        assert loss_two == [loss_one[0], pytest.approx(loss_one[1], rel=1e-4)]
    assert parts[0]["held_out"] == parts[1]["held_out"]

    # Stopped after step 2 by a request to one of them, and gone on with: the same bits.
    again = tmp_path / "again"
    done = launch(2, SCRIPT, pictures, again, 3, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [read_json(again / f"stopped-{rank}.json").partition(",")[0] for rank in (0, 1)] == [
        "stopped at step 2 of 6"
    ] * 2
    done = launch(2, SCRIPT, pictures, again, 3, "resume")
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in (0, 1):
        resumed = load_file(again / f"weights-{rank}.safetensors")
        assert resumed.keys() == weights["20"].keys()
        assert all(torch.equal(value, weights["20"][name]) for name, value in resumed.items())
        assert read_json(again / f"seen-{rank}.json")["seen"] == parts[rank]["seen"][2:]


@pytest.mark.slow
def test_sparse_tuning_selects_anew_on_two_processes(pictures, tmp_path):
    done = launch(2, SCRIPT, pictures, tmp_path / "2", 3, "reselect")
    assert done.returncode == 0, done.stderr[-2000:]
    runpy.run_path(str(SCRIPT))["main"](str(pictures), str(tmp_path / "1"), 6, "reselect")
    one, two, other = (load_file(tmp_path / run / f"weights-{r}.safetensors") for run, r in ("10", "20", "21"))
    pipe = tiny.tiny_sd_pipeline()
    change = AdapterSection(kind="sara", threshold=5e-3, rank_weight=0.0).to_change()
    assert sum(map(torch.numel, one.values())) < vislr.apply(pipe, change).trainable
    # Entries at the threshold may fall on either side of it by the rounding of a sum: nearly all are the same.
    counts = [sum(map(torch.numel, values.values())) for values in (one, two)]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)
    for name, value in two.items():
        assert torch.equal(value, other[name])
        if value.shape == one[name].shape:
            torch.testing.assert_close(value, one[name], rtol=0, atol=2e-4)


def test_a_divided_base_trains_the_same_adapter(pictures, tmp_path):
    for how in ("", "shard"):
        done = launch(2, SCRIPT, pictures, tmp_path / f"run{how}", 3, *([how] if how else []))
        assert done.returncode == 0, done.stderr[-2000:]
    parts = [read_json(tmp_path / "runshard" / f"parts-{rank}.json") for rank in (0, 1)]
    pipe = tiny.tiny_sd_pipeline()
    divided = sum(map(sum, parts))
    # Nearly all of the UNet lies in its blocks, and each process keeps about half of them.
    assert 0.8 * vislr.describe(pipe.unet).parameters < divided <= vislr.describe(pipe.unet).parameters
    assert sum(parts[0]) == pytest.approx(divided / 2, rel=0.05)
    whole, shard = (load_file(tmp_path / run / "weights-0.safetensors") for run in ("run", "runshard"))
    assert whole.keys() == shard.keys()
    for name, value in whole.items():
        torch.testing.assert_close(shard[name], value, rtol=0, atol=2e-5)
    assert read_json(tmp_path / "run" / "seen-0.json")["held_out"]["drift"] == [
        [step, pytest.approx(value, abs=1e-4)]
        for step, value in read_json(tmp_path / "runshard" / "seen-0.json")["held_out"]["drift"]
    ]
    # The file knows its base, and goes on a whole one.
    vislr.load_adapter(pipe, tmp_path / "runshard" / "adapter-0.safetensors", name="default")
    loaded = {name: value for name, value in pipe.unet.named_parameters() if name in shard}
    assert loaded.keys() == shard.keys()
    assert all(torch.equal(value, shard[name]) for name, value in loaded.items())


@pytest.mark.slow
def test_two_processes_share_the_pictures_of_shards(pictures, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    files = sorted(pictures.glob("*.png"))
    for number in range(3):
        with tarfile.open(shards / f"part-{number}.tar", "w") as tar:
            for path in files[number::3]:
                tar.add(path, path.name)
                tar.add(path.with_suffix(".txt"), path.with_suffix(".txt").name)
    done = launch(2, SCRIPT, shards, tmp_path / "2", 3)
    assert done.returncode == 0, done.stderr[-2000:]
    runpy.run_path(str(SCRIPT))["main"](str(shards), str(tmp_path / "1"), 6)
    parts = [read_json(tmp_path / "2" / f"seen-{rank}.json")["seen"] for rank in (0, 1)]
    whole = read_json(tmp_path / "1" / "seen-0.json")["seen"]
    for epoch in (0, 3):
        assert sorted(i for part in parts for step in part[epoch : epoch + 3] for i in step) == list(range(18))
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(step) for step in whole]
    two, one = (load_file(tmp_path / count / "weights-0.safetensors") for count in "21")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-4)

    # Stopped, and gone on with where the second process finds no checkpoint: both refuse, and neither waits.
    done = launch(2, SCRIPT, shards, tmp_path / "stopped", 3, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    done = launch(2, SCRIPT, shards, tmp_path / "stopped", 3, "apart")
    assert done.returncode != 0
    assert "processes find checkpoints of different steps (0, 2); expected an output.folder that all" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter.kind": "sara", "adapter.fraction": "0.1"}, "sara trains entries of the base in place"),
        ({"model.storage": "fp8"}, "model.shard goes with model.storage plain, not fp8"),
    ],
)
def test_what_does_not_go_with_a_divided_base(monkeypatch, change, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    flags = [part for key, value in change.items() for part in (f"--{key}", value)]
    with pytest.raises(ConfigError, match=message):
        train_adapter.main(["--data.folder", "none", "--output.folder", "none", *flags])


def test_another_number_of_processes_than_asked_for_is_an_error():
    with pytest.raises(
        LaunchError, match=r"processes is 2, but 1 took part; on CPUs: ACCELERATE_USE_CPU=true torchrun"
    ):
        make_accelerator(processes=2)
    assert make_accelerator(processes=1).num_processes == 1


def test_processes_that_do_not_find_each_other_are_an_error():
    """What plain torchrun without ACCELERATE_USE_CPU gives on a machine without a GPU: two jobs."""
    code = "from vislr.train import make_accelerator; make_accelerator()"
    environment = {"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = launch(1, "-c", code, **environment)
    assert done.returncode != 0
    assert "2 processes were started, but each trains alone (1 in its group)" in done.stderr
