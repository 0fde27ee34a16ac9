"""One press of "Generate": every chosen method makes the same pictures, one method after another."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from vislr.core.errors import AdapterError, ConfigError, VislrError, hint
from vislr.core.files import write_picture
from vislr.demos.session import Loaded, Picture, Session
from vislr.demos.shared import Stopped
from vislr.pipelines.picture_notes import Job, hashes_of, note_of

# The method that is none: the base model, for comparison.
BASE = "base"
# These weigh an adapter by the words in the prompt that mean it.
PROMPT_AWARE = frozenset(("w_switch", "w_composite"))
MOST_STEPS, MOST_COUNT, MOST_SIZE, MOST_TEXT = 200, 8, 2048, 1000
_log = logging.getLogger("vislr.demos")


def methods() -> dict[str, str]:
    """Name -> one line, of every method that the page offers."""
    from vislr import compose

    return {BASE: "without adapters", **compose.METHODS}


@dataclass(frozen=True)
class Wanted:
    """What a run should make.

    Attributes:
        methods: names out of `methods()`; a column of the grid each.
        weights: label of an adapter of the session -> weight.
        prompt, negative: texts.
        seed, count: first seed, and how many; a row of the grid each.
        steps, guidance, size: of the sampler; size None is the pipeline's own.
        every: steps between two switches of Switch.
        density: share of entries that TIES, DARE and magnitude keep.
        refresh: steps between two refreshes of CMLoRA's caches; 0: its non-uniform schedule.
        triggers: label -> the words in the prompt that mean this adapter, for the prompt-aware methods.
    """

    methods: tuple[str, ...]
    weights: dict[str, float]
    prompt: str
    negative: str = ""
    seed: int = 0
    count: int = 1
    steps: int = 25
    guidance: float = 4.0
    size: int | None = None
    every: int = 5
    density: float = 0.5
    refresh: int = 0
    triggers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("no method is chosen; choose at least one")
        for method in self.methods:
            if method not in methods():
                raise ConfigError(f"no method is called '{method}'{hint(method, methods())}")
        if not self.prompt.strip():
            raise ConfigError("the prompt is empty; write what the picture should show")
        for name in ("prompt", "negative"):
            if len(getattr(self, name)) > MOST_TEXT:
                raise ConfigError(f"{name} has {len(getattr(self, name)):,} characters; expected at most {MOST_TEXT:,}")
        for name, low, high in (
            ("seed", 0, 2**32 - 1), ("count", 1, MOST_COUNT), ("steps", 1, MOST_STEPS), ("guidance", 0, 50),
            ("every", 1, MOST_STEPS), ("refresh", 0, MOST_STEPS),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected {low} to {high}")
        if self.size is not None and not (16 <= self.size <= MOST_SIZE and self.size % 8 == 0):
            raise ConfigError(f"size is {self.size}; expected a multiple of 8 from 16 to {MOST_SIZE}")
        if not all(math.isfinite(weight) for weight in self.weights.values()):
            raise ConfigError("a weight is no finite number")

    @property
    def seeds(self) -> list[int]:
        """One for each row."""
        return [self.seed + number for number in range(self.count)]


@dataclass
class Line:
    """How far a method is.

    Attributes:
        state: what it does; "queued" waits for another user's picture.
        step: denoising steps that are done.
        seconds: since it began to run.
        message: why it failed, or what is to be known.
        pictures: what it made.
    """

    method: str
    state: Literal["waiting", "queued", "running", "done", "skipped", "failed"] = "waiting"
    step: int = 0
    seconds: float = 0.0
    message: str = ""
    pictures: list[Picture] = field(default_factory=list)
    skip: bool = False


class Run:
    """Work in several parts, which one thread executes while others look at `lines`, `skip` one or stop the session."""

    def __init__(self, session: Session, lines: list[Line], work: Callable[[Any, Line, Callable[[], None]], None]):
        """Args: `work(pipe, line, on_step)` does one part and calls `on_step` after every denoising step."""
        self.session, self.lines, self.work = session, lines, work
        self.changed = threading.Event()

    def execute(self) -> None:
        """Do every part; what goes wrong with one stands in its line and the next goes on.

        Raises:
            ConfigError: the session runs something already.
        """
        with self.session.working():
            self.session.run = self
            for line in self.lines:
                if line.skip or self.session.stopped():
                    line.state = "skipped"
                else:
                    self._execute(line)
                self.changed.set()

    def skip(self) -> None:
        """Leave out the part that is going on."""
        for line in self.lines:
            if line.state in ("queued", "running"):
                line.skip = True

    def _execute(self, line: Line) -> None:
        begun = time.monotonic()

        def ended() -> bool:
            return line.skip or self.session.stopped()

        def on_step() -> None:
            line.step, line.seconds = line.step + 1, time.monotonic() - begun
            self.changed.set()
            if ended():
                raise Stopped

        try:
            line.state = "queued"
            with self.session.pipeline.held(ended) as pipe:
                line.state, begun = "running", time.monotonic()
                self.changed.set()
                self.work(pipe, line, on_step)
            line.seconds = time.monotonic() - begun
            line.state = "done"
        except Stopped:
            line.state = "skipped"
        except VislrError as error:
            line.state, line.message = "failed", self.session.labelled(str(error))
        except Exception as error:
            # A user must not be left before a page that stands still; the log has the whole story.
            _log.exception("'%s' failed", line.method)
            line.state, line.message = "failed", unexpected(error)


def drawing(session: Session, wanted: Wanted) -> Run:
    """A run that makes the pictures of every method; the session remembers them.

    Raises:
        ConfigError, AdapterError, DataError: no pipeline, no adapters, adapters that are gone, words that the
            pipeline does not know.
    """
    from vislr.train.sampling import sample_images

    adapters, weights = session.chosen(wanted.weights)
    if not adapters and set(wanted.methods) != {BASE}:
        raise ConfigError(f"no adapter is on; load one and give it a weight, or choose '{BASE}' alone")
    _check_prompts(session, wanted)

    def work(pipe: Any, line: Line, on_step: Callable[[], None]) -> None:
        with using(session, pipe, line.method, wanted, adapters, weights) as plan:
            images = sample_images(
                pipe, [wanted.prompt] * wanted.count, wanted.seeds, steps=wanted.steps, guidance=wanted.guidance,
                size=wanted.size, batch=wanted.count, negative=wanted.negative, on_step=on_step,
            )  # fmt: skip
        used = [] if line.method == BASE else list(zip(adapters, weights, strict=True))
        # The words of `vislr generate`, which can make the picture again.
        settings = {
            "model": session.pipeline.name,
            "adapter": [f"{adapter.label}:{weight:g}" for adapter, weight in used],
            **{name: getattr(wanted, name) for name in ("steps", "guidance", "size")},
            "device": str(pipe.device),
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "any_base": True,
            "method": line.method,
        }
        hashes = hashes_of(session.pipeline.name, None, [adapter.path for adapter, _ in used], None)
        batch = [Job(wanted.prompt, seed, wanted.negative) for seed in wanted.seeds]
        for place, (image, seed) in enumerate(zip(images, wanted.seeds, strict=True)):
            made = note_of(settings, batch, place, hashes, plan)
            path = session.folder / f"{line.method}-{seed}-{time.time_ns():x}.png"
            write_picture(path, image, made)
            line.pictures.append(
                Picture(path, line.method if wanted.count == 1 else f"{line.method}, seed {seed}", made)
            )
            session.remember(line.pictures[-1])

    return Run(session, [Line(method) for method in wanted.methods], work)


def profiling(session: Session, wanted: Wanted) -> Run:
    """A run that makes the Fourier profile of every adapter of the session, which keeps them.

    Raises:
        AdapterError: there is none. ConfigError, DataError: as `drawing`.
    """
    from vislr import compose
    from vislr.train.sampling import stepping

    if not session.adapters:
        raise AdapterError("no adapter is loaded; load one or more first")
    _check_prompts(session, wanted)
    adapters = dict(session.adapters)

    def work(pipe: Any, line: Line, on_step: Callable[[], None]) -> None:
        with stepping(pipe, on_step):
            (session.profiles[line.method],) = compose.profile_adapters(
                pipe, [adapters[line.method].name], [wanted.prompt], wanted.seeds, steps=wanted.steps,
                guidance=wanted.guidance,
            )  # fmt: skip

    return Run(session, [Line(label) for label in adapters], work)


def _check_prompts(session: Session, wanted: Wanted) -> None:
    from vislr.train.prompts import check_prompts

    check_prompts(session.pipeline.pipe, [("prompt", wanted.prompt), ("negative prompt", wanted.negative)])


@contextlib.contextmanager
def using(
    session: Session, pipe: Any, method: str, wanted: Wanted, adapters: list[Loaded], weights: list[float]
) -> Iterator[dict[str, Any] | None]:
    """The pipeline with these adapters put together by this method; as it was afterwards. Gives the plan as data.

    Raises:
        VislrError: the method does not go with these adapters or this pipeline.
    """
    from vislr import compose

    if method == BASE:
        yield None
        return
    plan = compose.compose_plan(
        pipe, [adapter.name for adapter in adapters], weights, method, **_options(session, method, wanted, adapters)
    )
    with compose.composed(pipe, plan):
        yield session.labelled_data(plan.to_dict())


def _options(session: Session, method: str, wanted: Wanted, adapters: list[Loaded]) -> dict[str, Any]:
    options: dict[str, Any] = {"steps": wanted.steps}
    if method in ("ties", "dare", "dare_ties", "magnitude"):
        options["density"] = wanted.density
    elif method == "switch":
        options["every"] = wanted.every
    elif method == "cmlora":
        profiles = [session.profiles[adapter.label] for adapter in adapters if adapter.label in session.profiles]
        options["refresh"] = wanted.refresh or "non-uniform"
        options["profiles"] = profiles if len(profiles) == len(adapters) else None
    elif method in PROMPT_AWARE:
        triggers = [wanted.triggers.get(adapter.label, "") for adapter in adapters]
        for adapter, trigger in zip(adapters, triggers, strict=True):
            if not trigger:
                raise ConfigError(f"'{method}' needs the words in the prompt that mean '{adapter.label}': its trigger")
        options |= {"prompt": wanted.prompt, "triggers": triggers}
    return options


def unexpected(error: Exception) -> str:
    """What a user is told of an error that no room of vislr raised on purpose."""
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return "out of memory; make fewer or smaller pictures at once"
    return f"{type(error).__name__}, which is a fault of the studio; its log says more"
