"""`vislr recipe run | show | diff | replay | undo`: several verbs in a row; what was done to a folder, done again.

vislr recipe run recipes/small-fast.yaml --out runs/small-fast
vislr recipe show runs/pruned/pipeline
vislr recipe diff one two
vislr recipe replay runs/pruned/pipeline --base emoji-unet --out again
vislr recipe undo runs/pruned/pipeline --base emoji-unet --steps 1 --out before
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vislr.core.arguments import parse_config
from vislr.core.cli_guard import run
from vislr.core.errors import ConfigError, hint
from vislr.core.files import check_output

ACTIONS = ("show", "diff", "replay", "undo")


@dataclass
class RecipeConfig:
    """What to do with which folder."""

    action: str = ""
    """show: the steps. diff: what differs between two folders. replay: do the steps again on a base.
    undo: replay all but the last steps. Must be given."""
    folder: str = ""
    """A folder of vislr.save. Must be given."""
    other: str | None = None
    """diff: the second folder."""
    base: str | None = None
    """replay, undo: name of an embedded pipeline, a diffusers folder or a hub id."""
    steps: int = 1
    """undo: how many steps at the end to leave out."""
    any_base: bool = False
    """replay, undo: accept a base with other weights than the recipe's."""
    out: str | None = None
    """replay, undo: folder for the result."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ConfigError(f"no action '{self.action}'{hint(self.action, ACTIONS)}")
        if not self.folder:
            raise ConfigError("folder is not given; expected a folder of vislr.save")
        needed = {"diff": ("other",), "replay": ("base", "out"), "undo": ("base", "out")}.get(self.action, ())
        for name in needed:
            if getattr(self, name) is None:
                raise ConfigError(f"{self.action} needs {name}")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; expected 1 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr recipe` with these arguments; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"]:
        from vislr.pipelines.recipe_run import run_recipe

        return run_recipe(arguments[1:])
    for name in ("action", "folder", "other"):
        if arguments and not arguments[0].startswith("-"):
            word = arguments.pop(0)
            arguments += [f"--{name}", word]
        else:
            break
    config = parse_config(
        RecipeConfig, arguments, prog="vislr recipe",
        description="What was done to a folder. `vislr recipe show FOLDER` is short for --action show --folder FOLDER. "
        "`vislr recipe run --help`: several verbs in a row.",
    )  # fmt: skip
    if config.out is not None:
        check_output(config.out)

    from vislr import folders, replaying

    replaying.check_recipe(config.folder)
    if config.action == "show":
        print(replaying.show(config.folder))
    elif config.action == "diff":
        print(replaying.diff(config.folder, str(config.other)) or "no difference")
    else:
        left_out = config.steps if config.action == "undo" else 0
        target, notes = replaying.replay(config.folder, str(config.base), leave_out=left_out, any_base=config.any_base)
        folders.save(target, str(config.out))
        print("\n".join([*notes, f"-> {config.out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
