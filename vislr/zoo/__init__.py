"""The embedded images, scenes composed of them, and the embedded pipelines: small and real."""

from vislr.zoo.checkpoints import cards, classifier, classifier_names, pipeline, pipeline_folder, pipeline_names, verify
from vislr.zoo.composing import Scene, export_scenes, scene, scenes
from vislr.zoo.emoji import PROCEDURAL_STYLES, SPLITS, STYLES, Picture, export, images

__all__ = [
    "PROCEDURAL_STYLES",
    "SPLITS",
    "STYLES",
    "Picture",
    "Scene",
    "cards",
    "classifier",
    "classifier_names",
    "export",
    "export_scenes",
    "images",
    "pipeline",
    "pipeline_folder",
    "pipeline_names",
    "scene",
    "scenes",
    "verify",
]
