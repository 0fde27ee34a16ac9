"""How long the text is that a pipeline gives its denoiser."""

from __future__ import annotations

from typing import Any

# Longest text that the pipelines themselves read, and the tokenizer of the encoder that reads it.
_LENGTHS = {
    "PixArtAlphaPipeline": (120, "tokenizer"),
    "PixArtSigmaPipeline": (300, "tokenizer"),
    "FluxPipeline": (512, "tokenizer_2"),
}


def sequence_length(pipe: Any) -> int:
    """Tokens of the long text encoder, in training and in sampling: its tokenizer's limit, at most the family's.

    Without a limit of its own SD3 attends to 256 tokens of padding: four times the work of 16.
    """
    most, name = _LENGTHS.get(type(pipe).__name__.replace("Img2Img", ""), (256, "tokenizer_3"))
    return min(most, (getattr(pipe, name, None) or pipe.tokenizer).model_max_length)


def note_text_tokens(pipe: Any) -> None:
    """Note on the denoiser of a pipeline how many text tokens it reads, so that counts are of what runs.

    A denoiser's config does not say it. SD3's pipeline gives it CLIP's tokens and then those of T5, or as many zeros.
    """
    parts = getattr(pipe, "components", {})
    tokenizer = parts.get("tokenizer")
    if tokenizer is None:
        return
    if parts.get("unet") is not None:
        parts["unet"].text_tokens = tokenizer.model_max_length
    elif parts.get("transformer") is not None:
        first = tokenizer.model_max_length if "text_encoder_3" in parts else 0
        parts["transformer"].text_tokens = first + sequence_length(pipe)


def noted_text_tokens(model: Any) -> int | None:
    """What `note_text_tokens` noted, or None."""
    return vars(model).get("text_tokens")
