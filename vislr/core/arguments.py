"""Typed dataclasses read from YAML files and flags; a wrong key fails and names the nearest."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from vislr.core.errors import ConfigError, hint

T = TypeVar("T")


def build_parser(config: type, *, prog: str, description: str) -> Any:
    """A parser with a flag for every field of the dataclass `config`, and `--config FILE.yaml`."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            raise ConfigError(_explain(message, _keys(self)))

    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file; later flags win over it")
    parser.add_class_arguments(config, fail_untyped=True)
    return parser


def _keys(parser: Any) -> list[str]:
    names = []
    for action in parser._actions:
        names += [option.removeprefix("--") for option in action.option_strings if option.startswith("--")]
    return [name for name in names if not name.startswith(("print_", "help"))]


def _explain(message: str, keys: list[str]) -> str:
    """One line: jsonargparse's message, and the nearest key where a key was unknown."""
    message = " ".join(message.split())
    for pattern in (
        r"[Uu]nrecognized arguments: --([\w.\-]+)",
        r"does not accept (?:option|nested key) '([\w.\-]+)'",
        r"[Oo]ption '([\w.\-]+)' is not accepted",
        r"Key '([\w.\-]+)' is not expected",
        r"Unknown key[s]? '?([\w.\-]+)'?",
    ):
        found = re.search(pattern, message)
        if found:
            return f"unknown key '{found[1]}'{hint(found[1], keys)}"
    return message


def parse_config(config: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str) -> T:
    """Read `config` from `argv` (default: the command line). `--help` prints and leaves.

    Raises:
        ConfigError: an unknown key or a wrong value, with the nearest valid key.
    """
    parser = build_parser(config, prog=prog, description=description)
    parsed = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    values = {key: value for key, value in parser.instantiate_classes(parsed).as_dict().items() if key != "config"}
    return config(**values)


def dump_config(config: Any, path: str | Path) -> None:
    """Write a dataclass as the YAML that `parse_config` reads."""
    import dataclasses

    import yaml

    from vislr.core.files import write_text

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    write_text(path, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
