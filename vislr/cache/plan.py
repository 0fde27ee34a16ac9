"""The plan of feature reuse: which stretches of a denoiser are computed in which steps, as plain data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from vislr.core.arguments import plain_data
from vislr.core.errors import ConfigError
from vislr.core.plain import from_plain


@dataclass(frozen=True)
class Refresh:
    """The steps of a run in which something is computed anew; in the others it is used again.

    One of three forms; step 0 is in all of them.

    Attributes:
        every: uniform: steps 0, k, 2k, ...; 1 is every step.
        edges, middle: non-uniform (CMLoRA's c1 and c2): every `edges`-th step in the first 0.375 and the
            last 0.125 of a run, every `middle`-th between; each stretch starts anew at its own first step.
        chosen, of: these steps of a run of `of` steps; a run of another length has them at the same
            fractions.
    """

    every: int = 0
    edges: int = 0
    middle: int = 0
    chosen: tuple[int, ...] = ()
    of: int = 0

    def __post_init__(self) -> None:
        forms = (self.every > 0, self.edges > 0 and self.middle > 0, bool(self.chosen) and self.of > 0)
        numbers = (self.every, self.edges, self.middle, self.of, *self.chosen)
        if sum(forms) != 1 or min(numbers) < 0 or (self.edges > 0) != (self.middle > 0):
            raise ConfigError(
                f"a refresh is 'every', or 'edges' and 'middle', or 'chosen' and 'of', from 1 on; got {self}"
            )
        if self.chosen and (list(self.chosen) != sorted(set(self.chosen)) or self.chosen[-1] >= self.of):
            raise ConfigError(f"chosen steps rise from 0 to below {self.of}; got {list(self.chosen)}")

    def steps(self, total: int) -> tuple[int, ...]:
        """The steps of a run of `total` steps, rising from 0."""
        if self.every:
            return tuple(range(0, total, self.every))
        if self.edges:
            first, second = int(0.375 * total), int(0.875 * total)
            parts = (range(0, first, self.edges), range(first, second, self.middle), range(second, total, self.edges))
            # Very short runs have no first stretch.
            return tuple(sorted({0, *itertools.chain(*parts)}))
        return tuple(sorted({0, *(step * total // self.of for step in self.chosen)}))

    @property
    def always(self) -> bool:
        """Whether every step of every run is in it: nothing is used again."""
        return (
            self.every == 1 or (self.edges == 1 and self.middle == 1) or (self.of > 0 and len(self.chosen) == self.of)
        )


@dataclass(frozen=True)
class Region:
    """A stretch of a denoiser whose result is kept.

    Attributes:
        first, last: names of its first and last module in the order of the forward. One module alone:
            what it adds to its input is kept (its output, where shapes differ). Blocks of a transformer:
            what all of them add. A UNet from a down block to an up block: what enters the next up block.
        refresh: when it is computed.
    """

    first: str
    last: str
    refresh: Refresh


@dataclass(frozen=True)
class CachePlan:
    """Feature reuse between the denoising steps of one model; `vislr.apply` puts it on, JSON holds it.

    Attributes:
        regions: at least one; they do not overlap.
        steps: of a run, for the averages of the report, and for bare denoisers without a scheduler.
        criterion: what chose it ("interval", "measured").
        component: of a pipeline; "": the denoiser.
    """

    regions: tuple[Region, ...]
    steps: int = 25
    criterion: str = "interval"
    component: str = ""

    def __post_init__(self) -> None:
        if not self.regions:
            raise ConfigError("the cache plan has no region; expected at least one")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; expected at least 1")
        names = [(region.first, region.last) for region in self.regions]
        if len(set(names)) != len(names):
            raise ConfigError(f"a region is named twice: {sorted(names)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return plain_data(self)

    @classmethod
    def from_dict(cls, data: Any) -> CachePlan:
        """The inverse of `to_dict`; names are only looked up in a model by `apply`.

        Raises:
            ConfigError: an unknown key, a wrong type or an impossible value.
        """
        return from_plain(cls, data, "the cache plan")
