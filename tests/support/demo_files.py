"""Adapter files with random values, made on a pipeline."""

import torch

import vislr
from vislr.adapters.inject import adapter_parameters
from vislr.anatomy import denoiser_of


def random_adapter(pipe, path, change, seed, format="vislr", strength=0.3):
    """A file of this config with random values; the pipeline is as before."""
    report = vislr.apply(pipe, change, name=path.stem)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(denoiser_of(pipe)[1], path.stem).values():
        parameter.data = strength * torch.randn(parameter.shape, generator=generator)
    vislr.save_adapter(pipe, path, name=path.stem, format=format)
    vislr.remove(pipe, report)
    return path
