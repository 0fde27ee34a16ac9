"""How large KID and retrieval are for known differences: other vendors, blur, noise.

    python benchmarks/kid_scale.py

About two minutes on one core; needs the extra `measure`. Writes a record.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from vislr import measure
from vislr.zoo import STYLES, images

COUNT = 220


def main() -> None:
    rng = np.random.default_rng(0)

    def noisy(image: Image.Image) -> Image.Image:
        return Image.fromarray((np.asarray(image) + rng.normal(0, 40, (64, 64, 3))).clip(0, 255).astype(np.uint8))

    by_style = {style: images(style) for style in STYLES}
    # Every sixth concept is judged, against every sixth of the others: no concept is in both.
    sets = {style: pictures[3::6][:COUNT] for style, pictures in by_style.items()}
    names = [picture.name for picture in sets["noto"]]
    plain = [picture.image() for picture in sets["noto"]]
    for radius in (1, 2):
        sets[f"noto, blur {radius} px"] = [image.filter(ImageFilter.GaussianBlur(radius)) for image in plain]
    sets["noto, noise 40"] = [noisy(image) for image in plain]
    net = measure.feature_net()
    reference = net.features(by_style["noto"][::6][:COUNT])
    features = {name: net.features(one) for name, one in sets.items()}
    means = measure.Features((features["twemoji"].values + features["fluent3d"].values) / 2, net.hash)
    gallery = measure.Prototypes(tuple(names), means)
    figures = {f"kid {name}": measure.kid(one, reference) for name, one in features.items()}
    for name in features:
        if name.startswith("noto"):
            figures[f"retrieval {name}"] = measure.retrieval(features[name], names, gallery)
    log = "".join(f"{name}: {one}\n" for name, one in figures.items())
    print(log, end="")
    path = measure.write_record("kid-scale", figures, log=log, command="python benchmarks/kid_scale.py", seed=0)
    print(path)


if __name__ == "__main__":
    main()
