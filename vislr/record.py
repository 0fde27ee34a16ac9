"""What was done to a model, in order: apply, remove, and the entries that a recipe is made of."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vislr.core import registry
from vislr.core.errors import ModelError, UndoError, VislrError, hint
from vislr.core.registry import Attached
from vislr.core.report import Report

if TYPE_CHECKING:
    from torch import nn

_RECORD = "_vislr_record"
_MEASURED = "_vislr_measured"
# Applied later = larger, over all modules of a process: the order within a pipeline.
_order = itertools.count()


@dataclass
class Entry:
    """One applied change: what `vislr.json` keeps, and what `remove` needs.

    Attributes:
        owner: finds the target that it was applied through, for what is lifted off and put back.
    """

    report: Report
    change: dict[str, Any]
    attached: Attached
    owner: Callable[[], Any] = lambda: None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the live part stays behind."""
        return {"change": self.change, "report": self.report.to_dict()}

    @property
    def structural(self) -> bool:
        """Whether it is part of the component's saved structure."""
        return registry.get_kind(self.report.kind).structural

    @property
    def settled(self) -> bool:
        """Whether what came before it stays below it: a change of the structure, or of the weights themselves."""
        kind = registry.get_kind(self.report.kind)
        return kind.structural or kind.settles

    @property
    def on_top(self) -> bool:
        """Whether it is a run-time plan: those sit on top of everything, whenever they were applied."""
        return self.is_plan and not self.structural

    @property
    def is_plan(self) -> bool:
        """Whether it is a plan, not an adapter."""
        return "plan" in self.change


def record_of(module: nn.Module) -> list[Entry]:
    """The module's entries, in the order of application; of a model that was loaded, its config's plans."""
    if _RECORD not in module.__dict__:
        # Not through nn.Module.__setattr__: the record is no part of the state.
        module.__dict__[_RECORD] = _from_config(module)
    return module.__dict__[_RECORD]


def _from_config(module: Any) -> list[Entry]:
    from vislr.core.made_with import made_with
    from vislr.core.quantizing import parameter_count
    from vislr.models import KEY, read_entry

    plans = module.config.get(KEY) if hasattr(module, "register_to_config") else made_with(module).get("plans")
    entries = []
    for stored in plans or ():
        kind, name, plan = read_entry(stored)
        change = {"kind": kind.name, "plan": plan.to_dict()}
        total, count = getattr(plan, "total", None), parameter_count(module)
        before = total if total is not None and getattr(plan, "budget", "") == "parameters" else count
        sites = tuple(getattr(plan, "removed", ()) or getattr(plan, "layers", ()))
        report = Report(
            kind.name, name, plan.component, sites, (before, count), 0, notes=("loaded with the model",),
            index=next(_order),
        )  # fmt: skip
        entries.append(Entry(report, change, Attached(sites, change)))
    return entries


def restore(module: nn.Module, entries: list[tuple[Report, dict[str, Any], dict[str, bytes]]]) -> None:
    """Give a loaded model the reports that its folder keeps, in place of what its config alone says.

    Args:
        entries: report, change and files of every step that is in the weights.
    """
    module.__dict__[_RECORD] = [
        Entry(replace(report, index=next(_order)), change, Attached(report.sites, change, files=files))
        for report, change, files in entries
    ]


def component_of(target: Any, change: object = None) -> tuple[str, Any]:
    """Where a change goes (name, module): the component that it names, else the denoiser, else the module itself."""
    from vislr.anatomy import denoiser_of

    named = getattr(change, "component", None)
    if named and hasattr(target, "components"):
        if named not in target.components:
            raise ModelError(f"the pipeline has no component '{named}'{hint(named, target.components)}")
        return named, target.components[named]
    return denoiser_of(target)


def recipe_of(target: Any) -> list[dict[str, Any]]:
    """The record of a pipeline or module: what was applied and not removed, in order, as plain data."""
    return [entry.to_dict() for entry in entries_of(target)]


def modules_of(target: Any) -> list[nn.Module]:
    """The module itself, or a pipeline's components that are modules."""
    from torch import nn

    if isinstance(target, nn.Module):
        return [target]
    return [part for part in getattr(target, "components", {}).values() if isinstance(part, nn.Module)]


def entries_of(target: Any) -> list[Entry]:
    """All entries of a pipeline or module, in the order of application."""
    found = [entry for module in modules_of(target) for entry in record_of(module)]
    return sorted(found, key=lambda entry: entry.report.index)


def _flops(module: nn.Module) -> tuple[int | None, dict | None, str]:
    """FLOPs at the model's own size; a model that no reader knows is counted by parameters alone."""
    from vislr.anatomy import flops, sample_of

    try:
        return flops(module), sample_of(module), ""
    except ModelError as error:
        return None, None, f"FLOPs not counted: {error}"


def apply(target: Any, change: Any, *, name: str = "default", undo: bool = True, measure: bool = False) -> Report:
    """Put an adapter config or a plan on a pipeline or module.

    Args:
        target: a diffusers pipeline (the change goes to its denoiser, or to the component that a
            plan names), or a bare module.
        change: ConvLoraConfig, FloraConfig, any config of peft, or a plan.
        name: the adapter's name; plans are recorded under it.
        undo: keep what `remove` needs. False frees what was removed at once.
        measure: also time the model without and with the change, for kinds that can be timed; the
            report's notes say the figures.

    Returns:
        a Report: sites touched, parameters and FLOPs before and after.

    Raises:
        ConfigError: `change` is neither a config nor a plan.
        TargetError: it matches nothing in the model.
        AdapterError, ModelError: it does not fit. In every case the model is as it was.
    """
    report = put_on(target, change, name, attach_for(target, change), undo)
    timing = getattr(registry.handler_of(registry.kind_of(change)), "timing", None)
    if measure and timing is not None:
        module = component_of(target, change)[1]
        entry = record_of(module)[-1]
        report = add_notes(target, report, timing(module, entry.attached))
    return report


def attach_for(target: Any, change: Any) -> Callable[..., Attached]:
    """The `attach(module, change, name)` of a change on this target."""
    handler = registry.handler_of(registry.kind_of(change))
    return handler.attach_to(target) if hasattr(handler, "attach_to") else handler.attach


def add_notes(target: Any, report: Report, notes: Iterable[str]) -> Report:
    """The report with further notes, also in the record."""
    noted = replace(report, notes=report.notes + tuple(notes))
    for entry in entries_of(target):
        if entry.report.index == report.index:
            entry.report = noted
    return noted


def put_on(
    target: Any,
    change: Any,
    name: str,
    attach: Callable[..., Attached],
    undo: bool = True,
    known: Report | None = None,
) -> Report:
    """Count, let `attach(module, change, name)` work, count again, record.

    A change of the structure goes below the run-time plans that are on: they are lifted off and put back.

    Args:
        known: the report of a change that comes out of a folder: nothing is counted again.
    """
    kind = registry.kind_of(change)
    handler = registry.handler_of(kind)
    component, module = component_of(target, change)
    _check_above(module, kind)
    lifted = _lift(module) if kind.structural else []
    try:
        counted = None if known else _Counted(module, getattr(handler, "account", None))
        attached = attach(module, change, name)
        try:
            report = replace(known, index=next(_order)) if known else None
            if counted is not None:
                report = counted.report(kind.name, name, component, attached, change)
            assert report is not None
            _put_back(module, lifted)
        except BaseException:
            _take(module, lifted)
            handler.detach(module, attached)
            raise
    except BaseException:
        _put_back(module, lifted)
        raise
    if not undo:
        attached.undo = None
    record_of(module).append(Entry(report, attached.change, attached, weakref.ref(target)))
    if kind.structural:
        mark(target, component, module)
    return report


class _Counted:
    """Parameters and FLOPs of a module before a change, and the report once it is on."""

    def __init__(self, module: nn.Module, account: Any):
        from vislr.core.quantizing import parameter_count

        self.module, self.account, self.parameters = module, account, parameter_count(module)
        self.flops = (None, None, "") if account else _flops(module)

    def report(self, kind: str, name: str, component: str, attached: Attached, change: Any) -> Report:
        """Count again."""
        from vislr.core.quantizing import parameter_count

        module, (before, sample, note) = self.module, self.flops
        counted, notes = None, attached.notes
        if self.account is not None:
            from vislr.anatomy import sample_of

            counted, own = self.account(module, change)
            sample, notes = sample_of(module), notes + own
        elif before is not None:
            after, _, note = _flops(module)
            counted = None if after is None else (before, after)
        return Report(
            kind=kind,
            name=name,
            component=component,
            sites=attached.sites,
            parameters=(self.parameters, parameter_count(module)),
            trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
            flops=counted,
            sample=sample if counted else None,
            notes=notes + ((note,) if note else ()),
            index=next(_order),
        )


def _lift(module: nn.Module) -> list[Entry]:
    """Take the module's run-time plans off, the last one first; returns them in the order of application.

    Raises:
        ModelError: one of them cannot come off; all are as they were.
    """
    plans = [entry for entry in record_of(module) if entry.on_top]
    fixed = [entry.report.name for entry in plans if entry.attached.undo is None]
    if fixed:
        raise ModelError(
            f"'{fixed[-1]}' runs on the model's blocks and was applied with undo=False; nothing goes below"
        )
    _take(module, plans)
    return plans


def _take(module: nn.Module, plans: list[Entry]) -> None:
    for entry in reversed(plans):
        if entry.attached.undo is not None:
            registry.handler_of(registry.get_kind(entry.report.kind)).detach(module, entry.attached)
            entry.attached.undo = None


def _put_back(module: nn.Module, lifted: list[Entry]) -> None:
    """Put what was lifted on again, where it is off.

    Raises:
        ModelError: the model has become another, on which a plan does not fit; it and what follows stay off.
    """
    for entry in lifted:
        if entry.attached.undo is not None:
            continue
        plan: Any = registry.load(registry.get_kind(entry.report.kind).config)
        change = plan.from_dict(entry.change["plan"])
        owner = entry.owner()
        target = owner if owner is not None and any(part is module for part in modules_of(owner)) else module
        try:
            entry.attached = attach_for(target, change)(module, change, entry.report.name)
        except VislrError as error:
            raise ModelError(f"'{entry.report.name}' would not fit any more: {error}; remove it first") from error


def _check_above(module: nn.Module, kind: registry.Kind) -> None:
    """A composition sits on its adapters."""
    composed = [entry.report.name for entry in record_of(module) if entry.report.kind == "compose"]
    if composed and kind.settles:
        raise ModelError(f"'{composed[-1]}' composes the model's adapters; remove it before they are fused")


def structure_of(module: nn.Module) -> list[dict[str, Any]]:
    """The structural plans that the module carries, as configs hold them."""
    from vislr import models

    return [
        models.entry_of(entry.report.kind, entry.report.name, entry.change["plan"])
        for entry in record_of(module)
        if entry.structural
    ]


def mark(target: Any, component: str, module: nn.Module) -> None:
    """Make class, config and the pipeline's index say which structural plans the module carries."""
    from vislr import models

    models.mark(module, structure_of(module))
    if component and hasattr(target, "register_modules"):
        target.register_modules(**{component: module})


def remove(target: Any, report: Report) -> None:
    """Take the change of `report` off again, exactly.

    A change of the structure comes off only while nothing was applied after it, and nothing below
    a later change of the structure comes off before that one; run-time plans, which sit on top, always do.

    Raises:
        UndoError: it is not on the target, was applied with `undo=False` or came with a folder, or
            something else must come off first.
    """
    for module in modules_of(target):
        record = record_of(module)
        for place, entry in enumerate(record):
            if entry.report.index == report.index:
                _check_order(entry, record[place + 1 :])
                if entry.attached.undo is None:
                    raise UndoError(
                        f"'{report.name}' was applied with undo=False or came with a folder: nothing was kept"
                    )
                lifted = _lift(module) if entry.structural else []
                try:
                    registry.handler_of(registry.get_kind(report.kind)).detach(module, entry.attached)
                finally:
                    _put_back(module, lifted)
                record.remove(entry)
                if entry.structural:
                    mark(target, entry.report.component, module)
                if not record:
                    del module.__dict__[_RECORD]
                return
    known = [entry.report.name for entry in entries_of(target)]
    raise UndoError(f"'{report.name}' is not on this {type(target).__name__}{hint(report.name, known)}")


def _check_order(entry: Entry, later: list[Entry]) -> None:
    if entry.on_top:
        return
    blocking = later if entry.settled else [other for other in later if other.settled]
    if blocking:
        raise UndoError(
            f"'{entry.report.name}' cannot come off under '{blocking[-1].report.name}', which was applied after it; "
            f"remove '{blocking[-1].report.name}' first"
        )


def note_measurement(target: Any, name: str, before: Any = None, after: Any = None) -> None:
    """Keep a figure with the recipe: `vislr.save` writes it to `vislr.json` under `measurements`.

    Args:
        target: the changed pipeline or module.
        name: what was measured: "KID", "held-out loss".
        before, after: a `vislr.measure.Measurement`, or plain data.
    """
    module = component_of(target)[1]
    table = module.__dict__.setdefault(_MEASURED, {})
    plain = {
        key: one.to_dict() if hasattr(one, "to_dict") else one for key, one in (("before", before), ("after", after))
    }
    table.setdefault(name, {}).update({key: value for key, value in plain.items() if value is not None})


def measurements_of(target: Any) -> dict[str, Any]:
    """The figures that were kept with the recipe, by name."""
    found: dict[str, Any] = {}
    for module in modules_of(target):
        found |= module.__dict__.get(_MEASURED, {})
    return found
