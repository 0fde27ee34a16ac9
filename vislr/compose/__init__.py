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
from vislr.compose.costing import Cost
from vislr.compose.fourier import high_share
from vislr.compose.handler import composed, cost
from vislr.compose.overlaps import Conflicts, LayerConflict, PairConflict, conflict_picture, conflicts
from vislr.compose.picture import turns_picture
from vislr.compose.plan import METHODS, ComposePlan, Dominance, LayerWeights, Merging, Switching
from vislr.compose.profiles import (
    Profile,
    profile_adapters,
    profile_path,
    profile_picture,
    read_profile,
    split_profiles,
    write_profile,
)
from vislr.compose.prompts import PromptWeights, prompt_weights
from vislr.compose.schedule import Turn, turns

__all__ = [
    "METHODS",
    "ComposePlan",
    "Conflicts",
    "Cost",
    "Dominance",
    "LayerConflict",
    "LayerWeights",
    "Merging",
    "PairConflict",
    "Profile",
    "PromptWeights",
    "Switching",
    "Turn",
    "cmlora_plan",
    "compose_plan",
    "composed",
    "composite_plan",
    "conflict_picture",
    "conflicts",
    "cost",
    "high_share",
    "merge_plan",
    "options_of",
    "profile_adapters",
    "profile_path",
    "profile_picture",
    "prompt_weights",
    "read_profile",
    "split_profiles",
    "switch_plan",
    "turns",
    "turns_picture",
    "w_composite_plan",
    "w_switch_plan",
    "write_profile",
]
