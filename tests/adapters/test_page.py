"""The examples on the page about adapters run as they stand."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
EXAMPLES = re.findall(r"\n## ([^\n]*)(?:(?!\n## ).)*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("example", [code for _, code in EXAMPLES], ids=[title for title, _ in EXAMPLES])
def test_the_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(PAGE), "exec"), {})
    assert all((tmp_path / name).stat().st_size > 0 for name in re.findall(r'save_adapter\(model, "(.*?)"', example))


def test_no_example_is_left_out():
    assert len(EXAMPLES) == PAGE.read_text(encoding="utf-8").count("```python") >= 4
