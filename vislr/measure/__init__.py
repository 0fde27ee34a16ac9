"""Measuring: time, memory, FLOPs, image quality, and the one writer of records.

Every figure is a `Measurement`: a value with its interval, how many samples it rests on, the seed,
the unit, and the hash of the net that judged.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vislr.anatomy import flops
    from vislr.measure.features import FeatureNet, Features, feature_net
    from vislr.measure.measurement import Measurement
    from vislr.measure.memory import peak_memory
    from vislr.measure.overlap import dice, surface_dice
    from vislr.measure.quality import Prototypes, kid, prototypes, retrieval, vlhi
    from vislr.measure.record import Record, read_record, write_record
    from vislr.measure.teacher import teacher_distance
    from vislr.measure.timing import interleaved

_NAMES = {
    "FeatureNet": "vislr.measure.features",
    "Features": "vislr.measure.features",
    "Measurement": "vislr.measure.measurement",
    "Prototypes": "vislr.measure.quality",
    "Record": "vislr.measure.record",
    "dice": "vislr.measure.overlap",
    "feature_net": "vislr.measure.features",
    "flops": "vislr.anatomy",
    "interleaved": "vislr.measure.timing",
    "kid": "vislr.measure.quality",
    "peak_memory": "vislr.measure.memory",
    "prototypes": "vislr.measure.quality",
    "read_record": "vislr.measure.record",
    "retrieval": "vislr.measure.quality",
    "surface_dice": "vislr.measure.overlap",
    "teacher_distance": "vislr.measure.teacher",
    "vlhi": "vislr.measure.quality",
    "write_record": "vislr.measure.record",
}

__all__ = [
    "FeatureNet",
    "Features",
    "Measurement",
    "Prototypes",
    "Record",
    "dice",
    "feature_net",
    "flops",
    "interleaved",
    "kid",
    "peak_memory",
    "prototypes",
    "read_record",
    "retrieval",
    "surface_dice",
    "teacher_distance",
    "vlhi",
    "write_record",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'vislr.measure' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
