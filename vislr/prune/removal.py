"""Apply and undo of a LayerPlan: the units leave the model, their parameters with them."""

from __future__ import annotations

import torch
from torch import nn

from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import ModelError, UndoError
from vislr.core.registry import Attached
from vislr.prune import surgery
from vislr.prune.plan import LayerPlan, structure_hash


def attach(module: nn.Module, plan: LayerPlan, name: str = "default") -> Attached:
    """Remove the plan's units: every parameter that only they use is gone from the model.

    Args:
        module: the model that the plan was made for; adapters may be on it, those in removed units go too.
        plan: the units. A block all of whose branches go is skipped as a whole, and so on
            (`vislr.prune.surgery.effective`).
        name: for the record.

    Raises:
        ModelError: the plan is for another model. TargetError: it names something that cannot be
            removed. The model is as it was.
    """
    module = unwrapped(module)
    _check(module, plan)
    chosen = surgery.effective(module, plan.removed, plan.removal)
    # All new modules exist before the first one is put in.
    changes = {path: new for name in chosen for path, new in surgery.replacements(module, name, plan.removal).items()}
    old = {path: surgery.swap(module, path, new) for path, new in changes.items()}
    return Attached(
        sites=tuple(chosen),
        change={"kind": "layers", "plan": plan.to_dict()},
        undo={"old": old, "new": changes, "placed": _placed(module)},
        notes=_notes(plan, chosen),
    )


def detach(module: nn.Module, attached: Attached) -> None:
    """Put the removed units back: the very modules that were taken out, moved to where the model is now.

    What stayed in the model (shortcuts, embeddings) keeps the values that it has now.

    Raises:
        UndoError: something else stands in the place of a removed unit.
    """
    module = unwrapped(module)
    modules = dict(module.named_modules())
    for path, new in attached.undo["new"].items():
        if modules.get(path) is not new:
            raise UndoError(f"'{path}' is not what the plan left there; undo what came after the plan first")
    placed = _placed(module)
    for path, old in attached.undo["old"].items():
        if placed != attached.undo["placed"] and placed is not None:
            old.to(*placed)
        surgery.swap(module, path, old)


def rebuild(module: nn.Module, plan: LayerPlan) -> None:
    """The structure of a pruned model, from a freshly built one; tensors may lie on meta.

    Raises:
        as `attach`.
    """
    attach(module, plan)


def _check(module: nn.Module, plan: LayerPlan) -> None:
    if not isinstance(plan, LayerPlan):
        raise ModelError(f"expected a LayerPlan, not a {type(plan).__name__}")
    own = type(module).__name__
    if plan.architecture and plan.architecture != own:
        raise ModelError(f"the plan is for a {plan.architecture}; this is a {own}")
    if not plan.removed:
        return
    names = dict(module.named_modules())
    missing = [name for name in plan.removed if name not in names]
    if missing and plan.structure:
        raise ModelError(
            f"the plan is for another {own}: this one has no '{missing[0]}' ({len(missing)} of "
            f"{len(plan.removed)} units are missing)"
        )
    for name in plan.removed:
        surgery.replacements(module, name, plan.removal)  # raises TargetError
    if plan.structure and plan.structure != structure_hash(module):
        raise ModelError(f"the plan is for another {own}: its layers have other names or shapes than this one's")


def _placed(module: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    return None if first is None else (first.device, first.dtype)


def _notes(plan: LayerPlan, chosen: list[str]) -> tuple[str, ...]:
    notes: list[str] = []
    if plan.ratio is not None and plan.saved is not None and plan.total:
        notes.append(f"{plan.saved / plan.total:.2%} of {plan.budget} (asked: {plan.ratio:.2%}) by {plan.criterion}")
    whole = [name for name in chosen if name not in plan.removed]
    if whole:
        notes.append(f"gone as a whole, because all of their units are: {', '.join(whole)}")
    if plan.removed:
        # HierarchicalPrune's ablation: 79 % worse at 20 % without training, 2.5 % with it.
        notes.append("not trained since: expect broken pictures from about 20 % on; see docs/prune.md for recovery")
    return tuple(notes)
