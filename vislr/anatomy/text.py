"""How long the text is that a pipeline gives its denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Longest text that the pipelines themselves read, and the tokenizer of the encoder that reads it.
_LENGTHS = {
    "PixArtAlphaPipeline": (120, "tokenizer"),
    "PixArtSigmaPipeline": (300, "tokenizer"),
    "FluxPipeline": (512, "tokenizer_2"),
}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def sequence_length(pipe: Any) -> int:
    """Tokens of the long text encoder, in training and in sampling: its tokenizer's limit, at most the family's.

    Without a limit of its own SD3 attends to 256 tokens of padding: four times the work of 16.
    """
    return _sequence_length(type(pipe).__name__, _limits(pipe))


def note_text_tokens(pipe: Any) -> None:
    """Note on the denoiser of a pipeline how many text tokens it reads, so that counts are of what runs."""
    for name in ("unet", "transformer"):
        denoiser = getattr(pipe, "components", {}).get(name)
        if denoiser is not None:
            denoiser.text_tokens = text_tokens(type(pipe).__name__, _limits(pipe), name)


def noted_text_tokens(model: Any) -> int | None:
    """What `note_text_tokens` noted, or None."""
    return vars(model).get("text_tokens")


def text_tokens(kind: str, limits: Mapping[str, int], component: str) -> int | None:
    """Text tokens that a denoiser reads, which its config does not say; None for a pipeline without text.

    Args:
        kind: class of the pipeline.
        limits: names of its tokenizers -> their longest text.
        component: "unet" or "transformer".
    """
    if "tokenizer" not in limits:
        return None
    if component == "unet":
        return limits["tokenizer"]
    # SD3's pipeline hands on CLIP's tokens and then those of T5, or as many zeros.
    first = limits["tokenizer"] if kind.startswith("StableDiffusion3") else 0
    return first + _sequence_length(kind, limits)


def _sequence_length(kind: str, limits: Mapping[str, int]) -> int:
    most, name = _LENGTHS.get(kind.replace("Img2Img", ""), (256, "tokenizer_3"))
    return min(most, limits.get(name, limits["tokenizer"]))


def _limits(pipe: Any) -> dict[str, int]:
    found = {name: getattr(pipe, name, None) for name in TOKENIZERS}
    return {name: one.model_max_length for name, one in found.items() if one is not None}
