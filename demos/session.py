"""One user: the adapters that are theirs on a shared pipeline, their pictures, their files."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.errors import AdapterError, ConfigError, FormatError, VislrError, hint
from vislr.core.report import Report
from vislr.demos.shared import SharedPipeline
from vislr.demos.uploads import Taken, slug, take

if TYPE_CHECKING:
    from vislr.compose import Profile
    from vislr.demos.runs import Run

MOST_ADAPTERS = 8
MOST_PICTURES = 120


@dataclass(frozen=True)
class Loaded:
    """An adapter of this session.

    Attributes:
        label: what the user sees; unique in the session.
        name: what it is called on the pipeline; unique there.
        path: its file or folder.
        kind: of its layers: lora, convlora, ...; several are counted.
        place: number of its row on the page; stays while it is loaded.
        report: what went on.
    """

    label: str
    name: str
    path: Path
    kind: str
    place: int
    report: Report

    def summary(self) -> str:
        """Kind, layers, parameters in a line."""
        before, after = self.report.parameters
        return f"{len(self.report.sites)} layers, {after - before:,} parameters"


@dataclass(frozen=True)
class Picture:
    """A picture that was made: the PNG file, and how, which stands in the file too."""

    path: Path
    caption: str
    made: dict[str, Any]


@dataclass
class Session:
    """State of one user.

    Attributes:
        folder: the session's files; they go with it.
        upload_bytes: the largest file that is taken.
        shared: the pipeline in use; None until one is chosen.
        adapters: label -> adapter, in the order in which they came.
        profiles: label -> Fourier profile, of the adapters that were profiled.
        pictures: newest first.
        shown: those in the grid, row by row.
        picked: the one that was chosen from the history.
        run: what runs or ran last.
        used: when something was asked for last (`time.monotonic`).
    """

    folder: Path
    upload_bytes: int = 512 * 2**20
    shared: SharedPipeline | None = None
    adapters: dict[str, Loaded] = field(default_factory=dict)
    profiles: dict[str, Profile] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    shown: list[Picture] = field(default_factory=list)
    picked: Picture | None = None
    run: Run | None = None
    used: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.id = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()
        self._working = threading.Lock()
        self._stop = threading.Event()

    @property
    def pipeline(self) -> SharedPipeline:
        """The pipeline in use.

        Raises:
            ConfigError: none is.
        """
        if self.shared is None:
            raise ConfigError("no pipeline is loaded; choose one first")
        return self.shared

    @property
    def busy(self) -> bool:
        """Whether something of this session is running."""
        return self._working.locked()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Room for one long piece of work; `stop` ends it.

        Raises:
            ConfigError: another one is going on.
        """
        if not self._working.acquire(blocking=False):
            raise ConfigError("something is running already; stop it, or wait until it is done")
        self._stop.clear()
        try:
            yield
        finally:
            self.used = time.monotonic()
            self._working.release()

    def stop(self) -> None:
        """Ask the work that is going on to end at its next step."""
        self._stop.set()

    def stopped(self) -> bool:
        """Whether the work should end."""
        return self._stop.is_set()

    def take(self, files: Sequence[str | os.PathLike]) -> list[Taken]:
        """Copy uploaded files into the session's folder.

        Raises:
            FormatError: a file is too large, or half of an adapter of peft.
        """
        from vislr.record import component_of

        return take(files, self.folder, self.upload_bytes, component_of(self.pipeline.pipe)[0])

    def add(self, taken: Taken, any_base: bool = False) -> Loaded:
        """Put an adapter on the pipeline, inactive until a picture is made with it.

        Raises:
            AdapterError: it is damaged, does not fit, or there are too many; the pipeline is as it was.
        """
        from vislr import compose, recipe

        if len(self.adapters) >= MOST_ADAPTERS:
            raise AdapterError(f"{MOST_ADAPTERS} adapters are loaded, which is the most here; remove one first")
        label = self._free_label(taken.label)
        name = f"s{self.id}_{next(self._numbers)}_{slug(label)}"
        # Beside a file of the folder; an upload comes alone.
        profile = None if taken.owned else compose.read_profile(taken.path)
        with self.pipeline.held() as pipe:
            try:
                report = recipe.load_adapter(pipe, taken.path, name=name, any_base=any_base)
                kind = _kind(pipe, name, report)
            except VislrError as error:
                raise type(error)(readable(error, taken)) from error
            finally:
                recipe.set_adapters(pipe, [])
        if profile is not None:
            self.profiles[label] = dataclasses.replace(profile, adapter=name)
        taken_places = {adapter.place for adapter in self.adapters.values()}
        place = next(number for number in itertools.count() if number not in taken_places)
        self.adapters[label] = Loaded(label, name, taken.path, kind, place, report)
        return self.adapters[label]

    def _free_label(self, wanted: str) -> str:
        label, number = wanted, 2
        while label in self.adapters:
            label, number = f"{wanted} {number}", number + 1
        return label

    def remove(self, label: str) -> None:
        """Take an adapter off the pipeline; nobody else sees a difference.

        Raises:
            AdapterError: no adapter of this session has this label.
        """
        from vislr import recipe

        if label not in self.adapters:
            raise AdapterError(f"no adapter here is called '{label}'{hint(label, self.adapters)}")
        with self.pipeline.held() as pipe:
            recipe.remove(pipe, self.adapters.pop(label).report)
        self.profiles.pop(label, None)

    def clear_adapters(self) -> None:
        """Take all adapters of this session off."""
        for label in list(self.adapters):
            self.remove(label)

    def chosen(self, weights: Mapping[str, float]) -> tuple[list[Loaded], list[float]]:
        """Adapters and weights of these labels; those of weight 0 stay out.

        Raises:
            AdapterError: an unknown label.
        """
        for label in weights:
            if label not in self.adapters:
                raise AdapterError(f"the adapter '{label}' is not loaded any more; load it again")
        used = {label: weight for label, weight in weights.items() if weight != 0}
        return [self.adapters[label] for label in used], list(used.values())

    def labelled(self, text: str) -> str:
        """A message with labels in place of the names that adapters have on the pipeline, in one line."""
        for adapter in self.adapters.values():
            text = text.replace(adapter.name, adapter.label)
        return " ".join(text.split())

    def labelled_data(self, value: Any) -> Any:
        """Plain data, likewise."""
        if isinstance(value, dict):
            return {key: self.labelled_data(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.labelled_data(item) for item in value]
        return self.labelled(value) if isinstance(value, str) else value

    def remember(self, picture: Picture) -> None:
        """Add to the history; the oldest pictures beyond the limit go, with their files."""
        self.pictures.insert(0, picture)
        for old in self.pictures[MOST_PICTURES:]:
            old.path.unlink(missing_ok=True)
        del self.pictures[MOST_PICTURES:]


def _kind(pipe: Any, name: str, report: Report) -> str:
    from vislr import formats

    try:
        counted = Counter(entry.kind for entry in formats.canonical_of(pipe, name).entries.values())
    except FormatError:
        return report.kind
    return next(iter(counted)) if len(counted) == 1 else ", ".join(f"{kind} {n}" for kind, n in counted.most_common())


def readable(error: Exception, taken: Taken) -> str:
    """The message with the file's own name in place of where it lies on this machine."""
    text = str(error).replace(str(taken.path), taken.label)
    return " ".join(text.split())
