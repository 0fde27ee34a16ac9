"""What a training run is: model, data, adapter, optimiser, samples, output. Checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vislr.core.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]


def _at_least(low: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value < low:
            raise ConfigError(f"{name.replace('__', '.')} is {value}; expected {low} or more")


def _above_zero(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{name.replace('__', '.')} is {value}; expected more than 0")


def _share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{name.replace('__', '.')} is {value}; expected 0 or more and less than 1")


@dataclass
class ModelConfig:
    """The frozen base."""

    base: str = "emoji-unet"
    """Name of an embedded pipeline, a diffusers folder or a hub id; for a classifier timm/NAME or torchvision/NAME."""
    dtype: Dtype = "float32"
    """Number type of the frozen weights. The adapter is always float32."""
    pretrained: bool = True
    """Classifiers: fetch the pretrained weights. False starts from random ones."""


@dataclass
class DataConfig:
    """The pictures."""

    folder: str = ""
    """Pictures with .txt captions or metadata.jsonl; for a classifier one folder for each class. Must be given."""
    size: int | None = None
    """Side of the square pictures in pixels; null: the model's own."""
    crop: Literal["center", "random"] = "center"
    """center: the largest square in the middle. random: a square of 75 to 100 % of it, anywhere, new each time."""
    flip: bool = False
    """Mirror half of the pictures. Wrong where captions say left and right, or where there is text."""
    trigger: str = ""
    """Words that call what is learned: put before every caption that lacks them, and named in the model card."""
    cache_latents: bool = True
    """Encode every picture once and keep the latents in memory; random crops and flips need the pixels and do not."""
    workers: int = 0
    """Processes that read pictures ahead; 0 reads in the training process. Results do not depend on it."""

    def __post_init__(self) -> None:
        _at_least(0, data__workers=self.workers)
        _at_least(8, data__size=self.size)


@dataclass
class HeldOutConfig:
    """Pictures that are never trained on; the loss on them uses the same noise and timesteps every time."""

    fraction: float = 0.1
    """Share of data.folder that is held out, chosen by file name. 0: none."""
    folder: str | None = None
    """A folder of held-out pictures in place of a share."""
    every: int = 50
    """Steps between two held-out losses; 0: only before and after training."""
    repeats: int = 4
    """Timesteps and noises for each held-out picture."""

    def __post_init__(self) -> None:
        _share(held_out__fraction=self.fraction)
        _at_least(0, held_out__every=self.every)
        _at_least(1, held_out__repeats=self.repeats)


@dataclass
class AdapterSection:
    """What is trained."""

    kind: Literal["convlora", "flora", "lora"] = "convlora"
    """convlora: low-rank reshaped kernels. flora: Tucker core and factors. lora: peft's LoRA."""
    name: str = "default"
    """Name under which the adapter is put on the model."""
    r: int = 4
    """Rank."""
    alpha: float | None = None
    """Scale of the update: convlora and lora multiply it by alpha / r, flora by alpha; null: a scale of 1."""
    ranks: list[int | float] | None = None
    """flora only: a rank, or a share of the size, for each axis: out, in, height, width. null: r for every axis."""
    target_modules: list[str] | None = None
    """Layers to adapt: names, ends of names (to_q), all-linear, or one re:EXPRESSION over whole names;
    null: every linear and convolution of the backbone."""
    exclude_modules: list[str] | None = None
    """Layers to leave alone, written like target_modules."""
    dropout: float = 0.0
    """flora and lora: share of the adapter's input that is dropped in training."""

    def __post_init__(self) -> None:
        _at_least(1, adapter__r=self.r)
        _above_zero(adapter__alpha=self.alpha)
        _share(adapter__dropout=self.dropout)
        for rank in self.ranks or []:
            _above_zero(adapter__ranks=rank)
        if self.ranks is not None and self.kind != "flora":
            raise ConfigError(f"adapter.ranks belongs to flora, and adapter.kind is {self.kind}; use adapter.r")
        if self.dropout and self.kind == "convlora":
            raise ConfigError("adapter.dropout is for flora and lora; convlora has none")
        _patterns("target_modules", self.target_modules)
        _patterns("exclude_modules", self.exclude_modules)

    def to_change(self) -> Any:
        """The config that `vislr.apply` takes: ConvLoraConfig, FloraConfig or peft's LoraConfig."""
        where = {
            "target_modules": _patterns("target_modules", self.target_modules),
            "exclude_modules": _patterns("exclude_modules", self.exclude_modules),
        }
        if self.kind == "lora":
            from peft import LoraConfig

            alpha = self.r if self.alpha is None else self.alpha
            # peft's annotation says int; every scale it computes is a float.
            return LoraConfig(r=self.r, lora_alpha=alpha, lora_dropout=self.dropout, **where)  # type: ignore[arg-type]
        from vislr.adapters import ConvLoraConfig, FloraConfig

        if self.kind == "convlora":
            return ConvLoraConfig(r=self.r, alpha=self.alpha, **where)
        scale = 1.0 if self.alpha is None else self.alpha
        return FloraConfig(ranks=self.ranks or self.r, scale=scale, dropout=self.dropout, **where)


def _patterns(key: str, patterns: list[str] | None) -> Any:
    """Patterns as peft writes them: a list of names, or one text for an expression."""
    if patterns is None:
        return None
    if not patterns:
        raise ConfigError(f"adapter.{key} is an empty list; give names, or null")
    special = [pattern for pattern in patterns if pattern.startswith("re:") or pattern == "all-linear"]
    if special and len(patterns) > 1:
        raise ConfigError(f"adapter.{key}: '{special[0]}' stands alone, and {len(patterns)} patterns are given")
    return special[0].removeprefix("re:") if special else patterns


@dataclass
class OptimConfig:
    """AdamW, a learning rate that rises over `warmup` steps and falls by a cosine."""

    lr: float = 1e-3
    """Highest learning rate."""
    final_lr: float = 0.05
    """Learning rate at the end, as a share of `lr`."""
    warmup: int = 20
    """Steps over which the learning rate rises from 0."""
    batch: int = 16
    """Pictures in one forward pass of one process."""
    accumulation: int = 1
    """Forward passes for one step; a step sees batch x accumulation x processes pictures."""
    clip: float = 1.0
    """Longest gradient, as a norm over all trained parameters; longer ones are shortened. 0: never."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's averaging rates of gradient and squared gradient."""

    def __post_init__(self) -> None:
        _above_zero(optim__lr=self.lr)
        _at_least(1, optim__batch=self.batch, optim__accumulation=self.accumulation)
        _at_least(0, optim__warmup=self.warmup, optim__clip=self.clip, optim__weight_decay=self.weight_decay)
        _share(optim__betas=max(self.betas))
        if not 0 <= self.final_lr <= 1:
            raise ConfigError(f"optim.final_lr is {self.final_lr}; expected a share of optim.lr, 0 to 1")


@dataclass
class SampleConfig:
    """Pictures made before, during and after training, always from the same prompts and seeds."""

    prompts: list[str] = field(default_factory=list)
    """Prompts; empty: the captions of the first held-out (or training) pictures."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """A row of the grid for each seed."""
    every: int = 0
    """Steps between two grids; 0: only before and after training."""
    steps: int = 20
    """Denoising steps."""
    guidance: float = 4.0
    """Classifier-free guidance scale."""

    def __post_init__(self) -> None:
        _at_least(0, sample__every=self.every)
        _at_least(1, sample__steps=self.steps)
        if not self.seeds:
            raise ConfigError("sample.seeds is empty; give at least one")


@dataclass
class OutputConfig:
    """Where the result goes, and how often state is kept."""

    folder: str = ""
    """The result's folder. Must be given."""
    format: Literal["vislr", "diffusers"] = "vislr"
    """Layout of adapter.safetensors: vislr holds every kind; diffusers is for lora and `load_lora_weights`."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; 0: only when stopped."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 5
    """Steps between two entries of the loss in tensorboard and curves.png."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder; the result equals that of a run that never stopped."""
    overwrite: bool = False
    """Replace the result that is in the folder."""

    def __post_init__(self) -> None:
        _at_least(0, output__checkpoint_every=self.checkpoint_every)
        _at_least(1, output__keep=self.keep, output__log_every=self.log_every)
        if self.resume and self.overwrite:
            raise ConfigError("output.resume and output.overwrite exclude each other")


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
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it is trained."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Pictures made on the way."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Where the result goes."""
    steps: int = 400
    """Updates of the adapter."""
    seed: int = 0
    """Every random draw is a function of this, the step and the sample."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of forward and backward: fp32 (the fastest for small models on a CPU), or mixed with bf16 or fp16."""
    processes: int | None = None
    """Number of processes that must take part; another number is an error. null: as many as are started."""
    dry_run: bool = False
    """Check everything, print what would be done, write nothing. `--dry-run` for short."""

    def __post_init__(self) -> None:
        _at_least(1, steps=self.steps, processes=self.processes)
        if self.output.format == "diffusers" and self.adapter.kind != "lora":
            raise ConfigError(f"output.format diffusers holds lora, and adapter.kind is {self.adapter.kind}; use vislr")
        if not self.data.folder:
            raise ConfigError("data.folder is not given; expected a folder of pictures")
        if self.model.base.startswith(("timm/", "torchvision/")):
            if self.model.dtype != "float32" and self.precision == "fp32":
                raise ConfigError(f"a classifier in {self.model.dtype} needs precision bf16 or fp16, given fp32")
            if self.output.format != "vislr":
                raise ConfigError(f"output.format is {self.output.format}; a classifier's adapter is written as vislr")
        if not self.output.folder:
            raise ConfigError("output.folder is not given; expected a folder for the result")
