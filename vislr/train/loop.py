"""The one training loop: forward, backward, step; held-out loss, pictures, checkpoints, exact resume."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vislr.core.arguments import plain_data
from vislr.core.errors import ConfigError, Interrupted, OutputError, TrainingError
from vislr.core.files import atomic_path
from vislr.data import ImageFolder, generator, key_seed, make_grid
from vislr.train.adapted import adapter_training, adapters_off, trainable_parameters
from vislr.train.checkpoints import check_same_run, checkpoints_in, load_checkpoint, save_checkpoint
from vislr.train.config import OptimConfig, TrainConfig
from vislr.train.curves import Board, History, draw_curves
from vislr.train.examples import step_positions
from vislr.train.launch import make_accelerator
from vislr.train.tasks import Classification, Diffusion, Preview, Task

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Result:
    """What a training run gives.

    Attributes:
        task: the model, its examples and its loss.
        steps: updates made, those before a resume included.
        seconds: of the steps since the last start alone, without sampling, evaluating and saving.
        trainable: number of trained parameters.
        history: curves.
        before, after: pictures of the base and of the trained model; None on other processes than the first.
    """

    task: Task
    steps: int
    seconds: float
    trainable: int
    history: History
    before: Preview | None
    after: Preview | None


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Rises in a line over `warmup` steps, falls by a half cosine to `final_lr * lr` at the last step."""
    rise = min(1.0, (step + 1) / optim.warmup) if optim.warmup else 1.0
    done = min(1.0, max(0.0, (step - optim.warmup) / max(1, steps - 1 - optim.warmup)))
    return optim.lr * rise * (optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def fit(
    target: Any,
    adapter_name: str,
    config: TrainConfig,
    train: ImageFolder,
    held_out: ImageFolder | None = None,
    *,
    head: nn.Module | None = None,
    accelerator: Accelerator | None = None,
    save_adapter: Callable[[Path], Any] | None = None,
    stop: Callable[[int], bool] | None = None,
) -> Result:
    """Train the adapter that `target` carries.

    Every random draw follows from (seed, step, sample): a run that stops and resumes gives the bits
    of one that does not, and processes share a step's samples without changing which they are.

    Args:
        target: a diffusers pipeline or a classifier, with the adapter on it.
        adapter_name: of the adapter.
        config: the run. Progress is kept in `config.output.folder`.
        train, held_out: pictures.
        head: a module of the classifier that is trained in full, too.
        accelerator: of this process; default: one as `config` says.
        save_adapter: writes the adapter to a path, for every checkpoint.
        stop: asked after each step with the number of steps made; True saves and leaves.

    Raises:
        Interrupted: SIGINT, SIGTERM or `stop`; the state is saved.
        TrainingError: the loss is not finite.
        ConfigError, OutputError, FormatError: the checkpoint to resume from is missing or of another run.
    """
    accelerator = accelerator or make_accelerator(config.precision, config.processes)
    main = accelerator.is_main_process
    if held_out is None:
        held_out = dataclasses.replace(train, samples=())
    target.to(accelerator.device)
    task: Task
    if isinstance(target, nn.Module):
        task = Classification(target, config, train, held_out)
    else:
        task = Diffusion(target, config, train, held_out, quiet=not main)
    model = task.model
    trainable = trainable_parameters(model, adapter_name, also=head)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        list(trainable.values()), lr=config.optim.lr, betas=config.optim.betas,
        weight_decay=config.optim.weight_decay, fused=True,
    )  # fmt: skip
    run = _Run(config, task, trainable, optimizer, accelerator, save_adapter)
    run.start()
    wrapped, prepared = accelerator.prepare(model, optimizer)
    try:
        return run.train(wrapped, prepared, stop)
    finally:
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        adapter_training(model, False)


class _Run:
    """State of one run: the step, the curves, and where they are kept."""

    def __init__(
        self, config: TrainConfig, task: Task, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
        accelerator: Accelerator, save_adapter: Callable[[Path], Any] | None,
    ) -> None:  # fmt: skip
        self.config, self.task, self.trainable, self.optimizer = config, task, trainable, optimizer
        self.accelerator, self.save_adapter = accelerator, save_adapter
        self.folder = Path(config.output.folder)
        self.world, self.main = accelerator.num_processes, accelerator.is_main_process
        self.step_samples = config.optim.batch * config.optim.accumulation * self.world
        self.step, self.history = 0, History()
        self.board: Board | None = None
        self.data = task.train.source.folder.fingerprint()

    def start(self) -> None:
        """Take up the newest checkpoint if asked to."""
        found = checkpoints_in(self.folder)
        if self.config.output.resume and found:
            state = load_checkpoint(found[-1], self.trainable, self.optimizer)
            check_same_run(state["config"], plain_data(self.config))
            if state["step_samples"] != self.step_samples:
                raise ConfigError(
                    f"cannot resume: a step saw {state['step_samples']} pictures and would see {self.step_samples}; "
                    "expected the same batch x accumulation x processes"
                )
            if state["data"] != self.data:
                raise ConfigError(f"cannot resume: the pictures in '{self.config.data.folder}' have changed")
            self.step, self.history = state["step"], History.from_dict(state["history"])
            if state["scaler"] and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        elif found and not self.config.output.overwrite:
            raise OutputError(
                f"'{self.folder}' holds a run that stopped at step {found[-1].name}; "
                "expected output.resume to go on, or output.overwrite to replace it"
            )
        self.accelerator.wait_for_everyone()
        if self.main:
            self.board = Board(self.folder / "tensorboard", self.step)

    def save(self) -> None:
        """Keep the state as it is after `self.step` steps."""
        if self.main:
            scaler = self.accelerator.scaler
            state = {
                "step_samples": self.step_samples,
                "data": self.data,
                "config": plain_data(self.config),
                "history": dataclasses.asdict(self.history),
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            save_checkpoint(
                self.folder, self.step, self.trainable, self.optimizer, state,
                keep=self.config.output.keep, save_adapter=self.save_adapter,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> None:
        """The held-out loss now; every process takes its share of the examples."""
        examples = self.task.held_out
        if examples is None:
            return
        adapter_training(model, False)
        names = ["loss", "accuracy"] if examples.source.folder.classes else ["loss"]
        # Python's floats are double; not every device has doubles.
        sums = dict.fromkeys(names, 0.0)
        positions = list(range(len(examples)))[self.accelerator.process_index :: self.world]
        batch = self.config.optim.batch
        with self.accelerator.autocast():
            for start in range(0, len(positions), batch):
                for name, each in self.task.loss(model, examples[positions[start : start + batch]]).items():
                    sums[name] += sum(each.tolist())
        adapter_training(model, True)
        total = self.accelerator.reduce(torch.tensor(list(sums.values()), device=self.accelerator.device), "sum")
        values = dict(zip(names, (total / len(examples)).tolist(), strict=True))
        self.history.add("held_out", self.step, values)
        if self.board is not None:
            self.board.scalars("held_out", self.step, values)

    def show(self) -> Preview | None:
        """Pictures of the model now, as a grid in `samples/` and in tensorboard. On the first process alone."""
        preview = None
        if self.main:
            adapter_training(self.task.model, False)
            preview = self.task.preview()
            adapter_training(self.task.model, True)
            grid = make_grid(preview.rows, column_labels=preview.columns, title=f"step {self.step}")
            with atomic_path(self.folder / "samples" / f"{self.step:06d}.png") as temporary:
                grid.save(temporary, format="png")
            if self.board is not None:
                self.board.image("samples", self.step, grid)
        self.accelerator.wait_for_everyone()
        return preview

    def train(self, model: nn.Module, optimizer: Any, stop: Callable[[int], bool] | None) -> Result:
        """Step by step to the end, or until asked to stop."""
        config, first = self.config, self.step
        bare = self.task.model
        with adapters_off(bare):
            # Of the base, also when resumed.
            before = self.show() if first == 0 else (self.task.preview() if self.main else None)
        if first == 0:
            self.evaluate(bare)
        loader = DataLoader(
            self.task.train, batch_size=None, sampler=self._positions(), num_workers=config.data.workers,
            generator=generator(config.seed, "loader"),
        )  # fmt: skip
        batches = iter(loader)
        losses: list[torch.Tensor] = []
        seconds = 0.0
        adapter_training(bare, True)
        with (
            _signals() as asked,
            tqdm(
                total=config.steps, initial=first, desc="training", unit="step", disable=not self.main, mininterval=0.5
            ) as bar,
        ):
            while self.step < config.steps:
                began = time.perf_counter()
                # The adapter's dropout draws from the global stream.
                torch.manual_seed(key_seed(config.seed, "step", self.step, self.accelerator.process_index))
                rate = learning_rate(self.step, config.steps, config.optim)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                losses.append(self._gradients(model, batches))
                norm = None
                if config.optim.clip:
                    norm = self.accelerator.clip_grad_norm_(list(self.trainable.values()), config.optim.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self.step += 1
                last = self.step == config.steps
                if self.step % config.output.log_every == 0 or last:
                    self._log(losses, rate, norm)
                    losses = []
                seconds += time.perf_counter() - began
                if last or (config.held_out.every and self.step % config.held_out.every == 0):
                    self.evaluate(bare)
                if not last and config.sample.every and self.step % config.sample.every == 0:
                    self.show()
                bar.set_postfix(self._postfix(rate), refresh=False)
                bar.update()
                if not last:
                    self._save_or_stop(bool(asked) or (stop is not None and stop(self.step)))
        after = self.show()
        if self.board is not None:
            self.board.close()
            draw_curves(self.history, self.folder / "curves.png")
        count = sum(value.numel() for value in self.trainable.values())
        return Result(self.task, self.step, seconds, count, self.history, before, after)

    def _positions(self) -> Iterator[list[int]]:
        optim, rank = self.config.optim, self.accelerator.process_index
        for step in range(self.step, self.config.steps):
            yield from step_positions(step, optim.batch, optim.accumulation, rank, self.world)

    def _gradients(self, model: nn.Module, batches: Iterator[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Forward and backward of one step; processes exchange gradients in the last pass alone."""
        passes = self.config.optim.accumulation
        total = torch.zeros((), device=self.accelerator.device)
        for number in range(passes):
            batch = next(batches)
            with contextlib.nullcontext() if number == passes - 1 else self.accelerator.no_sync(model):
                with self.accelerator.autocast():
                    loss = self.task.loss(model, batch)["loss"].mean() / passes
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _log(self, losses: list[torch.Tensor], rate: float, norm: torch.Tensor | None) -> None:
        loss = float(self.accelerator.reduce(torch.stack(losses).mean(), "mean"))
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.step}; expected a number: lower optim.lr, or set precision to fp32"
            )
        values = {"loss": loss, "lr": rate} | ({"gradient": float(norm)} if norm is not None else {})
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
            self.save()
        if asked:
            if self.board is not None:
                self.board.close()
            raise Interrupted(
                f"stopped at step {self.step} of {self.config.steps}, state saved in '{self.folder}'; "
                "go on with the same command and --output.resume"
            )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM append to the list; a second SIGINT interrupts at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def remember(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
