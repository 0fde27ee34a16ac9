"""Two changes on one tiny model in either order: what happens, and what a new process makes of the saved result.

`python together.py FOLDER...` is the new process: it prints a digest of what every folder's model makes.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from adapted import SHORT, fill
from peft import LoraConfig
from tiny import (
    PIXELS,
    tiny_conv_net,
    tiny_flux_pipeline,
    tiny_flux_transformer,
    tiny_sd3_pipeline,
    tiny_sd3_transformer,
    tiny_sd_pipeline,
    tiny_unet,
    tiny_vit,
)

import vislr
from vislr import cache, compose, quantize, recipe_of
from vislr.adapters import inject
from vislr.anatomy import denoiser_of
from vislr.prune import LayerPlan
from vislr.quantize import Trajectories
from vislr.tokens import at_edm_plan

STEPS = 2
RUNS = Trajectories(("a cat face",), count=1, batch=1, steps=STEPS, options={"height": PIXELS, "width": PIXELS})


@dataclass(frozen=True)
class Family:
    """A tiny model and what the changes are on it.

    Attributes:
        build: makes it, the same at every call.
        layers: endings of the layers that adapters go on.
        units: what two LayerPlans remove.
        whole: endings of layers that the first QuantPlan leaves to the second.
        call: arguments of the pipeline's call.
    """

    build: Callable[[], Any]
    layers: tuple[str, ...]
    units: tuple[tuple[str, ...], tuple[str, ...]]
    whole: str
    call: dict[str, Any] = field(default_factory=dict)


# Every part that plans look at once, and no more: counting FLOPs takes a time for every operator.


def _unet() -> Any:
    pipe = tiny_sd_pipeline()
    one = {"block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    pipe.register_modules(unet=tiny_unet(**one))
    return pipe


def _sd3() -> Any:
    pipe = tiny_sd3_pipeline()
    pipe.register_modules(transformer=tiny_sd3_transformer(num_layers=4))
    return pipe


def _flux() -> Any:
    pipe = tiny_flux_pipeline()
    pipe.register_modules(transformer=tiny_flux_transformer(num_layers=1, num_single_layers=3))
    return pipe


FAMILIES = {
    "unet": Family(
        _unet, ("to_q", "conv1"), (("up_blocks.0.resnets.0",), ("mid_block.attentions.0",)), "*.to_v",
    ),
    "sd3": Family(
        _sd3, ("to_q", "ff.net.2"), (("transformer_blocks.1.ff",), ("transformer_blocks.0.ff",)), "*.to_v", SHORT,
    ),
    "flux": Family(
        _flux, ("to_q", "proj_mlp"), (("transformer_blocks.0.ff",), ("single_transformer_blocks.1",)), "*.to_v", SHORT,
    ),
    "vit": Family(tiny_vit, ("qkv", "fc1"), (("blocks.0.mlp",), ("blocks.1.mlp",)), "*.proj"),
    "conv": Family(tiny_conv_net, ("conv2",), (("layer2.0",), ("layer3.0",)), "layer4.0.conv1"),
}  # fmt: skip
DENOISERS = ("unet", "sd3", "flux")


def build(family: str) -> Any:
    """The family's model; its weights are random and nowhere zero."""
    torch.manual_seed(3)
    target = FAMILIES[family].build()
    if family in DENOISERS:
        target.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for parameter in denoiser_of(target)[1].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return target


def run(target: Any, family: str) -> torch.Tensor:
    """Latents after two steps, or logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if family not in DENOISERS:
            return target(torch.randn(2, 3, PIXELS, PIXELS, generator=generator))
        return target(
            ["a cat face"], num_inference_steps=STEPS, guidance_scale=3.0, generator=generator, height=PIXELS,
            width=PIXELS, output_type="latent", **FAMILIES[family].call,
        ).images  # fmt: skip


def digest(tensor: torch.Tensor) -> str:
    """Of the bits."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


# The changes: each puts itself on under a name and gives its reports.


def _adapter(config: Callable[[Family], Any]) -> Callable[[Any, str, str], list[Any]]:
    def put(target: Any, family: str, name: str) -> list[Any]:
        module = denoiser_of(target)[1]
        report = vislr.apply(target, config(FAMILIES[family]), name=name)
        if report.kind == "adabn":
            images = torch.rand(4, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(len(name)))
            vislr.adapt_statistics(module, [images], name=name)
        else:
            fill(module, name, sum(map(ord, name)))
        if not _composed(target):
            carriers = inject.carriers(module)
            on = {one: 1.0 if one in carriers else 0.8 for one in inject.adapter_names(module)}
            # Statistics of one adapter at a time.
            vislr.set_adapters(target, [one for one in on if one not in carriers[:-1]],
                               [on[one] for one in on if one not in carriers[:-1]])  # fmt: skip
        return [report]

    return put


def _composed(target: Any) -> bool:
    return any(step["report"]["kind"] == "compose" for step in recipe_of(target))


def _layers(target: Any, family: str, name: str) -> list[Any]:
    again = any(step["report"]["kind"] == "layers" for step in recipe_of(target))
    return [vislr.apply(target, LayerPlan(FAMILIES[family].units[again]), name=name)]


def _quant(target: Any, family: str, name: str) -> list[Any]:
    again = bool(quantize.quant_layers(denoiser_of(target)[1]))
    layers = None if again else {FAMILIES[family].whole: None}
    if family in DENOISERS:
        plan = quantize.efficientdm_plan(target, 8, 8, source=RUNS, bits=layers, input_observer="minmax")
    else:
        plan = quantize.weight_only_plan(target, 8, group=None, layers=layers)
    return [vislr.apply(target, plan, name=name)]


def _tokens(target: Any, family: str, name: str) -> list[Any]:
    # Also pruned in the early step: under a cache the late one is not computed.
    steps = {"early": 0.5, "steps": STEPS, "ends": 0} if family in DENOISERS else {}
    return [vislr.apply(target, at_edm_plan(target, keep=0.5, **steps), name=name)]


def _cache(target: Any, family: str, name: str) -> list[Any]:
    return [vislr.apply(target, cache.interval_plan(target, 2, steps=STEPS), name=name)]


def _compose(target: Any, family: str, name: str) -> list[Any]:
    """Two LoRAs and the plan, which also takes the adapters that were there."""
    module = denoiser_of(target)[1]
    names, reports = [*inject.adapter_names(module), f"{name}_p", f"{name}_q"], []
    try:
        for one in names[-2:]:
            config = LoraConfig(r=2, target_modules=list(FAMILIES[family].layers[:1]))
            reports.append(vislr.apply(target, config, name=one))
            fill(module, one, sum(map(ord, one)))
        return [*reports, vislr.apply(target, compose.composite_plan(target, names), name=name)]
    except BaseException:
        for report in reversed(reports):
            vislr.remove(target, report)
        raise


CHANGES: dict[str, Callable[[Any, str, str], list[Any]]] = {
    "lora": _adapter(lambda family: LoraConfig(r=2, lora_alpha=3, target_modules=list(family.layers))),
    "convlora": _adapter(lambda family: vislr.ConvLoraConfig(r=1, target_modules=list(family.layers))),
    "flora": _adapter(lambda family: vislr.FloraConfig(ranks=2, target_modules=list(family.layers))),
    "sara": _adapter(lambda family: vislr.SaraConfig(fraction=0.2, target_modules=list(family.layers))),
    "adabn": _adapter(lambda family: vislr.AdaBnConfig()),
    "layers": _layers,
    "quant": _quant,
    "tokens": _tokens,
    "cache": _cache,
    "compose": _compose,
}


@dataclass
class Outcome:
    """What came of two changes, one after the other.

    Attributes:
        error: of the change that was refused, or of whatever broke.
        changes: whether the second changed what the model makes.
        undone: whether, with the second off again (or refused), the model made and held what it had before.
        digest: of what both made; "" if refused.
    """

    error: Exception | None = None
    changes: bool = True
    undone: bool = True
    digest: str = ""


@dataclass
class Matrix:
    """All pairs on one family.

    Attributes:
        outcomes: by (first, second).
        base: whether, with everything off, the model made and held what it did at the start, by first.
        folder: what was saved, `FIRST-SECOND` each.
    """

    outcomes: dict[tuple[str, str], Outcome]
    base: dict[str, bool]
    folder: Path


def _state(target: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in denoiser_of(target)[1].state_dict().items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _traces(target: Any) -> bool:
    """Whether a hook is left. FLUX's pipeline itself leaves an empty registry."""
    parts = [vars(part) for part in denoiser_of(target)[1].modules()]
    hooked = any(own["_diffusers_hook"].hooks for own in parts if "_diffusers_hook" in own)
    return hooked or any({"forward", "__deepcopy__"} & set(own) for own in parts)


def run_pairs(family: str, folder: Path, kinds: tuple[str, ...] = tuple(CHANGES)) -> Matrix:
    """Every ordered pair of `kinds`: on, run, saved, off."""
    target = build(family)
    state, made = _state(target), run(target, family)
    matrix = Matrix({}, {}, folder)
    for first in kinds:
        try:
            reports = CHANGES[first](target, family, "first")
        except Exception as error:
            matrix.outcomes |= {(first, second): Outcome(error) for second in kinds}
            reports = []
        if reports:
            held, alone = _state(target), run(target, family)
            for second in kinds:
                outcome = _second(target, family, second, alone, folder / f"{first}-{second}")
                outcome.undone = _same(_state(target), held) and torch.equal(run(target, family), alone)
                matrix.outcomes[first, second] = outcome
        for report in reversed(reports):
            vislr.remove(target, report)
        matrix.base[first] = (
            _same(_state(target), state) and torch.equal(run(target, family), made) and not _traces(target)
        )
    return matrix


def _second(target: Any, family: str, kind: str, alone: torch.Tensor, folder: Path) -> Outcome:
    try:
        reports = CHANGES[kind](target, family, "second")
    except Exception as error:
        return Outcome(error)
    try:
        made = run(target, family)
        vislr.save(target, folder)
        return Outcome(changes=not torch.equal(made, alone), digest=digest(made))
    except Exception as error:
        return Outcome(error)
    finally:
        for report in reversed(reports):
            vislr.remove(target, report)


CLASSES = {
    "UNet2DConditionModel": "unet", "SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux",
    "VisionTransformer": "vit", "ResNet": "conv",
}  # fmt: skip


def restore(folder: Path) -> tuple[Any, str]:
    """(model, family) of a folder of `vislr.save`."""
    target = vislr.load(folder)
    family = CLASSES[type(denoiser_of(target)[1]).__name__]
    if family in DENOISERS:
        target.set_progress_bar_config(disable=True)
    return target, family


def digests(folders: list[Path]) -> Iterator[tuple[str, str]]:
    """(folder's name, digest of what its model makes, or the error)."""
    for folder in folders:
        try:
            yield folder.name, digest(run(*restore(folder)))
        except Exception as error:
            yield folder.name, f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, found in digests(sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())):
        print(name, found, flush=True)
