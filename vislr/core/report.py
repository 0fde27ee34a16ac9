"""What an `apply` did: sites touched, parameters and FLOPs before and after."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """The result of `vislr.apply`.

    Attributes:
        kind: the kind of change, as registered ("convlora", "layers", ...).
        name: the name that it was applied under.
        component: name of the pipeline's component, or "" for a bare module.
        sites: full module names of what was touched, in the order in which the model holds them.
        parameters: all parameters (before, after).
        trainable: parameters that require a gradient after the change.
        flops: FLOPs of one forward of the component (before, after), 2 per multiply-add.
        sample: the shapes that FLOPs were counted at.
        notes: what a user should know, a line each.
        index: the change's place in the target's record.
    """

    kind: str
    name: str
    component: str
    sites: tuple[str, ...]
    parameters: tuple[int, int]
    trainable: int
    flops: tuple[int, int] | None = None
    sample: dict[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())
    index: int = -1

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of `to_dict`, also after JSON made lists of its tuples."""
        tuples = {
            key: tuple(data[key]) for key in ("sites", "parameters", "flops", "notes") if data.get(key) is not None
        }
        return cls(**(data | tuples))

    def __str__(self) -> str:
        where = f" on {self.component}" if self.component else ""
        before, after = self.parameters
        lines = [
            f"{self.kind} '{self.name}'{where}: {len(self.sites)} sites, "
            f"{before:,} -> {after:,} parameters ({self.trainable:,} trainable)"
        ]
        if self.flops is not None:
            lines.append(f"  {self.flops[0] / 1e9:.3f} -> {self.flops[1] / 1e9:.3f} GFLOP at {self.sample}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])
