"""Domains as tensors: pictures with classes, volumes as slices with masks.

A domain is held in memory: pictures as bytes, slices as float32.
"""

from __future__ import annotations

import glob
import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from vislr.core.errors import DataError, ModelError
from vislr.data import ImageFolder, open_image, square, to_tensor
from vislr.data.images import SUFFIXES
from vislr.train.self_training_config import DomainConfig, SliceConfig

if TYPE_CHECKING:
    import numpy as np

ZOO = "zoo:"
_NIFTI, _ARRAYS = (".nii", ".nii.gz"), (".npz", ".npy")
VOLUMES = (*_NIFTI, *_ARRAYS, *SUFFIXES)


@dataclass(frozen=True)
class Domain:
    """Examples of one domain.

    Attributes:
        name: where they come from.
        inputs: (n, C, size, size): pictures as uint8, slices as float32 in [0, 1].
        truth: (n,) int64 classes, or (n, size, size) bool masks; None: not known.
        keys: for each example what it belongs to and is never split from: a picture's name, a volume's name.
        classes: names of the classes; () for masks.
        mean, std: of what the model is given, by channel.
        spacing: volume -> size of an element along slices, rows and columns.
    """

    name: str
    inputs: torch.Tensor
    truth: torch.Tensor | None
    keys: tuple[str, ...]
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    spacing: tuple[tuple[str, tuple[float, float, float]], ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Sequence[int], device: torch.device) -> torch.Tensor:
        """(b, C, size, size) float32 as the model takes it."""
        x = self.inputs[list(indices)].to(device)
        if x.dtype == torch.uint8:
            x = x.float() / 255
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    def take(self, indices: Sequence[int]) -> Domain:
        """These examples alone."""
        rows = list(indices)
        truth = None if self.truth is None else self.truth[rows]
        return replace(self, inputs=self.inputs[rows], truth=truth, keys=tuple(self.keys[i] for i in rows))

    def split(self, share: float) -> tuple[Domain, Domain, bool]:
        """Examples for training, examples for figures, and whether they are the same ones.

        What is held out is chosen by a hash of the keys, so equal names of two domains fall on the same side.
        """
        names = sorted(set(self.keys), key=lambda key: hashlib.sha256(key.encode()).digest())
        count = min(round(share * len(names)), len(names) - 1)
        if share > 0 and len(names) > 1:
            count = max(count, 1)
        if not count:
            return self, self, True
        held = set(names[:count])
        rows = [[i for i, key in enumerate(self.keys) if (key in held) == out] for out in (False, True)]
        return self.take(rows[0]), self.take(rows[1]), False

    def spread(self, count: int) -> Domain:
        """`count` examples, evenly spaced; 0, or more than there are: all."""
        if not 0 < count < len(self):
            return self
        return self.take([i * len(self) // count for i in range(count)])

    def volumes(self) -> dict[str, list[int]]:
        """Key -> its examples, in order."""
        found: dict[str, list[int]] = {}
        for i, key in enumerate(self.keys):
            found.setdefault(key, []).append(i)
        return found

    def fingerprint(self) -> str:
        """Hash of everything that figures depend on."""
        digest = hashlib.sha256(repr((self.inputs.shape, self.classes, self.mean, self.std, self.keys)).encode())
        digest.update(self.inputs.contiguous().numpy().tobytes())
        digest.update(b"" if self.truth is None else self.truth.contiguous().numpy().tobytes())
        return digest.hexdigest()


# Pictures.


def read_pictures(config: DomainConfig, size: int, classes: tuple[str, ...] | None = None) -> Domain:
    """A folder of pictures, or `zoo:STYLE`.

    Args:
        classes: of the source, for a target: its pictures may lie in folders of these names, or anywhere
            (then they have no labels). None: a source, with one folder for each class.

    Raises:
        DataError: no folder, no pictures, one that cannot be read, classes that are not the source's.
    """
    given = config.data[0]
    if given.startswith(ZOO):
        return _embedded(given, size, classes)
    root = Path(given)
    if not root.is_dir():
        raise DataError(f"'{given}' is no folder; expected one with pictures, or {ZOO}STYLE")
    if classes is None or any((root / name).is_dir() for name in classes):
        folder = ImageFolder.with_classes(root, classes)
        paths = [sample.path for sample in folder.samples]
        truth = torch.tensor([sample.label for sample in folder.samples])
        classes = folder.classes
    else:
        paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        truth = None
        if not paths:
            raise DataError(f"'{root}' holds no pictures; expected {', '.join(SUFFIXES)}")
    inputs = torch.stack([to_tensor(square(open_image(path), size)) for path in paths])
    return Domain(given, inputs, truth, tuple(path.relative_to(root).as_posix() for path in paths), classes)


def _embedded(given: str, size: int, classes: tuple[str, ...] | None) -> Domain:
    from vislr import zoo

    pictures = zoo.images(style=given.removeprefix(ZOO))
    names = tuple(sorted({picture.category for picture in pictures}))
    if classes is not None and classes != names:
        raise DataError(f"'{given}' has the classes {', '.join(names)}; the source has {', '.join(classes)}")
    inputs = torch.stack([to_tensor(square(picture.image(), size)) for picture in pictures])
    truth = torch.tensor([names.index(picture.category) for picture in pictures])
    return Domain(given, inputs, truth, tuple(picture.codepoint for picture in pictures), names)


# Volumes.


def read_slices(config: DomainConfig, slices: SliceConfig, size: int, *, labelled: bool) -> Domain:
    """Volumes cut into square slices, each volume scaled to [0, 1] by its own range.

    Args:
        labelled: masks must be there.

    Raises:
        DataError: no files, another number of masks, shapes that differ, values that are not finite, a volume
            without bright slices, or a labelled one without any foreground.
        ModelError: NIfTI files without nibabel (extra `mri`).
    """
    paths = _files(config.data)
    masks = _files(config.masks) if config.masks else []
    if masks and len(masks) != len(paths):
        raise DataError(f"{len(paths)} volumes and {len(masks)} masks; expected as many")
    inputs, truths, keys, spacings = [], [], [], {}
    for number, path in enumerate(paths):
        volume, spacing, inside = _volume(path)
        mask = _volume(masks[number])[0] if masks else inside
        if mask is None and labelled:
            raise DataError(f"'{path}' has no mask; expected one in masks, or an array 'mask' in the npz file")
        if mask is not None and mask.shape != volume.shape:
            raise DataError(f"the mask of '{path}' has shape {mask.shape}; the volume's is {volume.shape}")
        # Files of one name in two folders stay two volumes.
        key = path.name if path.name not in spacings else str(path)
        x, y, step = _cut(volume, mask, spacing, slices, size, path)
        if labelled and y is not None and not y.any():
            raise DataError(f"the mask of '{path}' has nothing above 0 on the slices kept")
        inputs.append(x)
        truths.append(y)
        keys += [key] * len(x)
        spacings[key] = step
    if any(y is None for y in truths) and any(y is not None for y in truths):
        raise DataError(f"some volumes of '{config.data[0]}' have masks and some have none; give all or none")
    truth = None if truths[0] is None else torch.cat([y for y in truths if y is not None])
    return Domain(", ".join(config.data), torch.cat(inputs), truth, tuple(keys), spacing=tuple(spacings.items()))


def _files(given: Sequence[str]) -> list[Path]:
    """Files, the volumes in folders, and what patterns match; sorted within each."""
    found: list[Path] = []
    for entry in given:
        path = Path(entry)
        if path.is_dir():
            some = sorted(p for p in path.iterdir() if p.name.lower().endswith(VOLUMES))
        elif path.is_file():
            some = [path]
        else:
            some = [Path(name) for name in sorted(glob.glob(entry, recursive=True))]
        if not some:
            raise DataError(
                f"'{entry}' is no file, no folder of volumes and matches nothing; expected {', '.join(VOLUMES)}"
            )
        found += some
    return found


def _volume(path: Path) -> tuple[np.ndarray, tuple[float, float, float], np.ndarray | None]:
    """(a, b, c) float32 values, the element's size along each axis, and the mask in the file if it has one."""
    import numpy as np

    name, mask = path.name.lower(), None
    spacing = (1.0, 1.0, 1.0)
    try:
        if name.endswith(_NIFTI):
            values, spacing = _nifti(path)
        elif name.endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                if "image" not in arrays:
                    raise DataError(f"'{path}' holds {', '.join(arrays) or 'nothing'}; expected an array 'image'")
                values, mask = arrays["image"], arrays.get("mask")
                if "spacing" in arrays:
                    spacing = tuple(float(one) for one in arrays["spacing"])  # type: ignore[assignment]
        elif name.endswith(".npy"):
            values = np.load(path, allow_pickle=False)
        else:
            values = np.asarray(open_image(path).convert("L"))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"'{path}' cannot be read: {' '.join(str(error).split())}") from error
    arrays_ = [values] if mask is None else [values, mask]
    if any(one.ndim not in (2, 3) for one in arrays_) or len(spacing) != 3:
        raise DataError(f"'{path}' has shape {values.shape}; expected a volume of 3 axes or a picture of 2")
    # A picture is a volume of one slice, across the last axis.
    values, *rest = [np.asarray(one, dtype=np.float32).reshape(*one.shape, *(1,) * (3 - one.ndim)) for one in arrays_]
    if not np.isfinite(values).all():
        raise DataError(f"'{path}' has NaN or infinite values")
    return values, spacing, rest[0] if rest else None


def _nifti(path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    try:
        import nibabel
    except ImportError as error:
        raise ModelError(f"reading '{path}' needs nibabel: pip install 'vislr[mri]'") from error
    import numpy as np

    try:
        image: Any = nibabel.as_closest_canonical(nibabel.load(path))
    except nibabel.filebasedimages.ImageFileError as error:
        raise DataError(f"'{path}' is no NIfTI file: {error}") from error
    zooms = image.header.get_zooms()[:3]
    values = np.asarray(image.dataobj, dtype=np.float32)
    return values.squeeze() if values.ndim > 3 else values, tuple(float(zoom) for zoom in zooms)  # type: ignore[return-value]


def _cut(
    volume: np.ndarray, mask: np.ndarray | None, spacing: tuple[float, float, float], slices: SliceConfig, size: int,
    path: Path,
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[float, float, float]]:  # fmt: skip
    """(n, 1, size, size), (n, size, size) and the element's size along slices, rows, columns."""
    axis = 2 if volume.shape[2] == 1 else slices.axis
    low, high = float(volume.min()), float(volume.max())
    if low == high:
        raise DataError(f"'{path}' has one value everywhere ({low:g})")
    x = torch.from_numpy((volume - low) / (high - low)).movedim(axis, 0)
    kept = (x > 0.1).float().mean((1, 2)) >= slices.foreground
    if not kept.any():
        raise DataError(f"'{path}' has no slice of which {slices.foreground:.0%} is bright; lower slices.foreground")
    x = x[kept][:, None]
    side = max(x.shape[2:])
    gaps = [side - length for length in (x.shape[3], x.shape[2])]
    around = (gaps[0] // 2, gaps[0] - gaps[0] // 2, gaps[1] // 2, gaps[1] - gaps[1] // 2)
    x = F.pad(x, around, mode="replicate")
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    step, *plane = (spacing[axis], *(one for i, one in enumerate(spacing) if i != axis))
    y = None
    if mask is not None:
        y = F.pad(torch.from_numpy(mask > 0).movedim(axis, 0)[kept][:, None].float(), around)
        # A pixel is foreground if most of it is.
        y = F.interpolate(y, (size, size), mode="area")[:, 0] >= 0.5
    return x.float(), y, (step, plane[0] * side / size, plane[1] * side / size)
