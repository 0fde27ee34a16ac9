"""A pipeline's own trajectories: what its denoiser is asked between noise and picture, without any data.

The pipeline itself runs, so schedulers, guidance and conditions are its own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from vislr.anatomy import denoiser_of
from vislr.core.errors import ConfigError, FormatError
from vislr.core.files import write_tensors
from vislr.quantize.observers import RangeObserver, fresh, observing

_TIMES = "timesteps"


@dataclass(frozen=True)
class Trajectories:
    """Runs of a pipeline from noise to picture.

    Attributes:
        prompts: taken in turn. Of a pipeline of classes: their numbers; empty: drawn at random.
        count: trajectories in all.
        batch: run at once.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        seed: noise and classes of trajectory i follow from (seed, i) alone.
        options: further arguments of the pipeline (height, max_sequence_length, eta, ...).
    """

    prompts: Sequence[Any] = ("",)
    count: int = 8
    batch: int = 4
    steps: int = 20
    guidance: float = 4.0
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.count, self.batch, self.steps) < 1:
            raise ConfigError(
                f"{self.count} trajectories, {self.batch} at once, {self.steps} steps; expected 1 or more"
            )

    @property
    def pieces(self) -> int:
        """Calls of the pipeline."""
        return -(-self.count // self.batch)

    def run(self, pipe: Any, piece: int) -> None:
        """Run one batch of trajectories."""
        numbers = range(piece * self.batch, min(self.count, (piece + 1) * self.batch))
        rngs = [torch.Generator().manual_seed(self.seed * 1_000_003 + number) for number in numbers]
        accepted = inspect.signature(type(pipe).__call__).parameters
        if "class_labels" in accepted:
            denoiser: Any = denoiser_of(pipe)[1]
            classes = denoiser.config.num_embeds_ada_norm
            drawn = [int(torch.randint(classes, (), generator=rng)) for rng in rngs]
            given = self.prompts if self.prompts and self.prompts[0] != "" else None
            conditions: Any = [drawn[i] if given is None else int(given[n % len(given)]) for i, n in enumerate(numbers)]
        else:
            conditions = [self.prompts[number % len(self.prompts)] for number in numbers]
        options = {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "generator": rngs}
        if "output_type" in accepted:
            options["output_type"] = "latent"
        with quiet(pipe), torch.no_grad():
            pipe(conditions, **(options | dict(self.options)))


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**(before | {"disable": True}))
    try:
        yield
    finally:
        pipe._progress_bar_config = before


@contextlib.contextmanager
def watching_calls(denoiser: nn.Module, see: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """While inside, `see` gets the keyword arguments of every call of the denoiser."""
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        given.pop("return_dict", None)
        see(given)

    handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def trajectory_inputs(pipe: Any, runs: Trajectories, every: int = 1) -> list[dict[str, Any]]:
    """What the denoiser is asked along trajectories: keyword arguments, every so-many-th call, copied."""
    found: list[dict[str, Any]] = []
    calls = 0

    def see(given: dict[str, Any]) -> None:
        nonlocal calls
        if calls % every == 0:
            found.append(copied(given))
        calls += 1

    with watching_calls(denoiser_of(pipe)[1], see):
        for piece in range(runs.pieces):
            runs.run(pipe, piece)
    return found


def copied(value: Any) -> Any:
    """A call's arguments, with tensors of their own."""
    if torch.is_tensor(value):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value


@dataclass
class Calibration:
    """What calibration saw.

    Attributes:
        observers: layer -> its inputs.
        timesteps: every timestep of a call, ascending; () for models that are told none.
    """

    observers: dict[str, RangeObserver]
    timesteps: tuple[float, ...] = ()


def calibrate(
    target: Any,
    names: Sequence[str],
    source: Trajectories | Sequence[Mapping[str, Any]],
    *,
    folder: Path | None = None,
    progress: bool = False,
) -> Calibration:
    """Show the layers' inputs to observers: memory is a histogram a layer, whatever the trajectories' number.

    Args:
        target: a pipeline; or a module, with batches as `source`.
        names: of layers.
        source: trajectories of the pipeline, or keyword arguments of forwards of the module.
        folder: keeps the state after each batch of trajectories; a run that was stopped goes on there.
        progress: show a bar.

    Raises:
        DataError: an input is not finite. FormatError: the folder's state is of another calibration.
    """
    module = denoiser_of(target)[1]
    pieces = source.pieces if isinstance(source, Trajectories) else len(source)
    told = f"{source!r} {list(names)}" if isinstance(source, Trajectories) else f"{pieces} batches {list(names)}"
    file = None if folder is None else folder / "calibration.safetensors"
    observers, times, done = fresh(names), set[float](), 0
    if file is not None and file.is_file():
        observers, times, done = _read(file, told)

    def see(given: dict[str, Any]) -> None:
        if given.get("timestep") is not None:
            times.update(torch.as_tensor(given["timestep"]).double().reshape(-1).tolist())

    with observing(module, observers), watching_calls(module, see), torch.no_grad():
        for piece in tqdm(range(done, pieces), "calibrating", disable=not progress, initial=done, total=pieces):
            if isinstance(source, Trajectories):
                source.run(target, piece)
            else:
                module(**source[piece])
            if file is not None:
                _write(file, told, observers, times, piece + 1)
    return Calibration(observers, tuple(sorted(times)))


def _write(file: Path, told: str, observers: Mapping[str, RangeObserver], times: set[float], done: int) -> None:
    tensors = {name: one.state() for name, one in observers.items()}
    tensors[_TIMES] = torch.tensor(sorted(times), dtype=torch.float64)
    write_tensors(file, tensors, {"of": told, "done": str(done)})


def _read(file: Path, told: str) -> tuple[dict[str, RangeObserver], set[float], int]:
    with safe_open(str(file), "pt") as stored:
        metadata = stored.metadata() or {}
        if metadata.get("of") != told:
            raise FormatError(f"'{file}' is the state of another calibration; give a new folder, or remove it")
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    times = set(tensors.pop(_TIMES).tolist())
    return {name: RangeObserver.of(state) for name, state in tensors.items()}, times, int(metadata["done"])
