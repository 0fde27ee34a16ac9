"""The embedded images and pipelines: small and real."""

from vislr.zoo.checkpoints import pipeline, pipeline_folder, pipeline_names
from vislr.zoo.emoji import SPLITS, STYLES, Picture, export, images

__all__ = [
    "SPLITS",
    "STYLES",
    "Picture",
    "export",
    "images",
    "pipeline",
    "pipeline_folder",
    "pipeline_names",
]
