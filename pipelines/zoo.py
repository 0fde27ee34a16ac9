"""`vislr zoo`: list what is embedded, write the images out as a folder, verify the weights, train them again."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vislr import zoo
from vislr.core.cli_guard import run
from vislr.core.errors import ConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vislr zoo", description="The embedded images and pipelines.", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    actions.add_parser("list", help="what is embedded, with licences")
    pictures = actions.add_parser("images", help="count the images of a selection, or export them with captions")
    pictures.add_argument("--style", help=f"only this style: {', '.join((*zoo.STYLES, *zoo.PROCEDURAL_STYLES))}")
    pictures.add_argument("--category", help="only this category, for example 'Animals & Nature'")
    pictures.add_argument("--split", help=f"only this split: {', '.join(zoo.SPLITS)}; concepts, not images, are split")
    pictures.add_argument("--limit", type=int, help="at most this many, spread evenly over the selection")
    pictures.add_argument("--export", type=Path, metavar="FOLDER", help="write PNG files and captions there")
    pictures.add_argument("--captions", default="txt", help="txt: a file beside each image; jsonl: one metadata.jsonl")
    actions.add_parser("verify", help="hash every embedded weight and compare with the models' cards")
    actions.add_parser("retrain", help="train an embedded model from nothing: --config zoo/unet.yaml", add_help=False)
    return parser


def _verify() -> int:
    problems = zoo.verify()
    for name in sorted(zoo.cards()):
        wrong = [line for line in problems if line.startswith(name)]
        print(f"  {name:<12} {'; '.join(wrong) if wrong else 'as in its card'}")
    return 1 if problems else 0


def _retrain(argv: Sequence[str]) -> int:
    from vislr.core.arguments import parse_config
    from vislr.zoo.retraining import RetrainConfig, retrain

    retrain(parse_config(RetrainConfig, argv, prog="vislr zoo retrain", description="Train an embedded model."))
    return 0


def _list() -> None:
    counts = Counter(picture.style for picture in zoo.images())
    print("images (64 x 64, on white)")
    for style, count in counts.items():
        first = zoo.images(style=style)[0]
        held = len(zoo.images(style=style, split="held-out"))
        print(f"  {style:<9} {count} ({held} of held-out concepts)  {first.credit}: {first.licence}")
    print("pipelines")
    for name in zoo.pipeline_names():
        folder = zoo.pipeline_folder(name)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"  {name:<11} {size / 1e6:.1f} MB  {folder}")
    others = {name: card for name, card in zoo.cards().items() if name not in zoo.pipeline_names()}
    if others:
        print("other models")
    for name, card in others.items():
        print(f"  {name:<11} {card['about']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr zoo` with these arguments; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["retrain"]:
        return _retrain(argv[1:])
    a = _parser().parse_args(argv)
    if a.action == "verify":
        return _verify()
    if a.action == "list":
        _list()
        return 0
    pictures = zoo.images(style=a.style, category=a.category, split=a.split)
    if a.limit is not None:
        if a.limit < 1:
            raise ConfigError(f"--limit {a.limit}: expected 1 or more")
        # Evenly spaced, so that a small folder still holds every category.
        count = min(a.limit, len(pictures))
        pictures = [pictures[i * len(pictures) // count] for i in range(count)]
    if a.export is None:
        for (style, category), count in sorted(Counter((p.style, p.category) for p in pictures).items()):
            print(f"{style:<9} {category:<18} {count}")
        return 0
    count = zoo.export(a.export, pictures, captions=a.captions)
    print(f"{count} images with captions -> {a.export}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
