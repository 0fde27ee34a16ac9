"""Who is there: sessions by their key, and the pipelines that they share, each with one lock."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vislr.core.errors import ConfigError, ModelError, hint
from vislr.demos.session import Session
from vislr.demos.shared import SharedPipeline
from vislr.demos.uploads import list_adapters


@dataclass
class Studio:
    """Everything behind the page.

    Attributes:
        model: the pipeline that every session begins with.
        models: others that are offered.
        folder: whose adapter files are offered; None: none.
        typed_paths: whether users may name any folder of this machine, or hub id, themselves.
        device, dtype: where pipelines run, as torch names them.
        upload_bytes: the largest file that is taken.
        idle_seconds: a session that did nothing for so long is closed.
    """

    model: str = "emoji-unet"
    models: tuple[str, ...] = ()
    folder: Path | None = None
    typed_paths: bool = True
    device: str = "cpu"
    dtype: str = "float32"
    upload_bytes: int = 512 * 2**20
    idle_seconds: float = 3600.0

    def __post_init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="vislr-studio-"))
        self._sessions: dict[str, Session] = {}
        self._pipelines: dict[str, SharedPipeline] = {}
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def open(self) -> None:
        """Load the first pipeline, which stays.

        Raises:
            ModelError: it cannot be loaded. ConfigError: the device cannot be used.
        """
        self._load(self.model, "studio")

    def offered(self) -> list[str]:
        """Names of pipelines to choose from."""
        from vislr import zoo

        return list(dict.fromkeys([self.model, *self.models, *zoo.pipeline_names()]))

    def session(self, key: str) -> Session:
        """The session of this key; made at the first call. Sessions that fell asleep are closed on the way."""
        now = time.monotonic()
        with self._lock:
            sleeping = [other for other, one in self._sessions.items()
                        if other != key and not one.busy and now - one.used > self.idle_seconds]  # fmt: skip
        for other in sleeping:
            self.close(other)
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = Session(Path(tempfile.mkdtemp(dir=self.root)), upload_bytes=self.upload_bytes)
            session = self._sessions[key]
            session.used = now
        return session

    def choose(self, key: str, name: str) -> Session:
        """The session with this pipeline; adapters of another one go off with it.

        Raises:
            ConfigError: a pipeline that is not offered, where users may not name their own.
            ModelError: it cannot be loaded.
        """
        name = name.strip()
        session = self.session(key)
        if session.shared is not None and session.shared.name == name:
            return session
        if name not in self.offered() and not self.typed_paths:
            raise ConfigError(f"the pipeline '{name}' is not offered here{hint(name, self.offered())}")
        shared = self._load(name, session.id)
        self._leave(session)
        session.shared = shared
        return session

    def ready(self, key: str) -> Session:
        """The session, with the first pipeline if it has chosen none."""
        session = self.session(key)
        return session if session.shared is not None else self.choose(key, self.model)

    def _load(self, name: str, user: str) -> SharedPipeline:
        # One at a time: two users who want the same one get the same one.
        with self._loading:
            if name not in self._pipelines:
                self._pipelines[name] = SharedPipeline(name, self.fresh(name))
            self._pipelines[name].users.add(user)
            return self._pipelines[name]

    def fresh(self, name: str) -> Any:
        """A pipeline of its own, shared with nobody.

        Raises:
            ModelError: it cannot be loaded, or is one model.
        """
        import torch

        from vislr import folders

        pipe = folders.load(name, dtype=getattr(torch, self.dtype))
        if not hasattr(pipe, "components"):
            raise ModelError(f"'{name}' is one model; expected a whole pipeline")
        try:
            return pipe.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device '{self.device}' cannot be used: {str(error).splitlines()[0]}") from error

    def _leave(self, session: Session) -> None:
        shared = session.shared
        if shared is None:
            return
        session.clear_adapters()
        shared.users.discard(session.id)
        session.shared = None
        with self._loading:
            if not shared.users:
                self._pipelines.pop(shared.name, None)

    def close(self, key: str) -> None:
        """End a session: its work stops, its adapters come off, its files go."""
        with self._lock:
            session = self._sessions.pop(key, None)
        if session is not None:
            session.stop()
            self._leave(session)
            shutil.rmtree(session.folder, ignore_errors=True)

    def visitors(self) -> list[str]:
        """Keys of the sessions that are open."""
        with self._lock:
            return list(self._sessions)

    def close_all(self) -> None:
        """End every session and remove all files."""
        for key in self.visitors():
            self.close(key)
        shutil.rmtree(self.root, ignore_errors=True)

    def library(self, typed: str = "") -> dict[str, Path]:
        """Adapters of the studio's folder: name below it -> file or folder.

        Args:
            typed: another folder, where users may name one.

        Raises:
            FormatError: there is no such folder.
        """
        folder = Path(typed.strip()) if self.typed_paths and typed and typed.strip() else self.folder
        return {} if folder is None else list_adapters(folder)
