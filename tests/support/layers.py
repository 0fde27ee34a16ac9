"""One linear or conv of every kind, each with an input: the rows of the layer matrices."""

import torch
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
VARIANTS = {
    "plain": {"padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 6, "padding": 1},
    "pointwise": {"kernel_size": 1},
    "non-square": {"kernel_size": (3, 1, 2), "padding": (1, 0, 1), "stride": (1, 2, 1)},
    "same": {"padding": "same", "kernel_size": 4},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "same-reflect": {"padding": "same", "kernel_size": 4, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "groups": 2},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "odd-channels": {"in_channels": 4, "bias": False},  # 3 does not divide 4: no chain for ConvLoRA
}
CASES = ["linear"] + [f"conv{dims}d-{variant}" for dims in CONV for variant in VARIANTS]


def make_layer(case):
    """The layer of this case and an input of batch 2; seed before."""
    if case == "linear":
        return nn.Linear(6, 9), torch.randn(2, 5, 6)
    dims, variant = int(case[4]), case.split("-", 1)[1]
    options = {"in_channels": 6, "out_channels": 12, "kernel_size": 3} | VARIANTS[variant]
    options = {k: v[:dims] if isinstance(v, tuple) else v for k, v in options.items()}
    layer = CONV[dims](**options)
    return layer, torch.randn(2, options["in_channels"], *(7, 6, 5)[:dims])
