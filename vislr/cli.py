"""`vislr <verb>`: finds the verb's script and hands it the rest of the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from vislr.core.cli_guard import run
from vislr.core.errors import ConfigError, hint

# verb -> (module with `main(argv)`, one line)
VERBS = {
    "describe": ("vislr.pipelines.describe", "list a model's sites: layers, units, shapes, parameters, FLOPs"),
    "train": ("vislr.pipelines.train_adapter", "train an adapter on a folder of images"),
    "adapt-domain": (
        "vislr.pipelines.adapt_domain",
        "adapt a classifier or a segmentation model to a domain without labels",
    ),
    "tokens": ("vislr.pipelines.tokens", "prune tokens: a plan for a budget, what it saves and what it keeps"),
    "estimate": ("vislr.pipelines.estimate", "what a training run needs: memory, time, files; does it fit"),
    "prune": ("vislr.pipelines.prune", "remove layers of a pipeline and let it recover by distillation"),
    "quantize": ("vislr.pipelines.quantize", "keep a pipeline in few bits, fine-tuned without data"),
    "export": ("vislr.pipelines.export", "write a pipeline for tools without vislr: plain folder, single file, ONNX"),
    "recipe": ("vislr.pipelines.recipe", "run several verbs in a row; show, compare, replay or undo what was done"),
    "generate": ("vislr.pipelines.generate", "make images with a pipeline and adapters"),
    "compose": ("vislr.pipelines.compose", "several adapters in one picture; profiles of adapters"),
    "convert": ("vislr.pipelines.convert", "an adapter file in another tool's format"),
    "doctor": ("vislr.pipelines.doctor", "what is in an adapter file, and what each tool will do with it"),
    "merge": ("vislr.pipelines.merge", "adapter files: several into one, another rank, one out of two checkpoints"),
    "demo": ("vislr.demos.app", "the studio: a page in the browser to try, compare and merge adapters"),
    "zoo": ("vislr.pipelines.zoo", "the embedded images and pipelines: list, export, check"),
}


def usage() -> str:
    """The text of `vislr --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {description}" for verb, (_, description) in VERBS.items()]
    return "\n".join(
        [
            "usage: vislr VERB [--config FILE.yaml] [--field value ...]",
            "",
            "Adapt and shrink vision and diffusion models.",
            "",
            *lines,
            "",
            "`vislr VERB --help` lists a verb's fields; `vislr --version` prints the version.",
            "A config's fields can all be set by flags; flags after --config win over it.",
        ]
    )


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from vislr import __version__

        print(__version__)
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise ConfigError(f"no verb '{verb}'{hint(verb, VERBS)}")
    return importlib.import_module(VERBS[verb][0]).main(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `vislr` command; returns the exit code."""
    return run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
