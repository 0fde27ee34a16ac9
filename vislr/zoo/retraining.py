"""Training of the embedded models from nothing: what `vislr zoo retrain` runs.

Four stages, each of which goes on from its newest checkpoint in the output folder: `vae`; `unet`,
which for its first `text_steps` trains the shared text model with it and then freezes that; `mmdit`
on the frozen text model. The learning rate is constant and falls over the last fifth of the steps, so
a stage may be run again with more steps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from vislr.core.errors import ConfigError
from vislr.core.files import atomic_path, write_json, write_tensors
from vislr.core.hashing import content_hash
from vislr.zoo import architectures
from vislr.zoo.composing import BASE_STYLES, scene
from vislr.zoo.emoji import images
from vislr.zoo.retraining_nets import train_classifier, train_net
from vislr.zoo.vocabulary import MAX_TOKENS, build_tokenizer

STAGES = ("vae", "unet", "mmdit", "net", "vit", "conv")


@dataclass(frozen=True)
class RetrainConfig:
    """A stage of the training of the embedded models."""

    stage: str
    """vae, unet (with the text model), mmdit, net (image-text features), vit or conv (classifiers)."""
    steps: int
    """Optimiser steps in all, those of the checkpoint that is gone on from included."""
    batch: int = 32
    """Images a step."""
    learning_rate: float = 1e-3
    """Peak of AdamW's; it falls over the last fifth of the steps."""
    ema: float = 0.9995
    """Decay of the averaged weights, which are the result."""
    text_steps: int = 8200
    """The step of the unet stage after which the text model stays as it is."""
    scenes: int = 8000
    """Composed scenes beside the single emoji."""
    scene_share: float = 1 / 3
    """Share of the samples that are scenes."""
    seed: int = 0
    """Of data order, noise and initial weights."""
    compile: bool = False
    """torch.compile the denoiser: a tenth faster on a CPU."""
    out: Path = Path("runs/base")
    """Folder of checkpoints and results."""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ConfigError(f"stage '{self.stage}'; one of {', '.join(STAGES)}")
        if min(self.steps, self.batch, self.scenes) < 1:
            raise ConfigError("steps, batch and scenes are at least 1")
        if not 0 <= self.scene_share <= 1:
            raise ConfigError(f"scene_share {self.scene_share}; from 0 to 1")


def retrain(config: RetrainConfig) -> None:
    """Run a stage to its last step; the pipelines come from `assemble`."""
    torch.manual_seed(config.seed)
    if config.stage in ("vae", "unet", "mmdit"):
        {"vae": _train_vae, "unet": _train_unet, "mmdit": _train_mmdit}[config.stage](config)
    else:
        (train_net if config.stage == "net" else train_classifier)(config, Run)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, constant, linear to a hundredth over the last fifth."""
    return peak * min((step + 1) / 100, 1.0, 0.01 + 0.99 * (steps - step) / max(1, steps // 5))


class Run:
    """Weights, EMA, optimiser and losses of a stage, kept in `folder` and taken up again from there."""

    def __init__(self, config: RetrainConfig, modules: dict[str, torch.nn.Module]):
        self.config, self.folder, self.step = config, config.out / f"{config.stage}-state", 0
        self.losses: list[tuple[int, float]] = []
        named = [(f"{m}.{n}", p) for m, module in modules.items() for n, p in module.named_parameters()]
        self.names = [n for n, p in named if p.requires_grad]
        self.values: list[torch.Tensor] = [p for _, p in named if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.values, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.ema = [p.detach().clone() for p in self.values]
        self.bar: tqdm[Any] | None = None
        if (self.folder / "state.json").is_file():
            state = json.loads((self.folder / "state.json").read_text())
            self.step, self.losses = state["step"], state.get("losses", [])
            self._restore(load_file(self.folder / f"{self.step}.safetensors"))

    def _restore(self, stored: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, p, e in zip(self.names, self.values, self.ema, strict=True):
                if f"raw.{name}" not in stored:
                    continue
                p.copy_(stored[f"raw.{name}"])
                e.copy_(stored[f"ema.{name}"])
                if f"m.{name}" in stored:
                    # The fused step walks memory order, so the moments take the layout of the parameter.
                    moments = [torch.empty_like(p).copy_(stored[f"{k}.{name}"]) for k in ("m", "v")]
                    self.optimizer.state[p] = {
                        "step": torch.tensor(float(self.step)), "exp_avg": moments[0], "exp_avg_sq": moments[1],
                    }  # fmt: skip

    def draw(self) -> torch.Generator:
        """The generator of every random draw of this step."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.values, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config.steps, self.config.learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.values, 1 - decay)
        self._log(loss.item())
        if self.step % 100 == 0 or self.step == self.config.steps:
            self.save()

    def _log(self, loss: float) -> None:
        if self.bar is None:
            self.bar = tqdm(total=self.config.steps, initial=self.step - 1, desc=self.config.stage, mininterval=5)
            self.mean = loss
        self.mean += (loss - self.mean) / 200
        if self.step % 50 == 0:
            self.losses.append((self.step, round(self.mean, 5)))
        self.bar.set_postfix(loss=f"{self.mean:.4f}", refresh=False)
        self.bar.update()

    def save(self) -> None:
        tensors = {}
        for name, p, e in zip(self.names, self.values, self.ema, strict=True):
            tensors[f"raw.{name}"], tensors[f"ema.{name}"] = p, e
            if p in self.optimizer.state:
                tensors[f"m.{name}"] = self.optimizer.state[p]["exp_avg"]
                tensors[f"v.{name}"] = self.optimizer.state[p]["exp_avg_sq"]
        write_tensors(self.folder / f"{self.step}.safetensors", tensors)
        write_json(self.folder / "state.json", {"step": self.step, "losses": self.losses})
        for old in self.folder.glob("*.safetensors"):
            if old.stem != str(self.step):
                old.unlink()

    def use_ema(self) -> None:
        with torch.no_grad():
            for p, e in zip(self.values, self.ema, strict=True):
                p.copy_(e)


def pixels(pictures: list[Any]) -> torch.Tensor:
    """uint8 images, N 3 64 64, of pictures or scenes."""
    return torch.from_numpy(np.stack([np.asarray(p.image()) for p in pictures])).permute(0, 3, 1, 2)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, dB; images in [-1, 1]."""
    error = (a.clamp(-1, 1) - b).pow(2).flatten(1).mean(1) / 4
    return float((-10 * error.log10()).mean())


def base_scenes(count: int, seed: int) -> list[Any]:
    """Scenes of the training split, in the styles of the base in turn."""
    return [scene(i, seed=seed, split="train", style=BASE_STYLES[i % 2]) for i in range(count)]


def base_pictures() -> list[Any]:
    """Every single emoji that the base models may see."""
    return [p for s in BASE_STYLES for p in images(style=s, split="train")]


def _train_vae(config: RetrainConfig) -> None:
    vae = architectures.make_vae().to(memory_format=torch.channels_last)
    run = Run(config, {"vae": vae})
    train = pixels(base_pictures())
    train = torch.cat([train, pixels(base_scenes(min(config.scenes, len(train) // 2), config.seed))])
    while run.step < config.steps:
        rng = run.draw()
        whole = run.step >= config.steps * 0.85  # crops of 32 px cost a quarter and teach the same convs
        count, side = (config.batch // 4, 64) if whole else (config.batch, 32)
        index = torch.randint(len(train), (count,), generator=rng)
        corners = torch.randint(0, 64 - side + 1, (count, 2), generator=rng)
        x = torch.stack(
            [train[i, :, a : a + side, b : b + side] for i, (a, b) in zip(index, corners.tolist(), strict=True)]
        )
        x = x.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
        y = vae.decode(z).sample
        run.update((y - x).abs().mean() + 2 * (y - x).pow(2).mean() + 1e-6 * posterior.kl().mean() / 3)
    run.use_ema()
    vae.eval()
    with torch.no_grad():
        z = torch.cat([vae.encode(t.float().div(127.5).sub(1)).latent_dist.mean for t in train[::8].split(64)])
        for name, held in (
            ("held-out emoji", pixels(images(style="noto", split="held-out")[:64])),
            ("held-out scenes", pixels([scene(i, seed=config.seed, split="held-out") for i in range(64)])),
        ):
            x = held.float().div(127.5).sub(1)
            made = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(16)])
            print(f"{name}: {psnr(made, x):.2f} dB", flush=True)
    vae.register_to_config(scaling_factor=round(float(1 / z.std()), 4))
    vae.save_pretrained(config.out / "vae")


@dataclass(frozen=True)
class Latents:
    """What the denoisers learn: posteriors of single emoji first, then of scenes, scaled, N 4 16 16."""

    mean: torch.Tensor
    std: torch.Tensor
    captions: list[str]
    singles: int

    def draw(self, rng: torch.Generator, batch: int, scene_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and their indices."""
        single = torch.randint(self.singles, (batch,), generator=rng)
        scened = torch.randint(self.singles, len(self.captions), (batch,), generator=rng)
        index = torch.where(torch.rand(batch, generator=rng) < scene_share, scened, single)
        mean, std = self.mean[index].float(), self.std[index].float()
        return mean + std * torch.randn(mean.shape, generator=rng), index


def latents(config: RetrainConfig) -> Latents:
    """Encode the training images with the autoencoder of `out`, once: kept beside it, under its hash."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(config.out / "vae").eval()
    pictures = base_pictures()
    chosen = base_scenes(config.scenes, config.seed + 1)
    captions = [p.caption for p in [*pictures, *chosen]]
    key = content_hash(vae.state_dict(), note=f"{config.scenes} scenes of seed {config.seed}")
    path = config.out / f"latents-{key[:12]}.safetensors"
    if not path.is_file():
        parts = []
        everything = [*pictures, *chosen]
        with torch.no_grad():
            for i in tqdm(range(0, len(everything), 64), desc="encode"):
                posterior = vae.encode(pixels(everything[i : i + 64]).float().div(127.5).sub(1)).latent_dist
                parts.append((posterior.mean.half(), posterior.std.half()))
        write_tensors(path, {"mean": torch.cat([m for m, _ in parts]), "std": torch.cat([s for _, s in parts])})
    stored, scale = load_file(path), vae.config.scaling_factor
    return Latents(stored["mean"] * scale, stored["std"] * scale, captions, len(pictures))


def _tokenise(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    pad = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
    return tokenizer(captions, **pad).input_ids


def _train_unet(config: RetrainConfig) -> None:
    tokenizer = build_tokenizer(p.caption for p in images())
    tokenizer.save_pretrained(config.out / "tokenizer")
    unet = architectures.make_unet().to(memory_format=torch.channels_last)
    text_model = architectures.make_text_model(tokenizer)
    text_model.text_projection.requires_grad_(False)
    scheduler = architectures.unet_scheduler()
    data = latents(config)
    ids, empty = _tokenise(tokenizer, data.captions), _tokenise(tokenizer, [""])
    run = Run(config, {"unet": unet, "text_encoder": text_model})
    embeddings = None
    denoise = torch.compile(unet) if config.compile else unet
    while run.step < config.steps:
        if embeddings is None and run.step >= config.text_steps:
            embeddings = _freeze_text(run, text_model, ids, empty)
        rng = run.draw()
        x, index = data.draw(rng, config.batch, config.scene_share)
        noise = torch.randn(x.shape, generator=rng)
        t = torch.randint(1000, (config.batch,), generator=rng)
        index = torch.where(torch.rand(config.batch, generator=rng) < 0.1, len(ids), index)
        text = text_model(torch.cat([ids, empty])[index]).last_hidden_state if embeddings is None else embeddings[index]
        noisy = scheduler.add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
        v = denoise(noisy, t, text).sample
        run.update((v - scheduler.get_velocity(x, noise, t)).pow(2).mean())


def _freeze_text(run: Run, text_model: Any, ids: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """Keep the averaged text model from here on; the hidden states of every caption, the empty one last."""
    with torch.no_grad():
        for name, p, e in zip(run.names, run.values, run.ema, strict=True):
            if name.startswith("text_encoder."):
                p.copy_(e)
        for p in text_model.parameters():
            p.requires_grad_(False)
        folder = run.config.out / "text_encoder"
        if not folder.is_dir():
            with atomic_path(folder) as temporary:
                text_model.save_pretrained(temporary)
        return torch.cat([text_model(part).last_hidden_state for part in torch.cat([ids, empty]).split(512)])


def _train_mmdit(config: RetrainConfig) -> None:
    if not (config.out / "text_encoder").is_dir():
        raise ConfigError(f"no text model in {config.out}; the unet stage writes it at its step `text_steps`")
    transformer = architectures.make_mmdit()
    data = latents(config)
    tokens, pooled = _sd3_embeddings(config.out, [*data.captions, ""])
    run = Run(config, {"transformer": transformer})
    denoise = torch.compile(transformer) if config.compile else transformer
    while run.step < config.steps:
        rng = run.draw()
        x, index = data.draw(rng, config.batch, config.scene_share)
        noise = torch.randn(x.shape, generator=rng)
        sigma = torch.randn(config.batch, generator=rng).sigmoid()  # logit-normal, as SD3 was trained
        index = torch.where(torch.rand(config.batch, generator=rng) < 0.1, len(data.captions), index)
        s = sigma[:, None, None, None]
        v = denoise(
            hidden_states=(1 - s) * x + s * noise, timestep=1000 * sigma, encoder_hidden_states=tokens[index].float(),
            pooled_projections=pooled[index].float(),
        ).sample  # fmt: skip
        run.update((v - (noise - x)).pow(2).mean())


def _sd3_embeddings(out: Path, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline itself makes of the captions: tokens N 32 128 (the last half is T5's absence), pooled N 128."""
    pipe = assemble(out, "emoji-mmdit", weights=False)
    parts = []
    with torch.no_grad():
        for i in range(0, len(captions), 512):
            made = pipe.encode_prompt(
                prompt=captions[i : i + 512], prompt_2=None, prompt_3=None, device=torch.device("cpu"),
                do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS,
            )  # fmt: skip
            parts.append((made[0].half(), made[2].half()))
    return torch.cat([t for t, _ in parts]), torch.cat([p for _, p in parts])


def assemble(out: Path, name: str, weights: bool = True) -> Any:
    """The pipeline of the averaged weights of a training folder, float32.

    Args:
        out: folder that the stages wrote into.
        name: "emoji-unet" or "emoji-mmdit".
        weights: put the trained weights into the denoiser.
    """
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from vislr.zoo.checkpoints import sixteen_tokens

    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    vae = AutoencoderKL.from_pretrained(out / "vae")
    stage = name.removeprefix("emoji-")
    denoiser = architectures.make_unet() if stage == "unet" else architectures.make_mmdit()
    if weights:
        prefix = "unet." if stage == "unet" else "transformer."
        step = json.loads((out / f"{stage}-state" / "state.json").read_text())["step"]
        stored = load_file(out / f"{stage}-state" / f"{step}.safetensors")
        with torch.no_grad():
            for key, p in denoiser.named_parameters():
                p.copy_(stored[f"ema.{prefix}{key}"])
    if stage == "unet":
        return StableDiffusionPipeline(
            vae=vae, text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder"), tokenizer=tokenizer,
            unet=denoiser, scheduler=architectures.unet_scheduler(), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    text = CLIPTextModelWithProjection.from_pretrained(out / "text_encoder")
    return sixteen_tokens()(
        vae=vae, text_encoder=text, text_encoder_2=text, text_encoder_3=None, tokenizer=tokenizer,
        tokenizer_2=tokenizer, tokenizer_3=None, transformer=denoiser, scheduler=architectures.mmdit_scheduler(),
    )  # fmt: skip
