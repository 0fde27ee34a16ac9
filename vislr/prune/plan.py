"""LayerPlan: which units of a model go, as plain data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from vislr.anatomy.wrapping import original, walk
from vislr.core.errors import ConfigError, hint

SCHEMA = 1
BUDGETS = ("parameters", "flops", "latency")
REMOVALS = ("skip", "identity")


@dataclass(frozen=True)
class LayerPlan:
    """The units that go, and how they were chosen.

    Attributes:
        removed: full module names, in the model's order.
        architecture: class of the model that it was made for.
        structure: `structure_hash` of that model; "" applies to any model that has the units.
        removal: "skip": a removed branch gives 0. "identity": attention and feed-forward become the
            identity (the reference code of HierarchicalPrune), blocks and resnets are skipped all the same.
        component: where `vislr.apply` puts it; "": the denoiser.
        criterion: what chose the units.
        ratio: share of the budget that was asked for, in [0, 1]; None: the units were given.
        budget: what the ratio is of: "parameters", "flops" or "latency".
        saved, total: of the budget: what goes, and what the model had (parameters, FLOPs a forward, or
            nanoseconds); None where it was not counted.
        scores: unit -> score of its removal, as the criterion defines it; higher is worse to remove.
        settings: what the scores depend on: seeds, samples, granularity, hash of the calibration data.
        base: `content_hash` of the weights that were scored; "" where none were read.
        schema: of this layout.
    """

    removed: tuple[str, ...]
    architecture: str = ""
    structure: str = ""
    removal: str = "skip"
    component: str = ""
    criterion: str = ""
    ratio: float | None = None
    budget: str = "parameters"
    saved: int | None = None
    total: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if isinstance(self.removed, str) or not all(isinstance(name, str) and name for name in self.removed):
            raise ConfigError(f"removed is {self.removed!r}; expected names of units")
        object.__setattr__(self, "removed", tuple(self.removed))
        if len(set(self.removed)) != len(self.removed):
            twice = next(name for name in self.removed if self.removed.count(name) > 1)
            raise ConfigError(f"the plan removes '{twice}' twice")
        for key, value, choices in (("removal", self.removal, REMOVALS), ("budget", self.budget, BUDGETS)):
            if value not in choices:
                raise ConfigError(f"the plan's {key} is {value!r}{hint(str(value), choices)}")
        for key in ("architecture", "structure", "component", "criterion", "base"):
            if not isinstance(getattr(self, key), str):
                raise ConfigError(f"the plan's {key} is {getattr(self, key)!r}; expected a text")
        if self.schema != SCHEMA:
            raise ConfigError(f"the plan has schema {self.schema!r}; this vislr knows {SCHEMA}")
        check_ratio(self.ratio)
        for key in ("saved", "total"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ConfigError(f"the plan's {key} is {value!r}; expected a count")
        for key in ("scores", "settings"):
            if not isinstance(getattr(self, key), Mapping):
                raise ConfigError(f"the plan's {key} is a {type(getattr(self, key)).__name__}; expected a table")
        for name, score in self.scores.items():
            if not isinstance(score, (int, float)) or isinstance(score, bool) or not math.isfinite(score):
                raise ConfigError(f"the plan's score of '{name}' is {score!r}; expected a finite number")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return {
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "removed": list(self.removed),
            "scores": dict(self.scores),
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, data: Any) -> LayerPlan:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: unknown or missing keys, or a value of the wrong type.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"a plan is a table, not a {type(data).__name__}")
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise ConfigError(f"a plan has no '{key}'{hint(str(key), known)}")
        if not isinstance(data.get("removed"), (list, tuple)):
            raise ConfigError(f"the plan's removed is {data.get('removed')!r}; expected a list of names")
        return cls(**{**data, "removed": tuple(data["removed"])})

    def __str__(self) -> str:
        share = f" = {self.saved / self.total:.1%} of {self.budget}" if self.saved is not None and self.total else ""
        return f"{self.criterion or 'plan'} for {self.architecture}: {len(self.removed)} units{share}"


def check_ratio(ratio: float | None) -> None:
    """Raises ConfigError unless 0 <= ratio <= 1 (or None)."""
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if ratio is not None and not (number and 0 <= ratio <= 1):
        raise ConfigError(f"ratio is {ratio!r}; expected a share from 0 to 1")


def structure_hash(module: nn.Module) -> str:
    """sha256 over names and shapes of all parameters and buffers, without adapters; no value is read."""
    shapes = {}
    for path, outer in walk(module):
        layer = original(outer)
        for name, value in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            shapes[f"{path}.{name}" if path else name] = list(value.shape)
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()
