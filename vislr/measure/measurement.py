"""A figure with everything needed to judge it, and the three kinds of interval that figures carry."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# Resamples of a bootstrap: the ends of a 95 % interval then move by about a percent of its width.
RESAMPLES = 1000


@dataclass(frozen=True)
class Measurement:
    """One measured figure.

    Attributes:
        value: the figure.
        interval: the 95 % interval (low, high), or None for a count without chance.
        n: how many samples (images, rounds, inputs) the value rests on.
        seed: of every random draw that was made, or None if none was.
        unit: "s", "bytes", "ratio", "KID", ...
        how: what the value is and how its interval was made, in words.
        net_hash: hash of the net that judged (weights and input preparation), or "".
        settings: what else the figure depends on: threads, device, dtype, bands.
        parts: figures that belong to this one, by name ("speedup", "top-5", "0-250").
    """

    value: float
    interval: tuple[float, float] | None
    n: int
    seed: int | None
    unit: str
    how: str = ""
    net_hash: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Measurement] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return {
            "value": self.value,
            "interval": None if self.interval is None else list(self.interval),
            "n": self.n,
            "seed": self.seed,
            "unit": self.unit,
            "how": self.how,
            "net_hash": self.net_hash,
            "settings": dict(self.settings),
            "parts": {name: part.to_dict() for name, part in self.parts.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of `to_dict`."""
        interval = data["interval"]
        return cls(
            **{
                **data,
                "interval": None if interval is None else (interval[0], interval[1]),
                "parts": {name: cls.from_dict(part) for name, part in data["parts"].items()},
            }
        )

    def __str__(self) -> str:
        span = "" if self.interval is None else f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]"
        text = f"{self.value:.4g}{span} {self.unit} (n={self.n})"
        return text + "".join(f"; {name} {part}" for name, part in self.parts.items())


def median_interval(values: Sequence[float]) -> tuple[float, tuple[float, float], str]:
    """The median, its order-statistic interval, and the interval's exact coverage in words.

    The two order statistics (k-th smallest, k-th largest) with the largest k whose coverage
    1 - 2 P(Binomial(n, 1/2) < k) is at least 95 %; fewer than 6 values cannot reach that, then it
    is the whole range with the coverage that it has. No assumption about the distribution.
    """
    ordered, n = sorted(values), len(values)
    # tails[k - 1] = P(Binomial(n, 1/2) < k): the chance that the median lies outside on one side.
    tails, total = [], 0.0
    for k in range(max(1, n // 2)):
        total += math.comb(n, k) / 2**n
        tails.append(total)
    k = max((index for index, tail in enumerate(tails) if 2 * tail <= 0.05), default=0)
    coverage = 1 - 2 * tails[k] if n > 1 else 0.0
    how = f"median of {n}; interval: order statistics {k + 1} and {n - k}, coverage {coverage:.1%}"
    return statistics.median(ordered), (ordered[k], ordered[n - 1 - k]), how


def proportion_interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion; sound at 0 and at 1, where a bootstrap has no width."""
    z = 1.959964
    centre, spread = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap at 95 %.

    Args:
        statistic: counts (resamples, n), how often each of n samples was drawn -> values (resamples,).
    """
    import numpy as np

    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    low, high = np.quantile(statistic(counts), (0.025, 0.975))
    return float(low), float(high)
