"""A folder's recipe: read it as text, compare two, do it again on a base, or all of it but the last steps."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from vislr.core import registry
from vislr.core.errors import FormatError, ModelError, UndoError
from vislr.core.hashing import content_hash
from vislr.folders import fused_in, load, read_recipe
from vislr.recipe import base_state, fuse, load_adapter, set_adapters
from vislr.record import apply, component_of


def steps_text(record: dict[str, Any]) -> list[str]:
    """A line or more for each step of a recipe: what, where, how much."""
    lines = []
    for number, step in enumerate(record["steps"], 1):
        report, change = step["report"], step["change"]
        before, after = report["parameters"]
        where = f" on {report['component']}" if report["component"] else ""
        lines.append(
            f"{number}. {report['kind']} '{report['name']}'{where}: {len(report['sites'])} sites, "
            f"{before:,} -> {after:,} parameters"
        )
        weights = change.get("adapters", {}) if report["kind"] == "fuse" else {}
        lines += [f"   '{name}' at weight {weight:g}" for name, weight in weights.items()]
        plan = change.get("plan")
        if plan is not None:
            told = {key: plan[key] for key in ("criterion", "ratio", "budget", "removal") if plan.get(key) is not None}
            lines.append("   " + ", ".join(f"{key} {value}" for key, value in told.items() if value != ""))
            settings = _settings(plan)
            data = settings.get("calibration") or settings.get("quality")
            hashes = {"made on weights": plan.get("base"), "calibration data": data}
            lines += [f"   {key} {value[:16]}" for key, value in hashes.items() if isinstance(value, str) and value]
            lines += [f"   - {name}" for name in plan.get("removed", ())]
    for name, stored in record["adapters"].items():
        state = "on" if stored["active"] else "off"
        lines.append(f"adapter '{name}': weight {stored['weight']:g}, {state}, {stored['file']}")
    lines += [f"fused into the weights: '{name}'" for name in record["merged"]]
    for name, figures in record["measurements"].items():
        pair = [f"{key} {_figure(figures[key])}" for key in ("before", "after") if key in figures]
        lines.append(f"measured {name}: {', '.join(pair)}")
    return lines


def _settings(plan: dict[str, Any]) -> dict[str, Any]:
    settings = plan.get("settings")
    return settings if isinstance(settings, dict) else {}


def _figure(value: Any) -> str:
    if isinstance(value, dict) and "value" in value:
        return f"{value['value']:.4g} {value.get('unit', '')}".strip()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(folder: str | os.PathLike) -> str:
    """The recipe of a folder as text.

    Raises:
        FormatError: the folder has no recipe, or a damaged one.
    """
    record = read_recipe(folder)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    head = [f"{record['class']} ({record['component'] or 'one model'}), weights {record['base'][:16]}", versions]
    return "\n".join([*head, *(steps_text(record) or ["nothing was done to it"])])


def diff(first: str | os.PathLike, second: str | os.PathLike) -> str:
    """What differs between two recipes, in the form of `diff -u`; "" if nothing does.

    Raises:
        FormatError: as `show`.
    """
    one, two = show(first).splitlines(), show(second).splitlines()
    return "\n".join(difflib.unified_diff(one, two, str(first), str(second), lineterm="", n=2))


def replay(
    folder: str | os.PathLike, base: str | os.PathLike, *, leave_out: int = 0, any_base: bool = False
) -> tuple[Any, tuple[str, ...]]:
    """Do to a base what was done to a folder, step by step.

    Args:
        folder: written by `vislr.save`. base: an embedded name, a diffusers folder or a hub id.
        leave_out: steps at the end that are not done.
        any_base: accept a base whose weights differ from those that plans and adapters were made on.

    Returns:
        the pipeline (every step can be removed again), and notes: whether the result is the folder's
        content, or its weights were trained or fused since.

    Raises:
        UndoError: an adapter fused by other means than `vislr.fuse`, whose file is not kept; or fewer steps than
            `leave_out`.
        ModelError: another base. FormatError: as `read_recipe`.
    """
    folder = Path(folder)
    record = read_recipe(folder)
    steps = record["steps"]
    if not 0 <= leave_out <= len(steps):
        raise UndoError(f"the recipe of '{folder}' has {len(steps)} steps; cannot leave out {leave_out}")
    from vislr.adapters import inject

    target = load(base)
    if component_of(target)[1].__class__.__name__ != record["class"]:
        raise ModelError(
            f"'{base}' has a {type(component_of(target)[1]).__name__}; the recipe is of a {record['class']}"
        )
    checked, fused = any_base, fused_in(steps)
    for place, step in enumerate(steps[: len(steps) - leave_out]):
        report, change = step["report"], step["change"]
        name = report["name"]
        if "plan" in change:
            kind = registry.get_kind(report["kind"])
            plan: Any = registry.load(kind.config).from_dict(change["plan"])
            if not checked and getattr(plan, "base", None):
                _check_base(target, plan, base)
            apply(target, plan, name=name)
        elif report["kind"] == "fuse":
            fuse(target, list(change["adapters"]), name=name)
        elif place in fused:
            later = steps[fused[place]]
            weight = later["change"]["adapters"][name]
            inject.rest_carriers(component_of(target)[1])
            load_adapter(target, folder / later["files"][name], name=name, weight=weight, any_base=any_base)
        elif name in record["adapters"]:
            stored = record["adapters"][name]
            # Its file was written on what later steps made of the weights.
            later_steps = steps[place + 1 :]
            accept = any_base or any(registry.get_kind(one["report"]["kind"]).structural for one in later_steps)
            inject.rest_carriers(component_of(target)[1])
            load_adapter(target, folder / stored["file"], name=name, weight=stored["weight"], any_base=accept)
        else:
            raise UndoError(f"the adapter '{name}' was fused into the weights of '{folder}'; its own file is not kept")
        # What later plans were made on has the earlier steps in it.
        checked = True
    on = {name: one["weight"] for name, one in record["adapters"].items() if one["active"]}
    done = {step["report"]["name"] for step in steps[: len(steps) - leave_out]}
    if done & record["adapters"].keys():
        set_adapters(target, [name for name in on if name in done], [on[name] for name in on if name in done])
    return target, _notes(target, record, leave_out)


def _check_base(target: Any, plan: Any, base: str | os.PathLike) -> None:
    module = component_of(target, plan)[1]
    if content_hash(module.state_dict()) != plan.base:
        raise ModelError(
            f"the weights of '{base}' are not those that the plan was made on; allow another base (any_base) if that "
            "is meant"
        )


def _notes(target: Any, record: dict[str, Any], leave_out: int) -> tuple[str, ...]:
    if leave_out:
        return ("weights are the base's: training that came with the steps left out, or before them, is not in it",)
    own = content_hash(base_state(component_of(target)[1]))
    if own == record["base"]:
        return ("the weights are the folder's, bit for bit",)
    return ("weights are the base's: the folder's were trained or fused since, so its pictures differ",)


def check_recipe(folder: str | os.PathLike) -> None:
    """Refuse a folder whose recipe is not there or damaged.

    Raises:
        FormatError: as `read_recipe`.
    """
    if not Path(folder).is_dir():
        raise FormatError(f"there is no folder '{folder}'")
    read_recipe(folder)
