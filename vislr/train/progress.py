"""How far a run is, and how that is kept: checkpoints, the best weights, the average."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vislr.core.arguments import plain_data
from vislr.core.errors import ConfigError, DataError, OutputError, TrainingError
from vislr.core.files import write_tensors
from vislr.train.adapted import Average, load_sparse, sparse_state
from vislr.train.checkpoints import (
    check_same_run,
    checkpoints_in,
    clear_leftovers,
    load_checkpoint,
    read_part,
    remove_folder,
    save_checkpoint,
    set_number,
)
from vislr.train.config import TrainConfig
from vislr.train.curves import History
from vislr.train.evaluation import best_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vislr.data import Pool
    from vislr.train.tasks import Task

# The weights of the lowest held-out loss: as the run keeps them, and as users load them.
BEST, BEST_ADAPTER = "best.safetensors", "adapter-best.safetensors"
# Further files of a checkpoint: averaged weights, and which entries SaRA still trains.
AVERAGE, SPARSE = "average.safetensors", "sparse.safetensors"


class Progress:
    """The state of a run that a checkpoint holds.

    Args:
        folder: of the run.
        trainable: name -> parameter. optimizer: over them, not yet prepared.
        average: of the parameters, if there is one: what is evaluated, shown and saved.
        save_adapter: writes the adapter to a path.
        models: that carry it, by prefix.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
        accelerator: Accelerator, average: Average | None, save_adapter: Callable[[Path], Any] | None,
        models: Mapping[str, nn.Module],
    ) -> None:  # fmt: skip
        self.models = models
        self.folder, self.config, self.trainable, self.optimizer = folder, config, trainable, optimizer
        self.accelerator, self.average, self.save_adapter = accelerator, average, save_adapter
        self.step, self.history = 0, History()
        self.step_samples = config.optim.batch * config.optim.accumulation * accelerator.num_processes
        self.data = ""

    def advance(self) -> None:
        """One more update is made."""
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)

    def set_rate(self, optimizer: Any, rate: float) -> float:
        """Set the learning rate of every group by its factor; gives it back."""
        for group in optimizer.param_groups:
            set_number(group, "lr", rate * group["factor"])
        return rate

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """The weights that are evaluated, shown and saved: the average, where there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.shown()

    def check_finite(self) -> None:
        """Refuse to keep weights that are no numbers: they would take the place of the last good ones.

        Raises:
            TrainingError: some are not finite.
        """
        norms = torch._foreach_norm([value.detach().float() for value in self.trainable.values()])
        if not torch.isfinite(torch.stack(norms)).all():
            raise TrainingError(
                f"the trained weights are not finite after step {self.step}; expected numbers: lower optim.lr, or set "
                "precision to fp32"
            )

    def save(self) -> None:
        """Keep the state as it is after `step` steps.

        Raises:
            TrainingError: it is no state to go on from.
        """
        self.check_finite()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step_samples": self.step_samples,
                "batch": self.config.optim.batch,
                "data": self.data,
                "config": plain_data(self.config),
                "history": dataclasses.asdict(self.history),
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            files = {AVERAGE: self.average.values} if self.average is not None else {}
            sparse = sparse_state(self.models)
            if sparse:
                files[SPARSE] = sparse
            save_checkpoint(
                self.folder, self.step, self.trainable, self.optimizer, state, keep=self.config.output.keep,
                save_adapter=self._save_shown if self.save_adapter is not None else None,
                files=files,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def _save_shown(self, path: Path) -> None:
        assert self.save_adapter is not None
        with self.shown():
            self.save_adapter(path)

    def keep_if_best(self) -> None:
        """Keep the weights now if their held-out loss is the lowest so far, and training has begun."""
        points = self._trained_losses()
        if not points or best_of(points)[0] != self.step or not self.accelerator.is_main_process:
            return
        if self.config.held_out.keep == "best":
            with self.shown():
                write_tensors(self.folder / BEST, self.trainable, {"step": str(self.step)})
        if self.save_adapter is not None:
            self._save_shown(self.folder / BEST_ADAPTER)

    def _trained_losses(self) -> list[tuple[int, float]]:
        """Held-out losses of trained weights: those of step 0 are the base's, which are no result."""
        return [point for point in self.history.held_out.get("loss", []) if point[0] > 0]

    @torch.no_grad()
    def finish(self) -> int:
        """Put the weights that are the result in place: the best, the average, or the last. Gives their step.

        Raises:
            TrainingError: the last ones are not finite.
        """
        self.check_finite()
        kept = self.step
        points = self._trained_losses()
        if self.config.held_out.keep == "best" and points:
            kept = best_of(points)[0]
        self.accelerator.wait_for_everyone()
        if kept != self.step:
            values = read_part(self.folder, BEST)
            for name, value in self.trainable.items():
                value.copy_(values[name])
            self.average = None
        elif self.average is not None:
            self.average.settle()
            self.average = None
        return kept


def take_up(progress: Progress, pool: Pool, task: Task) -> None:
    """Take up the newest checkpoint if the config asks for it.

    Raises:
        OutputError: there is one, and the config does not say what to do with it.
        ConfigError, FormatError: it is of another run, or damaged.
        ConfigError, DataError: processes on several machines see other checkpoints or other pictures.
    """
    config, folder = progress.config, progress.folder
    progress.data = pool.fingerprint()
    found = checkpoints_in(folder)
    check_together(progress.accelerator, int(found[-1].name) if found else 0, progress.data)
    if config.output.resume and found:
        if (found[-1] / SPARSE).is_file():
            load_sparse(progress.models, read_part(found[-1], SPARSE))
        state = load_checkpoint(found[-1], progress.trainable, progress.optimizer)
        check_same_run(state["config"], plain_data(config))
        _check_samples(progress, state, task)
        if state["data"] != progress.data:
            raise ConfigError(f"cannot resume: the pictures in '{config.data.folder}' have changed")
        progress.step, progress.history = state["step"], History.from_dict(state["history"])
        if progress.average is not None:
            progress.average.load(read_part(found[-1], AVERAGE))
        if state["scaler"] and progress.accelerator.scaler is not None:
            progress.accelerator.scaler.load_state_dict(state["scaler"])
    elif found and not config.output.overwrite:
        raise OutputError(
            f"'{folder}' holds a run that stopped at step {found[-1].name}; "
            "expected output.resume to go on, or output.overwrite to replace it"
        )
    progress.accelerator.wait_for_everyone()
    if progress.accelerator.is_main_process:
        for old in found if config.output.overwrite else ():
            remove_folder(old)
        clear_leftovers(folder)


def check_together(accelerator: Accelerator, step: int, data: str) -> None:
    """Refuse to train where processes begin differently: machines may have disks of their own.

    Args:
        step: of the newest checkpoint that this process finds; 0: none.
        data: hash of the pictures that it finds, hexadecimal.

    Raises:
        ConfigError, DataError: the same on every process.
    """
    if accelerator.num_processes == 1:
        return
    own = torch.tensor([step, int(data[:15], 16)], device=accelerator.device)
    every = accelerator.gather(own).view(-1, 2).cpu()
    steps = sorted(set(every[:, 0].tolist()))
    if len(steps) > 1:
        raise ConfigError(
            f"processes find checkpoints of different steps ({', '.join(map(str, steps))}); expected an output.folder "
            "that all machines share"
        )
    if len(set(every[:, 1].tolist())) > 1:
        raise DataError("processes find different pictures; expected the same in data.folder on all machines")


def _check_samples(progress: Progress, state: dict[str, Any], task: Task) -> None:
    if state["step_samples"] != progress.step_samples:
        raise ConfigError(
            f"cannot resume: a step saw {state['step_samples']} pictures and would see {progress.step_samples}; "
            "expected the same batch x accumulation x processes"
        )
    sizes = len(task.train.source.sizes)
    if state["batch"] != progress.config.optim.batch and sizes > 1:
        raise ConfigError(
            f"cannot resume: optim.batch was {state['batch']} and is {progress.config.optim.batch}; pictures of "
            f"{sizes} sizes are batched by it: give the old value"
        )
