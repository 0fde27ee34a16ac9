"""What a run tells tensorboard and Weights & Biases, read back from their files."""

from __future__ import annotations

import importlib.util
import json
import struct

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import run

from vislr.core.errors import LaunchError
from vislr.train import HeldOutConfig, OutputConfig
from vislr.train.curves import check_wandb

STEPS = 4
OPTIONS = {"held_out": HeldOutConfig(every=2, repeats=1), "steps": STEPS}


def output(folder, **more):
    return OutputConfig(folder=str(folder), checkpoint_every=0, log_every=1, **more)


def test_curves_of_a_resumed_run_have_no_gap_and_no_doubles(pictures, tmp_path):
    run("sd", pictures, tmp_path, stop=lambda step: step == 3, output=output(tmp_path), **OPTIONS)
    _, _, result = run("sd", pictures, tmp_path, output=output(tmp_path, resume=True), **OPTIONS)
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    for part, curves in (("train", result.history.train), ("held_out", result.history.held_out)):
        for name, points in curves.items():
            shown = [(event.step, event.value) for event in board.Scalars(f"{part}/{name}")]
            assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in points]
    assert [step for step, _ in result.history.train["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in result.history.held_out["loss"]] == [0, 2, 4]
    assert [event.step for event in board.Images("samples")] == [0, STEPS]
    assert (tmp_path / "curves.png").stat().st_size > 1000


def records(data):
    """The records of a .wandb file: LevelDB's log, in blocks of 32 kB, behind 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_gets_the_curves_and_grids(pictures, tmp_path, monkeypatch):
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _, _, result = run("sd", pictures, tmp_path / "out", output=output(tmp_path / "out", wandb="styles"), **OPTIONS)
    (file,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    rows, project, config = [], "", {}
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            project = record.run.project
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert project == "styles"
    assert config["steps"] == STEPS
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(step, pytest.approx(value)) for step, value in result.history.train["loss"]]
    drift = [(row["step"], row["held_out/drift"]) for row in rows if "held_out/drift" in row]
    assert drift == [(step, pytest.approx(value)) for step, value in result.history.held_out["drift"]]
    grids = [row["step"] for row in rows if any(key.startswith("samples") for key in row)]
    assert grids == [0, STEPS]
    assert len(list((tmp_path / "out" / "wandb").rglob("*.png"))) == 2


def test_wandb_that_is_not_installed_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LaunchError, match=r"output.wandb needs wandb: pip install wandb"):
        check_wandb()
