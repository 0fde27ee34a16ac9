"""SaRA: the entries of a model's weights that are nearest to zero are trained in place.

Source: SaRA (arXiv 2409.06633). The weight keeps its shape and its layer its speed; what is trained is one
vector a layer, what is stored is a sparse change. The layer is `sara_layer`, the choice of entries
`sara_select`, what happens around an optimiser's step `sara_steps`.

In files: `.sara_index` (n,) int32, places in the weight in row-major order, continued by the bias;
`.sara_delta` (n,) float64; `.sara_shape` int64, the weight's shape; `.sara_kept` (k,) int32 after a
re-selection, places in `.sara_index` that are still trained.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import nn

from vislr.adapters.layer import DeltaTuner
from vislr.adapters.sara_layer import SaraLayer
from vislr.adapters.sara_select import Selection, select
from vislr.adapters.sara_steps import polar, reselect, suggested_lr
from vislr.core.errors import AdapterError

__all__ = ["SaraConfig", "SaraLayer", "SaraModel", "polar", "reselect", "suggested_lr"]

PEFT_TYPE = "SARA"


@dataclass
class SaraConfig(PeftConfig):
    """Config of a SaRA adapter. Exactly one of `threshold`, `count` and `fraction` says how much is trained.

    Attributes:
        threshold: entries whose magnitude is below it, over all targets (paper: 2e-4 to 2e-3 on SD 1.5).
        count: this many entries of smallest magnitude, over all targets.
        fraction: this share of all entries of the targets, in (0, 1].
        target_modules: list of names or their endings, or a regular expression over whole names, or
            "all-linear"; None: every layer that has a weight, with its bias, norms included, as in the paper.
        exclude_modules: list or expression of names to leave alone.
        rank_weight: factor lambda of the nuclear norm of the trained entries (paper: 5e-4); 0: without it.
        rank_matrices: how many matrices get the term in a step, in turn (the published training: 1, so a
            matrix feels lambda divided by the number of matrices); None: all of them, in every step.
        reselect_after: optimiser steps after which only the entries still below the threshold are trained
            on (paper: half of the steps); None: never.
        sites: exact names of the layers; filled in when the adapter goes on.

    Raises:
        AdapterError: none or several of the three are given, or a value is impossible.
    """

    threshold: float | None = None
    count: int | None = None
    fraction: float | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_weight: float = 5e-4
    rank_matrices: int | None = 1
    reselect_after: int | None = None
    sites: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        given = [name for name in ("threshold", "count", "fraction") if getattr(self, name) is not None]
        if len(given) != 1:
            raise AdapterError(f"expected one of threshold, count, fraction; got {' and '.join(given) or 'none'}")
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold > 0):
            raise AdapterError(f"threshold is {self.threshold!r}; expected a number above 0")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise AdapterError(f"fraction is {self.fraction!r}; expected a number in (0, 1]")
        if not (math.isfinite(self.rank_weight) and self.rank_weight >= 0):
            raise AdapterError(f"rank_weight is {self.rank_weight!r}; expected a number of at least 0")
        for name in ("count", "rank_matrices", "reselect_after"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise AdapterError(f"{name} is {value!r}; expected a whole number of at least 1")

    def resolve(self, model: nn.Module) -> Selection:
        """What the adapter trains on `model`; changes nothing.

        Raises:
            TargetError, AdapterError: as `select`.
        """
        return select(model, self)


class SaraModel(DeltaTuner):
    """peft's tuner of SaRA."""

    prefix: str = "sara_"
    tuner_layer_cls = SaraLayer  # type: ignore[assignment]

    def _resolve(self, model: nn.Module, config: Any) -> list[str]:
        self._selection = config.resolve(model)
        return list(self._selection.index)

    def _place(self, layer: Any, name: str, site: str, parent: nn.Module, attribute: str, target: nn.Module) -> None:
        effective: Any = copy.copy(self.peft_config[name])
        effective.threshold = self._selection.threshold
        if layer is None:
            layer = SaraLayer(target, name)
            self._replace_module(parent, attribute, layer, target)
        layer.add(name, self._selection.index[site], effective)
