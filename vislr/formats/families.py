"""Model families and their module names, as data: golden lists and what follows from them alone.

`_`-joined names cannot be split by rule, so they are looked up. A name whose numbers lie outside of the
golden list (a pruned or a smaller model of the same build) is found by its template, the name with
every number replaced; templates are unique in each family, which a test checks.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from vislr.core.errors import FormatError, hint
from vislr.formats.golden import FOLDER, expand

Shape = tuple[int, ...]
_NUMBER = re.compile(r"(?<=[._])\d+(?=[._]|$)")


@dataclass(frozen=True)
class Family:
    """What headers and prefixes say of a family.

    Attributes:
        name: as in `FAMILIES` and in file headers of vislr.
        denoiser: the component with the denoiser; "" for bare models.
        base_versions: `ss_base_model_version`; the first is written.
        architectures: `modelspec.architecture`; the first is written.
        text_encoders: kohya prefix -> component; the first prefix of a component is written.
        comfy_text: ComfyUI's prefix -> component.
    """

    name: str
    denoiser: str
    base_versions: tuple[str, ...]
    architectures: tuple[str, ...]
    text_encoders: dict[str, str]
    comfy_text: dict[str, str]


_CLIP = "text_encoders.clip_{}.transformer."
_T5 = "text_encoders.t5xxl.transformer."
_ONE = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
_TWO = {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("sd15", "unet", ("sd_v1",), ("stable-diffusion-v1/lora",), _ONE, {_CLIP.format("l"): "text_encoder"}),
        Family("sd2", "unet", ("sd_v2", "sd_v2_v"), ("stable-diffusion-v2-512/lora", "stable-diffusion-v2-768-v/lora"),
               _ONE, {_CLIP.format("h"): "text_encoder"}),
        Family("sdxl", "unet", ("sdxl_base_v1-0",), ("stable-diffusion-xl-v1-base/lora",), _TWO,
               {_CLIP.format("l"): "text_encoder", _CLIP.format("g"): "text_encoder_2"}),
        Family("sd3", "transformer", ("medium", "5-medium", "5-large"),
               tuple(f"stable-diffusion-{size}/lora" for size in ("3-medium", "3.5-medium", "3.5-large")),
               {**_TWO, "lora_te3_": "text_encoder_3"},
               {_CLIP.format("l"): "text_encoder", _CLIP.format("g"): "text_encoder_2", _T5: "text_encoder_3"}),
        Family("flux", "transformer", ("flux1",), ("flux-1-dev/lora", "flux-1-schnell/lora"),
               {"lora_te1_": "text_encoder", "lora_te3_": "text_encoder_2", "lora_te2_": "text_encoder_2"},
               {_CLIP.format("l"): "text_encoder", _T5: "text_encoder_2"}),
        Family("pixart", "transformer", ("pixart",), ("pixart-alpha/lora", "pixart-sigma/lora"),
               {"lora_te_": "text_encoder", "lora_te1_": "text_encoder"}, {_T5: "text_encoder"}),
        Family("dit", "transformer", ("dit",), ("dit/lora",), {}, {}),
        Family("timm", "", ("timm",), ("timm/lora",), {}, {}),
    )
}  # fmt: skip


def family(name: str) -> Family:
    """The family of this name.

    Raises:
        FormatError: there is none; names the nearest.
    """
    if name not in FAMILIES:
        raise FormatError(f"no family is called '{name}'{hint(name, FAMILIES)}")
    return FAMILIES[name]


@functools.cache
def golden(name: str) -> dict[str, dict[str, Shape | None]]:
    """Component -> module path -> shape of its weight (None: differs between sizes of the family)."""
    data = json.loads((FOLDER / f"{family(name).name}.json").read_text(encoding="utf-8"))
    return {
        component: {
            path: None if shape is None else tuple(shape)
            for pattern, shape in patterns.items()
            for path in expand(pattern)
        }
        for component, patterns in data.items()
    }


def template(name: str) -> str:
    """A name with "#" for each number that stands alone between dots or underscores."""
    return _NUMBER.sub("#", name)


def filled(pattern: str, name: str) -> str:
    """The template `pattern` with the numbers of `name`, in order."""
    numbers = iter(_NUMBER.findall(name))
    return re.sub("#", lambda _: next(numbers), pattern)


@functools.cache
def _flat_templates(name: str, component: str) -> dict[str, str]:
    """Template of the `_`-joined name -> template of the path, of everything in the golden list."""
    found = {}
    for path in golden(name).get(component, {}):
        pattern = template(path)
        found[pattern.replace(".", "_")] = pattern
    return found


@functools.cache
def _flat_paths(name: str, component: str) -> dict[str, str]:
    return {path.replace(".", "_"): path for path in golden(name).get(component, {})}


def unflatten(name: str, component: str, flat: str) -> str | None:
    """The path whose `_`-joined form is `flat`; None if the family has no such module."""
    known = _flat_paths(name, component).get(flat)
    if known is not None:
        return known
    pattern = _flat_templates(name, component).get(template(flat))
    return None if pattern is None else filled(pattern, flat)


@functools.cache
def _path_templates(name: str, component: str) -> frozenset[str]:
    return frozenset(map(template, golden(name).get(component, {})))


def knows(name: str, component: str, path: str) -> bool:
    """Whether a path is one of the family's, at any depth."""
    return template(path) in _path_templates(name, component)


def guess(paths: dict[str, Iterable[str]]) -> str:
    """The family whose golden lists hold most of these {component: paths}; "" if none holds any.

    Of equals the first in the order of `FAMILIES`.
    """
    best, count = "", 0
    for name in FAMILIES:
        lists = golden(name)
        hits = sum(path in lists.get(component, ()) for component, some in paths.items() for path in some)
        if hits > count:
            best, count = name, hits
    return best
