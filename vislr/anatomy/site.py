"""The one language in which every method says what it touches: named sites."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vislr.core.errors import TargetError, hint

KINDS = ("conv", "linear", "attention", "norm", "unit")
# Kinds that hold weights themselves. Attention modules and units hold sites of these kinds.
LEAVES = ("conv", "linear", "norm")


@dataclass(frozen=True)
class Site:
    """One place in a model.

    Attributes:
        name: module name in the model without adapters (no `.base_layer`).
        kind: "conv", "linear", "attention", "norm", or "unit" (a residual branch or block).
        type: class of the layer, below any adapter.
        stage: the block of the backbone ("down_blocks.1", "mid_block", "blocks.3"), or "stem" before
            the first block, or "head" after the last.
        depth: place in the order of the forward, 0 first; a unit comes before what it holds.
        shape: shape of the layer's weight; () where it has none or several.
        parameters: parameters in it, adapters included.
        flops: FLOPs in it during one forward, adapters included, 2 per multiply-add.
        removable: whether shapes still fit when its residual branch is taken out (what a shortcut
            changes stays). False for everything that is no unit or attention.
    """

    name: str
    kind: str
    type: str
    stage: str
    depth: int
    shape: tuple[int, ...]
    parameters: int
    flops: int
    removable: bool


@dataclass(frozen=True)
class Stage:
    """Totals of one stage; "other" holds what no site does (embeddings, positions, scales)."""

    name: str
    sites: int
    units: int
    parameters: int
    flops: int


@dataclass(frozen=True)
class Anatomy:
    """A model as sites.

    Attributes:
        family: "unet", "sd3", "flux", "pixart", "dit", "vit" or "conv".
        sites: in the order of the forward.
        sample: the shapes that FLOPs were counted at (`vislr.anatomy.sample_of`).
        parameters: all parameters of the model, adapters included.
        flops: FLOPs of one forward at `sample`, adapters included, 2 per multiply-add.
    """

    family: str
    sites: tuple[Site, ...]
    sample: dict[str, int]
    parameters: int
    flops: int

    def select(
        self,
        kind: str | None = None,
        name: str | None = None,
        stage: str | None = None,
        removable: bool | None = None,
    ) -> tuple[Site, ...]:
        """The sites that fit every argument given, in the order of the forward.

        Args:
            kind: one of `KINDS`.
            name: a glob over the whole name ("up_blocks.*.conv1"), or "re:" and a regular
                expression that matches the whole name.
            stage: a glob over the stage.
            removable: only those that are, or are not.

        Raises:
            TargetError: an unknown kind, a wrong expression, or nothing fits; names the nearest.
        """
        if kind is not None and kind not in KINDS:
            raise TargetError(f"no sites of kind '{kind}'{hint(kind, KINDS)}")
        left = [s for s in self.sites if kind in (None, s.kind) and removable in (None, s.removable)]
        if not left:
            raise TargetError(f"this {self.family} model has {_none(kind, removable)}")
        if stage is not None:
            fitting = [s for s in left if fnmatch.fnmatchcase(s.stage, stage)]
            if not fitting:
                stages = dict.fromkeys(s.stage for s in left)
                raise TargetError(f"{_none(kind, removable)} in stage '{stage}'{_near(stage, stages)}")
            left = fitting
        if name is not None:
            matches = _matcher(name)
            fitting = [s for s in left if matches(s.name)]
            if not fitting:
                where = f" in stage '{stage}'" if stage is not None else ""
                near = _near(name, [s.name for s in left])
                raise TargetError(f"{_none(kind, removable)}{where} matches '{name}'{near}")
            left = fitting
        return tuple(left)

    def stages(self) -> tuple[Stage, ...]:
        """Totals per stage in the order of the forward, then "other" if something is left."""
        inside = tuple(s.name + "." for s in self.sites if s.kind == "attention")
        rows = []
        for name in dict.fromkeys(s.stage for s in self.sites):
            own = [s for s in self.sites if s.stage == name]
            # An attention module's FLOPs are its projections' and those of the product of q, k, v.
            parts = [s for s in own if s.kind == "attention" or (s.kind in LEAVES and not s.name.startswith(inside))]
            units = sum(s.kind == "unit" for s in own)
            rows.append(Stage(name, len(own), units, sum(s.parameters for s in parts), sum(s.flops for s in parts)))
        parameters = self.parameters - sum(row.parameters for row in rows)
        flops = self.flops - sum(row.flops for row in rows)
        return tuple(rows) + ((Stage("other", 0, 0, parameters, flops),) if parameters or flops else ())

    def table(self, sites: Sequence[Site] | None = None) -> str:
        """Sites (default: all) and totals per stage as text, with the sample that was counted at."""
        chosen = self.sites if sites is None else sites
        head = ("name", "kind", "type", "stage", "shape", "parameters", "FLOPs", "removable")
        body = [
            (s.name, s.kind, s.type, s.stage, "x".join(map(str, s.shape)), f"{s.parameters:,}", figure(s.flops),
             "yes" if s.removable else "")
            for s in chosen
        ]  # fmt: skip
        totals = [
            (row.name, str(row.sites), str(row.units), f"{row.parameters:,}", figure(row.flops),
             f"{row.flops / max(self.flops, 1):.1%}")
            for row in self.stages()
        ]  # fmt: skip
        return "\n\n".join(
            (
                columns([head, *body], right=(5, 6)),
                columns([("stage", "sites", "units", "parameters", "FLOPs", "share"), *totals], right=(1, 2, 3, 4, 5)),
                f"{self.family}: {len(self.sites)} sites, {self.parameters:,} parameters, {figure(self.flops)}FLOP "
                f"per forward at " + ", ".join(f"{key} {value}" for key, value in self.sample.items()),
            )
        )


def _none(kind: str | None, removable: bool | None) -> str:
    adjective = {None: "", True: "removable ", False: "unremovable "}[removable]
    return f"no {adjective}{kind + ' ' if kind else ''}site"


def _matcher(pattern: str) -> Any:
    if not pattern.startswith("re:"):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise TargetError(f"'{pattern}' is no regular expression: {error}") from error
    return lambda name: expression.fullmatch(name) is not None


def _near(given: str, choices: Sequence[str] | dict[str, None]) -> str:
    """The nearest names; a pattern's own signs do not count as spelling."""
    plain = re.sub(r"[*?\\^$]", "", given.removeprefix("re:"))
    return hint(plain or given, choices)


def figure(value: int) -> str:
    """A number in 4 digits with its unit prefix: 6.761 T, 803.3 G, 0."""
    for exponent, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**exponent:
            return f"{value / 10**exponent:#.4g} {prefix}"
    return f"{value} "


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of text under each other, two spaces apart; columns in `right` are set to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        .rstrip()
        for row in rows
    )  # fmt: skip
