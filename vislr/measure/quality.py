"""Image quality against a reference set: KID on EfficientNet-Lite features, and prototype retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.errors import ConfigError, DataError, hint
from vislr.measure.features import FeatureNet, Features, as_features, same_net
from vislr.measure.measurement import Measurement, bootstrap_interval, proportion_interval

if TYPE_CHECKING:
    import numpy as np

# Rows of a kernel matrix held at a time: 512 x n doubles.
BLOCK = 512


def kid(
    images: Any,
    reference: Any,
    *,
    net: FeatureNet | None = None,
    seed: int = 0,
    batch: int = 32,
    progress: bool = False,
) -> Measurement:
    """Kernel distance between two sets of images on EfficientNet-Lite features. Not FID, and not KID on Inception.

    The unbiased MMD^2 with the kernel k(x, y) = (x.y / d + 1)^3 (Binkowski et al., Demystifying MMD
    GANs, 2018, section 4), over all pairs: what the usual mean over random subsets tends to. Around 0 (also
    slightly below) for two samples of one distribution; no bias that falls with n, unlike FID. The
    two sets must be drawn apart: the same concepts or prompts in both lower the figure.

    The interval is a percentile bootstrap over the images of both sets in which a pair of one image
    with itself never counts; for two samples of one distribution it is wider than it need be.

    Args:
        images: what is judged: PIL images, embedded pictures, tensors (see `FeatureNet.features`),
            or `Features` taken before. At least two.
        reference: the same, for the set that it is compared with.
        net: default `feature_net()`.
        seed: of the bootstrap.

    Returns:
        n is the size of the smaller set; both are in `settings`.

    Raises:
        DataError: fewer than two images in a set, or features of different nets.
    """
    a, b = (as_features(one, net, batch, progress) for one in (images, reference))
    net_hash = same_net([a, b])
    if min(len(a), len(b)) < 2:
        raise DataError(f"KID of {len(a)} against {len(b)} images; both sets need two or more")
    import numpy as np

    x, y = a.values.double().numpy(), b.values.double().numpy()
    m = len(y)

    def statistic(counts: np.ndarray) -> np.ndarray:
        # x is drawn by the caller, y from a second stream of the same seed.
        other = np.random.default_rng([seed, 1]).multinomial(m, np.full(m, 1 / m), size=len(counts))
        return mmd2(x, y, counts, other)

    value = float(mmd2(x, y, np.ones((1, len(x))), np.ones((1, m)))[0])
    interval = bootstrap_interval(statistic, len(x), seed)
    how = "unbiased polynomial MMD^2 on EfficientNet-Lite0 features; interval: bootstrap over images, 95 %"
    settings = {"images": len(a), "reference": len(b), "features": x.shape[1]}
    return Measurement(value, interval, min(len(a), len(b)), seed, "KID (EfficientNet-Lite0)", how, net_hash, settings)


def mmd2(x: np.ndarray, y: np.ndarray, wx: np.ndarray, wy: np.ndarray) -> np.ndarray:
    """Unbiased MMD^2 between weighted samples, for r weightings at once.

    sum_{i != j} w_i w_j k(x_i, x_j) / sum_{i != j} w_i w_j, the same for y, less twice the mean of
    k(x, y). All weights 1: the U-statistic of Gretton et al., 2012, lemma 6.

    Args:
        x: (n, d). y: (m, d). wx: (r, n). wy: (r, m).

    Returns:
        (r,).
    """
    within = sum(_kernel_sum(z, z, w, w, own=True) / (w.sum(1) ** 2 - (w**2).sum(1)) for z, w in ((x, wx), (y, wy)))
    return within - 2 * _kernel_sum(x, y, wx, wy, own=False) / (wx.sum(1) * wy.sum(1))


def _kernel_sum(x: np.ndarray, y: np.ndarray, wx: np.ndarray, wy: np.ndarray, own: bool) -> np.ndarray:
    """sum_ij wx_i k(x_i, y_j) wy_j without the diagonal if `own`, a block of rows at a time."""
    import numpy as np

    total = np.zeros(len(wx))
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        kernel = (x[rows] @ y.T / x.shape[1] + 1) ** 3
        if own:
            index = np.arange(len(kernel))
            kernel[index, start + index] = 0
        total += ((wx[:, rows] @ kernel) * wy).sum(1)
    return total


@dataclass(frozen=True)
class Prototypes:
    """What each concept looks like on average to the net.

    Attributes:
        names: of the concepts, in the order of the rows.
        features: (concepts, d) means over the pictures of a concept.
    """

    names: tuple[str, ...]
    features: Features


def prototypes(
    pictures: Sequence[Any],
    names: Sequence[str] | None = None,
    *,
    net: FeatureNet | None = None,
    cache: str | Path | None = None,
    batch: int = 32,
    progress: bool = False,
) -> Prototypes:
    """Mean features a concept.

    To judge images of one style, build them from the other styles of the embedded images:
    `prototypes([p for p in vislr.zoo.images() if p.style != "noto"])`.

    Args:
        pictures: images of any form that `FeatureNet.features` takes.
        names: the concept of each picture; default: its `.name`.
        cache: folder in which the result is kept under the hash of the net, the pictures and the names.

    Raises:
        DataError: as many names as pictures are needed, and at least one.
    """
    import torch

    from vislr.core.files import write_tensors
    from vislr.core.hashing import content_hash
    from vislr.measure.features import feature_net, pixels

    names = [picture.name for picture in pictures] if names is None else list(names)
    if len(names) != len(pictures) or not names:
        raise DataError(f"{len(names)} names for {len(pictures)} pictures; expected one each, and at least one")
    net = net or feature_net()
    concepts = tuple(dict.fromkeys(names))
    stored = None
    if cache is not None:
        pieces = [content_hash({name: pixels(picture)}) for name, picture in zip(names, pictures, strict=True)]
        key = content_hash({}, " ".join([net.hash, *pieces]))
        stored = Path(cache) / f"prototypes-{key[:24]}.safetensors"
        if stored.is_file():
            from safetensors.torch import load_file

            return Prototypes(concepts, Features(load_file(stored)["means"], net.hash))
    values = net.features(pictures, batch=batch, progress=progress).values
    place = {name: row for row, name in enumerate(concepts)}
    rows = torch.tensor([place[name] for name in names])
    sums = torch.zeros(len(concepts), values.shape[1]).index_add_(0, rows, values)
    means = sums / rows.bincount()[:, None]
    if stored is not None:
        write_tensors(stored, {"means": means})
    return Prototypes(concepts, Features(means, net.hash))


def retrieval(
    images: Any,
    names: Sequence[str],
    gallery: Prototypes,
    *,
    top: int = 5,
    net: FeatureNet | None = None,
    batch: int = 32,
    progress: bool = False,
) -> Measurement:
    """How often the nearest prototype of an image is the concept that it should show.

    Alignment without a text model: the gallery knows what each concept looks like in other styles.
    Nearest by cosine after both sides are centred on the mean prototype.

    Args:
        images: what is judged, or `Features` taken before.
        names: the concept that each image should show; all known to the gallery.
        gallery: what `prototypes` gave, from pictures that do not hold the images themselves.
        top: also report how often the concept is among the `top` nearest.

    Returns:
        top-1 accuracy with Wilson's interval, part `"top-K"` beside it; `settings` has the number of
        concepts and the accuracy of chance.

    Raises:
        ConfigError: `top` is below 1 or beyond the gallery.
        DataError: a name unknown to the gallery, another number of names than images, or features of
            different nets.
    """
    import torch
    from torch.nn import functional as F

    concepts = {name: row for row, name in enumerate(gallery.names)}
    if not 1 <= top <= len(concepts):
        raise ConfigError(f"top {top} of {len(concepts)} concepts; expected 1 to {len(concepts)}")
    for name in names:
        if name not in concepts:
            raise DataError(f"the gallery has no concept '{name}'{hint(name, concepts)}")
    own = as_features(images, net, batch, progress)
    if len(own) != len(names):
        raise DataError(f"{len(names)} names for {len(own)} images; expected one each")
    net_hash = same_net([own, gallery.features])
    centre = gallery.features.values.mean(0)
    near = F.normalize(own.values - centre) @ F.normalize(gallery.features.values - centre).T
    right = torch.tensor([concepts[name] for name in names])
    ranks = (near > near.gather(1, right[:, None])).sum(1)

    def share(k: int) -> Measurement:
        hits, n = int((ranks < k).sum()), len(names)
        how = f"share of images with their concept among the {k} nearest prototypes; interval: Wilson score, 95 %"
        settings = {"concepts": len(concepts), "chance": k / len(concepts)}
        return Measurement(hits / n, proportion_interval(hits, n), n, None, "share", how, net_hash, settings)

    first = share(1)
    return first if top == 1 else replace(first, parts={f"top-{top}": share(top)})


def vlhi(distances: Sequence[float], alignments: Sequence[float]) -> list[float]:
    """One figure for style and caption together, for methods that were compared on the same data.

    Visual-linguistic harmony index (SaRA, arXiv 2409.06633, eq. 8)::

        (d_max - d_i) / (d_max - d_min) + (a_i - a_min) / (a_max - a_min)

    Args:
        distances: of each method, smaller is better (FID, KID).
        alignments: of each method, larger is better (CLIP score, retrieval).

    Returns:
        a value from 0 to 2 for each, relative to the others: not comparable with another comparison's.

    Raises:
        DataError: fewer than two methods, another number of alignments, or values that are all equal.
    """
    if len(distances) != len(alignments) or len(distances) < 2:
        raise DataError(
            f"{len(distances)} distances and {len(alignments)} alignments; expected one of each for two methods or more"
        )
    if min(distances) == max(distances) or min(alignments) == max(alignments):
        raise DataError("all methods have the same distance or alignment; expected values that differ")
    far, near, least, most = max(distances), min(distances), min(alignments), max(alignments)
    return [(far - d) / (far - near) + (a - least) / (most - least) for d, a in zip(distances, alignments, strict=True)]
