"""Quantised tiny pipelines of the real classes."""

import copy

import pytest
import torch
from tiny import tiny_sd3_pipeline, tiny_sd_pipeline

from vislr.quantize import Trajectories, efficientdm_plan

RUNS = Trajectories(("a cat face", "a bus"), count=2, batch=2, steps=4, options={"height": 32, "width": 32})


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd():
    """StableDiffusionPipeline; tests copy what they change."""
    return tiny_sd_pipeline()


@pytest.fixture(scope="session")
def sd3():
    return tiny_sd3_pipeline()


@pytest.fixture(scope="session")
def runs():
    """Two trajectories of four steps."""
    return RUNS


@pytest.fixture(scope="session")
def w4a4(sd):
    """EfficientDM's plan of the tiny pipeline, W4A4."""
    return efficientdm_plan(sd, 4, 4, source=RUNS)


@pytest.fixture
def student(sd):
    """A fresh copy of the denoiser."""
    return copy.deepcopy(sd.unet).requires_grad_(False)
