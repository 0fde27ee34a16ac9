"""`vislr describe MODEL`: the sites of a model and what each costs, without its weights.

vislr describe sdxl --kind unit --removable true
vislr describe path/to/pipeline --name "up_blocks.*.conv1" --sample.height 64 --sample.width 64
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from vislr.core.arguments import parse_config


@dataclass
class DescribeConfig:
    """What to describe, and which of its sites to list."""

    model: str
    """A diffusers folder (pipeline or one model; only its JSON is read), an embedded pipeline
    ("emoji-unet"), a public architecture ("sd15", "sdxl", "flux-dev"), timm:NAME or torchvision:NAME."""
    sample: dict[str, int] = field(default_factory=dict)
    """Shapes to count at: height and width (latent units for denoisers, pixels for classifiers),
    tokens, batch. Left out: the model's own. As flags: --sample.height 64"""
    kind: str | None = None
    """Only sites of this kind: conv, linear, attention, norm or unit."""
    name: str | None = None
    """Only names that match this glob, or "re:" and a regular expression."""
    stage: str | None = None
    """Only stages that match this glob: "up_blocks.*", "mid_block", "stem"."""
    removable: bool | None = None
    """Only units and attentions that can be removed (true), or only what cannot (false)."""
    json: bool = False
    """Print JSON instead of a table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or JSON."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--model")
    config = parse_config(
        DescribeConfig,
        arguments,
        prog="vislr describe",
        description="The sites of a model and what each costs. `vislr describe MODEL` is short for --model MODEL.",
    )
    from vislr import anatomy, models, zoo

    embedded = {name: zoo.pipeline_folder(name) for name in zoo.pipeline_names()}
    parts = anatomy.describe(models.with_plans(anatomy.skeleton(config.model, embedded)), config.sample)
    sites = parts.select(config.kind, config.name, config.stage, config.removable)
    if config.json:
        result = {
            "family": parts.family,
            "sample": parts.sample,
            "parameters": parts.parameters,
            "flops": parts.flops,
            "stages": [asdict(stage) for stage in parts.stages()],
            "sites": [asdict(site) for site in sites],
        }
        print(json.dumps(result, indent=2))
    else:
        print(parts.table(sites))
    return 0


if __name__ == "__main__":
    from vislr.core.cli_guard import run

    sys.exit(run(main))
