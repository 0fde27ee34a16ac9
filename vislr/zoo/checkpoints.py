"""The embedded pipelines: small diffusers folders that come with vislr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.errors import ModelError, hint
from vislr.core.files import read_json
from vislr.core.hashing import content_hash

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WEIGHTS = Path(__file__).with_name("weights")


def pipeline_names() -> list[str]:
    """Names that `pipeline` takes."""
    return sorted(folder.name for folder in WEIGHTS.iterdir() if (folder / "model_index.json").is_file())


def pipeline_folder(name: str) -> Path:
    """The diffusers folder of an embedded pipeline; stock `from_pretrained` loads it too.

    Raises:
        ModelError: no such pipeline is embedded.
    """
    if name not in pipeline_names():
        raise ModelError(f"no embedded pipeline is called '{name}'{hint(name, pipeline_names())}")
    return WEIGHTS / name


def pipeline(name: str, **options: Any) -> DiffusionPipeline:
    """Load an embedded pipeline, in float32 unless `dtype` says otherwise.

    Args:
        name: one of `pipeline_names()`, for example "emoji-unet".
        options: passed on to `DiffusionPipeline.from_pretrained`.
    """
    import torch
    from diffusers import DiffusionPipeline
    from transformers.utils import logging

    from vislr.anatomy.text import note_text_tokens

    options.setdefault("dtype", torch.float32)
    folder = pipeline_folder(name)
    level = logging.get_verbosity()
    # The text model is stored once for both pipelines; one of them leaves its projection aside, which
    # transformers reports at length.
    logging.set_verbosity_error()
    try:
        pipe = _load(folder, options, DiffusionPipeline)
    finally:
        logging.set_verbosity(level)
    note_text_tokens(pipe)
    return pipe


def _load(folder: Path, options: dict[str, Any], stock: Any) -> DiffusionPipeline:
    if json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusion3Pipeline":
        # Stock diffusers takes components that a folder lacks only when they are named.
        options = {"text_encoder_3": None, "tokenizer_3": None, **options}
        return sixteen_tokens().from_pretrained(str(folder), local_files_only=True, **options)
    return stock.from_pretrained(str(folder), local_files_only=True, **options)


def sixteen_tokens() -> Any:
    """StableDiffusion3Pipeline whose `max_sequence_length` is 16 unless given.

    The absent T5 becomes that many zero tokens; the embedded model was trained with 16, stock diffusers
    makes 256, which dilutes its attention. The class has the stock name, which is what `save_pretrained` writes.
    """
    import functools

    from diffusers import StableDiffusion3Pipeline as Stock

    from vislr.zoo.vocabulary import MAX_TOKENS

    def call(self: Any, *args: Any, max_sequence_length: int = MAX_TOKENS, **options: Any) -> Any:
        return Stock.__call__(self, *args, max_sequence_length=max_sequence_length, **options)

    # diffusers reads the signature, which `wraps` keeps.
    body = {"__call__": functools.wraps(Stock.__call__)(call), "__module__": Stock.__module__}
    return type("StableDiffusion3Pipeline", (Stock,), body)


def classifier(name: str) -> Any:
    """An embedded timm classifier of the pictures' categories, in evaluation mode.

    Pixels are (n, 3, 64, 64) in [-1, 1]; the order of the categories is in its `pretrained_cfg["label_names"]`.

    Args:
        name: "emoji-vit" (a ViT) or "emoji-conv" (a ResNet with BatchNorm).

    Raises:
        ModelError: no such classifier is embedded.
    """
    import timm

    from vislr.core.made_with import note_made_with

    names = classifier_names()
    if name not in names:
        raise ModelError(f"no embedded classifier is called '{name}'{hint(name, names)}")
    model = timm.create_model(f"local-dir:{WEIGHTS / name}", pretrained=True).eval()
    config = read_json(WEIGHTS / name / "config.json")
    return note_made_with(model, config["architecture"], config.get("model_args") or {})


def classifier_names() -> list[str]:
    """Names of the embedded classifiers."""
    return sorted(file.parent.name for file in WEIGHTS.glob("*/config.json") if "architecture" in file.read_text())


def cards() -> dict[str, dict[str, Any]]:
    """The card of every embedded model by name: what it is, hashes of its weights, how it was trained, its gates."""
    return {file.parent.name: json.loads(file.read_text()) for file in sorted(WEIGHTS.glob("*/card.json"))}


def weight_hashes(folder: Path) -> dict[str, str]:
    """Content hash of every weight file of a model folder, by its path in it; links are followed."""
    from safetensors.torch import load_file

    files = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    return {file.relative_to(folder).as_posix(): content_hash(load_file(file)) for file in sorted(files)}


def verify() -> list[str]:
    """What differs between the embedded weights and their cards; nothing when all is as it was frozen."""
    problems = []
    for name, card in cards().items():
        found = weight_hashes(WEIGHTS / name)
        for file in sorted({*found, *card["weights"]}):
            if found.get(file) != card["weights"].get(file):
                have, want = (str(h.get(file, "absent"))[:12] for h in (found, card["weights"]))
                problems.append(f"{name}/{file}: {have}, its card says {want}")
    return problems
