"""Training of adapters: one loop; objectives as functions; exact resume."""

from vislr.train.config import (
    AdapterSection,
    DataConfig,
    HeldOutConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    SampleConfig,
    TrainConfig,
)
from vislr.train.launch import make_accelerator
from vislr.train.loop import Result, fit
from vislr.train.sampling import sample_images

__all__ = [
    "AdapterSection",
    "DataConfig",
    "HeldOutConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "Result",
    "SampleConfig",
    "TrainConfig",
    "fit",
    "make_accelerator",
    "sample_images",
]
