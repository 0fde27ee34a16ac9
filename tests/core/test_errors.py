"""Errors say what was given and what would have been right."""

import pytest

from vislr.core.cli_guard import run
from vislr.core.errors import ConfigError, Interrupted, LaunchError, OutputError, hint


@pytest.mark.parametrize(
    ("given", "choices", "said"),
    [
        ("learing_rate", ["learning_rate", "rank"], "; did you mean 'learning_rate'?"),
        ("zzz", ["a", "b"], "; choose from 'a', 'b'"),
        ("zzz", [f"name{i}" for i in range(13)], ""),
        ("zzz", [], ""),
    ],
)
def test_hint(given, choices, said):
    assert hint(given, choices) == said


@pytest.mark.parametrize(("error", "code"), [(ConfigError, 2), (OutputError, 3), (LaunchError, 4), (Interrupted, 130)])
def test_named_errors_are_one_line_and_an_exit_code(error, code, capsys):
    def main(argv):
        raise error("first\nsecond")

    assert run(main, []) == code
    assert capsys.readouterr().err == f"{error.__name__}: first second\n"


def test_bugs_keep_their_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main, [])
