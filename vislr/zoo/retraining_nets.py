"""Training of the nets beside the pipelines: `net` (emoji-net), `vit` and `conv` (classifiers of categories)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from vislr.core.files import write_json, write_tensors
from vislr.zoo.composing import SCENE_STYLES, scene
from vislr.zoo.emoji import STYLE_WORDS, images
from vislr.zoo.emoji_net import EmojiNet, EmojiNetConfig, tokenise

if TYPE_CHECKING:
    from vislr.zoo.retraining import RetrainConfig, Run

# A tenth of the (concept, style) pairs: what the figures of emoji-net are measured on.
UNSEEN_EVERY = 10
# Captions beside the batch's own that a picture is told from.
BANK = 1024
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 4}),
    "conv": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64)}),
}


def unseen(codepoint: str, style: str) -> bool:
    """Whether emoji-net has never seen this concept in this style."""
    return sum(map(ord, codepoint + style)) % UNSEEN_EVERY == 0


def augment(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Shift by up to 4 px, zoom by up to 15 %, the whole batch in one resampling; (n, 3, 64, 64)."""
    n = len(x)
    zoom = 1 + 0.3 * (torch.rand(n, generator=rng) - 0.5)
    shift = (torch.rand(n, 2, generator=rng) - 0.5) * 0.25
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom, zoom, shift
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train_net(config: RetrainConfig, run_of: Any) -> None:
    """Half of a batch are single emoji in every style, a quarter whole scenes, a quarter subjects cut out of scenes."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(config.out / "tokenizer")
    net = EmojiNet(EmojiNetConfig(len(tokenizer))).to(memory_format=torch.channels_last)
    run: Run = run_of(config, {"net": net})
    array, captions, counts = _net_data(config)
    tokens = tokenise(tokenizer, captions)
    bounds = np.cumsum([0, *counts])
    parts = (config.batch // 2, config.batch // 4, config.batch - config.batch // 2 - config.batch // 4)
    while run.step < config.steps:
        net.train()
        rng = run.draw()
        index = torch.cat(
            [torch.randint(int(bounds[i]), int(bounds[i + 1]), (n,), generator=rng) for i, n in enumerate(parts)]
        )
        x = augment(array[index].float().div(127.5).sub(1), rng).contiguous(memory_format=torch.channels_last)
        # A text costs far less than a picture: a thousand more captions make the batch's task hard enough.
        others = torch.randint(len(tokens), (BANK,), generator=rng)
        texts = tokens[torch.cat([index, others])]
        a, b = net.image_features(x), net.text_features(texts, tokenizer.eos_token_id)
        logits = a @ b.T / net.log_temperature.exp().clamp(min=0.01)
        # Two pictures of one caption in a batch are both right.
        same = (tokens[index][:, None] == texts[None]).all(-1).float()
        own = same[:, : len(index)]
        run.update(
            F.cross_entropy(logits, same / same.sum(1, keepdim=True)) / 2
            + F.cross_entropy(logits[:, : len(index)].T, own / own.sum(1, keepdim=True)) / 2
        )
    run.use_ema()
    _settle(net.image_tower, array[:: max(1, len(array) // 2000)])
    net.eval()
    folder = config.out / "emoji-net"
    write_json(folder / "config.json", {
        "vocabulary": net.config.vocabulary, "channels": list(net.config.channels), "text_width": net.config.text_width,
    })  # fmt: skip
    write_tensors(folder / "model.safetensors", _half(net))


def _net_data(config: RetrainConfig) -> tuple[torch.Tensor, list[str], tuple[int, int, int]]:
    from vislr.zoo.retraining import pixels

    singles = [p for style in SCENE_STYLES for p in images(style=style) if not unseen(p.codepoint, style)]
    chosen = [
        scene(
            i, seed=config.seed + 2, split=("train", "held-out")[i % 8 == 0], style=SCENE_STYLES[i % len(SCENE_STYLES)]
        )
        for i in range(config.scenes // 2)
    ]
    chosen = [s for s in chosen if not any(unseen(e.codepoint, s.style) for e in s.elements)]
    crops, crop_captions = [], []
    whole = pixels(chosen)
    for s, image in zip(chosen, whole, strict=True):
        for e in s.elements:
            crops.append(crop(image, e.box))
            crop_captions.append(f"{STYLE_WORDS.get(s.style, s.style)} style, {e.phrase}")
    array = torch.cat([pixels(singles), whole, torch.stack(crops)])
    captions = [*(p.caption for p in singles), *(s.caption for s in chosen), *crop_captions]
    return array, captions, (len(singles), len(chosen), len(crops))


def crop(image: torch.Tensor, box: tuple[int, int, int, int]) -> torch.Tensor:
    """The subject of a scene, uint8 (3, 64, 64): its box and a tenth around it, scaled up."""
    left, top, right, bottom = box
    margin = max(1, (right - left) // 10)
    part = image[:, max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin]
    part = F.interpolate(part[None].float(), (64, 64), mode="bilinear", antialias=True)[0]
    return part.round().clamp(0, 255).byte()


def _settle(module: torch.nn.Module, array: torch.Tensor) -> None:
    """BatchNorm statistics of the averaged weights: cumulative over the data."""
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    module.train()
    with torch.no_grad():
        for part in array.split(128):
            module(part.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last))
    for m in norms:
        m.momentum = 0.1


def _half(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}


def train_classifier(config: RetrainConfig, run_of: Any) -> None:
    """Categories of the training concepts in the base's two styles; Fluent 3D and the other concepts are the test."""
    import timm

    from vislr.zoo.retraining import base_pictures, pixels

    pictures = base_pictures()
    categories = sorted({p.category for p in images()})
    architecture, arguments = CLASSIFIERS[config.stage]
    net: Any = timm.create_model(architecture, num_classes=len(categories), **arguments)
    net.to(memory_format=torch.channels_last)
    run: Run = run_of(config, {"net": net})
    array = pixels(pictures)
    labels = torch.tensor([categories.index(p.category) for p in pictures])
    while run.step < config.steps:
        net.train()
        rng = run.draw()
        index = torch.randint(len(array), (config.batch,), generator=rng)
        x = augment(array[index].float().div(127.5).sub(1), rng)
        flip = torch.rand(config.batch, 1, 1, 1, generator=rng) < 0.5
        x = torch.where(flip, x.flip(-1), x).contiguous(memory_format=torch.channels_last)
        run.update(F.cross_entropy(net(x), labels[index], label_smoothing=0.1))
    run.use_ema()
    _settle(net, array)
    net.eval()
    folder = config.out / f"emoji-{config.stage}"
    # timm's own local folder: timm.create_model("local-dir:FOLDER", pretrained=True) reads it.
    write_json(folder / "config.json", {
        "architecture": architecture, "num_classes": len(categories), "label_names": categories,
        "model_args": {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()},
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0,
                           "interpolation": "bicubic", "num_classes": len(categories)},
    })  # fmt: skip
    write_tensors(folder / "model.safetensors", _half(net))
    with torch.no_grad():
        for style in ("noto", "twemoji", "fluent3d"):
            held = images(style=style, split="held-out")
            answer = net(pixels(held).float().div(127.5).sub(1)).argmax(1)
            right = answer == torch.tensor([categories.index(p.category) for p in held])
            print(f"{style} held-out concepts: {right.float().mean():.3f} of {len(held)}", flush=True)


__all__ = ["CLASSIFIERS", "crop", "train_classifier", "train_net", "unseen"]
