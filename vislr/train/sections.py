"""Sections of a training config: base, held-out part, objective, optimiser, samples, output. Checked when made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vislr.core.errors import ConfigError
from vislr.train.checks import above_zero, at_least, share

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class ModelConfig:
    """The frozen base."""

    base: str = "emoji-unet"
    """Name of an embedded pipeline, a diffusers folder or a hub id; for a classifier timm/NAME or torchvision/NAME."""
    dtype: Dtype = "float32"
    """Number type of the frozen weights. The adapter is always float32."""
    storage: Literal["plain", "fp8", "int8", "nf4"] = "plain"
    """How the denoiser's frozen linears are kept: plain (as dtype says), fp8 (cast to dtype while they are used),
    int8 (torchao) or nf4 (bitsandbytes)."""
    pretrained: bool = True
    """Classifiers: fetch the pretrained weights. False starts from random ones."""
    checkpointing: bool = False
    """Gradient checkpointing: compute activations again in the backward pass; less memory, about a third more time."""
    compile: bool = False
    """torch.compile: the first steps take minutes, later ones less."""
    offload: Literal["none", "encoders"] = "none"
    """encoders: text encoders and VAE leave the device while they are not needed."""
    offload_activations: bool = False
    """What the forward keeps for the backward waits in main memory; less memory of a GPU, more time."""
    shard: bool = False
    """Divide the frozen base over the processes (FSDP2), the adapter stays whole; an accelerate config with FSDP does
    the same."""
    tokens: str | None = None
    """A plan.json of `vislr tokens`: the denoiser is trained under this token plan, for use under it. null: none."""

    def __post_init__(self) -> None:
        if self.offload_activations and self.compile:
            raise ConfigError("model.offload_activations and model.compile exclude each other")


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
    bands: int = 3
    """Equal parts of the time axis whose losses are also shown apart, from little noise to much; 0: none."""
    patience: int = 0
    """Stop after so many held-out losses in a row that are not the lowest; 0: never."""
    keep: Literal["last", "best"] = "last"
    """Which weights are the result: the last, or those of the lowest held-out loss."""
    similarity: bool = False
    """Compare sample pictures with the training pictures by features: is it memorising? (extra measure)"""

    def __post_init__(self) -> None:
        share(held_out__fraction=self.fraction)
        at_least(0, held_out__every=self.every, held_out__bands=self.bands, held_out__patience=self.patience)
        at_least(1, held_out__repeats=self.repeats)
        none = self.fraction == 0 and self.folder is None
        if (self.patience or self.keep == "best") and (none or not self.every):
            raise ConfigError("held_out.patience and held_out.keep best need held-out pictures and held_out.every")


@dataclass
class ObjectiveConfig:
    """What a step minimises. The target (noise, v, image or velocity) is the scheduler's."""

    weighting: Literal["none", "min-snr", "debiased"] = "none"
    """Weight of a timestep, for denoising models: min-snr cuts weights where there is little noise, debiased lifts
    those where there is much."""
    snr_gamma: float = 5.0
    """min-snr: signal to noise ratio above which weights are cut."""
    noise_offset: float = 0.0
    """Strength of an offset of the whole picture, drawn with the noise; 0.05 lets a model learn dark and light."""
    input_perturbation: float = 0.0
    """Strength of further noise in the input that the target does not hold; about 0.1 against drift in sampling."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last timestep is pure noise; for models that predict v or the image."""
    flow_times: Literal["logit-normal", "uniform"] = "logit-normal"
    """Flow models: how noise levels are drawn, before the shift."""
    shift: float | None = None
    """Flow models: shift of the noise levels to much noise; null: the scheduler's, at this size of picture."""
    unmasked_weight: float = 0.0
    """Weight of the loss outside of a picture's mask, where there are masks."""

    def __post_init__(self) -> None:
        above_zero(objective__snr_gamma=self.snr_gamma, objective__shift=self.shift)
        at_least(
            0, objective__noise_offset=self.noise_offset, objective__input_perturbation=self.input_perturbation,
            objective__unmasked_weight=self.unmasked_weight,
        )  # fmt: skip


@dataclass
class OptimConfig:
    """The optimiser and its learning rate, which rises over `warmup` steps and then follows a schedule."""

    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = "adamw"
    """adamw; adamw8bit (bitsandbytes or torchao: moments in 8 bit); adafactor (torch's: moments as rows and columns,
    lr relative to a parameter's size, about 0.01); prodigy (prodigyopt: finds its own rate, wants lr 1)."""
    lr: float = 1e-3
    """Highest learning rate."""
    text_lr: float | None = None
    """Highest learning rate of text encoders; null: lr."""
    block_lr: list[str] = field(default_factory=list)
    """Factors of the learning rate by parts of the model: "up_blocks.*=0.5"; the first pattern that fits a name counts,
    0 freezes."""
    schedule: Literal["cosine", "linear", "constant", "restarts"] = "cosine"
    """How the rate falls from lr to final_lr after the warmup; restarts: `cycles` cosines."""
    cycles: int = 1
    """restarts: how many times the rate falls."""
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
    """Weight decay, apart from the gradient."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Averaging rates of gradient and squared gradient; adafactor has none."""
    ema: float = 0.0
    """Averaging rate of the weights (0.999): the average is what is evaluated, shown and saved. 0: none."""

    def __post_init__(self) -> None:
        above_zero(optim__lr=self.lr, optim__text_lr=self.text_lr)
        at_least(1, optim__batch=self.batch, optim__accumulation=self.accumulation, optim__cycles=self.cycles)
        at_least(0, optim__warmup=self.warmup, optim__clip=self.clip, optim__weight_decay=self.weight_decay)
        share(optim__betas=max(self.betas), optim__ema=self.ema)
        if not 0 <= self.final_lr <= 1:
            raise ConfigError(f"optim.final_lr is {self.final_lr}; expected a share of optim.lr, 0 to 1")
        if self.optimizer == "prodigy" and (self.text_lr is not None or self.block_lr):
            raise ConfigError("prodigy finds one rate for everything; leave out optim.text_lr and optim.block_lr")
        self.factors()

    def factors(self) -> dict[str, float]:
        """`block_lr` as pattern -> factor.

        Raises:
            ConfigError: an entry is not PATTERN=FACTOR.
        """
        found = {}
        for entry in self.block_lr:
            pattern, _, factor = entry.rpartition("=")
            try:
                found[pattern] = float(factor)
            except ValueError:
                pattern = ""
            if not pattern or found[pattern] < 0:
                raise ConfigError(f'optim.block_lr holds {entry!r}; expected "PATTERN=FACTOR", like "up_blocks.*=0.5"')
        return found


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
        at_least(0, sample__every=self.every)
        at_least(1, sample__steps=self.steps)
        if not self.seeds:
            raise ConfigError("sample.seeds is empty; give at least one")


@dataclass
class OutputConfig:
    """Where the result goes, and how often state is kept."""

    folder: str = ""
    """The result's folder. Must be given."""
    format: Literal["vislr", "diffusers", "kohya", "comfy"] = "vislr"
    """Layout of adapter.safetensors: vislr holds every kind exactly; diffusers is for `load_lora_weights` and holds
    what a LoRA can say; kohya (A1111, ComfyUI, sd-scripts) and comfy hold what they have a form for."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; 0: only when stopped."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 5
    """Steps between two entries of the loss in tensorboard and curves.png."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the curves and grids, too; null: none."""
    license: str = ""
    """Licence of the result, for the model card (an SPDX name); empty: not stated."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder; the result equals that of a run that never stopped."""
    overwrite: bool = False
    """Replace the result that is in the folder."""

    def __post_init__(self) -> None:
        at_least(0, output__checkpoint_every=self.checkpoint_every)
        at_least(1, output__keep=self.keep, output__log_every=self.log_every)
        if self.resume and self.overwrite:
            raise ConfigError("output.resume and output.overwrite exclude each other")
