"""What could weights of the embedded models' size draw at best? KID and retrieval of pictures kept in so many bytes.

    python benchmarks/zoo_limit.py

A model that is asked for a named emoji has to have kept it. Trained language models were found to keep about two bits
of knowledge a parameter (Allen-Zhu and Li 2024, arXiv:2404.05405); a denoiser of P parameters that knows N pictures so
has P / 4 / N bytes for each. Here every picture is coded by WebP, at the size and quality with the least error that
fit such a budget (its container's 30 bytes not counted), and goes through the measures of the gates. An estimate: a
denoiser may share parts between pictures better than a coder of single ones, and it has scenes and
backgrounds to keep as well. About two minutes on one core; needs the extra `measure`. Writes a record.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from tqdm import tqdm

from vislr import measure, zoo
from vislr.zoo.composing import BASE_STYLES

COUNT = 220
CONTAINER = 30
BITS = 2


def squeezed(image: Image.Image, budget: int) -> Image.Image:
    """The image after WebP in at most `budget` bytes and back: of all sizes, the one with the least squared error."""
    best, least = image, float("inf")
    for side in (64, 48, 40, 32, 24, 16):
        small = image.resize((side, side), Image.Resampling.LANCZOS)
        for quality in (90, 80, 70, 60, 50, 40, 30, 20, 10, 5, 1):
            file = io.BytesIO()
            small.save(file, "WEBP", quality=quality, method=6)
            if file.tell() - CONTAINER <= budget:
                back = Image.open(file).convert("RGB").resize(image.size, Image.Resampling.BICUBIC)
                error = float(np.square(np.asarray(back, float) - np.asarray(image, float)).mean())
                if error < least:
                    best, least = back, error
                break
    return best


def main() -> None:
    known = sum(len(zoo.images(style=style, split="train")) for style in BASE_STYLES)
    budgets = {}
    for name in zoo.pipeline_names():
        pipe = zoo.pipeline(name)
        denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        parameters = sum(p.numel() for p in denoiser.parameters())
        budgets[f"{name}, {parameters:,} parameters"] = parameters * BITS // 8 // known
    budgets |= {f"{budget} bytes": budget for budget in (600, 800, 1200)}
    # Every sixth concept is judged, against every sixth of the others, as in `kid_scale.py`.
    noto = zoo.images(style="noto")
    chosen = noto[3::6][:COUNT]
    net = measure.feature_net()
    reference = net.features(noto[::6][:COUNT])
    gallery = measure.prototypes([p for p in zoo.images() if p.style != "noto"])
    figures = {}
    for label, budget in budgets.items():
        features = net.features([squeezed(p.image(), budget) for p in tqdm(chosen, desc=label)])
        settings = f"{label}: {budget} bytes a picture" if "bytes" not in label else label
        figures[f"kid, {settings}"] = measure.kid(features, reference, net=net)
        figures[f"retrieval, {settings}"] = measure.retrieval(features, [p.name for p in chosen], gallery)
    log = f"{known:,} pictures are known, {BITS} bits a parameter\n"
    log += "".join(f"{name}: {one}\n" for name, one in figures.items())
    print(log, end="")
    print(measure.write_record("zoo-limit", figures, log=log, command="python benchmarks/zoo_limit.py", seed=0))


if __name__ == "__main__":
    main()
