"""Accuracy of the embedded ViT against FLOPs saved: AT-EDM's ranking, random and even choices, ToMe.

    python benchmarks/tokens_vit.py

The classifier names the category of emoji whose concepts it never saw (Noto and Twemoji, held-out split). No weight is
changed. Every share is one run over all pictures; random choices are the mean of three seeds. Writes a record with
its picture; under a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import vislr
from vislr import measure, zoo
from vislr.core.errors import ConfigError
from vislr.measure.measurement import Measurement, proportion_interval
from vislr.tokens import at_edm_plan, plan_flops, tome_plan
from vislr.zoo.retraining import pixels

# Attempts at a better ranking: more rounds of it, cuts where attention is more settled, one cut in place of three.
ATTEMPTS: dict[str, dict[str, Any]] = {
    "at-edm 5 iterations": {"iterations": 5},
    "at-edm late cuts": {"prune_after": (2, 4)},
    "at-edm one cut": {"prune_after": (1,)},
}
METHODS = ("at-edm", "tome", "random", "stride", *ATTEMPTS)


def plan_for(net: Any, method: str, saved: float, seed: int) -> Any:
    if method == "tome":
        return tome_plan(net, flops_saved=saved)
    if method in ATTEMPTS:
        return at_edm_plan(net, flops_saved=saved, **ATTEMPTS[method])
    return at_edm_plan(net, flops_saved=saved, criterion="g-wpr" if method == "at-edm" else method, seed=seed)


@torch.no_grad()
def hits(net: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether each picture is named rightly."""
    return torch.cat([net(part).argmax(1) for part in x.split(64)]) == labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saved", nargs="*", type=float, default=[0.1, 0.2, 0.3, 0.388, 0.5])
    parser.add_argument("--picture", type=Path, default=Path("docs/images/tokens-vit.png"))
    parser.add_argument("--name", default="tokens-vit", help="of the record")
    a = parser.parse_args()
    net = zoo.classifier("emoji-vit")
    names = net.pretrained_cfg["label_names"]
    pictures = [p for style in ("noto", "twemoji") for p in zoo.images(style=style, split="held-out")]
    x, labels = pixels(pictures).float().div(127.5).sub(1), torch.tensor([names.index(p.category) for p in pictures])
    right = {("dense", 0.0): hits(net, x, labels)}
    notes = []
    for saved in a.saved:
        for method in METHODS:
            rows = []
            for seed in range(3 if method == "random" else 1):
                try:
                    plan = plan_for(net, method, saved, seed)
                except ConfigError as error:
                    notes.append(f"{method} {saved:g}: {error}")
                    break
                counted = plan_flops(net, plan).saved
                report = vislr.apply(net, plan)
                rows.append(hits(net, x, labels))
                vislr.remove(net, report)
            if rows:
                right[method, counted] = torch.cat(rows)
    figures = {}
    for (method, saved), found in right.items():
        # Three random draws on the same pictures are no three times as many pictures.
        count = len(pictures)
        share = float(found.float().mean())
        interval = proportion_interval(round(share * count), count)
        figures[f"{method} saved {saved:.3f}"] = Measurement(
            share, interval, count, 0, "accuracy", "emoji-vit, held-out"
        )
    log = "".join(f"{name}: {one}\n" for name, one in figures.items()) + "".join(f"{note}\n" for note in notes)
    print(log, end="")
    draw(right, a.picture)
    print(measure.write_record(a.name, figures, log=log, command="python benchmarks/tokens_vit.py", seed=0))


def draw(right: dict[tuple[str, float], torch.Tensor], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for method in METHODS:
        points = sorted(
            (saved, float(found.float().mean())) for (name, saved), found in right.items() if name == method
        )
        if not points:
            continue
        axes.plot(
            *zip((0.0, float(right["dense", 0.0].float().mean())), *points, strict=True), marker=".", label=method
        )
    axes.set(xlabel="share of FLOPs saved", ylabel="accuracy, unseen concepts")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
