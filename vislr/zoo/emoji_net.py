"""`emoji-net`: a small contrastive image-text net that judges captions, styles and the contents of scenes.

The recipe of CLIP (Radford et al., 2021) at 64 px: two towers, cosine similarity, a learned temperature. It is a
measuring instrument, so it has seen every style and concept, held-out ones included; the share of (concept, style)
pairs that it has not seen says how far to trust it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vislr.core.errors import DataError
from vislr.core.hashing import content_hash
from vislr.zoo.checkpoints import WEIGHTS
from vislr.zoo.vocabulary import MAX_TOKENS, check_words

WIDTH = 64


@dataclass(frozen=True)
class EmojiNetConfig:
    """Sizes of the net: channels of the image tower's four stages, and width of the text tower."""

    vocabulary: int
    channels: tuple[int, ...] = (16, 32, 64, 96)
    text_width: int = 40


class EmojiNet(nn.Module):
    """Image and text towers into `WIDTH` dimensions, unit vectors.

    Args:
        config: its sizes.
    """

    def __init__(self, config: EmojiNetConfig):
        super().__init__()
        import timm

        self.config = config
        self.image_tower: Any = timm.create_model(
            "resnet18", layers=(1, 1, 1, 1), channels=config.channels, num_classes=WIDTH
        )
        self.image_tower.maxpool = nn.Identity()
        self.token_embedding = nn.Embedding(config.vocabulary, config.text_width)
        # Neighbouring words decide what is left of what; the order beyond them does not matter here.
        self.text_conv = nn.Conv1d(config.text_width, 2 * WIDTH, 3, padding=1)
        self.text_head = nn.Linear(2 * WIDTH, WIDTH)
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, 64, 64) in [-1, 1] -> (n, 64) unit vectors."""
        return F.normalize(self.image_tower(pixels), dim=-1)

    def text_features(self, tokens: torch.Tensor, end: int) -> torch.Tensor:
        """(n, 16) token ids, `end` fills them up -> (n, 64) unit vectors."""
        hidden = F.gelu(self.text_conv(self.token_embedding(tokens).transpose(1, 2)))
        hidden = hidden.masked_fill((tokens == end)[:, None], float("-inf")).amax(-1)
        return F.normalize(self.text_head(hidden), dim=-1)


class Judge:
    """`EmojiNet` with its tokenizer: cosine similarities of images and captions.

    Attributes:
        hash: of weights, for records.
    """

    def __init__(self, net: EmojiNet, tokenizer: Any):
        self.net, self.tokenizer = net.eval().requires_grad_(False), tokenizer
        self.hash = content_hash(net.state_dict())

    @torch.no_grad()
    def images(self, images: Sequence[Any], batch: int = 128) -> torch.Tensor:
        """(n, 64) of PIL images, embedded pictures or scenes; scaled to 64 px.

        Raises:
            DataError: no images.
        """
        if not len(images):
            raise DataError("no images to judge")
        rows = [
            self.net.image_features(torch.stack([_prepared(i) for i in images[a : a + batch]]))
            for a in range(0, len(images), batch)
        ]
        return torch.cat(rows)

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> torch.Tensor:
        """(n, 64) of captions.

        Raises:
            DataError: a word that the embedded models do not know.
        """
        for caption in captions:
            check_words(self.tokenizer, caption)
        return self.net.text_features(tokenise(self.tokenizer, captions), self.tokenizer.eos_token_id)

    def alignment(self, images: Sequence[Any], captions: Sequence[str]) -> torch.Tensor:
        """(n,) cosine similarity of each image with its caption."""
        if len(images) != len(captions):
            raise DataError(f"{len(images)} images and {len(captions)} captions; expected one each")
        return (self.images(images) * self.texts(captions)).sum(-1)


def tokenise(tokenizer: Any, captions: Sequence[str]) -> torch.Tensor:
    """(n, 16) ids, filled up with the end mark."""
    pad = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
    return tokenizer(list(captions), **pad).input_ids


def _prepared(image: Any) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    if callable(getattr(image, "image", None)):
        image = image.image()
    image = image.convert("RGB")
    if image.size != (64, 64):
        image = image.resize((64, 64), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1)


@functools.cache
def emoji_net() -> Judge:
    """The embedded net, loaded once a process, float32 on the CPU."""
    from safetensors.torch import load_file
    from transformers import CLIPTokenizer

    folder: Path = WEIGHTS / "emoji-net"
    sizes = json.loads((folder / "config.json").read_text())
    net = EmojiNet(EmojiNetConfig(sizes["vocabulary"], tuple(sizes["channels"]), sizes["text_width"]))
    net.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "model.safetensors").items()}
    )
    return Judge(net, CLIPTokenizer.from_pretrained(str(WEIGHTS / "emoji-unet" / "tokenizer")))
