"""`vislr doctor FILE`: what is in an adapter file, what is wrong with it, and what each tool will do with it.

vislr doctor style.safetensors
vislr doctor style.safetensors --base path/to/pipeline --picture norms.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vislr.core.arguments import parse_config


@dataclass
class DoctorConfig:
    """Which file to examine."""

    file: str
    """An adapter file (safetensors, of any tool), or a folder of peft."""
    base: str | None = None
    """The model that it is to go on: a diffusers folder or a single-file checkpoint. Shapes are compared, norms
    are given relative to the weights, and DoRA can be measured. Only safetensors are read."""
    picture: str | None = None
    """Write the norms of every block as a PNG to this path."""
    json: bool = False
    """Print JSON instead of text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the diagnosis; 0 also where it is bad."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--file")
    config = parse_config(
        DoctorConfig,
        arguments,
        prog="vislr doctor",
        description="What is in an adapter file, and what each tool will do with it. "
        "`vislr doctor FILE` is short for --file FILE.",
    )
    from vislr.formats.doctor import as_data, examine
    from vislr.formats.doctor_picture import as_text, draw
    from vislr.formats.weights_base import open_checkpoint

    base = None if config.base is None else open_checkpoint(config.base)
    found = examine(config.file, base)
    print(as_data(found) if config.json else as_text(found))
    if config.picture is not None:
        print(f"picture -> {draw(found, config.picture)}", file=sys.stderr if config.json else sys.stdout)
    return 0


if __name__ == "__main__":
    from vislr.core.cli_guard import run

    sys.exit(run(main))
