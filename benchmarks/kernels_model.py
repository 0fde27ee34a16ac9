"""A UNet of the shapes of SD 1.5 or SDXL in plain torch, every 3x3 convolution with a FLoRA adapter.

For `benchmarks/kernels.py`, where diffusers may not be installed: the sizes of the products are those of the
real networks, the weights are random. Conditioning on the timestep is left out (a bias for each ResNet).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vislr.kernels.tucker_conv import tucker_convolution


@dataclass(frozen=True)
class Sizes:
    """Channels and transformer blocks of each level, width of the text, size of a head (0: eight heads), latent."""

    channels: tuple[int, ...]
    depth: tuple[int, ...]
    text: int
    head: int
    latent: int


SIZES = {
    "SD1.5 512": Sizes((320, 640, 1280, 1280), (1, 1, 1, 0), 768, 0, 64),
    "SDXL 1024": Sizes((320, 640, 1280), (0, 2, 10), 2048, 64, 128),
}
WAYS = ("kernels", "chain", "rebuild", "none")


class AdaptedConv(nn.Module):
    """A frozen 3x3 convolution with a trained Tucker adapter of one rank, in one of WAYS.

    "chain": three convolutions and an add; "rebuild": the weight of the adapter is made and convolved with, as
    LyCORIS does; "none": without the adapter.
    """

    way = "kernels"

    def __init__(self, inside: int, out: int, rank: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, out, 3, stride, 1)
        self.conv.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, inside) / inside**0.5)
        core = torch.randn(rank, rank, 3, 3) / (9 * rank) ** 0.5
        self.core = nn.Parameter(core.contiguous(memory_format=torch.channels_last))
        self.up = nn.Parameter(torch.randn(out, rank) / rank**0.5 / 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base, stride = self.conv(x), self.conv.stride
        if self.way == "kernels":
            return tucker_convolution(x, self.down, self.core, self.up, base, 1.0, stride, 1)
        if self.way == "chain":
            h = F.conv2d(F.conv2d(x, self.down[:, :, None, None]), self.core, None, stride, 1)
            return base + F.conv2d(h, self.up[:, :, None, None])
        if self.way == "rebuild":
            weight = torch.einsum("ab,bcij,cd->adij", self.up, self.core, self.down)
            return base + F.conv2d(x, weight, None, stride, 1)
        return base


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a shortcut."""

    def __init__(self, inside: int, out: int, rank: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inside), nn.GroupNorm(32, out)
        self.conv1, self.conv2 = AdaptedConv(inside, out, rank), AdaptedConv(out, out, rank)
        self.shortcut = nn.Conv2d(inside, out, 1) if inside != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Attention of heads to a context, or to the tokens themselves."""

    def __init__(self, size: int, context: int, head: int) -> None:
        super().__init__()
        self.heads = size // head if head else 8
        self.q, self.k, self.v = (nn.Linear(width, size, bias=False) for width in (size, context, context))
        self.out = nn.Linear(size, size)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q(x), self.k(context), self.v(context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self attention, cross attention, gated feed-forward."""

    def __init__(self, size: int, text: int, head: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(3))
        self.own, self.cross = Attention(size, size, head), Attention(size, text, head)
        self.wide, self.narrow = nn.Linear(size, 8 * size), nn.Linear(4 * size, size)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        h = self.norms[0](x)
        x = x + self.own(h, h)
        x = x + self.cross(self.norms[1](x), text)
        value, gate = self.wide(self.norms[2](x)).chunk(2, -1)
        return x + self.narrow(value * F.gelu(gate))


class Transformer(nn.Module):
    """Blocks over the pixels of a map."""

    def __init__(self, size: int, depth: int, text: int, head: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, size)
        self.enter, self.leave = nn.Linear(size, size), nn.Linear(size, size)
        self.blocks = nn.ModuleList(Block(size, text, head) for _ in range(depth))

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        h = self.enter(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.blocks:
            h = block(h, text)
        return x + self.leave(h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Two layers a level on the way down, three on the way up, with skips."""

    def __init__(self, sizes: Sizes, rank: int) -> None:
        super().__init__()
        first, levels = sizes.channels[0], range(len(sizes.channels))
        self.enter, self.leave = nn.Conv2d(4, first, 3, padding=1), nn.Conv2d(first, 4, 3, padding=1)
        self.downs, self.shrinks, self.ups, self.grows = (nn.ModuleList() for _ in range(4))
        skips, width = [first], first
        for level in levels:
            for _ in range(2):
                self.downs.append(self._layer(width, sizes, level, rank))
                width = sizes.channels[level]
                skips.append(width)
            if level != levels[-1]:
                self.shrinks.append(AdaptedConv(width, width, rank, stride=2))
                skips.append(width)
        deepest = max(sizes.depth[-1], 1)
        self.middle = nn.ModuleList([ResBlock(width, width, rank), ResBlock(width, width, rank)])
        self.between = Transformer(width, deepest, sizes.text, sizes.head)
        for level in reversed(levels):
            for _ in range(3):
                self.ups.append(self._layer(width + skips.pop(), sizes, level, rank))
                width = sizes.channels[level]
            if level:
                self.grows.append(AdaptedConv(width, width, rank))

    @staticmethod
    def _layer(width: int, sizes: Sizes, level: int, rank: int) -> nn.ModuleList:
        size, depth = sizes.channels[level], sizes.depth[level]
        layer = nn.ModuleList([ResBlock(width, size, rank)])
        if depth:
            layer.append(Transformer(size, depth, sizes.text, sizes.head))
        return layer

    @staticmethod
    def _run(layer: nn.ModuleList, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = layer[0](x)
        return layer[1](x, text) if len(layer) > 1 else x

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        skips = [x]
        for index, layer in enumerate(self.downs):
            x = self._run(layer, x, text)
            skips.append(x)
            if index % 2 and index // 2 < len(self.shrinks):
                x = self.shrinks[index // 2](x)
                skips.append(x)
        x = self.middle[1](self.between(self.middle[0](x), text))
        for index, layer in enumerate(self.ups):
            x = self._run(layer, torch.cat((x, skips.pop()), 1), text)
            if index % 3 == 2 and index // 3 < len(self.grows):
                x = self.grows[index // 3](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.leave(x)


def build(name: str, rank: int, device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[UNet, list[torch.Tensor]]:
    """The network of one of SIZES with only its adapters trained, and inputs of batch 2."""
    sizes = SIZES[name]
    with torch.device(device):
        net = UNet(sizes, rank).to(dtype).to(memory_format=torch.channels_last)
        inputs = [torch.randn(2, 4, sizes.latent, sizes.latent).to(dtype), torch.randn(2, 77, sizes.text).to(dtype)]
    for key, parameter in net.named_parameters():
        parameter.requires_grad_(key.rsplit(".", 1)[-1] in ("down", "core", "up"))
    inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    return net, inputs
