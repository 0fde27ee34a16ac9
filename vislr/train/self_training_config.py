"""What a domain adaptation is: model, source, target, early head, adapter, statistics. Checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vislr.core.errors import ConfigError
from vislr.train.checks import above_zero, at_least, share

Variant = Literal["source", "adabn", "convlora", "both"]
VARIANTS: tuple[Variant, ...] = ("source", "adabn", "convlora", "both")


@dataclass
class NetConfig:
    """The model that is adapted."""

    base: str = "lite0"
    """Classification: lite0 (EfficientNet-Lite0 with the ImageNet weights of the extra `measure`), timm/NAME or
    torchvision/NAME. Segmentation: unet, the residual U-Net with BatchNorm."""
    pretrained: bool = True
    """timm and torchvision: fetch the pretrained weights. False starts from random ones."""
    weights: str | None = None
    """model.safetensors of an earlier run: the source model is taken from there and not trained again."""
    size: int = 96
    """Side of the square pictures or slices in pixels."""

    def __post_init__(self) -> None:
        at_least(16, model__size=self.size)


@dataclass
class DomainConfig:
    """The examples of one domain."""

    data: list[str] = field(default_factory=list)
    """Classification: one folder of pictures (of the source: one folder for each class), or zoo:STYLE for the
    embedded pictures by category. Segmentation: NIfTI, npz, npy or picture files, folders of them, or patterns."""
    masks: list[str] = field(default_factory=list)
    """Segmentation: as many files with masks, in the same order; above 0 is foreground. npz files may hold theirs
    (arrays `image` and `mask`). Of the target only for the report: nothing is trained or chosen by them."""
    held_out: float = 0.3
    """Share of the pictures (by name) or volumes that figures are taken on and nothing else; 0, or a single volume:
    figures are taken on what was trained on, and the report says so."""

    def __post_init__(self) -> None:
        share(held_out=self.held_out)


@dataclass
class SliceConfig:
    """Segmentation: how volumes become slices."""

    axis: int = 2
    """The axis across which volumes are cut, after turning to right-anterior-superior order: 2 is axial."""
    foreground: float = 0.05
    """Slices are kept if this share of their pixels is brighter than a tenth of the volume's range."""
    tolerance: float = 1.0
    """Distance of the surface Dice, in the unit of the files (millimetres in NIfTI, pixels elsewhere)."""

    def __post_init__(self) -> None:
        if self.axis not in (0, 1, 2):
            raise ConfigError(f"slices.axis is {self.axis}; expected 0, 1 or 2")
        share(slices__foreground=self.foreground)
        at_least(0, slices__tolerance=self.tolerance)


@dataclass
class SourceTrainingConfig:
    """Training of the model on the labelled source."""

    train: Literal["all", "head"] = "all"
    """all: every weight. head: the classifier alone; of the frozen rest only the BatchNorm statistics become the
    source's, since those of a pretraining belong to a third domain."""
    epochs: int = 20
    """Passes over the source."""
    lr: float = 1e-3
    """Adam's learning rate."""

    def __post_init__(self) -> None:
        at_least(0, training__epochs=self.epochs)
        above_zero(training__lr=self.lr)


@dataclass
class EarlyHeadConfig:
    """The small head that reads a feature in the middle of the model; trained on the source, then frozen."""

    layer: str | None = None
    """The module whose output it reads; null: down3 of unet, else the last stage but one."""
    epochs: int = 20
    """Passes over the source."""
    lr: float = 1e-3
    """Adam's learning rate."""

    def __post_init__(self) -> None:
        at_least(1, early_head__epochs=self.epochs)
        above_zero(early_head__lr=self.lr)


@dataclass
class ShiftAdapterConfig:
    """The ConvLoRA adapter that self-training moves."""

    r: int = 2
    """Rank."""
    alpha: float | None = None
    """The update is scaled by alpha / r; null: 1."""
    target_modules: list[str] | None = None
    """Layers: names or their endings; null: every conv and linear that is computed before the early head's layer."""

    def __post_init__(self) -> None:
        at_least(1, adapter__r=self.r)
        above_zero(adapter__alpha=self.alpha)
        if self.target_modules is not None and not self.target_modules:
            raise ConfigError("adapter.target_modules is an empty list; give names, or null")


@dataclass
class StatisticsConfig:
    """AdaBN: BatchNorm statistics of the target."""

    mode: Literal["exact", "ema"] = "exact"
    """exact: pooled moments, one pass for every BatchNorm in the longest chain, at the start and after every epoch.
    ema: running averages, that also move during the epochs, as in the authors' training."""
    examples: int = 64
    """Examples of the target that they are taken from, evenly spread; 0: all. Exact ones cost many passes."""

    def __post_init__(self) -> None:
        at_least(0, statistics__examples=self.examples)


@dataclass
class SelfTrainingConfig:
    """Training of the adapter on the unlabelled target."""

    variants: list[Variant] = field(default_factory=lambda: list(VARIANTS))
    """What is tried: source (nothing adapted), adabn, convlora, both."""
    epochs: int = 5
    """Passes over the target."""
    lr: float = 1e-4
    """Adam's learning rate."""
    detach_pseudo_label: bool = True
    """The model's own output is a fixed target. False: gradient flows through it too, as in the authors' code."""

    def __post_init__(self) -> None:
        at_least(1, adaptation__epochs=self.epochs)
        above_zero(adaptation__lr=self.lr)
        if "source" not in self.variants:
            raise ConfigError("adaptation.variants lacks 'source', which the others are compared with")
        if len(set(self.variants)) != len(self.variants):
            raise ConfigError(f"adaptation.variants names one twice: {', '.join(self.variants)}")


@dataclass
class ShiftOutputConfig:
    """Where the result goes."""

    folder: str = ""
    """The result's folder. Must be given."""
    resume: bool = False
    """Go on after the last whole epoch; the result equals that of a run that never stopped."""
    overwrite: bool = False
    """Replace the result that is in the folder."""

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise ConfigError("output.resume and output.overwrite exclude each other")


@dataclass
class AdaptConfig:
    """A domain adaptation by self-training."""

    task: Literal["classification", "segmentation"] = "classification"
    """classification of pictures, or segmentation of slices into foreground and background."""
    model: NetConfig = field(default_factory=NetConfig)
    """What is adapted."""
    source: DomainConfig = field(default_factory=DomainConfig)
    """The labelled domain."""
    target: DomainConfig = field(default_factory=DomainConfig)
    """The unlabelled domain; labels that are there are used for the report alone."""
    slices: SliceConfig = field(default_factory=SliceConfig)
    """Segmentation: how volumes are cut."""
    training: SourceTrainingConfig = field(default_factory=SourceTrainingConfig)
    """How the model is trained on the source."""
    early_head: EarlyHeadConfig = field(default_factory=EarlyHeadConfig)
    """The head that makes the teaching signal."""
    adapter: ShiftAdapterConfig = field(default_factory=ShiftAdapterConfig)
    """What is trained on the target."""
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    """AdaBN."""
    adaptation: SelfTrainingConfig = field(default_factory=SelfTrainingConfig)
    """How the adapter is trained on the target."""
    output: ShiftOutputConfig = field(default_factory=ShiftOutputConfig)
    """Where the result goes."""
    batch: int = 32
    """Examples in one forward pass."""
    seed: int = 0
    """Every random draw is a function of this, the stage and the epoch."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; null: cuda if there is one."""
    dry_run: bool = False
    """Check everything, print what would be done, write nothing. `--dry-run` for short."""

    def __post_init__(self) -> None:
        # A batch of one gives BatchNorm no variance.
        at_least(2, batch=self.batch)
        for name, domain in (("source", self.source), ("target", self.target)):
            if not domain.data:
                raise ConfigError(f"{name}.data is not given; expected a folder or files")
            if self.task == "classification" and (domain.masks or len(domain.data) != 1):
                raise ConfigError(f"{name}: classification takes one folder in data, and no masks")
        if (self.model.base == "unet") != (self.task == "segmentation"):
            wanted = "unet" if self.task == "segmentation" else "lite0, timm/NAME or torchvision/NAME"
            raise ConfigError(f"model.base is '{self.model.base}' and task is {self.task}; expected {wanted}")
        if self.task == "segmentation" and self.training.train == "head":
            raise ConfigError("training.train is 'head'; a segmentation model has none, expected 'all'")
        if self.task == "segmentation" and self.model.size % 8:
            raise ConfigError(f"model.size is {self.model.size}; expected a multiple of 8 for unet")
        if not self.output.folder:
            raise ConfigError("output.folder is not given; expected a folder for the result")
