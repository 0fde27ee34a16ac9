"""The command line: verbs, listings, exit codes."""

import pytest

from vislr import __version__
from vislr.cli import VERBS, main
from vislr.core.arguments import parse_config
from vislr.pipelines.prune import PruneConfig


def test_help_names_every_verb_and_each_has_help(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    for verb in VERBS:
        with pytest.raises(SystemExit) as left:
            main([verb, "--help"])
        assert left.value.code == 0
        assert f"vislr {verb}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "ConfigError: no verb 'trian'; did you mean 'train'"),
        (["zoo", "images", "--style", "fluent"], "'fluent3d'"),
        (["zoo", "images", "--limit", "0"], "expected 1 or more"),
        (["zoo", "picture"], "invalid choice"),
        (["describe", "nothing-known"], "ModelError"),
        (["generate", "--prompt", "a cat"], "did you mean 'prompts'"),
    ],
)
def test_wrong_words_are_one_line_and_exit_code_2(argv, said, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "emoji-mmdit"],
        ["--model=emoji-mmdit"],
        ["--model.base", "emoji-mmdit"],
        ["--model", "{base: emoji-mmdit}"],
    ],
)
def test_a_model_is_named_alike_by_every_verb(flags):
    parsed = parse_config(
        PruneConfig,
        [*flags, "--seed", "3", "--output.folder", "x", "--data.folder", "y"],
        prog="vislr prune",
        description="",
    )
    assert (parsed.model.base, parsed.seed) == ("emoji-mmdit", 3)


def test_zoo_lists_counts_and_exports(tmp_path, capsys):
    assert main(["zoo", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(word in listed for word in ("noto", "CC-BY-4.0", "emoji-unet"))
    assert main(["zoo", "images", "--style", "sepia", "--category", "Activities"]) == 0
    assert capsys.readouterr().out.split() == ["sepia", "Activities", "85"]
    assert main(["zoo", "images", "--style", "noto", "--limit", "7", "--export", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 7
    assert len(list((tmp_path / "out").glob("noto-*.txt"))) == 7
