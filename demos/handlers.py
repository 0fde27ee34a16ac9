"""What the page's buttons do: read the page's values, ask the studio, say what has changed on the page."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import gradio as gr

from vislr.core.errors import AdapterError, ConfigError, VislrError
from vislr.demos import saving, view
from vislr.demos.runs import PROMPT_AWARE, Run, Wanted, drawing, methods, profiling, unexpected
from vislr.demos.session import MOST_ADAPTERS, Session
from vislr.demos.studio import Studio
from vislr.demos.uploads import Taken, discard, label_of

# The grid has at most so many columns; it wraps.
MOST_COLUMNS = 4
# Seconds between two looks at a run.
_LOOK = 0.3
_log = logging.getLogger("vislr.demos")
Changes = dict[Any, Any]


def _key(request: gr.Request) -> str:
    """Which window asks."""
    if not request.session_hash:
        raise ConfigError("this page has no session; load it again")
    return request.session_hash


def _said(error: Exception) -> str:
    if isinstance(error, VislrError):
        return view.problem(" ".join(str(error).split()))
    _log.exception("a handler failed")
    return view.problem(unexpected(error))


def _safely(handler: Callable[..., Changes]) -> Callable[..., Changes]:
    """An error becomes the page's message; what went well clears it."""

    @functools.wraps(handler)
    def wrapped(self: Handlers, *args: Any) -> Changes:
        try:
            return {self.ui["message"]: "", **handler(self, *args)}
        except Exception as error:
            return {self.ui["message"]: _said(error)}

    return wrapped


def _streaming(handler: Callable[..., Iterator[Changes]]) -> Callable[..., Iterator[Changes]]:
    """The same for what changes the page several times."""

    @functools.wraps(handler)
    def wrapped(self: Handlers, *args: Any) -> Iterator[Changes]:
        try:
            yield {self.ui["message"]: ""}
            yield from handler(self, *args)
        except Exception as error:
            yield {self.ui["message"]: _said(error)}

    return wrapped


class Handlers:
    """The handlers of one page; every user's state is in the studio's session for the request's key.

    Attributes:
        studio: who is there.
        ui: the page's components by name.
    """

    SETTINGS = ("prompt", "negative", "methods", "steps", "guidance", "seed", "count", "size", "every", "density",
                "refresh")  # fmt: skip
    DRAWN = ("message", "progress", "grid", "history", "generate", "skip", "stop")

    def __init__(self, studio: Studio, ui: dict[str, Any]):
        self.studio, self.ui = studio, ui

    def outputs(self) -> list[Any]:
        """What `enter` and everything about adapters may change."""
        rows = [part for slot in self.ui["slots"] for part in slot[:3]]
        return [*(self.ui[name] for name in ("message", "adapters", "model", "library")), *rows]

    # The pipeline and its adapters

    def _shown(self, session: Session, new: tuple[str, ...] = ()) -> Changes:
        changes: Changes = {self.ui["adapters"]: view.adapter_lines(session)}
        if session.shared is not None:
            changes[self.ui["model"]] = session.shared.name
        places = {adapter.place: adapter for adapter in session.adapters.values()}
        for place, (row, weight, trigger, _) in enumerate(self.ui["slots"]):
            adapter = places.get(place)
            changes[row] = gr.update(visible=adapter is not None)
            if adapter is not None and adapter.label in new:
                changes[weight] = gr.update(label=adapter.label, value=1.0)
                changes[trigger] = gr.update(value="")
        return changes

    @_safely
    def enter(self, request: gr.Request) -> Changes:
        """A page was opened."""
        return self._shown(self.studio.ready(_key(request)))

    def leave(self, request: gr.Request) -> None:
        """It was closed."""
        self.studio.close(_key(request))

    @_safely
    def choose(self, request: gr.Request, name: str) -> Changes:
        """Another pipeline."""
        session = self.studio.choose(_key(request), str(name or ""))
        return self._shown(session)

    def _put_on(self, session: Session, found: list[Taken], any_base: bool) -> Changes:
        new, wrong = [], []
        for taken in found:
            try:
                new.append(session.add(taken, bool(any_base)).label)
            except VislrError as error:
                wrong.append(str(error) if taken.label in str(error) else f"'{taken.label}': {error}")
                if taken.owned:
                    discard(taken.path)
        changes = self._shown(session, tuple(new))
        if wrong:
            changes[self.ui["message"]] = view.problem(" ".join(wrong))
        return changes

    @_safely
    def upload(self, request: gr.Request, files: list[str] | None, any_base: bool) -> Changes:
        """Files were uploaded."""
        session = self.studio.ready(_key(request))
        files = [files] if isinstance(files, str) else list(files or ())
        if len(files) > 2 * MOST_ADAPTERS:
            raise AdapterError(f"{len(files)} files at once; at most {MOST_ADAPTERS} adapters can be loaded")
        return self._put_on(session, session.take(files), any_base)

    @_safely
    def list_folder(self, folder: str) -> Changes:
        """The files of a folder of this machine."""
        return {self.ui["library"]: gr.update(choices=sorted(self.studio.library(folder)), value=[])}

    @_safely
    def add(self, request: gr.Request, folder: str, names: list[str], any_base: bool) -> Changes:
        """Files of a folder were chosen."""
        session = self.studio.ready(_key(request))
        library = self.studio.library(folder)
        missing = [name for name in names or () if name not in library]
        if missing or not names:
            raise AdapterError(
                f"'{missing[0]}' is not in the folder" if missing else "choose files from the list first"
            )
        found = [Taken(label_of(library[name]), library[name], False) for name in names]
        return {self.ui["library"]: gr.update(value=[]), **self._put_on(session, found, any_base)}

    def remover(self, place: int) -> Callable[..., Changes]:
        """The handler of the button that removes the adapter of this row."""

        def remove(self: Handlers, request: gr.Request) -> Changes:
            session = self.studio.ready(_key(request))
            for adapter in list(session.adapters.values()):
                if adapter.place == place:
                    session.remove(adapter.label)
            return self._shown(session)

        bound = functools.partial(_safely(remove), self)

        def handler(request: gr.Request) -> Changes:
            return bound(request)

        return handler

    def needs_triggers(self, names: list[str]) -> list[Any]:
        """The rows ask for trigger words while a method that reads the prompt is chosen."""
        return [gr.update(visible=bool(PROMPT_AWARE.intersection(names or ())))] * MOST_ADAPTERS

    # Pictures

    def _weights(self, session: Session, values: tuple[Any, ...]) -> tuple[dict[str, float], dict[str, str]]:
        """Label -> weight, label -> trigger, out of the rows' values."""
        weights, triggers = {}, {}
        for adapter in session.adapters.values():
            weight, trigger = values[2 * adapter.place : 2 * adapter.place + 2]
            weights[adapter.label], triggers[adapter.label] = float(weight or 0), str(trigger or "").strip()
        return weights, triggers

    def _wanted(self, session: Session, values: tuple[Any, ...]) -> Wanted:
        given = dict(zip(self.SETTINGS, values, strict=False))
        weights, triggers = self._weights(session, values[len(self.SETTINGS) :])
        # In the order of the page, not of the clicks.
        order = list(methods())
        chosen = sorted(given["methods"] or (), key=lambda name: order.index(name) if name in order else -1)
        whole = {name: int(given[name] or 0) for name in ("steps", "seed", "count", "every", "refresh")}
        return Wanted(
            methods=tuple(chosen), weights=weights, triggers=triggers,
            prompt=str(given["prompt"] or ""), negative=str(given["negative"] or ""),
            guidance=float(given["guidance"] or 0), density=float(given["density"] or 0),
            size=int(given["size"] or 0) or None, **whole,
        )  # fmt: skip

    def _follow(self, run: Run, look: Callable[[], Changes]) -> Generator[Changes, None, str]:
        """Execute in another thread, and say what it looks like until it is done; returns the page's message."""
        wrong: list[Exception] = []

        def work() -> None:
            try:
                run.execute()
            except VislrError as error:
                wrong.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            if run.changed.wait(_LOOK):
                run.changed.clear()
                yield look()
            thread.join(0.05)
        yield look()
        return _said(wrong[0]) if wrong else ""

    def _grid(self, session: Session, run: Run) -> Any:
        done = [line for line in run.lines if line.pictures]
        rows = max((len(line.pictures) for line in done), default=0)
        session.shown = [line.pictures[row] for row in range(rows) for line in done if row < len(line.pictures)]
        return gr.update(
            value=[(str(picture.path), picture.caption) for picture in session.shown],
            columns=max(1, min(MOST_COLUMNS, len(done))), selected_index=None,
        )  # fmt: skip

    @_streaming
    def generate(self, request: gr.Request, *values: Any) -> Iterator[Changes]:
        """Pictures by every chosen method."""
        ui, session = self.ui, self.studio.ready(_key(request))
        wanted = self._wanted(session, values)
        run, count = drawing(session, wanted), -1

        def look() -> Changes:
            nonlocal count
            changes: Changes = {ui["progress"]: view.progress_lines(run.lines, wanted.steps)}
            pictures = sum(len(line.pictures) for line in run.lines)
            if pictures != count:
                count = pictures
                changes[ui["grid"]] = self._grid(session, run)
            return changes

        yield {ui["generate"]: gr.update(interactive=False), **self._buttons(True)}
        wrong = yield from self._follow(run, look)
        yield {
            ui["generate"]: gr.update(interactive=True), **self._buttons(False), ui["message"]: wrong,
            ui["history"]: [(str(picture.path), picture.caption) for picture in session.pictures],
        }  # fmt: skip

    def _buttons(self, on: bool) -> Changes:
        return {self.ui[name]: gr.update(interactive=on) for name in ("skip", "stop")}

    def skip(self, request: gr.Request) -> None:
        """Leave out the method that runs."""
        session = self.studio.session(_key(request))
        if session.run is not None:
            session.run.skip()

    def stop(self, request: gr.Request) -> None:
        """End what runs."""
        self.studio.session(_key(request)).stop()

    def pick(self, request: gr.Request, event: gr.SelectData) -> Changes:
        """A picture of the grid was chosen."""
        pictures = self.studio.session(_key(request)).shown
        return self._details(pictures, event.index, "picked", "picture_file")

    def recall(self, request: gr.Request, event: gr.SelectData) -> Changes:
        """A picture of the history was chosen."""
        session = self.studio.session(_key(request))
        changes = self._details(session.pictures, event.index, "remembered", "history_file")
        session.picked = session.pictures[event.index] if changes else None
        return {**changes, self.ui["again"]: gr.update(interactive=session.picked is not None)}

    def _details(self, pictures: list[Any], index: int, made: str, file: str) -> Changes:
        if not 0 <= index < len(pictures):
            return {}
        chosen = pictures[index]
        return {
            self.ui[made]: view.made_lines(chosen),
            self.ui[file]: gr.update(value=str(chosen.path), interactive=True),
        }

    @_safely
    def again(self, request: gr.Request) -> Changes:
        """The settings of the chosen picture, back on the left side."""
        session, ui = self.studio.session(_key(request)), self.ui
        if session.picked is None:
            raise AdapterError("choose a picture first")
        made = session.picked.made
        changes: Changes = {ui[name]: made[name] for name in ("negative", "steps", "guidance", "size")}
        changes |= {ui["prompt"]: made["prompts"][0], ui["seed"]: made["seeds"][0], ui["methods"]: [made["method"]]}
        weights = dict(text.rpartition(":")[::2] for text in made["adapter"])
        for adapter in session.adapters.values():
            changes[ui["slots"][adapter.place][1]] = float(weights.pop(adapter.label, 0))
        if weights and made["model"] == session.pipeline.name:
            changes[ui["message"]] = view.note(f"not loaded any more: {', '.join(weights)}")
        return changes

    # Reports

    @_streaming
    def profile(self, request: gr.Request, *values: Any) -> Iterator[Changes]:
        """The Fourier profile of every adapter."""
        from vislr import compose

        ui, session = self.ui, self.studio.ready(_key(request))
        wanted = self._wanted(session, values)
        run = profiling(session, wanted)
        steps = wanted.steps * wanted.count
        yield {ui["stop"]: gr.update(interactive=True)}
        wrong = yield from self._follow(run, lambda: {ui["profile_lines"]: view.progress_lines(run.lines, steps)})
        found = [dataclasses.replace(one, adapter=label) for label, one in session.profiles.items()]
        picture = compose.profile_picture(found) if found else None
        yield {
            ui["stop"]: gr.update(interactive=False), ui["message"]: wrong,
            ui["profile_picture"]: gr.update(value=picture, visible=bool(found)),
        }  # fmt: skip

    @_safely
    def conflicts(self, request: gr.Request) -> Changes:
        """Where adapters change the same weights."""
        from vislr import compose

        session = self.studio.ready(_key(request))
        names = {adapter.name: adapter.label for adapter in session.adapters.values()}
        if len(names) < 2:
            raise AdapterError(f"{len(names)} adapters are loaded; expected two or more to compare")
        with session.pipeline.held() as pipe:
            found = compose.conflicts(pipe, list(names))
        found = dataclasses.replace(
            found,
            **{
                part: tuple(
                    dataclasses.replace(one, first=names[one.first], second=names[one.second])
                    for one in getattr(found, part)
                )
                for part in ("pairs", "layers")
            },
        )
        return {
            self.ui["conflict_lines"]: view.conflict_lines(found),
            self.ui["conflict_picture"]: gr.update(value=compose.conflict_picture(found), visible=True),
        }

    # Files

    @_safely
    def save_grid(self, request: gr.Request) -> Changes:
        """The grid as one picture."""
        session = self.studio.session(_key(request))
        path = saving.save_grid(session, session.shown)
        return {self.ui["grid_file"]: gr.update(value=str(path), visible=True)}

    @_safely
    def save_adapter(
        self, request: gr.Request, name: str, way: str, format: str, rank: float, density: float, *values: Any
    ) -> Changes:
        """The adapters as one file."""
        session = self.studio.ready(_key(request))
        weights, _ = self._weights(session, values)
        path, notes = saving.save_merged_adapter(
            session, weights, name=name or "", way=way, format=format, rank=int(rank or 0), density=float(density or 0)
        )
        return self._saved(path, notes)

    @_safely
    def save_pipeline(self, request: gr.Request, name: str, *values: Any) -> Changes:
        """The pipeline with the adapters in it."""
        session = self.studio.ready(_key(request))
        weights, _ = self._weights(session, values)
        return self._saved(*saving.save_merged_pipeline(self.studio, session, weights, name=name or ""))

    def _saved(self, path: Any, notes: list[str]) -> Changes:
        lines = "".join(view.note(text) for text in [f"{path.stat().st_size / 2**20:,.2f} MiB", *notes])
        return {self.ui["saved"]: gr.update(value=str(path), visible=True), self.ui["saved_lines"]: lines}
