"""The golden lists of module names, as patterns; and how they were made from the public architectures.

A list is {component: {pattern: shape of the weight}}; "{0-2,5}" in a pattern stands for each of these
numbers, every other character for itself. Lists are data in `names/FAMILY.json`: nothing reads names
from a live model, whose library may have renamed them since.

`python -m vislr.formats.golden` writes the files again; a test compares them with the installed libraries.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "names"
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
_BRACES = re.compile(r"\{([\d,-]+)\}")

# family -> component -> how to build it: names of `vislr.anatomy.skeleton`, or a text encoder's config.
SOURCES: dict[str, dict[str, list[Any]]] = {
    "sd15": {
        "unet": ["sd15"],
        "text_encoder": [("clip", {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12})],
    },
    "sd2": {
        "unet": ["sd21"],
        "text_encoder": [("clip", {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23})],
    },
    "sdxl": {
        "unet": ["sdxl"],
        "text_encoder": [("clip", {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12})],
        "text_encoder_2": [("clip+", {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32})],
    },
    "sd3": {
        "transformer": ["sd3-medium", "sd35-medium", "sd35-large"],
        "text_encoder": [("clip+", {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12})],
        "text_encoder_2": [("clip+", {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32})],
        "text_encoder_3": [("t5", {})],
    },
    "flux": {
        "transformer": ["flux-dev"],
        "text_encoder": [("clip", {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12})],
        "text_encoder_2": [("t5", {})],
    },
    "pixart": {"transformer": ["pixart-alpha"], "text_encoder": [("t5", {})]},
    "dit": {"transformer": ["dit-xl-2"]},
    "timm": {
        "": [
            "timm:vit_base_patch16_224", "timm:resnet34", "timm:resnet50", "timm:resnet50d", "timm:convnext_tiny",
            "timm:efficientnet_b0", "timm:mobilenetv3_large_100", "timm:swin_tiny_patch4_window7_224",
        ]
    },
}  # fmt: skip
_SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}


def expand(pattern: str) -> list[str]:
    """Every name that a pattern stands for."""
    parts = _BRACES.split(pattern)
    choices: list[list[str]] = []
    for place, part in enumerate(parts):
        if place % 2 == 0:
            choices.append([part])
            continue
        numbers: list[str] = []
        for piece in part.split(","):
            low, _, high = piece.partition("-")
            numbers += map(str, range(int(low), int(high or low) + 1))
        choices.append(numbers)
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def compress(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Names -> shapes as patterns -> shapes; `expand` gives the names back."""
    groups: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        numbers = tuple(int(number) for number in _INDEX.findall(name))
        groups.setdefault((_INDEX.sub("#", name), repr(shape)), []).append(numbers)
    found = {}
    for (template, _), rows in groups.items():
        for block in _blocks(sorted(rows)):
            pattern = template
            for axis in block:
                text = str(axis[0]) if len(axis) == 1 else "{" + _ranges(axis) + "}"
                pattern = pattern.replace("#", text, 1)
            found[pattern] = shapes[expand(pattern)[0]]
    return found


def _blocks(rows: list[tuple[int, ...]]) -> list[list[list[int]]]:
    """Cover index tuples by full grids."""
    axes = [sorted(set(axis)) for axis in zip(*rows, strict=True)]
    size = 1
    for axis in axes:
        size *= len(axis)
    if size == len(rows):
        return [axes]
    # Not a grid: rows that agree behind their first number go together.
    tails: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first in axes[0]:
        tails.setdefault(tuple(row[1:] for row in rows if row[0] == first), []).append(first)
    return [[firsts, *rest] for tail, firsts in tails.items() for rest in _blocks(list(tail))]


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in runs)


def names_of(family: str) -> dict[str, dict[str, Any]]:
    """Component -> name -> weight's shape, read from the libraries as installed.

    Where the sources of a component disagree about a shape, it is None.
    """
    found: dict[str, dict[str, Any]] = {}
    for component, sources in SOURCES[family].items():
        shapes: dict[str, Any] = found.setdefault(component, {})
        for source in sources:
            for name, module in _built(source).named_modules():
                weight = module._parameters.get("weight")
                if weight is not None:
                    if not isinstance(source, str) and source[0].startswith("clip"):
                        name = canonical_clip(name)
                    shape = list(weight.shape)
                    shapes[name] = shape if shapes.get(name, shape) == shape else None
    return found


def canonical_clip(name: str) -> str:
    """A CLIP text encoder's module name with `text_model.`, which newer transformers leave out."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def _built(source: Any) -> Any:
    import torch

    from vislr.anatomy import skeleton

    if isinstance(source, str) and source != "sd35-medium":
        return skeleton(source)
    with torch.device("meta"):
        if source == "sd35-medium":
            from diffusers import SD3Transformer2DModel

            return SD3Transformer2DModel(**_SD35_MEDIUM)
        import transformers

        kind, config = source
        if kind == "t5":
            return transformers.T5EncoderModel(
                transformers.T5Config(
                    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu",
                    vocab_size=32128,
                )
            )  # fmt: skip
        heads = config["hidden_size"] // 64
        width = 768 if config["hidden_size"] == 768 else 1280
        build = transformers.CLIPTextModelWithProjection if kind == "clip+" else transformers.CLIPTextModel
        return build(transformers.CLIPTextConfig(**config, num_attention_heads=heads, projection_dim=width))


def main() -> None:
    """Write every list."""
    from vislr.core.files import write_text

    for family in SOURCES:
        lines = []
        for component, shapes in names_of(family).items():
            rows = [f"    {_quote(p)}: {_quote(s)}" for p, s in compress(shapes).items()]
            lines.append(f"  {_quote(component)}: {{\n" + ",\n".join(rows) + "\n  }")
        write_text(FOLDER / f"{family}.json", "{\n" + ",\n".join(lines) + "\n}\n")


def _quote(value: Any) -> str:
    import json

    return json.dumps(value)


if __name__ == "__main__":
    main()
