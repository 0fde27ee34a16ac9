"""The one training loop: forward, backward, step; held-out figures, pictures, checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vislr.core.errors import ConfigError, Interrupted, TrainingError
from vislr.core.files import atomic_path
from vislr.core.memory import return_freed_heap
from vislr.data import ImageFolder, Pool, as_pool, generator, key_seed, make_grid
from vislr.train.adapted import Average, adapter_training, adapters_off, let_resize, trainable_parameters
from vislr.train.base import activations_aside, prepare_base
from vislr.train.config import TrainConfig
from vislr.train.curves import Board, History, draw_curves
from vislr.train.diffusion import Diffusion
from vislr.train.evaluation import Evaluator, Similarity, out_of_patience
from vislr.train.launch import make_accelerator
from vislr.train.optimizers import build_optimizer, learning_rate, parameter_groups
from vislr.train.progress import Progress, take_up
from vislr.train.sharding import shard_base
from vislr.train.signals import stop_signals
from vislr.train.tasks import Classification, Extra, Preview, Task

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Result:
    """What a training run gives.

    Attributes:
        task: the model, its examples and its loss.
        steps: updates made, those before a resume included; fewer than asked for after an early stop.
        seconds: of the steps since the last start alone, without sampling, evaluating and saving.
        trainable: number of trained parameters.
        history: curves.
        before, after: pictures of the base and of the trained model; None on other processes than the first.
        kept: the step whose weights are the result.
    """

    task: Task
    steps: int
    seconds: float
    trainable: int
    history: History
    before: Preview | None
    after: Preview | None
    kept: int


def fit(
    target: Any,
    adapter_name: str | None,
    config: TrainConfig,
    train: Pool | ImageFolder,
    held_out: Pool | ImageFolder | None = None,
    *,
    head: nn.Module | None = None,
    accelerator: Accelerator | None = None,
    save_adapter: Callable[[Path], Any] | None = None,
    stop: Callable[[int], bool] | None = None,
    trainable: Mapping[str, nn.Parameter] | None = None,
    rates: Mapping[str, float] | None = None,
    extra: Extra | None = None,
) -> Result:
    """Train the adapter that `target` carries.

    Every random draw follows from (seed, step, sample): a run that stops and resumes gives the bits
    of one that does not, and processes share a step's samples without changing which they are.

    Args:
        target: a diffusers pipeline or a classifier, with the adapter on it.
        adapter_name: of the adapter; None with `trainable`.
        config: the run. Progress is kept in `config.output.folder`.
        train, held_out: pictures.
        head: a module of the classifier that is trained in full, too.
        accelerator: of this process; default: one as `config` says.
        save_adapter: writes the adapter to a path, for every checkpoint.
        stop: asked after each step with the number of steps made; True saves and leaves.
        trainable: name -> parameter, trained in place of an adapter's; all others are frozen.
        rates: name of a parameter -> factor of its learning rate (absent: 1).
        extra: given the draw of each training forward; its "objective" is minimised in place of the loss.

    Raises:
        Interrupted: SIGINT, SIGTERM or `stop`; the state is saved.
        TrainingError: the loss is not finite.
        ConfigError, OutputError, FormatError: the checkpoint to resume from is missing or of another run.
    """
    if (adapter_name is None) == (trainable is None):
        raise ConfigError("fit trains an adapter or `trainable`; expected one of the two")
    accelerator = accelerator or make_accelerator(config.precision, config.processes)
    main = accelerator.is_main_process
    pool, held = (as_pool(part, config.data) if isinstance(part, ImageFolder) else part for part in (train, held_out))
    assert pool is not None
    held = held if held is not None and len(held) else None
    target.to(accelerator.device)
    task: Task
    if isinstance(target, nn.Module):
        task = Classification(target, config, pool, held)
    else:
        share = (accelerator.process_index, accelerator.num_processes)
        task = Diffusion(target, config, pool, held, share=share, quiet=not main)
    if trainable is None:
        chosen = trainable_parameters(task.models, str(adapter_name), also=head)
    else:
        task.model.requires_grad_(False)
        chosen = dict(trainable)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
    undo = prepare_base(task.model, config.model)
    groups = parameter_groups(chosen, config.optim, rates)
    chosen = {name: chosen[name] for group in groups for name in group["names"]}
    optimizer = build_optimizer(groups, config.optim)
    average = Average(chosen, config.optim.ema) if config.optim.ema else None
    progress = Progress(Path(config.output.folder), config, chosen, optimizer, accelerator, average, save_adapter,
                        task.models)  # fmt: skip
    take_up(progress, pool, task)
    if _by_hand(config, accelerator.num_processes):
        if config.model.shard:
            shard_base(task.model, list(chosen.values()), accelerator.device, accelerator.num_processes)
        let_resize(task.models)
        wrapped, prepared = task.model, accelerator.prepare(optimizer)
    else:
        wrapped, prepared = accelerator.prepare(task.model, optimizer)
    try:
        return _Run(task, progress, extra).train(wrapped, prepared, stop)
    finally:
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        undo()
        adapter_training(list(task.models.values()), False)


def _by_hand(config: TrainConfig, world: int) -> bool:
    """Whether gradients are shared one by one: a divided base and vectors that get shorter are nothing for DDP."""
    return world > 1 and bool(config.model.shard or config.adapter.reselect_after)


class _Run:
    """One run, from the step that `progress` is at to the end."""

    def __init__(self, task: Task, progress: Progress, extra: Extra | None) -> None:
        self.task, self.progress, self.extra = task, progress, extra
        self.config, self.accelerator = progress.config, progress.accelerator
        self.history, self.trainable = progress.history, progress.trainable
        self.main, self.world = self.accelerator.is_main_process, self.accelerator.num_processes
        self.models = list(task.models.values())
        # A divided model runs on all processes or on none.
        self.together = self.config.model.shard and self.world > 1
        # Parameters beside the wrapped model, or all: their gradients are shared by hand.
        by_hand = _by_hand(self.config, self.world)
        self.loose = [
            value for name, value in self.trainable.items() if by_hand or name.partition(".")[0] in task.models
        ]
        held_out = self.config.held_out
        self.evaluator = Evaluator(
            task, self.accelerator, batch=self.config.optim.batch, bands=held_out.bands, together=self.together
        )
        self.board: Board | None = None
        self.similarity: Similarity | None = None

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self.progress.step

    def evaluate(self) -> None:
        """The held-out figures of the weights as they would be saved; the best so far are kept."""
        with self.progress.shown():
            values = self.evaluator.measure()
        if values:
            self.note(values)
            self.progress.keep_if_best()

    def note(self, values: dict[str, float]) -> None:
        """Held-out figures, into the curves."""
        self.history.add("held_out", self.step, values)
        if self.board is not None:
            self.board.scalars("held_out", self.step, values)

    def show(self) -> Preview | None:
        """Pictures of the model now, as a grid in `samples/` and in tensorboard. On the first process alone."""
        # A step leaves much heap behind, and the VAE's large blocks would come on top of it.
        return_freed_heap()
        preview = self._draw()
        if self.main and preview is not None:
            grid = make_grid(preview.rows, column_labels=preview.columns, title=f"step {self.step}")
            with atomic_path(self.progress.folder / "samples" / f"{self.step:06d}.png") as temporary:
                grid.save(temporary, format="png")
            if self.config.held_out.similarity and preview.drawn:
                self.similarity = self.similarity or Similarity(self.task, quiet=True)
                values = self.similarity.measure(preview)
                self.history.add("samples", self.step, values)
                if self.board is not None:
                    self.board.scalars("samples", self.step, values)
            if self.board is not None:
                self.board.image("samples", self.step, grid)
        self.accelerator.wait_for_everyone()
        return preview

    def _draw(self) -> Preview | None:
        if not (self.main or self.together):
            return None
        adapter_training(self.models, False)
        with self.progress.shown():
            preview = self.task.preview()
        adapter_training(self.models, True)
        return preview

    def _before(self) -> Preview | None:
        """Pictures of the base, also when resumed, and what it predicts."""
        fresh = self.step == 0 and self.config.init_adapter is None
        with adapters_off(self.models):
            if self.task.drifts:
                values = self.evaluator.measure(of_base=True)
                if fresh and values:
                    # A new adapter changes nothing yet: these are its figures, too.
                    self.note(values)
            if self.step == 0:
                preview = self.show()
            else:
                preview = self.task.preview() if self.main or self.together else None
        if self.step == 0 and not (fresh and self.task.drifts):
            self.evaluate()
        return preview

    def train(self, model: nn.Module, optimizer: Any, stop: Callable[[int], bool] | None) -> Result:
        """Step by step to the end, or until asked to stop."""
        config, first = self.config, self.step
        if self.main:
            self.board = Board(self.progress.folder / "tensorboard", first, config)
        before = self._before()
        loader = DataLoader(
            self.task.train, batch_size=None, sampler=self._items(), num_workers=config.data.workers,
            generator=generator(config.seed, "loader"),
        )  # fmt: skip
        batches = iter(loader)
        logged: list[dict[str, torch.Tensor]] = []
        seconds = 0.0
        adapter_training(self.models, True)
        with (
            stop_signals() as asked,
            tqdm(
                total=config.steps, initial=first, desc="training", unit="step", disable=not self.main, mininterval=0.5
            ) as bar,
        ):
            while self.step < config.steps and not self._enough():
                began = time.perf_counter()
                # The adapter's dropout draws from the global stream.
                torch.manual_seed(key_seed(config.seed, "step", self.step, self.accelerator.process_index))
                rate = self.progress.set_rate(optimizer, learning_rate(self.step, config.steps, config.optim))
                logged.append(self._gradients(model, batches))
                norm = None
                if config.optim.clip:
                    norm = self.accelerator.clip_grad_norm_(list(self.trainable.values()), config.optim.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self.progress.advance()
                last = self.step == config.steps
                if self.step % config.output.log_every == 0 or last:
                    self._log(logged, rate, norm)
                    logged = []
                seconds += time.perf_counter() - began
                if last or (config.held_out.every and self.step % config.held_out.every == 0):
                    self.evaluate()
                if not last and config.sample.every and self.step % config.sample.every == 0:
                    self.show()
                bar.set_postfix(self._postfix(rate), refresh=False)
                bar.update()
                if not last:
                    self._save_or_stop(bool(asked) or (stop is not None and stop(self.step)))
        kept = self.progress.finish()
        after = self.show()
        if self.board is not None:
            self.board.close()
            draw_curves(self.history, self.progress.folder / "curves.png")
        count = sum(value.numel() for value in self.trainable.values())
        return Result(self.task, self.step, seconds, count, self.history, before, after, kept)

    def _enough(self) -> bool:
        """Whether the held-out loss has stopped falling. The same on every process: the losses are."""
        return out_of_patience(self.history.held_out.get("loss", []), self.config.held_out.patience)

    def _items(self) -> Iterator[Any]:
        optim, rank = self.config.optim, self.accelerator.process_index
        return self.task.train.source.batches(
            self.step, self.config.steps, optim.batch, optim.accumulation, rank, self.world
        )

    def _gradients(self, model: nn.Module, batches: Iterator[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Forward and backward of one step; processes exchange gradients in the last pass alone.

        Returns:
            means of the loss and of the other parts.
        """
        passes = self.config.optim.accumulation
        total: dict[str, torch.Tensor] = {}
        for number in range(passes):
            batch = next(batches)
            with contextlib.nullcontext() if number == passes - 1 else self.accelerator.no_sync(model):
                aside = self.config.model.offload_activations
                kept = activations_aside(self.task.model) if aside else contextlib.nullcontext()
                with self.accelerator.autocast(), kept:
                    draw = self.task.forward(model, batch)
                    values: dict[str, torch.Tensor] = {"loss": draw.loss}
                    if self.extra is not None:
                        values |= self.extra(draw)
                    loss = values.get("objective", draw.loss).mean() / passes
                self.accelerator.backward(loss)
            for name, value in values.items():
                total[name] = total.get(name, 0) + value.detach().mean() / passes
        if self.loose and self.world > 1:
            for parameter in self.loose:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return total

    def _log(self, logged: list[dict[str, torch.Tensor]], rate: float, norm: torch.Tensor | None) -> None:
        means = torch.stack([torch.stack([one[name] for one in logged]).mean() for name in logged[0]])
        values = dict(zip(logged[0], self.accelerator.reduce(means, "mean").tolist(), strict=True))
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {name} is {value} at step {self.step}; expected a number: lower optim.lr, "
                    "or set precision to fp32"
                )
        values |= {"lr": rate} | ({"gradient": float(norm)} if norm is not None else {})
        self.history.add("train", self.step, values)
        if self.board is not None:
            self.board.scalars("train", self.step, values)

    def _postfix(self, rate: float) -> dict[str, str]:
        shown = {"loss": self.history.last("train").get("loss"), "held-out": self.history.last("held_out").get("loss")}
        return {name: f"{value:.4f}" for name, value in shown.items() if value is not None} | {"lr": f"{rate:.1e}"}

    def _save_or_stop(self, asked: bool) -> None:
        if self.world > 1:
            # A signal may reach processes at different steps; all leave if one must.
            flag = torch.tensor(float(asked), device=self.accelerator.device)
            asked = float(self.accelerator.reduce(flag, "sum")) > 0
        every = self.config.output.checkpoint_every
        if asked or (every and self.step % every == 0):
            self.progress.save()
        if asked:
            if self.board is not None:
                self.board.close()
            raise Interrupted(
                f"stopped at step {self.step} of {self.config.steps}, state saved in '{self.progress.folder}'; "
                "go on with the same command and --output.resume"
            )
