"""Are the embedded models good enough to judge methods on? The gates of a pipeline, as a record with sheets.

    python benchmarks/zoo_gates.py emoji-unet
    python benchmarks/zoo_gates.py emoji-unet --training runs/base        # before it is frozen
    python benchmarks/zoo_gates.py emoji-net                              # how far the judge itself can be trusted

A style at a time: KID against the style's other concepts, caption-to-style accuracy by emoji-net, prototype
retrieval with the distance to the nearest training picture; then the named subjects of scenes. The autoencoder's
own reconstructions of the true pictures go through the same measures: the ceiling. About ten minutes on two
cores; needs the extra `measure`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from adapted_style import draw
from PIL import Image, ImageDraw

from vislr import measure, zoo
from vislr.measure.measurement import Measurement, bootstrap_interval, proportion_interval
from vislr.zoo.composing import BASE_STYLES
from vislr.zoo.emoji import STYLE_WORDS
from vislr.zoo.emoji_net import emoji_net
from vislr.zoo.retraining import assemble, pixels
from vislr.zoo.retraining_nets import crop, unseen


def reconstructions(vae: Any, pictures: list[Any]) -> list[Image.Image]:
    """The autoencoder's own versions of pictures."""
    made = []
    with torch.no_grad():
        for x in pixels(pictures).split(32):
            y = vae.decode(vae.encode(x.float().div(127.5).sub(1)).latent_dist.mean).sample
            made += [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in ((y.clamp(-1, 1) + 1) * 127.5).byte()]
    return made


def share(hits: torch.Tensor, what: str) -> Measurement:
    """A proportion with Wilson's interval."""
    value = float(hits.float().mean())
    return Measurement(value, proportion_interval(int(hits.sum()), len(hits)), len(hits), 0, what, "emoji-net")


def style_accuracy(judge: Any, pictures: list[Any], phrases: list[str], style: str) -> Measurement:
    """How often a picture fits its caption better than the same caption with another style's word."""
    rows = judge.images(pictures)
    words = [STYLE_WORDS.get(s, s) for s in (*zoo.STYLES, *zoo.PROCEDURAL_STYLES)]
    scores = torch.stack([(rows * judge.texts([f"{w} style, {p}" for p in phrases])).sum(-1) for w in words], 1)
    return share(scores.argmax(1) == words.index(STYLE_WORDS.get(style, style)), "caption-to-style accuracy")


def element_retrieval(judge: Any, drawn: list[Any], scenes: list[Any]) -> Measurement:
    """How often the part of a picture where a subject should be is nearest to that subject, of all of its style."""
    names = sorted({p.phrase for p in zoo.images(style="noto", split="train")})
    hits = []
    for style in BASE_STYLES:
        gallery = judge.texts([f"{STYLE_WORDS[style]} style, {n}" for n in names])
        gallery = gallery - gallery.mean(0)
        for picture, scene in zip(drawn, scenes, strict=True):
            if scene.style != style:
                continue
            array = pixels([_Held(picture)])[0]
            for element in scene.elements:
                part = Image.fromarray(crop(array, element.box).permute(1, 2, 0).numpy())
                hits.append(names[int((judge.images([part]) @ gallery.T).argmax())] == element.phrase)
    return share(torch.tensor(hits), "top-1 of a scene's subjects")


def nearest(distance: Any) -> Measurement:
    """Mean distance to the nearest training picture, of one array."""
    interval = bootstrap_interval(lambda counts: counts @ distance / len(distance), len(distance), 0)
    how = "euclidean on EfficientNet-Lite0 features"
    return Measurement(float(distance.mean()), interval, len(distance), 0, "feature distance", how)


def judge_figures(judge: Any, count: int) -> dict[str, Measurement]:
    """Of emoji-net: pictures it has seen and pairs of concept and style that it has not, each among all captions."""
    figures = {}
    for style in (*zoo.STYLES, *zoo.PROCEDURAL_STYLES):
        everything = zoo.images(style=style)
        captions = [p.caption for p in everything]
        gallery = judge.texts(captions)
        for kind, wanted in (("seen", False), ("unseen", True)):
            chosen = [p for p in everything if unseen(p.codepoint, style) == wanted][:count]
            own = torch.tensor([captions.index(p.caption) for p in chosen])[:, None]
            best = (judge.images(chosen) @ gallery.T).topk(5, 1).indices
            for k in (1, 5):
                hits = (best[:, :k] == own).any(1)
                figures[f"{style} {kind} top-{k} of {len(captions)}"] = share(hits, f"caption found, top-{k}")
            phrases = [p.phrase for p in chosen]
            figures[f"{style} {kind} style accuracy"] = style_accuracy(judge, chosen, phrases, style)
    return figures


class _Held:
    def __init__(self, picture: Any):
        self.image = lambda: picture.image() if callable(getattr(picture, "image", None)) else picture


def sheet(rows: list[list[Any]]) -> Image.Image:
    """Pictures in rows, twice their size, in 256 colours."""
    made = Image.new("RGB", (64 * max(map(len, rows)), 64 * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            made.paste(_Held(picture).image(), (64 * x, 64 * y))
    return made.quantize(256).resize((made.width * 2, made.height * 2), Image.Resampling.NEAREST)


def category_sheet(shown: dict[str, tuple[list[Any], list[Any]]]) -> Image.Image:
    """Of one category: for each style the true pictures above what was drawn, labelled."""
    margin, columns = 16, max(len(known) for known, _ in shown.values())
    made = Image.new("RGB", (64 * columns, (128 + margin) * len(shown)), "white")
    write = ImageDraw.Draw(made)
    for band, (style, (known, drawn)) in enumerate(shown.items()):
        top = band * (128 + margin)
        write.text((2, top + 2), f"{style}: true above, drawn below", fill="black")
        for x, (one, other) in enumerate(zip(known, drawn, strict=True)):
            made.paste(_Held(one).image(), (64 * x, top + margin))
            made.paste(_Held(other).image(), (64 * x, top + margin + 64))
    return made.quantize(256)


def loss_curve(losses: list[list[float]], path: Path) -> None:
    """Training loss against steps, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 2.4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*losses, strict=True), linewidth=1)
    axes.set(xlabel="step", ylabel="loss, mean of 200 steps", ylim=(None, losses[len(losses) // 20][1]))
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", choices=("emoji-unet", "emoji-mmdit", "emoji-net"))
    parser.add_argument("--training", type=Path, help="folder of `vislr zoo retrain`; default: the embedded weights")
    parser.add_argument("--count", type=int, default=200, help="single emoji a style")
    parser.add_argument("--scenes", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sheets", type=Path, default=Path("docs/images"))
    parser.add_argument("--columns", type=int, default=14, help="most pictures in a row of a category's sheet")
    parser.add_argument("--name", help="of the record; default: PIPELINE-gates")
    a = parser.parse_args()
    a.name = a.name or f"{a.pipeline}-gates"
    a.sheets.mkdir(parents=True, exist_ok=True)
    if a.pipeline == "emoji-net":
        return write(a, judge_figures(emoji_net(), a.count))
    pipe = assemble(a.training, a.pipeline) if a.training else zoo.pipeline(a.pipeline)
    judge, net = emoji_net(), measure.feature_net()
    figures: dict[str, Measurement] = {}
    by_category: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {}
    for style in BASE_STYLES:
        known = zoo.images(style=style, split="train")
        chosen = known[:: max(1, len(known) // a.count)][: a.count]
        names = {p.name for p in chosen}
        # All of them: they come in the order of their categories, so the first ones are of other kinds.
        reference = net.features([p for p in known if p.name not in names])
        gallery = measure.prototypes([p for p in zoo.images() if p.style != style])
        drawn = draw(pipe, [p.caption for p in chosen], a.steps, a.guidance)
        training = net.features(known)
        for source, pictures in (("", drawn), (" ceiling", reconstructions(pipe.vae, chosen))):
            features = net.features(pictures)
            figures[f"kid {style}{source}"] = measure.kid(features, reference, net=net)
            figures[f"style accuracy {style}{source}"] = style_accuracy(
                judge, pictures, [p.phrase for p in chosen], style
            )
            figures[f"retrieval {style}{source}"] = measure.retrieval(features, [p.name for p in chosen], gallery)
            distance = torch.cdist(features.values, training.values).min(1).values.numpy()
            figures[f"nearest training picture {style}{source}"] = nearest(distance)
        sheet([[*chosen[::9]], [*drawn[::9]]]).save(a.sheets / f"{a.pipeline}-{style}.png")
        for category in sorted({p.category for p in chosen}):
            own = [n for n, p in enumerate(chosen) if p.category == category]
            own = own[:: -(-len(own) // a.columns)]  # spread over the category, which is in the order of its groups
            pair = [chosen[n] for n in own], [drawn[n] for n in own]
            by_category.setdefault(category, {})[style] = pair
    for category, shown in by_category.items():
        name = category.split()[0].lower()
        category_sheet(shown).save(a.sheets / f"{a.pipeline}-{name}.png", optimize=True)
    scenes = zoo.scenes(a.scenes, start=10**6, seed=7, split="train")
    scenes = [s for s in scenes if s.style in BASE_STYLES]
    drawn = draw(pipe, [s.caption for s in scenes], a.steps, a.guidance)
    figures["scene subjects"] = element_retrieval(judge, drawn, scenes)
    figures["scene subjects ceiling"] = element_retrieval(judge, reconstructions(pipe.vae, scenes), scenes)
    sheet([[*scenes[:16]], [*drawn[:16]]]).save(a.sheets / f"{a.pipeline}-scenes.png")
    state = zoo.cards()[a.pipeline]
    if a.training:
        state = json.loads((a.training / f"{a.pipeline.removeprefix('emoji-')}-state" / "state.json").read_text())
    loss_curve(state["losses"], a.sheets / f"{a.pipeline}-loss.png")
    write(a, figures)


def write(a: argparse.Namespace, figures: dict[str, Measurement]) -> None:
    """The record."""
    log = "\n".join(f"{key}: {figure}" for key, figure in figures.items()) + "\n"
    print(log, end="")
    command = f"python benchmarks/zoo_gates.py {a.pipeline}"
    print(measure.write_record(a.name, figures, log=log, command=command, seed=0))


if __name__ == "__main__":
    main()
