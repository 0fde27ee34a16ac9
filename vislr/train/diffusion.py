"""The task of a diffusion pipeline: denoising or flow matching on latents, and pictures of what it draws."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from vislr.anatomy.text import sequence_length
from vislr.core.errors import ModelError
from vislr.core.hashing import content_hash
from vislr.data import Pool, Source, TensorCache, cache_key, make_grid
from vislr.train import objectives
from vislr.train.captions import Captions
from vislr.train.config import TrainConfig
from vislr.train.examples import Batch, Examples, HeldOut, Latents, Pixels
from vislr.train.families import Conditions, family_of
from vislr.train.sampling import sample_images
from vislr.train.tasks import Draw, Preview, spread, to_image

if TYPE_CHECKING:
    from PIL import Image

_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")


class Diffusion:
    """Denoising or flow matching on the latents of a pipeline, whichever its scheduler says.

    Captions are encoded once, unless their encoder is trained; pictures are, too, unless crops or flips
    need the pixels.

    Args:
        pipe: a diffusers pipeline that `family_of` knows, on its device.
        config: the run.
        train, held_out: pictures with captions (or classes); `held_out` may be None.
        share: (rank, world): with a cache on disk each process encodes its part of the pictures.
        quiet: no progress bar.

    Raises:
        ModelError: not a pipeline that can be trained, or not at this size.
    """

    drifts = True

    def __init__(
        self, pipe: Any, config: TrainConfig, train: Pool, held_out: Pool | None, *,
        share: tuple[int, int] = (0, 1), quiet: bool = False,
    ) -> None:  # fmt: skip
        self.pipe, self.config, self.family = pipe, config, family_of(pipe)
        self.model: nn.Module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        self.models = {"": self.model} | {name: getattr(pipe, name) for name in config.adapter.text_encoders}
        self.device = next(self.model.parameters()).device
        self.dtype = compute_dtype(self.model, config.model.dtype)
        objective = config.objective
        self.flow = "FlowMatch" in type(pipe.scheduler).__name__
        self.size, shape = latent_shape(pipe, config.data.size)
        self.shift = objective.shift or scheduler_shift(pipe, shape)
        if self.flow and (objective.weighting != "none" or objective.zero_terminal_snr):
            raise ModelError("objective.weighting and zero_terminal_snr are for denoising models; this one is of flow")
        self.scheduler = None
        if not self.flow:
            self.scheduler = training_scheduler(pipe.scheduler, zero_terminal_snr=objective.zero_terminal_snr)
        further = {"offset": objective.noise_offset, "perturbation": objective.input_perturbation}
        extra = [name for name, strength in further.items() if strength]
        cache = None
        if config.data.cache_folder is not None:
            cache = TensorCache(Path(config.data.cache_folder), int(config.data.cache_limit_gb * 1e9))
        # One encoder for both parts: it is hashed once.
        prefix = {}
        if cache is not None and config.data.cache_latents:
            prefix = {"encoder": encoder_hash(pipe.vae), "dtype": str(pipe.vae.dtype)}

        def parts(pool: Pool, kept: bool) -> tuple[Source, Latents, bool]:
            source = pool.at(self.size, size_step(pipe), seed=config.seed)
            kept = kept and not (cache is None and source.streamed)
            return source, Latents(shape[0], self.factor, cache=cache if kept else None, prefix=prefix), kept

        self.factor = vae_factor(pipe)
        source, latents, kept = parts(train, config.data.cache_latents)
        kept = kept and not source.random
        self.train = Examples(source, Pixels(self.size), config.seed, latents, extra, kept)
        self.held_out = None
        if held_out is not None:
            # Held-out pictures are never augmented.
            source, latents, kept = parts(held_out, True)
            self.held_out = HeldOut(
                source, Pixels(self.size), config.seed, config.held_out.repeats, latents=latents, stored=kept
            )
        for examples in (self.train, self.held_out):
            if examples is not None:
                self._fill(examples, share, quiet)
        self.captions = self._captions(train, held_out, cache if config.data.cache_text else None)
        shown = (self.held_out or self.train).source
        self.prompts = config.sample.prompts or [self._caption(shown, index) for index in spread(shown)]
        self._away()

    def _caption(self, source: Source, index: int) -> str:
        item = source.item(index)
        return source.pool.classes[item.label] if self.family.labelled else item.caption

    def _captions(self, train: Pool, held_out: Pool | None, cache: TensorCache | None) -> Captions:
        known: list[str] | None
        if self.family.labelled:
            known, cache = list(train.classes), None
        else:
            found = [pool.captions() for pool in (train, held_out) if pool is not None]
            known = [caption for part in found for caption in part or ()] if all(p is not None for p in found) else None
            if not self.config.data.cache_text:
                known = None
        trained = bool(self.config.adapter.text_encoders)
        key: Callable[[str], str] | None = None
        if cache is not None and not trained:
            encoders = [getattr(self.pipe, name, None) for name in _ENCODERS[:3]]
            tokenizers = [getattr(self.pipe, name.replace("text_encoder", "tokenizer"), None) for name in _ENCODERS[:3]]
            fixed = {
                "encoders": "+".join(encoder_hash(one) for one in encoders if one is not None),
                "tokenizers": "+".join(tokenizer_hash(one) for one in tokenizers if one is not None),
                "dtype": str(self.dtype),
                "family": type(self.family).__name__,
                "length": str(sequence_length(self.pipe)),
            }

            def key(caption: str) -> str:
                return cache_key("text", caption=caption, **fixed)

        return Captions(self.family.encode, known, trained=trained, cache=cache, key=key)

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and deviation of the latents, scaled as the denoiser sees them."""
        vae = self.pipe.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def _fill(self, examples: Examples, share: tuple[int, int], quiet: bool) -> None:
        """Encode every picture that is not kept yet, one by one: its latents depend on nothing beside it."""
        source, latents = examples.source, examples.latents
        if not examples.stored or source.streamed or latents is None:
            return
        rank, world = share if latents.cache is not None else (0, 1)
        for index in tqdm(range(rank, source.count, world), desc="encoding pictures", leave=False, disable=quiet):
            item = source.item(index)
            part = examples.one(item)
            if part["stored"] is None:
                made = self._latents(part["pixels"], part["frame"], part["mask"])
                if latents.cache is not None:
                    latents.cache.put(part["key"], made)
                else:
                    latents.table[part["item"].index] = made

    def _latents(self, pixels: torch.Tensor, frame: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        mean, std = self._encode(pixels[None])
        made = {"mean": mean[0].cpu(), "std": std[0].cpu(), "frame": frame}
        return made if mask is None else made | {"mask": mask}

    def _clean(self, batch: Batch) -> dict[str, torch.Tensor]:
        """mean, std (B, C, H, W), frame (B, 6), and mask (B, 1, H, W) if any picture has one; on the device."""
        rows = list(batch["stored"])
        missing = [i for i, row in enumerate(rows) if row is None]
        if missing:
            with self._here("vae"):
                if self.train.stored:
                    for i in missing:
                        rows[i] = self._latents(batch["pixels"][i], batch["frame"][i], batch["mask"][i])
                else:
                    mean, std = self._encode(torch.stack([batch["pixels"][i] for i in missing]))
                    for row, i in enumerate(missing):
                        rows[i] = {"mean": mean[row], "std": std[row], "frame": batch["frame"][i],
                                   "mask": batch["mask"][i]}  # fmt: skip
        if missing and self.train.stored and self.train.latents is not None and self.train.latents.cache is not None:
            for i in missing:
                self.train.latents.cache.put(batch["key"][i], rows[i])
        found = {
            name: torch.stack([row[name].to(self.device, non_blocking=True) for row in rows])
            for name in ("mean", "std", "frame")
        }
        masks = [row.get("mask") for row in rows]
        if any(mask is not None for mask in masks):
            full = torch.ones(1, *found["mean"].shape[2:])
            found["mask"] = torch.stack([full if mask is None else mask for mask in masks]).to(self.device)
        return found

    def forward(self, model: nn.Module, batch: Batch, *, plain: bool = False) -> Draw:
        objective = self.config.objective
        clean = self._clean(batch)
        drawn = {name: batch[name].to(self.device, non_blocking=True)
                 for name in ("u", "noise", "posterior", "offset", "perturbation") if name in batch}  # fmt: skip
        x = torch.addcmul(clean["mean"], clean["std"], drawn["posterior"])
        conditions = self._conditions(batch, clean["frame"])
        noise, perturbation = drawn["noise"], None
        if not plain and "offset" in drawn:
            noise = noise + objective.noise_offset * drawn["offset"]
        if not plain and "perturbation" in drawn:
            perturbation = objective.input_perturbation * drawn["perturbation"]
        seen: list[torch.Tensor] = []

        def predict(noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            seen.extend((noisy.to(self.dtype), time))
            return self.family.forward(model, seen[0], time, conditions)

        if self.scheduler is None:
            parts = objectives.flow(
                predict, x, noise, drawn["u"], self.shift, times=objective.flow_times, perturbation=perturbation
            )
        else:
            parts = objectives.denoise(
                predict, self.scheduler, x, noise, drawn["u"], weighting="none" if plain else objective.weighting,
                gamma=objective.snr_gamma, perturbation=perturbation,
            )  # fmt: skip
        mask = None
        if "mask" in clean:
            mask = clean["mask"] + objective.unmasked_weight * (1 - clean["mask"])
        loss = parts.loss(mask)
        if not plain:
            loss = loss * batch["weight"].to(self.device)
        return Draw(seen[0], seen[1], conditions, parts.prediction, parts.target, loss)

    def _conditions(self, batch: Batch, frame: torch.Tensor) -> Conditions:
        if self.family.labelled:
            texts = [self.train.source.pool.classes[label] for label in batch["label"].tolist()]
        else:
            texts = batch["captions"]
        rows = self.captions.rows(texts, self.device)
        return rows | self.family.frame(frame[:, :2], frame[:, 2:4], frame[:, 4:])

    def _away(self) -> None:
        if self.config.model.offload == "encoders":
            for name in _ENCODERS[:3] if self.captions.bounded else ():
                if getattr(self.pipe, name, None) is not None:
                    getattr(self.pipe, name).to("cpu")
            if self.train.stored and not self.train.source.streamed:
                self.pipe.vae.to("cpu")

    @contextlib.contextmanager
    def _here(self, *names: str) -> Iterator[None]:
        """These encoders on the device, inside the block; all, if none is named."""
        for name in names or _ENCODERS:
            if getattr(self.pipe, name, None) is not None:
                getattr(self.pipe, name).to(self.device)
        try:
            yield
        finally:
            self._away()

    def preview(self) -> Preview:
        sample = self.config.sample
        with self._here():
            images = sample_images(
                self.pipe, self.prompts * len(sample.seeds), [seed for seed in sample.seeds for _ in self.prompts],
                steps=sample.steps, guidance=sample.guidance, size=self.size, batch=min(8, self.config.optim.batch),
            )  # fmt: skip
        count = len(self.prompts)
        return Preview([images[i * count : (i + 1) * count] for i in range(len(sample.seeds))], self.prompts)

    def before_after(self, before: Preview, after: Preview) -> Image.Image:
        rows, labels = [], []
        for seed, old, new in zip(self.config.sample.seeds, before.rows, after.rows, strict=True):
            rows += [old, new]
            labels += [f"before, seed {seed}", f"after, seed {seed}"]
        source = self.train.source
        rows.append([to_image(source.read(source.item(i)).pixels) for i in spread(source, len(self.prompts))])
        labels.append("training pictures")
        return make_grid(rows, row_labels=labels, column_labels=before.columns)


def vae_factor(pipe: Any) -> int:
    """Pixels of a picture for each position of its latents, along one side."""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def size_step(pipe: Any) -> int:
    """Sides of pictures are multiples of this, so that the denoiser can halve the latents as often as it must."""
    halvings = len(pipe.unet.config.block_out_channels) - 1 if hasattr(pipe, "unet") else 1
    return vae_factor(pipe) * 2**halvings


def latent_shape(pipe: Any, size: int | None) -> tuple[int, tuple[int, int, int]]:
    """Side of a picture in pixels (None: the pipeline's own), and the shape (C, H, W) of its latents.

    Raises:
        ModelError: the denoiser cannot halve the latents of this size as often as it must.
    """
    factor, step = vae_factor(pipe), size_step(pipe)
    if size is None:
        native = getattr(pipe, "default_sample_size", None)
        if native is None:
            native = pipe.unet.config.sample_size if hasattr(pipe, "unet") else pipe.transformer.config.sample_size
        size = int(native) * factor
    if size % step:
        raise ModelError(f"data.size is {size}; expected a multiple of {step} for this model")
    return size, (pipe.vae.config.latent_channels, size // factor, size // factor)


def scheduler_shift(pipe: Any, shape: tuple[int, int, int]) -> float:
    """Shift of the noise levels at this size: the scheduler's own, or by its number of image tokens (FLUX)."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or 1.0)
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    tokens = shape[1] * shape[2] // 4
    return math.exp(least + (most - least) * (tokens - low) / (high - low))


def training_scheduler(scheduler: Any, *, zero_terminal_snr: bool = False) -> Any:
    """The DDPM scheduler with the betas and the prediction type of any sampling scheduler.

    Sampling schedulers scale their noise in ways of their own (Euler adds sigma * noise); a model is
    trained on the variance-preserving process of its betas.

    Args:
        zero_terminal_snr: rescale the betas so that the last timestep is pure noise (Lin et al. 2023, algorithm 1).

    Raises:
        ModelError: it has no betas; or it predicts the noise, which pure noise says nothing about.
    """
    from diffusers import DDPMScheduler

    if "beta_schedule" not in scheduler.config:
        raise ModelError(f"cannot train a model with a {type(scheduler).__name__}: it has no betas and no flow")
    if zero_terminal_snr and scheduler.config.prediction_type == "epsilon":
        raise ModelError("objective.zero_terminal_snr needs a model that predicts v or the image; this predicts noise")
    changes = {"rescale_betas_zero_snr": True} if zero_terminal_snr else {}
    return DDPMScheduler.from_config(scheduler.config, **changes)


def encoder_hash(module: Any) -> str:
    """Of an encoder's weights and of its config: factors and layers that are used change what it gives, too."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    own = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    return content_hash(module.state_dict(), json.dumps(own, sort_keys=True, default=str))


def tokenizer_hash(tokenizer: Any) -> str:
    """Of everything that turns a caption into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    options = json.dumps(tokenizer.init_kwargs, sort_keys=True, default=str)
    return hashlib.sha256(f"{state} {options} {tokenizer.model_max_length}".encode()).hexdigest()


def compute_dtype(model: nn.Module, stored: str) -> torch.dtype:
    """The number type in which a denoiser computes: that of its weights, unless they are kept smaller."""
    first = next(p for p in model.parameters() if p.is_floating_point())
    return first.dtype if first.dtype.itemsize > 1 else getattr(torch, stored)
