"""The plan of a composition: which adapters make a picture together, and how, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from vislr.cache.plan import Refresh
from vislr.core.arguments import plain_data
from vislr.core.errors import ConfigError, hint
from vislr.core.plain import from_plain

METHODS = {
    "merge": "the weighted sum of all adapters at once (LoRA Merge; diffusers' set_adapters)",
    "cat": "the same sum as one adapter with all ranks side by side",
    "svd": "the sum, cut to a rank",
    "ties": "largest entries of each, signs elected, mean of those that agree (TIES)",
    "dare": "random entries of each, scaled up, summed (DARE)",
    "dare_ties": "random entries of each, signs elected",
    "magnitude": "largest entries of each, summed",
    "switch": "one adapter at a time, in turns of some steps (LoRA Switch)",
    "composite": "the mean of the predictions that every adapter makes alone (LoRA Composite)",
    "cmlora": "Composite with a leading adapter by frequency, and a cache for the others (CMLoRA)",
    "w_switch": "Switch with turns as long as the prompt needs them (W-Switch)",
    "w_composite": "Composite with weights by the prompt (W-Composite)",
}
# Several adapters become one change of each weight, before the first step.
MERGED = ("cat", "svd", "ties", "dare", "dare_ties", "magnitude")
TURNS = ("switch", "w_switch")
MIXED = ("composite", "w_composite", "cmlora")
PASSES = ("auto", "batched", "separate")
MODES = ("offline", "online")
LOW_PHASES = ("lo", "all_but_first")
DECAYS = ("none", "geometric")


@dataclass(frozen=True)
class LayerWeights:
    """Other weights on some layers.

    Attributes:
        pattern: of layer names, with `*` and `?`.
        weights: one an adapter, in the plan's order; they take the place of the plan's own. Of the merged
            methods a weight may be a list, one number an input of the layer (ZipLoRA's mergers); zeros and
            ones choose an adapter for a layer (as K-LoRA does).
    """

    pattern: str
    weights: tuple[float | tuple[float, ...], ...]


@dataclass(frozen=True)
class Merging:
    """How adapters become one change; of the merged methods and, `layers`, of "merge".

    Attributes:
        density: share of entries that "ties", "dare", "dare_ties" and "magnitude" keep, in (0, 1].
        rank: largest rank of the result on a layer; None: whole ("svd": the largest rank of the adapters).
        seed: of the entries that "dare" and "dare_ties" drop.
        layers: weights layer by layer; of several patterns that fit, the first counts.
    """

    density: float = 0.5
    rank: int | None = None
    seed: int = 0
    layers: tuple[LayerWeights, ...] = ()


@dataclass(frozen=True)
class Switching:
    """Whose turn it is.

    Attributes:
        every: steps of a turn (tau of LoRA Switch).
        off_by_one: as the published code runs: the first adapter's first turn is one step longer.
        shares: of a run, one an adapter, summing to 1; (): turns of equal length. Turns are spread over
            the run so that each adapter has its share at every point.
        last: the adapter of the last steps; None: whoever is due.
        last_steps: how many these are.
    """

    every: int = 5
    off_by_one: bool = False
    shares: tuple[float, ...] = ()
    last: str | None = None
    last_steps: int = 5


@dataclass(frozen=True)
class Dominance:
    """Who leads in CMLoRA, and by how much (sections 1.2 to 1.4 of the specification; arXiv 2502.04923).

    Attributes:
        high, low: adapters that lead while high, or low, frequencies are made.
        mode: "offline": the high phase ends at `boundary`; "online": it lasts while H_eta of the latent is
            at least `threshold`.
        boundary: share of the run that is the high phase (120 of 220 steps).
        threshold, eta, log_amplitude: of the online mode, as in `vislr.compose.high_share`.
        low_phase: "lo": the low adapters lead in turn; "all_but_first": everyone but the first, as the
            published code runs.
        beta: weight of the leading adapter over that of another; None: N - 0.5.
        decay: "geometric": the j-th refresh takes 0.5^j off beta, which stays at least 1.
    """

    high: tuple[str, ...] = ()
    low: tuple[str, ...] = ()
    mode: str = "offline"
    boundary: float = 6 / 11
    threshold: float = 0.4
    eta: float = 0.2
    log_amplitude: bool = False
    low_phase: str = "lo"
    beta: float | None = None
    decay: str = "none"


@dataclass(frozen=True)
class ComposePlan:
    """Several adapters in one picture; `vislr.apply` puts it on a pipeline, JSON holds it.

    While a plan is on, adapters that it does not name are off. With one adapter every method is that
    adapter, bit for bit, and nothing is cached.

    Attributes:
        adapters: names on the pipeline; their order is the order of turns and of the lead.
        weights: of each adapter's delta, 1 as trained.
        method: one of `METHODS`.
        text_adapters: adapters that are on in the text encoders, at their weights. Prompts are encoded once,
            before the first step, whatever is switched later. None: all.
        passes: several adapters in one forward ("batched"), one after another ("separate"), or batched
            where every kind allows it, until memory runs out ("auto").
        merging, switching, dominance: of the methods that they concern.
        mix: of Composite and W-Composite: coefficients of the predictions, summing to 1; (): 1/N each.
        cache: keep each adapter's deep features and use them again between refreshes: the name of the
            boundary (of a UNet, the up block that they enter; of a transformer, the block before which
            cached blocks end), or "" for the default of `vislr.cache.region_at`. None: no cache.
        refresh: steps at which CMLoRA's lead passes on and the new leader's features are computed anew, or
            everybody's in Composite. At every step: nothing is ever used again.
        steps: of a run, for the averages of the report, and for bare denoisers without a scheduler.
        component: of a pipeline; "": the denoiser.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...] = ()
    method: str = "merge"
    text_adapters: tuple[str, ...] | None = None
    passes: str = "auto"
    merging: Merging = field(default_factory=Merging)
    switching: Switching = field(default_factory=Switching)
    mix: tuple[float, ...] = ()
    dominance: Dominance = field(default_factory=Dominance)
    cache: str | None = None
    refresh: Refresh = field(default_factory=lambda: Refresh(edges=2, middle=3))
    steps: int = 25
    component: str = ""

    def __post_init__(self) -> None:
        names = self.adapters
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"adapters are {list(names)}; expected at least one, each once")
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * len(names))
        if len(self.weights) != len(names) or not all(math.isfinite(weight) for weight in self.weights):
            raise ConfigError(
                f"{len(names)} adapters and weights {list(self.weights)}; expected as many finite numbers"
            )
        for what, value, choices in (
            ("method", self.method, tuple(METHODS)),
            ("passes", self.passes, PASSES),
            ("mode", self.dominance.mode, MODES),
            ("low_phase", self.dominance.low_phase, LOW_PHASES),
            ("decay", self.dominance.decay, DECAYS),
        ):
            if value not in choices:
                raise ConfigError(f"{what} is '{value}'; expected one of {', '.join(choices)}{hint(value, choices)}")
        for name in self.text_adapters or ():
            _known(name, names, "text_adapters")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; expected at least 1")
        self._check_merging()
        self._check_switching()
        self._check_mixing()

    def _check_merging(self) -> None:
        merging = self.merging
        if not 0 < merging.density <= 1 or (merging.rank is not None and merging.rank < 1):
            raise ConfigError(f"density {merging.density}, rank {merging.rank}; expected in (0, 1], and 1 or more")
        for layer in merging.layers:
            if len(layer.weights) != len(self.adapters):
                raise ConfigError(
                    f"'{layer.pattern}' has {len(layer.weights)} weights for {len(self.adapters)} adapters"
                )
            if self.method == "merge" and any(isinstance(weight, tuple) for weight in layer.weights):
                raise ConfigError(f"'{layer.pattern}' has weights by input, which 'merge' cannot use; choose 'cat'")
        if merging.layers and self.method not in ("merge", *MERGED):
            raise ConfigError(f"weights by layer are of merging; the method is '{self.method}'")

    def _check_switching(self) -> None:
        turns, count = self.switching, len(self.adapters)
        if turns.every < 1 or turns.last_steps < 0:
            raise ConfigError(f"every {turns.every}, last_steps {turns.last_steps}; expected at least 1 and 0")
        if turns.shares and (len(turns.shares) != count or min(turns.shares) < 0 or not _one(turns.shares)):
            raise ConfigError(f"shares are {list(turns.shares)}; expected {count}, none negative, summing to 1")
        if turns.last is not None:
            _known(turns.last, self.adapters, "last")

    def _check_mixing(self) -> None:
        lead, count = self.dominance, len(self.adapters)
        if self.mix and (len(self.mix) != count or not _one(self.mix)):
            raise ConfigError(f"mix is {list(self.mix)}; expected {count} coefficients that sum to 1")
        if self.method == "cmlora" and sorted((*lead.high, *lead.low)) != sorted(self.adapters):
            raise ConfigError(
                f"high {list(lead.high)} and low {list(lead.low)} are not {list(self.adapters)}, each once"
            )
        if self.method == "cmlora" and not lead.high:
            raise ConfigError("no adapter leads in the high phase; expected at least one in 'high'")
        if not 0 <= lead.boundary <= 1 or not 0 <= lead.eta <= 1:
            raise ConfigError(f"boundary {lead.boundary}, eta {lead.eta}; expected shares from 0 to 1")
        if lead.beta is not None and not lead.beta > 0:
            raise ConfigError(f"beta is {lead.beta}; expected above 0")
        if self.cache is not None and self.method not in MIXED:
            raise ConfigError(
                f"'{self.method}' runs one forward a step; put a cache plan (vislr.cache) beside the composition"
            )

    @property
    def alone(self) -> bool:
        """Whether there is one adapter: then nothing is composed."""
        return len(self.adapters) == 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return plain_data(self)

    @classmethod
    def from_dict(cls, data: Any) -> ComposePlan:
        """The inverse of `to_dict`; names are only looked up on a pipeline by `apply`.

        Raises:
            ConfigError: an unknown key, a wrong type or an impossible value.
        """
        return from_plain(cls, data, "the compose plan")


def _one(values: tuple[float, ...]) -> bool:
    return all(math.isfinite(value) for value in values) and abs(math.fsum(values) - 1) < 1e-6


def _known(name: str, names: tuple[str, ...], what: str) -> None:
    if name not in names:
        raise ConfigError(f"{what} names '{name}', which is none of the plan's adapters{hint(name, names)}")
