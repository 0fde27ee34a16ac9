"""Training of adapters: one loop; objectives as functions; exact resume; when to stop."""

from vislr.train.config import (
    AdapterSection,
    DataConfig,
    HeldOutConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    OutputConfig,
    SampleConfig,
    TrainConfig,
)
from vislr.train.launch import make_accelerator
from vislr.train.loop import Result, fit
from vislr.train.sampling import sample_images
from vislr.train.tasks import Draw

__all__ = [
    "AdapterSection",
    "DataConfig",
    "Draw",
    "HeldOutConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "OutputConfig",
    "Result",
    "SampleConfig",
    "TrainConfig",
    "fit",
    "make_accelerator",
    "sample_images",
]
