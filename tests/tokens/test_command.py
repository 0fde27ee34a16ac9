"""`vislr tokens`."""

import json

import pytest
from PIL import Image

from vislr.cli import main
from vislr.core.arguments import find_config, parse_config
from vislr.pipelines.tokens import TokensConfig
from vislr.tokens import TokenPlan


@pytest.mark.parametrize("name", ["emoji-unet", "sdxl", "sdxl-tome"])
def test_the_configs_that_come_with_vislr_fit_and_name_every_field(name):
    import dataclasses

    import yaml

    path = find_config(f"tokens/{name}.yaml")
    parse_config(TokensConfig, ["--config", str(path)], prog="vislr tokens", description="")
    given = yaml.safe_load(path.read_text())
    assert list(given) == [field.name for field in dataclasses.fields(TokensConfig)]


def test_a_plan_for_a_structure(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["tokens", "--model", "emoji-unet", "--keep", "0.5", "--out", str(out)]) == 0
    plan = TokenPlan.from_dict(json.loads((out / "plan.json").read_text()))
    assert plan.criterion == "g-wpr"
    printed = capsys.readouterr().out
    assert "of the FLOPs" in printed
    assert (out / "report.txt").read_text().strip() in printed


def test_pictures_of_what_was_kept(tmp_path):
    out = tmp_path / "out"
    arguments = ["--config", "tokens/emoji-unet.yaml", "--steps", "4", "--prompts", "noto style, a cat face"]
    assert main(["tokens", *arguments, "--out", str(out), "--device", "cpu"]) == 0
    for name in ("before_after.png", "kept.png"):
        with Image.open(out / name) as image:
            assert image.width > 150
            assert len(image.convert("L").getcolors()) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no budget"),
        (["--keep", "0.5", "--speedup", "1.2"], "speedup and keep"),
        (["--flops-saved", "0.9"], "at most"),
        (["--keep", "0.5", "--method", "tome", "--inside-first"], "tome knows no"),
        (["--keep", "0.5", "--recovry", "copy"], "recovery"),
        (["--keep", "0.5", "--model", "emoji-unett"], "emoji-unet"),
    ],
)
def test_wrong_wishes_are_one_line(tmp_path, capsys, arguments, message):
    assert main(["tokens", *arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
