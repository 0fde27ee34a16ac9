"""How each family of pipelines turns captions into conditions and calls its denoiser."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from vislr.core.errors import ModelError

Conditions = dict[str, torch.Tensor]


class Family(Protocol):
    """What training needs to know of a pipeline."""

    def encode(self, prompts: list[str], size: int) -> Conditions:
        """Everything that the denoiser is told, one row a prompt. `size`: side of the picture in pixels."""

    def forward(self, model: Any, noisy: torch.Tensor, time: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The prediction (B, C, H, W). `time`: timesteps, or sigmas in (0, 1) for flow models."""


class StableDiffusion:
    """UNet with cross attention to one text encoder."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def encode(self, prompts: list[str], size: int) -> Conditions:
        return {"text": self.pipe.encode_prompt(prompts, self.pipe.text_encoder.device, 1, False)[0]}

    def forward(self, model: Any, noisy: torch.Tensor, time: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return model(noisy, time, encoder_hidden_states=conditions["text"], return_dict=False)[0]


class StableDiffusionXL:
    """UNet with two text encoders, a pooled embedding, and size and crop as numbers."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def encode(self, prompts: list[str], size: int) -> Conditions:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.pipe.text_encoder_2.device, do_classifier_free_guidance=False
        )
        # Original size, corner of the crop, target size.
        ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=text.dtype, device=text.device)
        return {"text": text, "pooled": pooled, "ids": ids.repeat(len(prompts), 1)}

    def forward(self, model: Any, noisy: torch.Tensor, time: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        added = {"text_embeds": conditions["pooled"], "time_ids": conditions["ids"]}
        return model(noisy, time, encoder_hidden_states=conditions["text"], added_cond_kwargs=added, return_dict=False)[
            0
        ]


class StableDiffusion3:
    """Transformer with joint attention and a pooled projection; time is sigma."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def encode(self, prompts: list[str], size: int) -> Conditions:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=self.pipe.text_encoder.device, do_classifier_free_guidance=False,
            max_sequence_length=sequence_length(self.pipe),
        )  # fmt: skip
        return {"text": text, "pooled": pooled}

    def forward(self, model: Any, noisy: torch.Tensor, time: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        count = self.pipe.scheduler.config.num_train_timesteps
        return model(
            hidden_states=noisy, timestep=time * count, encoder_hidden_states=conditions["text"],
            pooled_projections=conditions["pooled"], return_dict=False,
        )[0]  # fmt: skip


class Flux:
    """Transformer over latents packed 2 x 2, with positions as ids; time is sigma."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def encode(self, prompts: list[str], size: int) -> Conditions:
        text, pooled, _ = self.pipe.encode_prompt(
            prompts, None, device=self.pipe.text_encoder.device, max_sequence_length=sequence_length(self.pipe)
        )
        return {"text": text, "pooled": pooled}

    def forward(self, model: Any, noisy: torch.Tensor, time: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        batch, channels, height, width = noisy.shape
        rows, columns = height // 2, width // 2
        packed = noisy.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        positions = torch.zeros(rows, columns, 3, device=noisy.device, dtype=noisy.dtype)
        positions[..., 1] += torch.arange(rows, device=noisy.device)[:, None]
        positions[..., 2] += torch.arange(columns, device=noisy.device)
        text = conditions["text"]
        # A guidance-distilled model is trained as if it were not guided.
        guided = self.pipe.transformer.config.guidance_embeds
        out = model(
            hidden_states=packed.reshape(batch, rows * columns, channels * 4), timestep=time,
            guidance=torch.ones_like(time) if guided else None, pooled_projections=conditions["pooled"],
            encoder_hidden_states=text, txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=text.dtype),
            img_ids=positions.view(-1, 3), return_dict=False,
        )[0]  # fmt: skip
        out = out.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(batch, channels, height, width)


def sequence_length(pipe: Any) -> int:
    """Tokens of the long text encoder, in training and in sampling: the tokenizer's own limit, at most 256.

    Without a limit of its own SD3 attends to 256 tokens of padding: four times the work of 16.
    """
    return min(256, pipe.tokenizer.model_max_length)


def family_of(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        ModelError: none that can be trained.
    """
    denoiser: Any = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    # A subclass (vislr.models) trains like the class that it is made from.
    names = {base.__name__ for base in type(denoiser).__mro__}
    if "UNet2DConditionModel" in names:
        added = denoiser.config.addition_embed_type
        if added is None:
            return StableDiffusion(pipe)
        if added == "text_time":
            return StableDiffusionXL(pipe)
    if "SD3Transformer2DModel" in names:
        return StableDiffusion3(pipe)
    if "FluxTransformer2DModel" in names:
        return Flux(pipe)
    raise ModelError(
        f"cannot train a {type(pipe).__name__} with a {type(denoiser).__name__}; expected the UNet of Stable "
        "Diffusion 1, 2 or XL, or the transformer of SD3 or FLUX"
    )
