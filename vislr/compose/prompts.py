"""How much a prompt asks for each adapter, by the pipeline's own text encoder (arXiv 2606.03792)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vislr.core.errors import ConfigError, ModelError, hint


@dataclass(frozen=True)
class PromptWeights:
    """One number an adapter.

    Attributes:
        trigger: cos(trigger, prompt): how near the prompt as a whole is to what the adapter stands for.
        absence: 1 - cos(prompt, prompt without the trigger): how much the prompt changes without it.
    """

    trigger: tuple[float, ...]
    absence: tuple[float, ...]


def prompt_weights(pipe: Any, prompt: str, triggers: Sequence[str]) -> PromptWeights:
    """How much a prompt asks for each of several triggers.

    Args:
        pipe: a pipeline with a tokenizer and a text encoder; the first of several counts.
        triggers: parts of the prompt, one an adapter.

    Raises:
        ConfigError: a trigger is not in the prompt; names the nearest words. ModelError: no text encoder.
    """
    for trigger in triggers:
        if not trigger or trigger not in prompt:
            raise ConfigError(f"the trigger '{trigger}' is not in the prompt '{prompt}'{hint(trigger, prompt.split())}")
    texts = [prompt, *triggers, *(without(prompt, trigger) for trigger in triggers)]
    whole, *others = embedded(pipe, texts)
    near = [float(F.cosine_similarity(whole, other, dim=0)) for other in others]
    count = len(triggers)
    return PromptWeights(tuple(near[:count]), tuple(1 - value for value in near[count:]))


def without(prompt: str, trigger: str) -> str:
    """The prompt without a part of it, and without the commas and spaces that it leaves behind."""
    rest = re.sub(r"\s+", " ", prompt.replace(trigger, " "))
    parts = [part.strip() for part in rest.split(",")]
    return ", ".join(part for part in parts if part)


@torch.no_grad()
def embedded(pipe: Any, texts: Sequence[str]) -> torch.Tensor:
    """(texts, width) float32: CLIP's pooled embedding, or the mean over T5's tokens."""
    encoder, tokenizer = getattr(pipe, "text_encoder", None), getattr(pipe, "tokenizer", None)
    if encoder is None or tokenizer is None:
        raise ModelError(f"a {type(pipe).__name__} has no text encoder to weigh a prompt with")
    length = min(tokenizer.model_max_length, 256)
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids, mask = tokens.input_ids.to(encoder.device), tokens.attention_mask.to(encoder.device)
    output = encoder(ids) if hasattr(encoder.config, "projection_dim") else encoder(ids, attention_mask=mask)
    pooled = getattr(output, "text_embeds", None)
    if pooled is None:
        pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        shown = mask[..., None].to(output.last_hidden_state.dtype)
        pooled = (output.last_hidden_state * shown).sum(1) / shown.sum(1).clamp(min=1)
    return pooled.float()
