"""A pipeline that several sessions use, and how they take turns."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

# Seconds between two looks at whether the one who waits wants to go on.
_POLL = 0.1


class Stopped(Exception):
    """The user stopped what was going on; nothing is wrong."""


@dataclass
class SharedPipeline:
    """A loaded pipeline; whoever changes or runs it holds its lock.

    Attributes:
        name: as it was asked for.
        pipe: the pipeline; between two holders no adapter is active on it.
        users: keys of the sessions that chose it.
    """

    name: str
    pipe: Any
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: set[str] = field(default_factory=set)

    @contextlib.contextmanager
    def held(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[Any]:
        """The pipeline, for this thread alone.

        Raises:
            Stopped: `stopped` said so while another thread had it.
        """
        while not self.lock.acquire(timeout=_POLL):
            if stopped():
                raise Stopped
        try:
            yield self.pipe
        finally:
            self.lock.release()
