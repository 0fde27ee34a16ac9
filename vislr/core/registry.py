"""What `vislr.apply` can put on a model: one line per kind, nothing imported until it is used.

A handler is a module with two functions::

    attach(module, change, name) -> Attached     # changes the module; all or nothing
    detach(module, attached) -> None             # exact, or UndoError

and two more where they are needed: `attach_to(target)` gives the `attach` of a change that reads the pipeline
beside its denoiser; `account(module, change)` gives the FLOPs before and after, and notes, of a change on the
module whose calls differ over a run.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from vislr.core.errors import ConfigError, hint


@dataclass(frozen=True)
class Kind:
    """A kind of change.

    Attributes:
        name: short name, as written in records and files.
        config: "module:Class" of the config or plan.
        handler: module with `attach` and `detach`.
        structural: whether the change is part of the component's saved structure.
        description: one line for listings.
        settles: whether it makes earlier changes part of the weights: they stay below it.
    """

    name: str
    config: str
    handler: str
    structural: bool
    description: str
    settles: bool = False


@dataclass
class Attached:
    """What a handler did, and what it needs to take it back.

    Attributes:
        sites: full names of the modules touched.
        change: the change with everything resolved, as plain JSON data.
        undo: whatever `detach` needs; None if the change cannot be taken back.
        notes: lines for the report.
        files: name -> content of what a folder must keep so that the change can be replayed.
    """

    sites: tuple[str, ...]
    change: dict[str, Any]
    undo: Any = None
    notes: tuple[str, ...] = field(default=())
    files: dict[str, bytes] = field(default_factory=dict)


_KINDS = {
    kind.name: kind
    for kind in (
        Kind("convlora", "vislr.adapters.conv_lora:ConvLoraConfig", "vislr.adapters.inject", False,
             "low-rank reshaped updates of convs and linears (ConvLoRA)"),
        Kind("flora", "vislr.adapters.flora:FloraConfig", "vislr.adapters.inject", False,
             "Tucker updates of convs and linears (FLoRA)"),
        Kind("sara", "vislr.adapters.sara:SaraConfig", "vislr.adapters.inject", False,
             "sparse tuning in place of the entries nearest to zero (SaRA)"),
        Kind("adabn", "vislr.adapters.adabn:AdaBnConfig", "vislr.adapters.inject", False,
             "BatchNorm statistics of a target's images (AdaBN)"),
        Kind("qalora", "vislr.adapters.qalora:QALoraConfig", "vislr.adapters.inject", False,
             "low-rank updates merged before quantising, and step sizes (EfficientDM)"),
        Kind("tokens", "vislr.tokens.plan:TokenPlan", "vislr.tokens.handler", False,
             "fewer tokens between places in a backbone (AT-EDM, ToMe)"),
        Kind("cache", "vislr.cache.plan:CachePlan", "vislr.cache.handler", False,
             "features used again in later denoising steps (DeepCache, Block Caching)"),
        Kind("compose", "vislr.compose.plan:ComposePlan", "vislr.compose.handler", False,
             "several adapters in one image (merge, Switch, Composite, CMLoRA)"),
        Kind("file", "vislr.formats.live:FileChange", "vislr.formats.live", False,
             "an adapter out of a file of another tool"),
        Kind("fuse", "vislr.formats.fusing:FusePlan", "vislr.formats.fusing", False,
             "adapters made part of the weights, their files kept", settles=True),
        Kind("peft", "peft:PeftConfig", "vislr.adapters.inject", False,
             "any adapter config of peft: LoRA, DoRA, LoHa, LoKr, OFT, ..."),
        Kind("layers", "vislr.prune.plan:LayerPlan", "vislr.prune.removal", True,
             "removal of residual units (LAPTOP-Diff, HierarchicalPrune)"),
        Kind("quant", "vislr.quantize.plan:QuantPlan", "vislr.quantize.handler", True,
             "weights and inputs of linears and convs as integers (EfficientDM, NF4)"),
    )
}  # fmt: skip


def kinds() -> list[Kind]:
    """Every kind of change, in the order in which an object is matched against them."""
    return list(_KINDS.values())


def get_kind(name: str) -> Kind:
    """The kind of this name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in _KINDS:
        raise ConfigError(f"no kind of change is called '{name}'{hint(name, _KINDS)}")
    return _KINDS[name]


def load(reference: str) -> Any:
    """`"package.module:Name"` -> the object."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def handler_of(kind: Kind) -> ModuleType:
    """The module that applies this kind."""
    return importlib.import_module(kind.handler)


def kind_of(change: object) -> Kind:
    """The kind whose config class `change` is an instance of; the most exact one first.

    Raises:
        ConfigError: `change` is no config and no plan.
    """
    bases = {f"{base.__module__}:{base.__name__}" for base in type(change).__mro__}
    for kind in _KINDS.values():
        if kind.name != "peft" and kind.config in bases:
            return kind
    if any(base.__name__ == "PeftConfig" and base.__module__.startswith("peft.") for base in type(change).__mro__):
        return _KINDS["peft"]
    known = ", ".join(kind.config.partition(":")[2] for kind in _KINDS.values())
    raise ConfigError(f"cannot apply a {type(change).__name__}; expected one of {known}")
