"""Typed dataclasses read from YAML files and flags; a wrong key fails and names the nearest."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vislr.core.errors import ConfigError, hint

T = TypeVar("T")


def build_parser(config: type, *, prog: str, description: str) -> Any:
    """A parser with a flag for every field of the dataclass `config`, and `--config FILE.yaml`.

    The string below a field is its help.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            raise ConfigError(_explain(message, _keys(self)))

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="a YAML file, or the name of one that comes with vislr; later flags win over it",
    )
    parser.add_class_arguments(config, fail_untyped=True)
    return parser


def _options(parser: Any) -> dict[str, Any]:
    """Flag, without its dashes -> the parser's action, for every field."""
    actions = {}
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--") and not option.endswith("+"):
                actions[option.removeprefix("--")] = action
    return actions


def _keys(parser: Any) -> list[str]:
    return [name for name in _options(parser) if not name.startswith(("print_", "help"))]


def _explain(message: str, keys: list[str]) -> str:
    """One line: jsonargparse's message, and the nearest key where a key was unknown."""
    message = " ".join(message.split())
    inside = re.search(r"Group '([\w.\-]+)' does not accept (?:option|nested key|key) '([\w.\-]+)'", message)
    if inside:
        group, key = inside.groups()
        below = [name.removeprefix(f"{group}.") for name in keys if name.startswith(f"{group}.")]
        return f"unknown key '{key}' in '{group}'{hint(key, below)}"
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
    wrong = re.search(r"Parser key \"([\w.\-]+)\": Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)", message)
    if wrong:
        key, choices, value = wrong.groups()
        names = re.findall(r"'(.*?)'", choices)
        return f"{key} is '{value}'; expected one of {', '.join(names)}{hint(value, names) if len(names) > 3 else ''}"
    wrong = re.search(r"Parser key \"([\w.\-]+)\": Expected a (?:<class '(\w+)'>|(\S+))\. Got value: (.*)", message)
    if wrong:
        return f"{wrong[1]} is '{wrong[4]}'; expected {wrong[2] or wrong[3]}"
    return message


def find_config(name: str) -> Path:
    """The file of this name; else the one of this name among the configs that come with vislr.

    Raises:
        ConfigError: neither; names the nearest of vislr's.
    """
    from importlib.resources import files

    if Path(name).is_file():
        return Path(name)
    shipped = Path(str(files("vislr"))) / "configs"
    for candidate in (shipped / name, shipped / f"{name}.yaml", shipped / name.removeprefix("configs/")):
        if candidate.is_file():
            return candidate
    known = sorted(path.relative_to(shipped).as_posix() for path in shipped.rglob("*.yaml"))
    raise ConfigError(f"there is no config file '{name}'{hint(name, known)}")


def _plain_flags(argv: Sequence[str], parser: Any) -> list[str]:
    """Flags as people type them, in the one form that jsonargparse reads.

    `--dry-run` for `--dry_run=true`, `--prompts "a cat" "a dog"` (also in several goes) for
    `--prompts=["a cat", "a dog"]`, `--config` by name, and `--model NAME`, which some verbs have, for the
    `--model.base=NAME` of the others.
    """
    options = _options(parser)
    plain: list[str] = []
    lists: dict[str, list[str]] = {}
    place: dict[str, int] = {}
    i = 0
    while i < len(argv):
        word = argv[i]
        i += 1
        if not word.startswith("--") or word == "--":
            plain.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if name not in options and name.replace("-", "_") in options:
            name = name.replace("-", "_")
        following = [] if not equals else [value]
        while not equals and i + len(following) < len(argv) and not argv[i + len(following)].startswith("--"):
            following.append(argv[i + len(following)])
        if f"{name}.base" in options and following and not (following[0][:1] == "{" or Path(following[0]).is_file()):
            name = f"{name}.base"
        kind = _type_of(options.get(name))
        if kind == "list":
            i += 0 if equals else len(following)
            if name not in lists:
                place[name] = len(plain)
                plain.append("")
            lists.setdefault(name, []).extend(following)
            continue
        if kind == "bool" and not following:
            plain.append(f"--{name}=true")
            continue
        if name == "config" and following:
            following[0] = str(find_config(following[0]))
        if following:
            i += 0 if equals else 1
            plain.append(f"--{name}={following[0]}")
        else:
            plain.append(f"--{name}")
    for name, values in lists.items():
        written = len(values) == 1 and (values[0].startswith("[") or values[0] in ("null", ""))
        # A value is text here; the field's own type turns "1" into 1.
        plain[place[name]] = f"--{name}={values[0] if written else json.dumps(values)}"
    return plain


def _type_of(action: Any) -> str:
    """ "bool", "list" or "" for the type of a field."""
    kind = str(getattr(action, "_typehint", ""))
    if "<class 'bool'>" in kind:
        return "bool"
    if re.match(r"(typing\.)?[Dd]ict\[", kind):
        return ""  # a table of lists is written as one value
    return "list" if re.search(r"\b(list|tuple)\[", kind) else ""


def parse_config(config: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str) -> T:
    """Read `config` from `argv` (default: the command line). `--help` prints and leaves.

    Raises:
        ConfigError: an unknown key or a wrong value, with the nearest valid key.
    """
    parser = build_parser(config, prog=prog, description=description)
    parsed = parser.parse_args(_plain_flags(list(sys.argv[1:] if argv is None else argv), parser))
    values = {key: value for key, value in parser.instantiate(parsed).as_dict().items() if key != "config"}
    return config(**values)


def read_section(config: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Make `config` out of plain data, as `parse_config` does from a file.

    Args:
        where: what the data is, for messages: "step 2 (prune)".

    Raises:
        ConfigError: an unknown key or a wrong value, with the nearest valid key.
    """
    parser = build_parser(config, prog=where, description="")
    for key in values:
        known = {name.partition(".")[0] for name in _keys(parser)} - {"config"}
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'{hint(str(key), known)}")
    try:
        parsed = parser.parse_object(dict(values))
        found = parser.instantiate(parsed).as_dict()
        return config(**{key: value for key, value in found.items() if key != "config"})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def dump_config(config: Any, path: str | Path) -> None:
    """Write a dataclass as the YAML that `parse_config` reads."""
    import yaml

    from vislr.core.files import write_text

    write_text(path, yaml.safe_dump(plain_data(config), sort_keys=False, allow_unicode=True))


def plain_data(value: Any) -> Any:
    """A dataclass, with all that is in it, as dicts, lists, texts and numbers."""
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item) for item in value]
    return str(value) if isinstance(value, Path) else value
