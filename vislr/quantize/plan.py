"""QuantPlan: which layers are kept in how many bits, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vislr.core.errors import ConfigError, hint
from vislr.core.quantizing import check_bits
from vislr.quantize.weights import FORMATS, OBSERVERS, default_symmetric

SCHEMA = 1
# Bits of an input that is left as it is.
WHOLE = 16
INPUTS = ("none", "dynamic", "static", "timestep")
ZEROS = ("auto", "always", "never")


@dataclass(frozen=True)
class QuantPlan:
    """Bits of every quantised layer, and where the step sizes of their inputs come from.

    Attributes:
        layers: full module name -> (bits of the weight, bits of the input); 16: the input stays as it is.
            Layers that are not named stay in high precision.
        inputs: "none": weights only. "dynamic": a step size for every token of a linear and every sample of a
            conv, from the call. "static": one for each layer, from `ranges`. "timestep": one for each layer and
            entry of `timesteps` (TALSQ, EfficientDM equation 9), from `ranges` at first, then trained.
        ranges: layer -> (low, high) of its input, as calibrated; for "static" and "timestep".
        timesteps: ascending, in the denoiser's own unit; for "timestep".
        group: entries of a weight's row that share a scale; None: the row. For weights only.
        format: of weights: "uniform", or "nf4" (4 bits, weights only).
        observer: how scales of weights are chosen: "minmax", "mse" or "percentile".
        zeros: whether weights have zero points: "auto": below 8 bits; "always", "never".
        architecture: class of the model that it was made for; "": any that has the layers.
        component: where `vislr.apply` puts it; "": the denoiser.
        criterion: what chose the bits.
        scores: layer -> error that quantising it alone makes, where it was measured.
        settings: what the figures depend on: prompts, trajectories, steps, seeds.
        base: `content_hash` of the weights; "" where none were read.
        schema: of this layout.
    """

    layers: Mapping[str, tuple[int, int]]
    inputs: str = "none"
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()
    group: int | None = None
    format: str = "uniform"
    observer: str = "minmax"
    zeros: str = "auto"
    architecture: str = ""
    component: str = ""
    criterion: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for key in ("layers", "ranges", "scores", "settings"):
            if not isinstance(getattr(self, key), Mapping):
                raise ConfigError(f"the plan's {key} is a {type(getattr(self, key)).__name__}; expected a table")
        for key, choices in (("inputs", INPUTS), ("format", FORMATS), ("observer", OBSERVERS), ("zeros", ZEROS)):
            if getattr(self, key) not in choices:
                raise ConfigError(f"the plan's {key} is {getattr(self, key)!r}{hint(str(getattr(self, key)), choices)}")
        for key in ("architecture", "component", "criterion", "base"):
            if not isinstance(getattr(self, key), str):
                raise ConfigError(f"the plan's {key} is {getattr(self, key)!r}; expected a text")
        if self.schema != SCHEMA:
            raise ConfigError(f"the plan has schema {self.schema!r}; this vislr knows {SCHEMA}")
        if not self.layers:
            raise ConfigError("the plan quantises no layer; expected at least one in 'layers'")
        object.__setattr__(self, "layers", {name: self._bits(name, bits) for name, bits in self.layers.items()})
        object.__setattr__(self, "ranges", {name: self._range(name, pair) for name, pair in self.ranges.items()})
        object.__setattr__(self, "timesteps", tuple(_number("timesteps", time) for time in self.timesteps))
        object.__setattr__(self, "scores", {name: _number("scores", score) for name, score in self.scores.items()})
        self._check_whole()

    def _bits(self, name: str, bits: Any) -> tuple[int, int]:
        if isinstance(bits, str) or not hasattr(bits, "__len__") or len(bits) != 2:
            raise ConfigError(f"the plan's bits of '{name}' are {bits!r}; expected weight and input")
        check_bits(bits[0], f"the plan's bits of the weight of '{name}'")
        if bits[1] != WHOLE:
            check_bits(bits[1], f"the plan's bits of the input of '{name}'")
        return bits[0], bits[1]

    def _range(self, name: str, pair: Any) -> tuple[float, float]:
        if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
            raise ConfigError(f"the plan's range of '{name}' is {pair!r}; expected low and high")
        low, high = (_number(f"range of '{name}'", value) for value in pair)
        if not low <= high:
            raise ConfigError(f"the plan's range of '{name}' is {low} to {high}; expected low, then high")
        return low, high

    def _check_whole(self) -> None:
        reads = [name for name, (_, bits) in self.layers.items() if bits != WHOLE]
        if (self.inputs == "none") != (not reads):
            raise ConfigError(f"inputs is '{self.inputs}' and {len(reads)} layers have an input of fewer bits")
        if self.inputs in ("static", "timestep"):
            lacking = [name for name in reads if name not in self.ranges]
            if lacking:
                raise ConfigError(f"the plan has no range for the input of '{lacking[0]}'; calibrate first")
        ascending = all(a < b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        if (self.inputs == "timestep") != bool(self.timesteps) or not ascending:
            raise ConfigError("timesteps ascend and belong to inputs 'timestep', and to nothing else")
        if self.group is not None:
            if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 2 or self.group % 2:
                raise ConfigError(f"the plan's group is {self.group!r}; expected an even number or null")
            if self.inputs != "none":
                raise ConfigError("groups of a weight's entries have scales of their own only where inputs is 'none'")
        if self.format == "nf4" and (self.inputs != "none" or {bits for bits, _ in self.layers.values()} != {4}):
            raise ConfigError("format 'nf4' is for weights of 4 bits, with inputs 'none'")

    def symmetric(self, bits: int) -> bool:
        """Whether weights of so many bits have the middle code as their zero."""
        if self.format == "nf4" or self.zeros == "never":
            return True
        return self.zeros == "auto" and default_symmetric(bits)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return {
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "layers": {name: list(bits) for name, bits in self.layers.items()},
            "ranges": {name: list(pair) for name, pair in self.ranges.items()},
            "timesteps": list(self.timesteps),
            "scores": dict(self.scores),
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, data: Any) -> QuantPlan:
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
        if not isinstance(data.get("layers"), Mapping):
            raise ConfigError(f"the plan's layers are {data.get('layers')!r}; expected a table of bits by name")
        if not isinstance(data.get("timesteps", ()), (list, tuple)):
            raise ConfigError(f"the plan's timesteps are {data['timesteps']!r}; expected a list")
        return cls(**data)

    def __str__(self) -> str:
        kinds: dict[str, int] = {}
        for weights, inputs in self.layers.values():
            kind = f"W{weights}" + ("" if inputs == WHOLE else f"A{inputs}")
            kinds[kind] = kinds.get(kind, 0) + 1
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        return f"{self.criterion or 'plan'} for {self.architecture or 'any model'}: {counts}, inputs {self.inputs}"


def _number(what: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"the plan's {what} holds {value!r}; expected a finite number")
    return value
