"""A model as named sites, and what it costs: read on the meta device, without weights or arithmetic."""

from vislr.anatomy.architectures import ARCHITECTURES
from vislr.anatomy.cost import denoiser_of, flops, meta_copy, sample_inputs, sample_of
from vislr.anatomy.reading import describe
from vislr.anatomy.site import KINDS, Anatomy, Site
from vislr.anatomy.skeletons import skeleton

__all__ = [
    "ARCHITECTURES",
    "KINDS",
    "Anatomy",
    "Site",
    "denoiser_of",
    "describe",
    "flops",
    "meta_copy",
    "sample_inputs",
    "sample_of",
    "skeleton",
]
