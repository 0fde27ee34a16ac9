"""Several adapters in one picture: plans of composition, what they cost, and what they stand on."""

from vislr.compose.building import (
    cmlora_plan,
    compose_plan,
    composite_plan,
    merge_plan,
    options_of,
    switch_plan,
    w_composite_plan,
    w_switch_plan,
)
from vislr.compose.cost import Cost
from vislr.compose.fourier import high_share
from vislr.compose.handler import composed, cost
from vislr.compose.plan import METHODS, ComposePlan, Dominance, LayerWeights, Merging, Switching
from vislr.compose.prompts import PromptWeights, prompt_weights
from vislr.compose.schedule import Turn, turns

__all__ = [
    "METHODS",
    "ComposePlan",
    "Cost",
    "Dominance",
    "LayerWeights",
    "Merging",
    "PromptWeights",
    "Switching",
    "Turn",
    "cmlora_plan",
    "compose_plan",
    "composed",
    "composite_plan",
    "cost",
    "high_share",
    "merge_plan",
    "options_of",
    "prompt_weights",
    "switch_plan",
    "turns",
    "w_composite_plan",
    "w_switch_plan",
]
