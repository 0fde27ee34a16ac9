"""Adapter files with random values, made on a pipeline."""

import numpy as np
import torch
from PIL import Image

import vislr
from vislr.adapters.inject import adapter_parameters
from vislr.anatomy import denoiser_of
from vislr.demos.runs import Wanted, drawing


def random_adapter(pipe, path, change, seed, format="vislr", strength=0.3):
    """A file of this config with random values; the pipeline is as before."""
    report = vislr.apply(pipe, change, name=path.stem)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(denoiser_of(pipe)[1], path.stem).values():
        parameter.data = strength * torch.randn(parameter.shape, generator=generator)
    vislr.save_adapter(pipe, path, name=path.stem, format=format)
    vislr.remove(pipe, report)
    return path


def draw(session, weights, methods=("merge",), **more):
    """Method -> pixels of its pictures, made in a session of the studio."""
    run = drawing(session, Wanted(methods=tuple(methods), weights=weights, prompt="a red car", steps=2, **more))
    run.execute()
    assert [line.state for line in run.lines] == ["done"] * len(run.lines), [line.message for line in run.lines]
    return {line.method: [np.asarray(Image.open(p.path)) for p in line.pictures] for line in run.lines}
