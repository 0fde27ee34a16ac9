"""How each family of pipelines turns captions into conditions and calls its denoiser."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from vislr.anatomy.text import sequence_length
from vislr.core.errors import DataError, ModelError, hint

Conditions = dict[str, torch.Tensor]


class Family(Protocol):
    """What training needs to know of a pipeline.

    Attributes:
        labelled: conditions are classes, not captions.
    """

    labelled: bool

    def encode(self, prompts: list[str]) -> Conditions:
        """What the denoiser is told of captions (of classes: their names), one row each."""

    def frame(self, original: torch.Tensor, corner: torch.Tensor, target: torch.Tensor) -> Conditions:
        """What it is told of sizes: of the picture as it was, the upper left corner of the crop, of the crop as it
        is trained on; each (B, 2): height and width in pixels, corner top and left."""

    def forward(self, model: Any, noisy: torch.Tensor, time: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The prediction (B, C, H, W). `time`: timesteps, or sigmas in (0, 1) for flow models."""


class _Captioned:
    """A family that reads captions and is told no sizes."""

    labelled = False

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def frame(self, original: torch.Tensor, corner: torch.Tensor, target: torch.Tensor) -> Conditions:
        return {}


class StableDiffusion(_Captioned):
    """UNet with cross attention to one text encoder: Stable Diffusion 1 and 2."""

    def encode(self, prompts: list[str]) -> Conditions:
        return {"text": self.pipe.encode_prompt(prompts, self.pipe.text_encoder.device, 1, False)[0]}

    def forward(self, model: Any, noisy: torch.Tensor, time: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return model(noisy, time, encoder_hidden_states=conditions["text"], return_dict=False)[0]


class StableDiffusionXL(_Captioned):
    """UNet with two text encoders, a pooled embedding, and size and crop as numbers."""

    def encode(self, prompts: list[str]) -> Conditions:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.pipe.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def frame(self, original: torch.Tensor, corner: torch.Tensor, target: torch.Tensor) -> Conditions:
        return {"ids": torch.cat([original, corner, target], 1)}

    def forward(self, model: Any, noisy: torch.Tensor, time: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        added = {"text_embeds": conditions["pooled"], "time_ids": conditions["ids"].to(conditions["text"].dtype)}
        return model(noisy, time, encoder_hidden_states=conditions["text"], added_cond_kwargs=added, return_dict=False)[
            0
        ]


class StableDiffusion3(_Captioned):
    """Transformer with joint attention and a pooled projection; time is sigma. SD3 and SD3.5."""

    def encode(self, prompts: list[str]) -> Conditions:
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


class Flux(_Captioned):
    """Transformer over latents packed 2 x 2, with positions as ids; time is sigma."""

    def encode(self, prompts: list[str]) -> Conditions:
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


class PixArt(_Captioned):
    """Transformer with cross attention to T5; the 1024-pixel alpha is told size and aspect. PixArt alpha and sigma."""

    def encode(self, prompts: list[str]) -> Conditions:
        text, mask, _, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.pipe.text_encoder.device,
            max_sequence_length=sequence_length(self.pipe),
        )  # fmt: skip
        return {"text": text, "mask": mask}

    def frame(self, original: torch.Tensor, corner: torch.Tensor, target: torch.Tensor) -> Conditions:
        # What the pipelines ask before they tell it (PixArt sigma never does).
        if not self.pipe.transformer.use_additional_conditions:
            return {}
        return {"resolution": target, "aspect_ratio": target[:, :1] / target[:, 1:]}

    def forward(self, model: Any, noisy: torch.Tensor, time: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        kind = conditions["text"].dtype
        sizes = {key: conditions[key].to(kind) if key in conditions else None for key in ("resolution", "aspect_ratio")}
        return model(
            noisy, encoder_hidden_states=conditions["text"], encoder_attention_mask=conditions["mask"], timestep=time,
            added_cond_kwargs=sizes, return_dict=False,
        )[0]  # fmt: skip


class DiT:
    """Transformer that is told a class; folders of pictures are named like its classes, or by their numbers."""

    labelled = True

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def encode(self, prompts: list[str]) -> Conditions:
        return {"label": torch.tensor([self.number(name) for name in prompts])}

    def number(self, name: str) -> int:
        """The model's number of a class.

        Raises:
            DataError: it has no class of this name.
        """
        count = self.pipe.transformer.config.num_embeds_ada_norm
        known = getattr(self.pipe, "labels", None) or {}
        if name in known:
            return int(known[name])
        if name.isdecimal() and int(name) < count:
            return int(name)
        raise DataError(
            f"the model has no class '{name}'{hint(name, known)}; expected a class's name, or its number below {count}"
        )

    def frame(self, original: torch.Tensor, corner: torch.Tensor, target: torch.Tensor) -> Conditions:
        return {}

    def forward(self, model: Any, noisy: torch.Tensor, time: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return model(noisy, timestep=time, class_labels=conditions["label"], return_dict=False)[0]


def family_of(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        ModelError: none that can be trained.
    """
    denoiser: Any = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    # A subclass (vislr.models) trains like the class that it is made from.
    names = {base.__name__ for base in type(denoiser).__mro__}
    family: Any = None
    if "UNet2DConditionModel" in names:
        family = {None: StableDiffusion, "text_time": StableDiffusionXL}.get(denoiser.config.addition_embed_type)
    for name, kind in _TRANSFORMERS.items():
        if name in names:
            family = kind
    if family is None:
        raise ModelError(
            f"cannot train a {type(pipe).__name__} with a {type(denoiser).__name__}; expected the UNet of Stable "
            "Diffusion 1, 2 or XL, or the transformer of SD3, FLUX, PixArt or DiT"
        )
    if "AutoencoderKL" not in {base.__name__ for base in type(pipe.vae).__mro__}:
        raise ModelError(f"the VAE is of class {type(pipe.vae).__name__}; expected the model's own AutoencoderKL")
    wanted = pipe.vae.config.latent_channels * (4 if family is Flux else 1)
    if denoiser.config.in_channels != wanted:
        raise ModelError(
            f"the {type(denoiser).__name__} reads {denoiser.config.in_channels} channels; expected {wanted}, "
            "those of the latents (inpainting, depth and edit models cannot be trained)"
        )
    return family(pipe)


_TRANSFORMERS: dict[str, type] = {
    "SD3Transformer2DModel": StableDiffusion3,
    "FluxTransformer2DModel": Flux,
    "PixArtTransformer2DModel": PixArt,
    "DiTTransformer2DModel": DiT,
}
