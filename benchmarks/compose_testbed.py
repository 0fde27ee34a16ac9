"""The composition testbed on embedded data: adapters, sets of them, scenes that ask for them, and who judges.

Every adapter learns one thing that the embedded base never saw: a held-out style, a held-out concept or a held-out
ground. A set names two to five of them, at most one style and one ground; its scene's caption asks for all.
An element is judged by forced choice against the scenes' own ground truth: the picture counts as right if its
features are nearest to renderings of the scene as asked for, among renderings in which this one element is
replaced (by every other style or ground, or by nine other held-out concepts). Positions do not count.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vislr import zoo
from vislr.pipelines import train_adapter
from vislr.zoo.composing import SCENE_STYLES, Scene
from vislr.zoo.grounds import HELD_OUT_PATTERNS, PATTERNS

STYLES = ("fluent3d", "outline", "pixel", "sepia", "halftone")
GROUNDS = HELD_OUT_PATTERNS
CONCEPTS = 6
# How many sets have what, by number of adapters: (styles, concepts, grounds).
MAKEUPS = {
    2: ((1, 1, 0), (0, 1, 1), (1, 0, 1), (0, 2, 0)),
    3: ((1, 1, 1), (1, 2, 0), (0, 2, 1)),
    4: ((1, 2, 1), (0, 3, 1), (1, 3, 0)),
    5: ((1, 3, 1),),
}
DISTRACTORS = 9
RENDERINGS = 4


@dataclass(frozen=True)
class Part:
    """An adapter of the testbed: what it is of ("style", "concept", "ground"), and of which one."""

    kind: str
    name: str
    codepoint: str = ""
    phrase: str = ""

    @property
    def adapter(self) -> str:
        """Its name on a pipeline."""
        return f"{self.kind}-{self.name}".replace(" ", "-")

    @property
    def trigger(self) -> str:
        """What asks for it in a caption."""
        if self.kind == "style":
            return f"{zoo.emoji.STYLE_WORDS[self.name]} style"
        return self.name


@dataclass(frozen=True)
class ComposedSet:
    """Adapters and the scene that asks for all of them."""

    parts: tuple[Part, ...]
    scene: Scene


def concepts() -> list[Part]:
    """Held-out concepts with one-word names, half of them living things (subjects), half things (objects)."""
    found: dict[bool, list[Part]] = {True: [], False: []}
    for picture in zoo.images("noto", split="held-out"):
        if picture.name.isalpha() and len(picture.phrase.split()) == 2:
            living = picture.category == "Animals & Nature"
            found[living].append(Part("concept", picture.name, picture.codepoint, picture.phrase))
    return [*found[True][: CONCEPTS // 2], *found[False][: CONCEPTS - CONCEPTS // 2]]


def parts() -> list[Part]:
    """Every adapter of the testbed."""
    return [*(Part("style", one) for one in STYLES), *concepts(), *(Part("ground", one) for one in GROUNDS)]


def sets(count: int = 100, seed: int = 7) -> list[ComposedSet]:
    """The first `count` of the fixed sets: two, three, four, five adapters, and from the start again."""
    rng = np.random.default_rng(seed)
    every = parts()
    by_kind = {kind: [part for part in every if part.kind == kind] for kind in ("style", "concept", "ground")}
    made = []
    for index in range(count):
        size = 2 + index % 4
        makeup = MAKEUPS[size][index // 4 % len(MAKEUPS[size])]
        chosen = []
        for kind, number in zip(("style", "concept", "ground"), makeup, strict=True):
            chosen += [by_kind[kind][int(i)] for i in rng.choice(len(by_kind[kind]), number, replace=False)]
        made.append(ComposedSet(tuple(chosen), _scene(chosen, index)))
    return made


def singles(scenes: int) -> list[ComposedSet]:
    """Every adapter by itself, on `scenes` scenes that ask for nothing else new: what there is to lose."""
    return [ComposedSet((part,), _scene([part], 1000 + index)) for index in range(scenes) for part in parts()]


def _scene(chosen: list[Part], index: int) -> Scene:
    style = next((part.name for part in chosen if part.kind == "style"), None)
    ground = next((part.name for part in chosen if part.kind == "ground"), None)
    subjects = [part for part in chosen if part.kind == "concept"]
    drawn = zoo.scene(index, seed=11, style=style, ground=ground, subjects=len(subjects) or 1)
    if not subjects:
        return drawn
    elements = tuple(
        dataclasses.replace(element, name=part.name, codepoint=part.codepoint, phrase=part.phrase)
        for element, part in zip(drawn.elements, subjects, strict=True)
    )
    return dataclasses.replace(drawn, elements=elements, split="held-out")


def train(part: Part, base: str, folder: Path, steps: int, rank: int, lr: float, pictures: int) -> Path:
    """Train one adapter; a finished one is not trained again, a stopped one goes on. Returns its file."""
    data = folder / "data" / part.adapter
    if not data.is_dir():
        zoo.export_scenes(data, _lessons(part, pictures))
    out = folder / "adapters" / f"{part.adapter}-{base}-{steps}-{rank}-{lr:g}"
    file = out / "adapter.safetensors"
    if not (file.is_file() and (out / "report.json").is_file()):
        code = train_adapter.main([
            "--model.base", base, "--data.folder", str(data), "--adapter.kind", "lora", "--adapter.r", str(rank),
            "--optim.lr", f"{lr:g}", "--steps", str(steps), "--held_out.every", "0", "--sample.steps", "1",
            "--output.folder", str(out), "--output.resume",
        ])  # fmt: skip
        if code:
            raise SystemExit(code)
    return file


def _lessons(part: Part, count: int) -> list[Scene]:
    if part.kind == "style":
        return zoo.scenes(count, seed=1, style=part.name)
    if part.kind == "ground":
        return zoo.scenes(count, seed=2, ground=part.name)
    # Scenes of one subject, which is then this one: on all grounds and in both styles that the base knows.
    made = []
    for one in zoo.scenes(count, seed=3, subjects=1):
        element = dataclasses.replace(one.elements[0], name=part.name, codepoint=part.codepoint, phrase=part.phrase)
        made.append(dataclasses.replace(one, elements=(element,), split="held-out"))
    return made


class Referee:
    """Forced choice between renderings, by the features of a net.

    Args:
        net: "efficientnet" (needs the extra `measure`) or "emoji-net" (embedded).
    """

    def __init__(self, net: str):
        if net == "emoji-net":
            from vislr.zoo.emoji_net import emoji_net

            self.judge: Any = emoji_net()
            self.hash = self.judge.hash
        else:
            from vislr.measure import feature_net

            self.judge = feature_net()
            self.hash = self.judge.hash
        self.net = net
        self._kept: dict[str, torch.Tensor] = {}

    def features(self, pictures: list[Any]) -> torch.Tensor:
        """(pictures, d)."""
        return self.judge.images(pictures) if self.net == "emoji-net" else self.judge.features(pictures).values

    def prototype(self, scene: Scene) -> torch.Tensor:
        """(d,) mean features of the scene in `RENDERINGS` layouts, colours and phases."""
        key = json.dumps(dataclasses.asdict(scene), sort_keys=True)
        if key not in self._kept:
            drawn = []
            for number in range(RENDERINGS):
                other = zoo.scene(number, seed=21, subjects=len(scene.elements))
                elements = tuple(
                    dataclasses.replace(place, name=own.name, codepoint=own.codepoint, phrase=own.phrase)
                    for place, own in zip(other.elements, scene.elements, strict=True)
                )
                drawn.append(dataclasses.replace(scene, elements=elements, phase=other.phase))
            self._kept[key] = self.features(drawn).mean(0)
        return self._kept[key]

    def choices(self, part: Part, scene: Scene) -> list[Scene]:
        """The scene as asked for, then with this element replaced."""
        if part.kind == "style":
            others = [dataclasses.replace(scene, style=style) for style in SCENE_STYLES if style != scene.style]
        elif part.kind == "ground":
            patterns = (*PATTERNS, *HELD_OUT_PATTERNS)
            others = [dataclasses.replace(scene, pattern=pattern) for pattern in patterns if pattern != scene.pattern]
        else:
            shown = {element.codepoint for element in scene.elements}
            pool = [picture for picture in zoo.images("noto", split="held-out") if picture.codepoint not in shown]
            rng = np.random.default_rng(int(part.codepoint.split("-")[0], 16))
            others = []
            for i in rng.choice(len(pool), DISTRACTORS, replace=False):
                picture = pool[int(i)]
                elements = tuple(
                    dataclasses.replace(one, name=picture.name, codepoint=picture.codepoint, phrase=picture.phrase)
                    if one.codepoint == part.codepoint
                    else one
                    for one in scene.elements
                )
                others.append(dataclasses.replace(scene, elements=elements))
        return [scene, *others]

    def judged(self, one: ComposedSet, pictures: list[Any]) -> tuple[dict[str, list[bool]], list[float]]:
        """(adapter -> whether each picture shows its element, alignment of each picture with the scene)."""
        features = self.features(pictures)
        right = {}
        for part in one.parts:
            gallery = torch.stack([self.prototype(scene) for scene in self.choices(part, one.scene)])
            centre = gallery.mean(0)
            near = F.normalize(features - centre, dim=1) @ F.normalize(gallery - centre, dim=1).T
            right[part.adapter] = (near.argmax(1) == 0).tolist()
        whole = F.cosine_similarity(features, self.prototype(one.scene)[None])
        return right, whole.tolist()
