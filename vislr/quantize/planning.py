"""Plans: which layers get how many bits, and the ranges of their inputs from calibration."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from vislr.anatomy import denoiser_of, describe
from vislr.anatomy.wrapping import unwrapped, walk
from vislr.core.errors import ModelError, TargetError, hint
from vislr.core.hashing import content_hash
from vislr.quantize.handler import quantizable
from vislr.quantize.layers import quant_layers
from vislr.quantize.observers import RangeObserver
from vislr.quantize.plan import WHOLE, QuantPlan
from vislr.quantize.trajectories import Calibration, Trajectories, calibrate
from vislr.quantize.weights import check_observer

# Convs beside a residual branch and convs that halve a map: what EfficientDM's code leaves in high precision.
_SHORTCUTS = re.compile(r"(.*\.)?(conv_shortcut|skip_connection|downsample(rs)?(\..*)?)")
# Bits of the first and last layers.
ENDS = 8
Bits = Mapping[str, tuple[int, int] | None]


class Classes(NamedTuple):
    """A model's layers by what quantising does to them.

    Attributes:
        body: at the wanted bits.
        ends: first and last layers, time embedding: 8 bits, and no low-rank branch in EfficientDM.
        whole: left as they are.
    """

    body: tuple[str, ...]
    ends: tuple[str, ...]
    whole: tuple[str, ...]


def layer_classes(module: nn.Module) -> Classes:
    """EfficientDM's classes, read off the model's anatomy: stem and head are the ends.

    Of a model that no reader knows, the first and the last layer are the ends.
    """
    module = unwrapped(module)
    layers = {*quantizable(module), *quant_layers(module)}
    names = [name for name, _ in walk(module) if name in layers]
    whole = [name for name in names if _SHORTCUTS.fullmatch(name)]
    try:
        stages = {site.name: site.stage for site in describe(module).sites}
        ends = [name for name in names if stages.get(name) in ("stem", "head")]
    except ModelError:
        ends = [names[0], names[-1]] if names else []
    ends = [name for name in ends if name not in whole]
    taken = {*whole, *ends}
    return Classes(tuple(name for name in names if name not in taken), tuple(ends), tuple(whole))


def assigned(
    module: nn.Module, weights: int, inputs: int, bits: Bits | None = None, classes: Classes | None = None
) -> dict[str, tuple[int, int]]:
    """Bits of every layer: the wanted ones, 8 at the ends, none on shortcuts; patterns stand above that.

    Args:
        weights, inputs: bits of weights and inputs; inputs 16: weights alone.
        bits: glob over names -> (weight, input), or None: stays as it is. Later patterns win.
        classes: of the layers; None: `layer_classes`.

    Raises:
        TargetError: a pattern fits no layer, or nothing is left to quantise.
    """
    classes = classes or layer_classes(module)
    end = ENDS if inputs != WHOLE else WHOLE
    chosen: dict[str, tuple[int, int] | None] = dict.fromkeys(classes.body, (weights, inputs))
    chosen |= dict.fromkeys(classes.ends, (ENDS, end)) | dict.fromkeys(classes.whole, None)
    names = quantizable(unwrapped(module))
    for pattern, wanted in (bits or {}).items():
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise TargetError(f"'{pattern}' fits no layer that can be quantised{hint(pattern, names)}")
        chosen |= dict.fromkeys(fitting, None if wanted is None else (wanted[0], wanted[1]))
    layers = {name: pair for name in names if (pair := chosen.get(name)) is not None}
    if not layers:
        raise TargetError(f"nothing of this {type(module).__name__} is left to quantise")
    return layers


def weight_only_plan(
    target: Any, bits: int = 4, *, group: int | None = 64, format: str = "uniform", observer: str = "minmax",
    layers: Bits | None = None, ends: bool = False,
) -> QuantPlan:  # fmt: skip
    """Weights alone in few bits: INT8, INT4 and less with groups, or NF4. Needs no calibration and no weights.

    Args:
        target: a pipeline or module; may lie on meta.
        group: entries that share a scale.
        format: "uniform" or "nf4".
        layers: as `bits` of `assigned`; the input's bits are 16.
        ends: also the first and last layers, in 8 bits (in NF4: in NF4).
    """
    module = unwrapped(denoiser_of(target)[1])
    classes = layer_classes(module)
    chosen = assigned(module, bits, WHOLE, layers, classes)
    if not ends:
        chosen = {name: pair for name, pair in chosen.items() if name not in classes.ends}
    elif format == "nf4":
        chosen = dict.fromkeys(chosen, (bits, WHOLE))
    return QuantPlan(
        chosen, group=group, format=format, observer=observer, architecture=type(module).__name__,
        criterion=f"{format} weight-only", base=_base(module),
    )  # fmt: skip


def ptq_plan(
    target: Any,
    weights: int = 8,
    activations: int = 8,
    *,
    source: Trajectories | Sequence[Mapping[str, Any]] | None = None,
    inputs: str = "static",
    observer: str = "minmax",
    input_observer: str = "mse",
    bits: Bits | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> QuantPlan:
    """Weights and inputs in few bits, without training.

    Args:
        target: a pipeline; or a module, with batches as `source`.
        weights, activations: bits.
        source: trajectories of the pipeline's own (default: 8 of 20 steps), or batches of keyword arguments. Not used
            by inputs "dynamic".
        inputs: "static", "timestep" or "dynamic", as in `QuantPlan`.
        observer, input_observer: "minmax", "mse" or "percentile", of weights and of inputs.
        bits: as in `assigned`.
        folder: where calibration keeps its state.

    Raises:
        TargetError, ConfigError, DataError: as `assigned` and `calibrate`.
    """
    check_observer(observer)
    check_observer(input_observer)
    module = unwrapped(denoiser_of(target)[1])
    layers = assigned(module, weights, activations, bits)
    settings: dict[str, Any] = {"weights": weights, "activations": activations, "input observer": input_observer}
    seen = Calibration({})
    if inputs != "dynamic":
        source = Trajectories() if source is None else source
        names = [name for name, pair in layers.items() if pair[1] != WHOLE]
        seen = calibrate(target, names, source, folder=folder, progress=progress)
        if isinstance(source, Trajectories):
            settings |= {
                "prompts": list(source.prompts), "trajectories": source.count, "steps": source.steps,
                "guidance": source.guidance, "seed": source.seed,
            }  # fmt: skip
    return QuantPlan(
        layers,
        inputs=inputs,
        ranges=ranges_of(seen.observers, layers, input_observer),
        timesteps=seen.timesteps if inputs == "timestep" else (),
        observer=observer,
        architecture=type(module).__name__,
        criterion="ptq",
        settings=settings,
        base=_base(module),
    )


def ranges_of(
    observers: Mapping[str, RangeObserver], layers: Mapping[str, tuple[int, int]], method: str
) -> dict[str, tuple[float, float]]:
    """Layer -> range of its input at its bits.

    Raises:
        DataError: a layer was never called.
    """
    return {name: one.range(method, layers[name][1]) for name, one in observers.items()}


def efficientdm_plan(target: Any, weights: int = 4, activations: int = 8, **options: Any) -> QuantPlan:
    """EfficientDM's plan: TALSQ step sizes for inputs, its layer classes, what `vislr.train.efficientdm` fine-tunes.

    Args:
        target: a pipeline.
        options: of `ptq_plan`; `source` says the timesteps of the step sizes by its scheduler and steps.
    """
    from dataclasses import replace

    plan = ptq_plan(target, weights, activations, inputs="timestep", **options)
    return replace(plan, criterion="efficientdm")


def _base(module: nn.Module) -> str:
    on_meta = any(p.device.type == "meta" for p in module.parameters())
    return "" if on_meta else content_hash(module.state_dict())
