"""What a training run is: model, data, adapter, objective, optimiser, samples, output. Checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vislr.core.errors import ConfigError
from vislr.data.config import DataConfig
from vislr.train.adapter_section import AdapterSection
from vislr.train.checks import at_least
from vislr.train.sections import (
    HeldOutConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    OutputConfig,
    SampleConfig,
)

__all__ = [
    "AdapterSection",
    "DataConfig",
    "HeldOutConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "OutputConfig",
    "SampleConfig",
    "TrainConfig",
]


@dataclass
class TrainConfig:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The frozen base."""
    data: DataConfig = field(default_factory=DataConfig)
    """The pictures."""
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    """What is never trained on."""
    adapter: AdapterSection = field(default_factory=AdapterSection)
    """What is trained."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What a step minimises."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it is trained."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Pictures made on the way."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Where the result goes."""
    init_adapter: str | None = None
    """An adapter's file, of any format that vislr reads, to start from in place of a new one of `adapter`."""
    steps: int = 400
    """Updates of the adapter."""
    seed: int = 0
    """Every random draw is a function of this, the step and the sample."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of forward and backward: fp32 (the fastest for small models on a CPU), or mixed with bf16 or fp16."""
    processes: int | None = None
    """Number of processes that must take part; another number is an error. null: as many as are started."""
    check_data: bool = False
    """Look at the pictures alone: report what is wrong, draw a contact sheet into output.folder, and leave."""
    dry_run: bool = False
    """Check everything, print what would be done, write nothing. `--dry-run` for short."""

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, processes=self.processes)
        if not self.data.parts():
            raise ConfigError("data.folder is not given; expected a folder of pictures")
        if self.model.base.startswith(("timm/", "torchvision/")):
            self._check_classifier()
        if self.model.storage != "plain" and self.adapter.kind in ("sara", "dora"):
            what = {"sara": "trains the weights themselves", "dora": "takes norms of the weights"}[self.adapter.kind]
            raise ConfigError(f"{self.adapter.kind} {what}; model.storage must be plain")
        if self.model.storage == "nf4" and self.adapter.kind in ("loha", "lokr"):
            raise ConfigError(f"{self.adapter.kind} does not go with packed weights; model.storage may be int8")
        if self.adapter.reselect_after and self.held_out.keep == "best":
            raise ConfigError("adapter.reselect_after changes what is trained on the way; held_out.keep must be last")
        if not self.output.folder:
            raise ConfigError("output.folder is not given; expected a folder for the result")

    def _check_classifier(self) -> None:
        if self.model.dtype != "float32" and self.precision == "fp32":
            raise ConfigError(f"a classifier in {self.model.dtype} needs precision bf16 or fp16, given fp32")
        if self.output.format != "vislr":
            raise ConfigError(f"output.format is {self.output.format}; a classifier's adapter is written as vislr")
        if self.adapter.text_encoders:
            raise ConfigError("adapter.text_encoders is for pipelines; a classifier has none")
        if self.model.storage != "plain":
            raise ConfigError(f"model.storage {self.model.storage} is for pipelines; a classifier's is plain")
