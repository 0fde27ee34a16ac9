"""Layer pruning: criteria score a model's units and return a LayerPlan; `vislr.apply` removes them."""

from vislr.prune.plan import LayerPlan
from vislr.prune.units import Inventory, Unit, units_of, without

__all__ = ["Inventory", "LayerPlan", "Unit", "units_of", "without"]
