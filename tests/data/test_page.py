"""The page about data: its example runs, its fields exist, its YAML is read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from vislr.data import DataConfig, FolderConfig

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
FIELDS = {field.name for field in dataclasses.fields(DataConfig)}


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/data.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("24 pictures can be used, 24 examples an epoch\n")
    assert printed.count("torch.Size([3, 64, 64])") == 2
    assert (tmp_path / "report" / "contact_sheet.png").stat().st_size > 10_000


def test_the_yaml_is_read():
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    values = yaml.safe_load(example)["data"]
    folders = [FolderConfig(**entry) for entry in values.pop("folders")]
    assert [part.prior for part in DataConfig(folders=folders, **values).parts()] == [False, False, True]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`data\.(\w+)", PAGE))))
def test_fields_exist(name):
    assert name in FIELDS
