"""Records: what is written is read back, nothing private is in them, nothing is overwritten."""

import getpass
import json
import re
import socket

import pytest

from vislr.core.errors import ConfigError, DataError, OutputError
from vislr.measure import Measurement, read_record, write_record
from vislr.measure.record import anonymous

FIGURES = {
    "time": Measurement(0.5, (0.4, 0.6), 9, 1, "s", parts={"speedup": Measurement(2.0, (1.9, 2.1), 9, 1, "ratio")}),
    "flops": Measurement(12345, None, 1, None, "FLOP", settings={"sample": [1, 4, 16, 16]}),
}


def test_round_trip(tmp_path):
    path = write_record(
        "a-claim", FIGURES, log="line 1\nline 2\n", command=["vislr", "bench", "a b"], seed=5, folder=tmp_path
    )
    assert sorted(file.name for file in path.iterdir()) == ["command", "log", "record.json"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-a-claim", path.name)
    record = read_record(path)
    assert record.measurements == FIGURES
    assert (record.name, record.seed, record.log, record.command) == (
        "a-claim",
        5,
        "line 1\nline 2\n",
        "vislr bench 'a b'",
    )
    assert record.machine["usable_cores"] >= 1
    assert record.machine["cpu"]
    assert {"python", "torch", "numpy"} <= set(record.versions)
    assert record.commit == "" or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", record.commit)


def test_nothing_says_whose_machine_it_was(tmp_path):
    log = f"saved {tmp_path}/deep/out.png\ntook 3 s/step, 1/2 done\nsee https://example.org/a/b\n"
    figures = {
        "x": Measurement(1.0, None, 1, 0, "s", settings={"folder": str(tmp_path / "data"), "list": [str(tmp_path)]})
    }
    path = write_record(
        "private", figures, log=log, command=f"python {tmp_path}/run.py --out={tmp_path}/o", folder=tmp_path
    )
    text = "".join(file.read_text() for file in path.iterdir())
    assert str(tmp_path) not in text
    assert str(tmp_path.parent) not in text
    record = read_record(path)
    assert record.command == "python …/run.py --out=…/o"
    assert record.log == "saved …/out.png\ntook 3 s/step, 1/2 done\nsee https://example.org/a/b\n"
    assert record.measurements["x"].settings["folder"] == "…/data"


def test_host_and_user_names_are_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "gethostname", lambda: "blue-whale")
    monkeypatch.setattr(getpass, "getuser", lambda: "jonathan")
    assert anonymous("jonathan@blue-whale: blue-whales, jonathan") == "<user>@<host>: blue-whales, <user>"
    monkeypatch.chdir(tmp_path)
    assert anonymous(f"{tmp_path}/configs/a.yaml") == "configs/a.yaml"


def test_a_claim_is_not_overwritten(tmp_path):
    path = write_record("once", FIGURES, log="first", command="true", folder=tmp_path)
    with pytest.raises(OutputError, match="already"):
        write_record("once", FIGURES, log="second", command="true", folder=tmp_path)
    assert read_record(path).log == "first"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match="names no record"):
        write_record("No Good", FIGURES, log="", command="true", folder=tmp_path)
    with pytest.raises(DataError, match="at least one measurement"):
        write_record("empty", {}, log="", command="true", folder=tmp_path)
    with pytest.raises(DataError, match="is no record"):
        read_record(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="regular file"):
        write_record("below", FIGURES, log="", command="true", folder=tmp_path / "file")
    broken = write_record("broken", FIGURES, log="", command="true", folder=tmp_path)
    (broken / "record.json").write_text(json.dumps({"name": "broken"}))
    with pytest.raises(DataError, match="is no record"):
        read_record(broken)
