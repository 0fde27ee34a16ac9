"""The example on the page about adapters runs as it stands."""

import re
from pathlib import Path


def test_the_example_runs(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "adapters.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(page), "exec"), {})
    assert (tmp_path / "style.safetensors").stat().st_size > 0
