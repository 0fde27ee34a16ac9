"""The plan of token pruning: which tokens leave where, when they come back, and in which steps, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from vislr.core.errors import ConfigError, hint

CRITERIA = {
    "g-wpr": "weighted page rank of the attention map (AT-EDM)",
    "tome": "the most similar pairs are merged (ToMe)",
    "random": "a new random choice at every call, drawn from seed, timestep, sample and token",
    "stride": "evenly spaced",
}
RECOVERIES = {
    "copy": "the processed value of the most similar kept token (AT-EDM)",
    "update": "its own value when it left, and what the most similar kept token has gained since",
    "zeros": "0",
    "interpolate": "inverse-square-distance mean of the four nearest kept tokens on the grid",
    "cached": "its own value of the last call that kept it; of the first call, a copy",
}
MAPS = ("self", "cross")
SIMILARITIES = ("attention", "symmetric")
GUIDANCES = ("separate", "shared")
# What leaves together. Windows of tokens (SparseViT) would enter here.
UNITS = ("token",)
EARLY, LATE = "early", "late"


@dataclass(frozen=True)
class Cut:
    """A place where tokens leave.

    Attributes:
        after: block after which they leave; its attention ranks them.
        keep: share of the span's image tokens that is there afterwards, above 0, at most 1.
    """

    after: str
    keep: float


@dataclass(frozen=True)
class Span:
    """A stretch of a backbone that some tokens miss.

    Attributes:
        cuts: in the order of the forward; `keep` does not rise from one to the next.
        until: block at whose end the tokens come back; None: they do not (classifiers). The block of
            the only cut itself: tokens leave only inside of its `parts`.
        parts: modules of the first cut's block ("attn1", "attn2", "ff") that already see few tokens.
    """

    cuts: tuple[Cut, ...]
    until: str | None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenPlan:
    """Token pruning of one model; `vislr.apply` puts it on, JSON holds it.

    A call is early where its timestep is at or above `boundary` (denoising-steps-aware pruning, AT-EDM
    section on DSAP); a batch of mixed timesteps counts as its mean.

    Attributes:
        late: spans of late calls, or of all calls.
        early: spans of early calls.
        boundary: in the denoiser's own unit of timesteps; None: every call is late.
        early_share: share of a run's calls that are early, for averages; 0 to 1.
        criterion: one of `CRITERIA`.
        recovery: one of `RECOVERIES`.
        iterations: of the page rank; 1 is the fast path.
        ranking: "self" or "cross": the attention map that is ranked by.
        similarity: "attention" (pruned token's row of the head-averaged map) or "symmetric" (row plus
            column).
        guidance: "separate" masks for every sample, or "shared" by the two halves of the batch
            (classifier-free guidance: unconditional and conditional).
        seed: of "random" and of the cells of "tome".
        unit: what leaves together; "token".
        component: of a pipeline; "": the denoiser.
    """

    late: tuple[Span, ...]
    early: tuple[Span, ...] = ()
    boundary: float | None = None
    early_share: float = 0.0
    criterion: str = "g-wpr"
    recovery: str = "copy"
    iterations: int = 1
    ranking: str = "self"
    similarity: str = "attention"
    guidance: str = "separate"
    seed: int = 0
    unit: str = "token"
    component: str = ""

    def __post_init__(self) -> None:
        for name, choices in (
            ("criterion", CRITERIA),
            ("recovery", RECOVERIES),
            ("ranking", MAPS),
            ("similarity", SIMILARITIES),
            ("guidance", GUIDANCES),
            ("unit", UNITS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(choices)}{_near(value, choices)}")
        if not 1 <= self.iterations <= 100:
            raise ConfigError(f"iterations is {self.iterations}; expected 1 to 100")
        if not 0 <= self.early_share <= 1:
            raise ConfigError(f"early_share is {self.early_share}; expected 0 to 1")
        if self.boundary is None and (self.early or self.early_share):
            raise ConfigError("a plan with an early phase needs the boundary between early and late timesteps")
        if not any((*self.late, *self.early)):
            raise ConfigError("the plan has no span; expected at least one in 'late' or 'early'")
        for span in (*self.late, *self.early):
            _check_span(span)

    def spans(self, phase: str) -> tuple[Span, ...]:
        """The spans of "early" or "late" calls."""
        return self.early if phase == EARLY else self.late

    def phases(self) -> tuple[str, ...]:
        """The phases that calls can be in."""
        return (LATE,) if self.boundary is None else (EARLY, LATE)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        data = dataclasses.asdict(self)
        for phase in (EARLY, LATE):
            data[phase] = [
                {"cuts": list(span["cuts"]), "until": span["until"], "parts": list(span["parts"])}
                for span in data[phase]
            ]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; what it names is only looked up in a model by `apply`.

        Raises:
            ConfigError: an unknown key, a wrong type or an impossible value.
        """
        fields = _keys(cls, data, "the token plan")
        for phase in (EARLY, LATE):
            if phase in fields:
                fields[phase] = tuple(_span(one, f"'{phase}'") for one in _list(fields[phase], f"'{phase}'"))
        return cls(**fields)


def _near(value: Any, choices: Any) -> str:
    return hint(value, choices) if isinstance(value, str) and len(choices) > 2 else ""


def _check_span(span: Span) -> None:
    if not span.cuts:
        raise ConfigError("a span without cuts; expected at least one place where tokens leave")
    keeps = [cut.keep for cut in span.cuts]
    for cut in span.cuts:
        if not 0 < cut.keep <= 1:
            raise ConfigError(f"keep is {cut.keep} after '{cut.after}'; expected above 0 and at most 1")
    if keeps != sorted(keeps, reverse=True):
        raise ConfigError(f"keep rises within a span: {keeps} after {[cut.after for cut in span.cuts]}")
    if len({cut.after for cut in span.cuts}) != len(span.cuts):
        raise ConfigError(f"two cuts after one block: {[cut.after for cut in span.cuts]}")
    if span.until == span.cuts[0].after and (len(span.cuts) > 1 or not span.parts):
        raise ConfigError(f"a span within the one block '{span.until}' needs one cut, and parts that see few tokens")


def _keys(cls: type, data: Any, where: str) -> dict[str, Any]:
    """The entries of `data` as arguments of the dataclass, plain ones checked by type."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is a {type(data).__name__}; expected a mapping")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown key '{key}' in {where}{hint(str(key), fields)}")
    types = {"str": str, "int": int, "float": (int, float), "float | None": (int, float, type(None)),
             "str | None": (str, type(None))}  # fmt: skip
    for name, field in fields.items():
        if name not in data:
            if field.default is dataclasses.MISSING:
                raise ConfigError(f"{where} has no '{name}'")
            continue
        kind: Any = types.get(str(field.type))
        if kind is not None and (not isinstance(data[name], kind) or isinstance(data[name], bool)):
            raise ConfigError(f"'{name}' in {where} is {data[name]!r}; expected {field.type}")
        if isinstance(data[name], float) and data[name] != data[name]:
            raise ConfigError(f"'{name}' in {where} is no number")
    return dict(data)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} is a {type(value).__name__}; expected a list")
    return list(value)


def _span(data: Any, where: str) -> Span:
    fields = _keys(Span, data, f"a span of {where}")
    cuts = tuple(Cut(**_keys(Cut, cut, f"a cut of {where}")) for cut in _list(fields["cuts"], "'cuts'"))
    parts = tuple(_list(fields.get("parts", ()), "'parts'"))
    if not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"'parts' of a span of {where} is {list(parts)!r}; expected names of modules")
    return Span(cuts, fields["until"], parts)
