"""Layer pruning: criteria score a model's units and return a LayerPlan; `vislr.apply` removes them.

==================  ========================================================================
criterion           plan
==================  ========================================================================
`OutputLoss`        `laptop_plan`: LAPTOP-Diff, output loss and an exact knapsack
`Contribution`      `hierarchical_plan`: HierarchicalPrune, drop of quality weighted by position
`Magnitude`, `Random`, `UniformDepth`, `BkSdmOrder`, `SsdOrder`: baselines, by `plan_layers`
lists               `bk_sdm_plan`, `ssd_1b_plan`
==================  ========================================================================

Another criterion is any object with `name`, `solver`, `score` and `settings` (`Criterion`).
"""

from vislr.prune.baselines import BkSdmOrder, Magnitude, Random, SsdOrder, UniformDepth, bk_sdm_plan, ssd_1b_plan
from vislr.prune.hierarchical import Contribution, PrototypeQuality, block_range, hierarchical_plan, keep_score
from vislr.prune.latency import with_latency
from vislr.prune.output_loss import Additivity, OutputLoss, additivity, laptop_plan
from vislr.prune.picture import draw_additivity, draw_plan
from vislr.prune.plan import LayerPlan
from vislr.prune.scoring import Criterion, ScoringCost, plan_layers, scoring_cost
from vislr.prune.units import Inventory, Unit, units_of, without

__all__ = [
    "Additivity",
    "BkSdmOrder",
    "Contribution",
    "Criterion",
    "Inventory",
    "LayerPlan",
    "Magnitude",
    "OutputLoss",
    "PrototypeQuality",
    "Random",
    "ScoringCost",
    "SsdOrder",
    "UniformDepth",
    "Unit",
    "additivity",
    "bk_sdm_plan",
    "block_range",
    "draw_additivity",
    "draw_plan",
    "hierarchical_plan",
    "keep_score",
    "laptop_plan",
    "plan_layers",
    "scoring_cost",
    "ssd_1b_plan",
    "units_of",
    "with_latency",
    "without",
]
