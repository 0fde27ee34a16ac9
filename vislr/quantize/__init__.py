"""Quantisation: plans of bits, calibration, layers of integers, and which way of computing is fastest.

===================  ==========================================================================
plan                 what it keeps in few bits
===================  ==========================================================================
`weight_only_plan`   weights: INT8, INT4 and less with groups, NF4
`ptq_plan`           weights and inputs, calibrated on the pipeline's own trajectories
`efficientdm_plan`   the same with step sizes by timestep; `vislr.train.efficientdm` trains it
`mixed_plan`         bits by sensitivity, under a budget of size or error
===================  ==========================================================================
"""

from vislr.quantize.handler import Sizes, quantizable, sizes
from vislr.quantize.layers import QuantConv1d, QuantConv2d, QuantLayer, QuantLinear, quant_layers
from vislr.quantize.plan import QuantPlan
from vislr.quantize.planning import efficientdm_plan, layer_classes, ptq_plan, weight_only_plan
from vislr.quantize.running import LayerTime, Ways, choose_ways, without_slower
from vislr.quantize.sensitivity import Choice, mixed_plan, sensitivity
from vislr.quantize.torchao import export_torchao
from vislr.quantize.trajectories import Calibration, Trajectories, calibrate, trajectory_inputs

__all__ = [
    "Calibration",
    "Choice",
    "LayerTime",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "QuantPlan",
    "Sizes",
    "Trajectories",
    "Ways",
    "calibrate",
    "choose_ways",
    "efficientdm_plan",
    "export_torchao",
    "layer_classes",
    "mixed_plan",
    "ptq_plan",
    "quant_layers",
    "quantizable",
    "sensitivity",
    "sizes",
    "trajectory_inputs",
    "weight_only_plan",
    "without_slower",
]
