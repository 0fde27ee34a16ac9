"""Feature reuse between denoising steps: what changes little from step to step is not computed anew."""

from vislr.cache.handler import cached, plan_flops
from vislr.cache.picture import plan_picture
from vislr.cache.plan import CachePlan, Refresh, Region
from vislr.cache.planning import interval_plan, measured_changes, measured_plan
from vislr.cache.regions import region_at

__all__ = [
    "CachePlan",
    "Refresh",
    "Region",
    "cached",
    "interval_plan",
    "measured_changes",
    "measured_plan",
    "plan_flops",
    "plan_picture",
    "region_at",
]
