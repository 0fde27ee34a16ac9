"""EfficientDM's fine-tuning: a quantised denoiser learns from its full-precision self, without any data.

The pipeline runs with the teacher, so scheduler, guidance and x_{t-1} are the teacher's. At every call the
student, quantised and with QALoRA, answers the same question, and learns at once::

    L_t = sum (eps_teacher(x_t, t, c) - eps_student(x_t, t, c))^2        both after classifier-free guidance

(arXiv 2310.03270, equation 7; the sum as in the published code.) Scale-aware: the update of a layer must reach
its step size before it changes a code, so each layer's learning rate is its mean step size over `reach`. The paper
multiplies gradients by the step size instead, which is the same under SGD and nothing at all under Adam.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from vislr.adapters import QALoraConfig, attach
from vislr.adapters.inject import adapter_layers, exactly
from vislr.adapters.qalora import QALoraLayer
from vislr.anatomy import denoiser_of
from vislr.core.arguments import plain_data
from vislr.core.errors import ConfigError, Interrupted, ModelError, TrainingError
from vislr.quantize import QuantLayer, Trajectories, layer_classes, quant_layers
from vislr.quantize.trajectories import copied, watching_calls
from vislr.train.checkpoints import check_same_run, checkpoints_in, load_checkpoint, save_checkpoint, set_number
from vislr.train.checks import above_zero, at_least
from vislr.train.signals import stop_signals

NAME = "qalora"
# No update changes an input's step size by more than this share: small ones would be gone after a few.
_LARGEST = 0.01
# What parameters of step sizes are called where all weights are trained.
_STEPS = ("weight_scale", "input_scale", "input_zero")
# The published scale of the trajectories; its pictures are drawn with 3.
_GUIDANCE = 1.5


@dataclass
class TuneConfig:
    """How a quantised denoiser is fine-tuned."""

    trajectories: int = 160
    """Runs of the teacher from noise to picture; every step of each batch of them is one update."""
    batch: int = 2
    """Trajectories run at once."""
    steps: int = 100
    """Denoising steps of a trajectory; also the entries of the inputs' step sizes, where the plan has them."""
    guidance: float | None = None
    """Classifier-free guidance scale of the trajectories; null: 1.5 (published), which keeps pictures sharper than
    learning at the scale that they are drawn with; of models that read it as an input (FLUX): the calibration's."""
    rank: int = 32
    """Rank of QALoRA."""
    scale_aware: bool = True
    """Each layer's rate is its mean step size over `reach`; false: `lr` for all."""
    reach: float = 2500.0
    """scale_aware: mean step size over this is the rate (the published value, for 16,000 updates)."""
    lr: float = 2e-5
    """Rate of QALoRA's factors where scale_aware is false."""
    weight_scale_lr: float = 1e-6
    """Rate of the weights' step sizes."""
    input_lr: float = 5e-4
    """Rate of the inputs' step sizes and zeros, where the plan has any; of a step size at most a hundredth of it."""
    weight_decay: float = 0.01
    """AdamW's weight decay; the step sizes decay too, as in the published code."""
    train: Literal["all", "qalora", "full"] = "all"
    """all: factors, step sizes of weights and of inputs; qalora: the factors alone; full: the weights themselves
    (quantisation-aware training, to compare with), and parameters called weight_scale, input_scale and input_zero."""
    window: int = 1
    """So many batches of trajectories run first and are learnt from in a random order; their inputs stay in memory. 1:
    every step is learnt as it comes (published), which in short runs fits the pictures at hand."""
    checkpoint_every: int = 100
    """Updates between two checkpoints, at the end of a window."""
    seed: int = 3407
    """Of noise and of the factors' start."""

    def __post_init__(self) -> None:
        at_least(1, tune__trajectories=self.trajectories, tune__batch=self.batch, tune__steps=self.steps)
        at_least(1, tune__rank=self.rank, tune__checkpoint_every=self.checkpoint_every, tune__window=self.window)
        above_zero(tune__reach=self.reach, tune__lr=self.lr)
        if self.train == "full" and self.scale_aware:
            raise ConfigError("tune.train full has one rate, tune.lr; expected tune.scale_aware false")
        at_least(0, tune__weight_scale_lr=self.weight_scale_lr, tune__input_lr=self.input_lr)
        at_least(0, tune__weight_decay=self.weight_decay)

    @property
    def updates(self) -> int:
        """Optimiser steps of the whole run."""
        return -(-self.trajectories // self.batch) * self.steps


@dataclass(frozen=True)
class TuneResult:
    """What a fine-tune did.

    Attributes:
        updates: optimiser steps.
        seconds: of this run.
        trained: name of a part -> parameters trained.
        losses: mean relative error |teacher - student|^2 / |teacher|^2 of each window of trajectories.
    """

    updates: int
    seconds: float
    trained: dict[str, int]
    losses: tuple[float, ...]


def attach_qalora(student: nn.Module, rank: int, *, ends: bool = True, name: str = NAME, seed: int = 0) -> Any:
    """QALoRA on every quantised layer of the model's body; of the first and last layers the scales alone.

    Args:
        student: quantised.
        ends: train those scales (`vislr.quantize.layer_classes` says which layers these are).

    Returns:
        what `vislr.adapters.detach` takes.
    """
    layers = quant_layers(student)
    classes = layer_classes(student)
    body = [path for path in layers if path in classes.body]
    if not body:
        raise ModelError("no layer of the plan is in the model's body; expected more than its first and last layers")
    others = [path for path in layers if path not in body and ends]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = QALoraConfig(r=rank, target_modules=exactly([*body, *others]), scales=others)
        return attach(student, config, name)


def parameter_groups(student: nn.Module, config: TuneConfig, name: str = NAME) -> list[dict[str, Any]]:
    """AdamW's groups with the rate of each: factors (by layer where scale-aware), weights' and inputs' step sizes.

    Each group has "names", "part" and "lr"; rates fall in a line to 0.
    """
    groups: list[dict[str, Any]] = []
    sizes: dict[str, dict[str, nn.Parameter]] = {"weight scales": {}, "input zeros": {}}
    inputs: list[tuple[str, nn.Parameter, float]] = []
    for site, layer in adapter_layers(student, name).items():
        assert isinstance(layer, QALoraLayer)
        factors = {
            f"{site}.{part}": getattr(layer, part)[name]
            for part in ("qalora_A", "qalora_B")
            if name in getattr(layer, part)
        }
        mean = float(layer.qalora_scale[name].detach().mean())
        if factors:
            rate = mean / config.reach if config.scale_aware else config.lr
            groups.append({"params": list(factors.values()), "names": list(factors), "part": "factors", "lr": rate})
        sizes["weight scales"][f"{site}.qalora_scale"] = layer.qalora_scale[name]
        if name in layer.qalora_input_scale:
            size = layer.qalora_input_scale[name]
            inputs.append((f"{site}.qalora_input_scale", size, _input_rate(size, config)))
            sizes["input zeros"][f"{site}.qalora_input_zero"] = layer.qalora_input_zero[name]
    for key, size, rate in inputs:
        size.requires_grad_(config.train == "all" and rate > 0)
        if size.requires_grad:
            groups.append({"params": [size], "names": [key], "part": "input scales", "lr": rate})
    rates = {"weight scales": config.weight_scale_lr, "input zeros": config.input_lr}
    for part, found in sizes.items():
        kept = config.train == "all" and rates[part] > 0
        for parameter in found.values():
            parameter.requires_grad_(kept)
        if found and kept:
            groups.append({"params": list(found.values()), "names": list(found), "part": part, "lr": rates[part]})
    return groups


def guided(prediction: torch.Tensor, guidance: float, doubled: bool, conditional_first: bool = False) -> torch.Tensor:
    """unconditional + guidance (conditional - unconditional) of a doubled batch; any other as it is.

    Args:
        conditional_first: the conditional half comes first, as DiT's pipeline has it.
    """
    if not doubled:
        return prediction
    without, with_ = prediction.chunk(2)
    if conditional_first:
        without, with_ = with_, without
    return without + guidance * (with_ - without)


def output_of(answer: Any) -> torch.Tensor:
    """The prediction in what a denoiser returns."""
    return answer if torch.is_tensor(answer) else answer[0]


def tune(
    pipe: Any,
    student: nn.Module,
    runs: Trajectories,
    config: TuneConfig,
    *,
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    watch: Callable[[int, float], None] | None = None,
) -> TuneResult:
    """Fine-tune a quantised copy of a pipeline's denoiser along the pipeline's own trajectories.

    Args:
        pipe: with the teacher in place; not changed.
        student: a quantised model with QALoRA (`attach_qalora`), or with `train: full` any trainable copy.
        runs: prompts and options of the trajectories; their number, batch, steps, guidance and seed are the
            config's (guidance null: see `TuneConfig`).
        folder: keeps checkpoints; None: none.
        resume: go on from the newest one.
        watch: called with the update's number and its relative error.

    Raises:
        ConfigError: the checkpoints are of another run. TrainingError: the loss is not finite.
        Interrupted: asked to stop; the last whole window of trajectories is kept.
    """
    teacher = denoiser_of(pipe)[1]
    if teacher is student:
        raise ModelError("the teacher is the student itself; expected the model before quantising")
    runs = _runs_of(runs, config, teacher)
    groups = _groups(student, config)
    trainable = {name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
    optimizer = torch.optim.AdamW(
        [{"params": group["params"], "lr": group["lr"], "base_lr": group["lr"]} for group in groups],
        weight_decay=config.weight_decay,
    )
    total = config.updates
    state: dict[str, Any] = {"updates": 0, "piece": 0, "losses": []}
    if folder is not None and resume and checkpoints_in(folder):
        stored = load_checkpoint(checkpoints_in(folder)[-1], trainable, optimizer)
        check_same_run(stored["config"], plain_data(config))
        state = {key: stored[key] for key in state}
    elif folder is not None and checkpoints_in(folder):
        raise ConfigError(f"'{folder}' holds checkpoints of a run; expected resume, or another folder")
    student.train(False)
    teacher.requires_grad_(False)
    learner = _Learner(teacher, student, optimizer, trainable, config, runs.guidance, watch)
    learner.updates = state["updates"]
    learner.conditional_first = "class_labels" in inspect.signature(type(pipe).__call__).parameters
    started, saved = time.monotonic(), state["updates"]
    losses: list[float] = list(state["losses"])
    with (
        stop_signals() as asked,
        learner,
        tqdm(total=total, initial=learner.updates, desc="fine-tuning", disable=not progress) as bar,
    ):
        learner.bar = bar
        for piece in range(state["piece"], runs.pieces):
            learner.samples = min(runs.batch, runs.count - piece * runs.batch)
            runs.run(pipe, piece)
            if (piece + 1) % config.window and piece + 1 < runs.pieces:
                continue
            learner.learn_kept(config.seed + piece)
            losses.append(sum(learner.seen) / max(1, len(learner.seen)))
            learner.seen = []
            due = learner.updates - saved >= config.checkpoint_every or piece + 1 == runs.pieces or asked
            if folder is not None and due:
                saved = learner.updates
                kept = {"updates": saved, "piece": piece + 1, "losses": losses, "config": plain_data(config)}
                save_checkpoint(folder, saved, trainable, optimizer, kept, keep=1)
            if asked and piece + 1 < runs.pieces:
                raise Interrupted(f"stopped after {learner.updates} of {total} updates; resume goes on from there")
    counts: dict[str, int] = {}
    for group in groups:
        counts[group["part"]] = counts.get(group["part"], 0) + sum(p.numel() for p in group["params"])
    return TuneResult(learner.updates, time.monotonic() - started, counts, tuple(losses))


def _runs_of(runs: Trajectories, config: TuneConfig, teacher: Any) -> Trajectories:
    guidance = config.guidance
    if guidance is None:
        told = getattr(getattr(teacher, "config", None), "guidance_embeds", False)
        guidance = runs.guidance if told else _GUIDANCE
    return replace(
        runs, count=config.trajectories, batch=config.batch, steps=config.steps, guidance=guidance, seed=config.seed
    )


def _groups(student: nn.Module, config: TuneConfig) -> list[dict[str, Any]]:
    if config.train != "full":
        return parameter_groups(student, config)
    groups: list[dict[str, Any]] = []
    for name, p in student.named_parameters():
        if p.requires_grad:
            part = name.rpartition(".")[2]
            if part == "input_scale":
                rate = _input_rate(p, config)
            else:
                rate = {"weight_scale": config.weight_scale_lr, "input_zero": config.input_lr}.get(part, config.lr)
            groups.append({"params": [p], "names": [name], "part": part if part in _STEPS else "weights", "lr": rate})
    return groups


def _input_rate(size: torch.Tensor, config: TuneConfig) -> float:
    return min(config.input_lr, _LARGEST * float(size.detach().mean()))


class _Learner:
    """On the teacher while the pipeline runs: the student answers what the teacher was asked, and learns."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, optimizer: torch.optim.Optimizer,
        trainable: Mapping[str, nn.Parameter], config: TuneConfig, guidance: float,
        watch: Callable[[int, float], None] | None,
    ) -> None:  # fmt: skip
        self.teacher, self.student, self.optimizer = teacher, student, optimizer
        self.trainable, self.guidance, self.total = trainable, guidance, config.updates
        self.watch, self.updates = watch, 0
        # Questions and answers of a window, and how many samples each has; None: learn at once.
        self.kept: list[tuple[dict[str, Any], torch.Tensor, int]] | None = [] if config.window > 1 else None
        self.seen: list[float] = []
        self.samples, self.conditional_first = 0, False
        self.bar: Any = None
        self.asked: dict[str, Any] = {}

    def __enter__(self) -> _Learner:
        self.watching = watching_calls(self.teacher, self._note)
        self.watching.__enter__()
        self.handle = self.teacher.register_forward_hook(self._learn)
        return self

    def __exit__(self, *reason: Any) -> None:
        self.handle.remove()
        self.watching.__exit__(*reason)

    def _note(self, given: dict[str, Any]) -> None:
        self.asked = given

    def _learn(self, module: nn.Module, args: Any, answer: Any) -> None:
        target = output_of(answer).detach()
        if self.kept is None:
            self._update(self.asked, target, self.samples)
        else:
            self.kept.append((copied(self.asked), target.clone(), self.samples))

    def learn_kept(self, seed: int) -> None:
        """Learn from what the window kept, in an order that follows from the seed."""
        kept = self.kept or []
        for i in torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed)).tolist():
            self._update(*kept[i])
        kept.clear()

    def _update(self, asked: dict[str, Any], target: torch.Tensor, samples: int) -> None:
        left = max(0.0, 1 - self.updates / self.total)
        for group in self.optimizer.param_groups:
            set_number(group, "lr", group["base_lr"] * left)
        # Guidance in one call is a doubled batch; in two calls, or distilled into the model, each answer counts alone.
        doubled = self.guidance > 1 and target.shape[0] == 2 * samples
        with torch.enable_grad():
            own = output_of(self.student(**asked))
            how = (self.guidance, doubled, self.conditional_first)
            wanted = guided(target.float(), *how)
            error = (wanted - guided(own.float(), *how)).square().sum()
            error.backward()
        value = float(error.detach() / wanted.square().sum().clamp_min(1e-12))
        if not math.isfinite(value):
            raise TrainingError(f"the error of update {self.updates + 1} is not finite; lower the rates")
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                if name.endswith(("qalora_scale", "weight_scale", "input_scale")):
                    # A step size that reached 0 would divide by it.
                    parameter.clamp_min_(1e-8)
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self.seen.append(value)
        self.bar.update()
        self.bar.set_postfix(error=f"{value:.4f}")
        if self.watch is not None:
            self.watch(self.updates, value)


def merge_qalora(student: Any, name: str = NAME) -> None:
    """Make the trained codes and scales the model's own, and take the adapter off: what is left is integers.

    Raises:
        AdapterError: no such adapter.
    """
    layers = adapter_layers(student, name)
    for layer in layers.values():
        layer.merge(adapter_names=[name])
    for path, layer in list(student.named_modules()):
        if isinstance(layer, QALoraLayer) and layer in layers.values():
            base: Any = layer.base_layer
            layer.merged_adapters = []
            assert isinstance(base, QuantLayer)
            parent, _, attribute = path.rpartition(".")
            setattr(student.get_submodule(parent), attribute, base)
    configs = getattr(student, "peft_config", None)
    if isinstance(configs, dict):
        configs.pop(name, None)
        if not configs:
            del student.peft_config
    student.__dict__.pop("_vislr_adapters", None)
    if "_hf_peft_config_loaded" in vars(student) and not configs:
        student._hf_peft_config_loaded = False
    student.requires_grad_(False)
