"""Train the embedded base pipeline from nothing: the autoencoder, then text model and UNet.

    python pipelines/train_base.py --stage vae --steps 2000
    python pipelines/train_base.py --stage unet --steps 6500 --batch 32
    python pipelines/train_base.py --stage export

A stage goes on from its newest checkpoint in the output folder, also with a larger `--steps`. The
learning rate falls over the last fifth of the steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from vislr.core.files import atomic_path, write_json, write_tensors
from vislr.zoo.checkpoints import WEIGHTS
from vislr.zoo.emoji import images
from vislr.zoo.vocabulary import MAX_TOKENS, build_tokenizer

BASE_STYLES = ("noto", "twemoji")


def make_vae():
    from diffusers import AutoencoderKL

    levels = 3
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=64, block_out_channels=(24, 48, 64),
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, norm_num_groups=8, mid_block_add_attention=False,
    )  # fmt: skip


def make_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(48, 64, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64,
        transformer_layers_per_block=(1, 2, 2), attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def make_text_model(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=64,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def make_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )  # fmt: skip


def pixels(pictures) -> torch.Tensor:
    array = np.stack([np.asarray(p.image()) for p in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2)  # uint8, N 3 64 64


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, constant, linear to a hundredth over the last fifth."""
    return peak * min((step + 1) / 100, 1.0, 0.01 + 0.99 * (steps - step) / max(1, steps // 5))


class Run:
    """Weights, EMA and optimiser of a stage, kept in `folder` and taken up again from there."""

    def __init__(self, folder: Path, modules: dict[str, torch.nn.Module], decay: float):
        self.folder, self.decay, self.step = folder, decay, 0
        self.names = [f"{m}.{n}" for m, module in modules.items() for n, _ in module.named_parameters()]
        self.values: list[torch.Tensor] = [p for module in modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.values, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.ema = [p.detach().clone() for p in self.values]
        if (folder / "state.json").is_file():
            self.step = json.loads((folder / "state.json").read_text())["step"]
            stored = load_file(folder / f"{self.step}.safetensors")
            with torch.no_grad():
                for name, p, e in zip(self.names, self.values, self.ema, strict=True):
                    p.copy_(stored[f"raw.{name}"])
                    e.copy_(stored[f"ema.{name}"])
                    if f"m.{name}" in stored:
                        self.optimizer.state[p] = {
                            "step": torch.tensor(float(self.step)),
                            "exp_avg": stored[f"m.{name}"].clone(),
                            "exp_avg_sq": stored[f"v.{name}"].clone(),
                        }

    def update(self, lr: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.values, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.values, 1 - decay)

    def save(self) -> None:
        tensors = {}
        for name, p, e in zip(self.names, self.values, self.ema, strict=True):
            tensors[f"raw.{name}"], tensors[f"ema.{name}"] = p, e
            if p in self.optimizer.state:
                tensors[f"m.{name}"] = self.optimizer.state[p]["exp_avg"]
                tensors[f"v.{name}"] = self.optimizer.state[p]["exp_avg_sq"]
        write_tensors(self.folder / f"{self.step}.safetensors", tensors)
        write_json(self.folder / "state.json", {"step": self.step})
        for old in self.folder.glob("*.safetensors"):
            if old.stem != str(self.step):
                old.unlink()

    def use_ema(self) -> None:
        with torch.no_grad():
            for p, e in zip(self.values, self.ema, strict=True):
                p.copy_(e)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, dB; images in [-1, 1]."""
    error = (a.clamp(-1, 1) - b).pow(2).flatten(1).mean(1) / 4
    return float((-10 * error.log10()).mean())


def train_vae(out: Path, steps: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    vae = make_vae().to(memory_format=torch.channels_last)
    run = Run(out / "vae-state", {"vae": vae}, decay=0.998)
    train = torch.cat([pixels(images(style=s, split="train")) for s in BASE_STYLES])
    held = pixels(images(style="noto", split="held-out")[:64]).float().div(127.5).sub(1)
    bar = tqdm(total=steps, initial=run.step, desc="vae", mininterval=5)
    while run.step < steps:
        step = run.step
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        whole = step >= steps * 0.85  # crops of 32 px cost a quarter and teach the same convs
        count, side = (batch // 4, 64) if whole else (batch, 32)
        index = torch.randint(len(train), (count,), generator=rng)
        corners = torch.randint(0, 64 - side + 1, (count, 2), generator=rng)
        x = torch.stack(
            [train[i, :, a : a + side, b : b + side] for i, (a, b) in zip(index, corners.tolist(), strict=True)]
        )
        x = x.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
        y = vae.decode(z).sample
        loss = (y - x).abs().mean() + 2 * (y - x).pow(2).mean() + 1e-6 * posterior.kl().mean() / 3
        loss.backward()
        run.update(learning_rate(step, steps, 2e-3))
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        bar.update()
        if run.step % 100 == 0:
            run.save()
    run.save()
    run.use_ema()
    vae.eval()
    with torch.no_grad():
        rec = torch.cat([vae.decode(vae.encode(h).latent_dist.mean).sample for h in held.split(16)])
        z = torch.cat([vae.encode(t.float().div(127.5).sub(1)).latent_dist.mean for t in train[::8].split(64)])
    vae.register_to_config(scaling_factor=round(float(1 / z.std()), 4))
    print(f"vae held-out PSNR {psnr(rec, held):.2f} dB, scaling {vae.config.scaling_factor}", flush=True)
    vae.save_pretrained(out / "vae")


def train_unet(out: Path, steps: int, batch: int, seed: int) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    pictures = [p for s in BASE_STYLES for p in images(style=s, split="train")]
    tokenizer = build_tokenizer(p.caption for p in images())
    tokenizer.save_pretrained(out / "tokenizer")
    with torch.no_grad():
        posteriors = [vae.encode(x.float().div(127.5).sub(1)).latent_dist for x in pixels(pictures).split(64)]
    mean = torch.cat([p.mean for p in posteriors]) * vae.config.scaling_factor
    std = torch.cat([p.std for p in posteriors]) * vae.config.scaling_factor
    pad = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
    ids = tokenizer([p.caption for p in pictures], **pad).input_ids
    empty = tokenizer([""], **pad).input_ids
    unet = make_unet().to(memory_format=torch.channels_last)
    text_model = make_text_model(tokenizer)
    scheduler = make_scheduler()
    run = Run(out / "unet-state", {"unet": unet, "text_encoder": text_model}, decay=0.9995)
    for name, module in (("unet", unet), ("text model", text_model)):
        print(f"{name}: {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters")
    bar, mean_loss = tqdm(total=steps, initial=run.step, desc="unet", mininterval=5), 0.0
    while run.step < steps:
        step = run.step
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(pictures), (batch,), generator=rng)
        x = mean[index] + std[index] * torch.randn(mean[index].shape, generator=rng)
        noise = torch.randn(x.shape, generator=rng)
        t = torch.randint(1000, (batch,), generator=rng)
        tokens = torch.where(torch.rand(batch, 1, generator=rng) < 0.1, empty, ids[index])
        noisy = scheduler.add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
        v = unet(noisy, t, text_model(tokens)[0]).sample
        loss = (v - scheduler.get_velocity(x, noise, t)).pow(2).mean()
        loss.backward()
        run.update(learning_rate(step, steps, 1e-3))
        mean_loss = loss.item() if not mean_loss else mean_loss + (loss.item() - mean_loss) / 200
        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        bar.update()
        if run.step % 100 == 0:
            run.save()
    run.save()


def assemble(out: Path):
    """The pipeline of the averaged weights, float32."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    unet, text_model = make_unet(), make_text_model(tokenizer)
    run = Run(out / "unet-state", {"unet": unet, "text_encoder": text_model}, decay=0.0)
    run.use_ema()
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(out / "vae"), text_encoder=text_model, tokenizer=tokenizer, unet=unet,
        scheduler=make_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipe, run.step


def export(out: Path, folder: Path, seed: int) -> None:
    """Write the pipeline in half precision, and a sheet of samples beside the originals into `out`."""
    from PIL import Image

    pipe, step = assemble(out)
    pipe.set_progress_bar_config(disable=True)
    chosen = [p for s in BASE_STYLES for p in images(style=s, split="train")[40::131]]
    sheet = Image.new("RGB", (64 * len(chosen) // 2, 64 * 4), "white")
    for i, picture in enumerate(chosen):
        rng = torch.Generator().manual_seed(seed + i)
        made = pipe(picture.caption, num_inference_steps=20, guidance_scale=3.0, generator=rng).images[0]
        row, column = divmod(i, len(chosen) // 2)
        sheet.paste(picture.image(), (64 * column, 128 * row))
        sheet.paste(made, (64 * column, 128 * row + 64))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(out / f"sheet-{step}.png")
    with atomic_path(folder) as temporary:
        pipe.to(dtype=torch.float16).save_pretrained(temporary)
    print(f"step {step}: {out / f'sheet-{step}.png'}, {folder}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("vae", "unet", "export"), required=True)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/base"))
    a = parser.parse_args()
    if a.stage == "export":
        export(a.out, WEIGHTS / "emoji-unet", a.seed)
    else:
        (train_vae if a.stage == "vae" else train_unet)(a.out, a.steps, a.batch, a.seed)


if __name__ == "__main__":
    main()
