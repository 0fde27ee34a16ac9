"""Quantisation: plans of bits, calibration, layers of integers, and which way of computing is fastest.

===================  ==========================================================================
plan                 what it keeps in few bits
===================  ==========================================================================
`weight_only_plan`   weights: INT8, INT4 and less with groups, NF4
`ptq_plan`           weights and inputs, calibrated on the pipeline's own trajectories
`efficientdm_plan`   the same with step sizes by timestep; `vislr.train.efficientdm` trains it
===================  ==========================================================================
"""

from vislr.quantize.handler import Sizes, quantizable, sizes
from vislr.quantize.layers import QuantConv1d, QuantConv2d, QuantLayer, QuantLinear, quant_layers
from vislr.quantize.plan import QuantPlan
from vislr.quantize.planning import efficientdm_plan, layer_classes, ptq_plan, weight_only_plan
from vislr.quantize.trajectories import Calibration, Trajectories, calibrate, trajectory_inputs

__all__ = [
    "Calibration",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "QuantPlan",
    "Sizes",
    "Trajectories",
    "calibrate",
    "efficientdm_plan",
    "layer_classes",
    "ptq_plan",
    "quant_layers",
    "quantizable",
    "sizes",
    "trajectory_inputs",
    "weight_only_plan",
]
