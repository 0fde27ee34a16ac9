"""Token pruning: fewer tokens between places in a backbone, as a plan (AT-EDM, ToMe) that goes on and comes off."""

from vislr.tokens.handler import applied, attach, detach, watching
from vislr.tokens.picture import kept_picture, kept_shares
from vislr.tokens.plan import CRITERIA, RECOVERIES, Cut, Span, TokenPlan
from vislr.tokens.planning import at_edm_plan, tome_plan
from vislr.tokens.solving import PlanFlops, plan_flops
from vislr.tokens.timing import time_plan

__all__ = [
    "CRITERIA",
    "RECOVERIES",
    "Cut",
    "PlanFlops",
    "Span",
    "TokenPlan",
    "applied",
    "at_edm_plan",
    "attach",
    "detach",
    "kept_picture",
    "kept_shares",
    "plan_flops",
    "time_plan",
    "tome_plan",
    "watching",
]
