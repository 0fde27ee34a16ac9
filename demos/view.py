"""What the page shows, as HTML: everything that came from outside is escaped here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from vislr.demos.runs import Line
from vislr.demos.session import Picture, Session

if TYPE_CHECKING:
    from vislr.compose import Conflicts

CSS = """
.gradio-container {max-width: 1500px !important; margin: 0 auto}
#head h1 {font-size: 1.35rem; margin: 0} #head p {margin: 0; opacity: .75; font-size: .9rem}
.note {padding: .55rem .8rem; border-radius: 8px; border-left: 4px solid var(--color-accent);
  background: var(--background-fill-secondary); font-size: .92rem; overflow-wrap: anywhere}
.note.bad {border-left-color: #d33c3c} .note b {margin-right: .4rem} .note + .note {margin-top: .3rem}
.lines {width: 100%; border-collapse: collapse; font-size: .88rem; margin: 0 !important}
.lines, .lines tr, .lines td, .lines th {border: 0 !important; background: none !important}
.lines td, .lines th {padding: .25rem .5rem; text-align: left; vertical-align: middle}
.lines th {font-weight: 600; opacity: .7} .lines td.bar {width: 45%} .lines td.what {overflow-wrap: anywhere}
.lines .rail {height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden}
.lines .rail div {height: 100%; background: var(--color-accent)}
.lines .failed {color: #d33c3c} .lines .number {text-align: right; font-variant-numeric: tabular-nums}
.made {font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22rem; overflow: auto;
  background: var(--background-fill-secondary); padding: .6rem; border-radius: 8px; margin: 0}
.pictures img {image-rendering: pixelated}
.pictures .caption-label {max-width: 100% !important; left: 0; right: 0; bottom: 0; text-align: center; border: 0;
  border-radius: 0; opacity: .9} .pictures .grid-wrap {min-height: 0 !important; max-height: none !important}
.pictures .grid-container {grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important}
.slot {align-items: stretch !important; gap: 6px !important; flex-wrap: nowrap !important}
.slot button {min-width: 34px !important; padding: 0 !important; flex: none !important}
.slot .form, .slot .block {min-width: 0 !important}
.lines .done, .lines .skipped, .lines .running {white-space: nowrap}
#message {position: sticky; top: 6px; z-index: 40} #message .note {box-shadow: 0 2px 10px rgb(0 0 0 / .18)}
#message:not(:has(.note)) {display: none}
@media (max-width: 760px) {
  #columns {flex-direction: column !important} #columns > .column {width: 100% !important}
  .gradio-container, .main, .wrap, .contain, .column {min-width: 0 !important; max-width: 100vw !important}}
footer {display: none !important}
"""


def note(text: str, title: str = "") -> str:
    """A line that tells something."""
    return f'<div class="note" role="status"><b>{escape(title)}</b>{escape(text)}</div>'


def problem(text: str) -> str:
    """A line that tells what went wrong."""
    return f'<div class="note bad" role="alert"><b>Not done.</b>{escape(text)}</div>'


def adapter_lines(session: Session) -> str:
    """The pipeline, and what every adapter is."""
    where = session.shared.name if session.shared is not None else "none"
    rows = "".join(
        f"<tr><td>{escape(a.label)}</td><td>{escape(a.kind)}</td><td class=what>{escape(a.summary())}</td></tr>"
        for a in session.adapters.values()
    )
    table = f'<table class="lines">{rows}</table>' if rows else "No adapter is loaded: upload files, or add one below."
    return f'<div class="note"><b>{escape(where)}</b>{"" if rows else table}</div>{table if rows else ""}'


def method_lines(methods: Mapping[str, str]) -> str:
    """What every method is."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(line)}</td></tr>" for name, line in methods.items())
    return f'<table class="lines">{rows}</table>'


def progress_lines(lines: Sequence[Line], steps: int) -> str:
    """A bar for every method."""
    said = {"waiting": "waiting", "queued": "waiting for another user's picture", "skipped": "stopped"}
    rows = []
    for line in lines:
        share = 1.0 if line.state == "done" else min(1.0, line.step / max(1, steps))
        if line.state == "running":
            text = f"step {line.step} of {steps}"
        elif line.state == "done":
            text = f"{line.seconds:.1f} s"
        else:
            text = line.message or said.get(line.state, line.state)
        rows.append(
            f'<tr data-method="{escape(line.method)}" data-state="{line.state}"><td>{escape(line.method)}</td>'
            f'<td class="bar"><div class="rail"><div style="width:{100 * share:.0f}%"></div></div></td>'
            f'<td class="what {line.state}">{escape(text)}</td></tr>'
        )
    return f'<table class="lines" id="progress">{"".join(rows)}</table>'


def made_lines(picture: Picture) -> str:
    """How a picture was made."""
    return f'<pre class="made">{escape(json.dumps(picture.made, indent=1, ensure_ascii=False))}</pre>'


def conflict_lines(found: Conflicts, most: int = 12) -> str:
    """Pairs of adapters, and the layers that they fight over most."""
    head = "<tr><th>{}</th><th class=number>cosine</th><th class=number>overlap</th><th>{}</th></tr>"

    def row(what: str, cosine: float, overlap: float, more: str) -> str:
        figures = "".join(f'<td class="number">{value:+.3f}</td>' for value in (cosine, overlap))
        return f'<tr><td class="what">{escape(what)}</td>{figures}<td>{escape(more)}</td></tr>'

    pairs = "".join(
        row(f"{pair.first} and {pair.second}", pair.cosine, pair.overlap, f"{pair.shared_layers}")
        for pair in found.pairs
    )
    layers = "".join(
        row(one.layer, one.cosine, one.overlap, f"{one.first}, {one.second}") for one in found.layers[:most]
    )
    return (
        f'<table class="lines">{head.format("adapters", "shared layers")}{pairs}</table>'
        f'<table class="lines">{head.format("layer", "of")}{layers}</table>'
        '<p class="made">cosine +1: they do the same; -1: they cancel. overlap 0 to 1: how much they change the same '
        "entries.</p>"
    )
