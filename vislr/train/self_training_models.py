"""Models and heads of domain adaptation, and where an early head reads a model.

The residual U-Net and the early segmentation head are those of ConvLoRA (arXiv 2402.04964, section
"Architecture"; the line of UDAS), described by their layer counts and widths.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vislr.core.errors import ModelError, TargetError, hint
from vislr.train.self_training_config import NetConfig


class _Residual(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))), both convs of one odd kernel."""

    def __init__(self, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(h)))


def _three(width: int) -> list[nn.Module]:
    return [_Residual(width) for _ in range(3)]


class ResidualUNet(nn.Module):
    """(N, channels, H, W) -> (N, 1, H, W) logits; H and W multiples of 8.

    Four levels of `width`, 2, 4 and 8 times as many maps, three pre-activation blocks a stage, 2x2 convs
    of stride 2 down and transposed ones up, 1x1 shortcuts that are added, a 1x1 block at the end. 52 BatchNorms.
    """

    def __init__(self, channels: int = 1, width: int = 16) -> None:
        super().__init__()
        n = width
        self.init_path = nn.Sequential(nn.Conv2d(channels, n, 3, padding=1, bias=False), nn.ReLU(), *_three(n))
        for level in (1, 2, 3):
            before, after = n * 2 ** (level - 1), n * 2**level
            down = nn.Conv2d(before, after, 2, stride=2, bias=False)
            up = nn.ConvTranspose2d(after, before, 2, stride=2, bias=False)
            self.add_module(f"down{level}", nn.Sequential(nn.BatchNorm2d(before), down, nn.ReLU(), *_three(after)))
            self.add_module(f"up{level}", nn.Sequential(*_three(after), nn.BatchNorm2d(after), up, nn.ReLU()))
            self.add_module(f"shortcut{level - 1}", nn.Conv2d(before, before, 1))
        self.out_path = nn.Sequential(
            _Residual(n, 1), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 1, 1), nn.BatchNorm2d(1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = [self.init_path(x)]
        for level in (1, 2, 3):
            levels.append(getattr(self, f"down{level}")(levels[-1]))
        y = levels.pop()
        for level in (3, 2, 1):
            y = getattr(self, f"up{level}")(y) + getattr(self, f"shortcut{level - 1}")(levels.pop())
        return self.out_path(y)


class EarlySegmentationHead(nn.Module):
    """(N, C, h, w) features -> (N, 1, H, W) logits: three 3x3 convs to 12, 8 and 1 maps, enlarged bilinearly."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(self.layers(features), size, mode="bilinear", align_corners=False)


class EarlyClassHead(nn.Module):
    """(N, C) pooled features -> (N, classes) logits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return self.linear(features)


def pooled(features: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w), (N, tokens, C) or (N, C) -> (N, C): the mean over positions."""
    if features.dim() == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.dim() == 3 else features


@dataclass
class Net:
    """A model and what is known of it.

    Attributes:
        model: (N, C, size, size) -> logits.
        head: the classifier; None of a segmentation model.
        layer: the module that an early head reads by default; "" if none is known.
        mean, std: of the pictures, by channel.
    """

    model: nn.Module
    head: nn.Module | None
    layer: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def build_net(config: NetConfig, classes: int, channels: int) -> Net:
    """The model of a config, with random or pretrained weights.

    Args:
        classes: of a classifier. channels: of a segmentation model's input.

    Raises:
        ModelError: no such model, or its weights are not to be had.
    """
    if config.base == "unet":
        return Net(ResidualUNet(channels), None, "down3", (0.0,) * channels, (1.0,) * channels)
    half = (0.5, 0.5, 0.5)
    if config.base == "lite0":
        from vislr import measure

        # The judge of image metrics is shared: a copy, with a head.
        lite: Any = copy.deepcopy(measure.feature_net().module).requires_grad_(True)
        lite.reset_classifier(classes)
        return Net(lite, lite.get_classifier(), _stage(lite), half, half)
    from vislr.train.classifiers import is_classifier, load_classifier

    if not is_classifier(config.base):
        known = ["lite0", "unet", "timm/NAME", "torchvision/NAME"]
        raise ModelError(f"no model '{config.base}' to adapt{hint(config.base, known)}")
    patches = config.size if "vit" in config.base or "deit" in config.base else None
    model, head = load_classifier(config.base, classes, pretrained=config.pretrained, size=patches)
    known_of = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (tuple(known_of.get(key, default)) for key, default in (("mean", _MEAN), ("std", _STD)))
    return Net(model, head, _stage(model), mean, std)


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _stage(model: Any) -> str:
    """timm's last stage but one; of a ViT the block at two thirds; "" of other models."""
    info = getattr(model, "feature_info", None)
    stages = [one["module"] for one in (getattr(info, "info", None) or info or []) if isinstance(one, dict)]
    names = {name for name, _ in model.named_modules()}
    stages = [stage for stage in dict.fromkeys(stages) if stage in names]
    if len(stages) >= 2:
        blocks = [stage for stage in stages if stage.startswith("blocks.")]
        return stages[-2] if len(blocks) < len(stages) or len(stages) < 7 else stages[2 * len(stages) // 3]
    return "layer3" if "layer3" in names else ""


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`.

    Raises:
        TargetError: there is none; names the nearest.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        choices = [key for key in modules if key]
        given = f"no layer '{name}'" if name else "no default layer for an early head"
        raise TargetError(f"{given} in this {type(model).__name__}{hint(name, choices)}; set early_head.layer")
    return modules[name]


@contextlib.contextmanager
def reading(module: nn.Module, *, inputs: bool = False) -> Iterator[list[torch.Tensor]]:
    """While inside, the list holds what `module` gave (or was given, with `inputs`) at its last call."""
    seen: list[torch.Tensor] = []

    def after(module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        seen[:] = [given[0] if inputs else result]

    handle = module.register_forward_hook(after)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def sites_before(model: nn.Module, layer: str, x: torch.Tensor) -> list[str]:
    """Names of the convs and linears that a forward of `x` computes until `layer` has its output, in order.

    Raises:
        TargetError: there is no such layer, or a forward never calls it.
    """
    order: list[str] = []
    end = module_at(model, layer)
    done: list[bool] = []

    def entered(name: str) -> Any:
        return lambda module, given: None if done else order.append(name)

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [
        module.register_forward_pre_hook(entered(name))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    handles.append(end.register_forward_hook(lambda *_: done.append(True)))
    was = model.training
    try:
        model.eval()
        model(x)
    finally:
        model.train(was)
        for handle in handles:
            handle.remove()
    if not done:
        raise TargetError(f"a forward of this {type(model).__name__} never calls '{layer}'; set early_head.layer")
    return list(dict.fromkeys(order))
