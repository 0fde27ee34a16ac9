"""All pictures of a run: several folders or sets of shards, what is left out of them and why, the held-out part."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vislr.core.errors import DataError
from vislr.data.captions import with_trigger
from vislr.data.config import DataConfig, FolderConfig
from vislr.data.files import FileStore, PictureFile, read_folder
from vislr.data.folder import ImageFolder
from vislr.data.images import measure
from vislr.data.pictures import Picture, Problem, Store, clean_name, refuse, some
from vislr.data.shards import find_shards, read_shards
from vislr.data.source import Source


@dataclass(frozen=True)
class Part:
    """One folder or set of shards of a pool.

    Attributes:
        settings: how often its pictures come up, and with which trigger.
        store: where they are.
        chosen: numbers, in the store, of the pictures that belong to the pool; ascending.
    """

    settings: FolderConfig
    store: Store
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def repeats(self) -> np.ndarray:
        """(n,) times that each picture comes up in a pass."""
        if self.store.streamed:
            return np.ones(len(self), dtype=np.int64)
        return np.array([self.store.picture(i).repeats for i in self.chosen], dtype=np.int64)


@dataclass(frozen=True)
class Pool:
    """Pictures to train on, or held out.

    Attributes:
        config: where they are and how they are used.
        parts: folders and shards.
        problems: what was found wrong; fatal ones are left out.
    """

    config: DataConfig
    parts: tuple[Part, ...]
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty for captions."""
        return self.parts[0].store.classes

    @property
    def streamed(self) -> bool:
        """Whether pictures come from shards: too many for a table, read once when their turn comes."""
        return any(part.store.streamed for part in self.parts)

    def trigger(self, part: Part) -> str:
        """The words put before captions of this part."""
        if part.settings.trigger is not None:
            return part.settings.trigger
        return "" if part.settings.prior else self.config.trigger

    def captions(self) -> list[str] | None:
        """Every caption that can come up, each once; None: too many to count (shuffled tags, shards)."""
        if self.streamed or self.config.shuffle_tags or self.config.tag_dropout:
            return None
        found = {
            with_trigger(part.store.picture(i).caption, self.trigger(part)): None
            for part in self.parts
            for i in part.chosen.tolist()
        }
        return list(found) + ([""] if self.config.caption_dropout and "" not in found else [])

    def split(self, fraction: float) -> tuple[Pool, Pool]:
        """Training and held-out part. Which pictures are held out depends on their names alone.

        Args:
            fraction: share held out, in [0, 1), regularisation sets not counted. Above 0 at least one picture is
                held out and one is left.

        Raises:
            DataError: fewer than two pictures.
        """
        open_ = [number for number, part in enumerate(self.parts) if not part.settings.prior]
        count = sum(len(self.parts[number]) for number in open_)
        if fraction <= 0:
            return self, self._only([np.zeros(len(part), dtype=bool) for part in self.parts])
        if count < 2:
            raise DataError(
                f"'{self.parts[0].store.root}' has one picture; a held-out part needs two or more (or set it to 0)"
            )
        held = min(max(1, math.floor(count * fraction + 0.5)), count - 1)

        def place(entry: tuple[int, int]) -> bytes:
            part = self.parts[entry[0]]
            name = part.store.picture(int(part.chosen[entry[1]])).name
            return hashlib.sha256(os.fsencode(name)).digest()

        entries = [(number, i) for number in open_ for i in range(len(self.parts[number]))]
        masks = [np.zeros(len(part), dtype=bool) for part in self.parts]
        for number, i in sorted(entries, key=place)[:held]:
            masks[number][i] = True
        return self._only([~mask for mask in masks]), self._only(masks)

    def _only(self, masks: Sequence[np.ndarray]) -> Pool:
        parts = [
            dataclasses.replace(part, chosen=part.chosen[mask]) for part, mask in zip(self.parts, masks, strict=True)
        ]
        return dataclasses.replace(self, parts=tuple(parts))

    def fingerprint(self) -> str:
        """sha256 over names, contents, captions and labels of all pictures, 16 hex digits.

        For shards names, places, sizes and captions stand for the contents.
        """
        digest = hashlib.sha256()
        for part in self.parts:
            for i in part.chosen.tolist():
                digest.update(part.store.fingerprint(i))
        return digest.hexdigest()[:16]

    def pictures(self) -> list[Picture]:
        """Every picture, part by part."""
        return [part.store.picture(i) for part in self.parts for i in part.chosen.tolist()]

    def at(self, size: int, multiple: int = 1, *, seed: int = 0) -> Source:
        """The pictures cut to the sizes of a model.

        Args:
            size: side in pixels of the square; with buckets, of a square of the largest area.
            multiple: sides must be multiples of this many pixels.
            seed: everything random follows from it.

        Raises:
            ConfigError: a size or bucket_step that the model cannot take.
            DataError: no picture is large enough for a bucket, or `broken` is stop and one is not.
        """
        return Source(self, size, multiple, seed)

    def summary(self) -> str:
        """What there is and what was left out, for people, in a few lines."""
        lines = []
        for part in self.parts:
            settings = part.settings
            what = [f"{len(part)} pictures"]
            what += [f"{settings.repeats} times an epoch"] if settings.repeats > 1 else []
            what += [f"weight {settings.weight:g}"] if settings.weight is not None else []
            what += ["regularisation"] if settings.prior else []
            lines.append(f"{', '.join(what)} in '{part.store.root}'")
        left = [f"{problem.path} ({problem.reason})" for problem in self.problems if problem.fatal]
        if left:
            lines.append(f"left out {len(left)}: {some(left)}")
        notes = [str(problem) for problem in self.problems if not problem.fatal]
        if notes:
            lines.append(f"noted {len(notes)}: {some(notes, 3)}")
        return "\n".join(lines)


def open_pool(config: DataConfig, classes: bool | Sequence[str] = False, *, quiet: bool = True) -> Pool:
    """Find and check all pictures that `config` names.

    Args:
        config: where they are.
        classes: True: one folder is one class; names: the classes of the training set; False: captions.
        quiet: no progress bars.

    Raises:
        DataError: a folder is not there or holds no picture that can be used; or `config.broken` is stop and something
            is wrong: the first few are named.
    """
    pool = gather(config, classes, quiet=quiet)
    if config.broken == "stop":
        refuse(pool.problems, len(pool))
    for part in pool.parts:
        if not len(part):
            reasons = some([str(problem) for problem in part.store.problems if problem.fatal])
            raise DataError(f"no picture in '{part.store.root}' can be used: {reasons}")
    return pool


def gather(config: DataConfig, classes: bool | Sequence[str] = False, *, quiet: bool = True) -> Pool:
    """As `open_pool`, whatever is wrong with single pictures.

    Raises:
        DataError: a folder is not there or holds no pictures at all.
    """
    parts: list[Part] = []
    for settings in config.parts():
        shards = find_shards(settings.path)
        store: Store
        if shards:
            store = read_shards(settings, shards, config, classes, quiet=quiet)
        else:
            store = read_folder(settings, config, classes, quiet=quiet)
        if classes is True:
            classes = store.classes
        parts.append(Part(settings, store, np.arange(len(store))))
    several = len(parts) > 1
    problems = [
        # Names are relative to their folder; of several folders it must be said which.
        dataclasses.replace(problem, path=f"{part.store.root}/{problem.path}") if several else problem
        for part in parts
        for problem in part.store.problems
    ]
    return Pool(config, tuple(parts), tuple(problems))


def as_pool(folder: ImageFolder, config: DataConfig) -> Pool:
    """The pictures of a folder that was read already, used as `config` says.

    Raises:
        DataError: a file is gone or is no picture.
    """
    files = []
    for sample in folder.samples:
        try:
            with sample.path.open("rb") as opened:
                width, height = measure(opened)
        except OSError as error:
            raise DataError(f"'{sample.path}' cannot be read: {error.strerror}") from error
        except DataError as error:
            raise DataError(f"'{sample.path}' {error}") from error
        name = clean_name(sample.path.relative_to(folder.root).as_posix())
        files.append(PictureFile(sample.path, Picture(name, sample.caption, sample.label, width, height)))
    store = FileStore(str(folder.root), files, folder.classes)
    return Pool(config, (Part(FolderConfig(str(folder.root)), store, np.arange(len(store))),))
