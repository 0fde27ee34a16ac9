"""The section `data` of a training config: which pictures, how often, how they are cut and captioned, caches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vislr.core.errors import ConfigError


@dataclass
class FolderConfig:
    """One of several folders (or sets of shards) that are trained on together."""

    path: str = ""
    """A folder of pictures, or shards: a .tar, a folder of them, a range like a-{000..041}.tar, a glob, a URL."""
    repeats: int = 1
    """Times that every picture of the folder comes up in an epoch."""
    weight: float | None = None
    """Share of the epoch, relative to the weights of the other folders, however many pictures each holds."""
    trigger: str | None = None
    """Words put before captions that lack them; null: data.trigger."""
    caption: str | None = None
    """Caption of pictures that have none; null: data.caption."""
    masks: str | None = None
    """With data.masks files: a folder of masks named like the pictures; null: NAME-masklabel.png beside them."""
    prior: bool = False
    """A regularisation set: no trigger, its loss is multiplied by data.prior_weight."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("data.folders has an entry without a path; expected a folder or shards")
        if self.repeats < 1:
            raise ConfigError(f"data.folders repeats is {self.repeats} for '{self.path}'; expected 1 or more")
        if self.weight is not None and self.weight <= 0:
            raise ConfigError(f"data.folders weight is {self.weight} for '{self.path}'; expected more than 0")


@dataclass
class DataConfig:
    """The pictures."""

    folder: str = ""
    """Pictures with .txt captions or metadata.jsonl; for a classifier one folder for each class; or shards: a .tar, a
    folder of them, a range like a-{000..041}.tar, a glob, a URL. This or data.folders must be given."""
    folders: list[FolderConfig] = field(default_factory=list)
    """Several folders, each with path, repeats, weight, trigger, caption, masks, prior."""
    size: int | None = None
    """Side of the square pictures in pixels; with buckets the side of a square of the largest area; null: the model's
    own."""
    crop: Literal["center", "random"] = "center"
    """center: the largest cut in the middle. random: a cut of 75 to 100 % of it, anywhere, new each time."""
    flip: bool = False
    """Mirror half of the pictures. Wrong where captions say left and right, or where there is text."""
    buckets: bool = False
    """Keep each picture's proportions: pictures are sorted into sizes of about the same area and never enlarged."""
    bucket_step: int | None = None
    """Sides of the sizes are multiples of this many pixels; null: about a sixteenth of the size (64 for 1024), in whole
    multiples of what the model needs."""
    max_aspect: float = 2.0
    """The longest side of a size over its shortest; longer pictures are cut."""
    trigger: str = ""
    """Words that call what is learned: put before every caption that lacks them, and named in the model card."""
    caption: str = ""
    """Caption of pictures that have none; empty: such pictures are left out, by name."""
    caption_suffix: str = ".txt"
    """End of the names of caption files."""
    repeats_from_names: bool = False
    """Folders named like 10_NAME count 10 times an epoch, and NAME is the caption of their pictures without one."""
    shuffle_tags: bool = False
    """Put the comma-separated parts of a caption into a new order each time."""
    keep_tags: int = 0
    """So many parts at the front of a caption stay where they are and are never dropped."""
    tag_dropout: float = 0.0
    """Share of a caption's parts that is dropped, new each time."""
    caption_dropout: float = 0.0
    """Share of captions that is replaced by an empty one."""
    prior_folder: str | None = None
    """A regularisation set with captions of its own, as many pictures of it in an epoch as of all others."""
    prior_weight: float = 1.0
    """Factor of the loss of regularisation pictures."""
    masks: Literal["none", "alpha", "files"] = "none"
    """Masks of the loss, white where it counts. alpha: the picture's own transparency. files: NAME-masklabel.png
    beside the picture, or a folder (data.folders)."""
    broken: Literal["skip", "stop"] = "skip"
    """Pictures that cannot be used: skip leaves them out and names them, stop ends before training."""
    decode_all: bool = True
    """Decode every picture before training. false reads their headers alone; what turns out broken later is replaced
    by another picture and named. Shards are never decoded beforehand."""
    window: int = 1000
    """Shards: so many neighbouring pictures are shuffled among themselves; the shards are shuffled as wholes."""
    cache_latents: bool = True
    """Encode every picture once and keep the latents; random crops and flips need the pixels and do not."""
    cache_text: bool = True
    """Encode every caption once and keep the embeddings."""
    cache_folder: str | None = None
    """Keep latents and embeddings here for later runs, several at once if need be; null: in memory for this run."""
    cache_limit_gb: float = 20.0
    """Largest size of the cache in gigabytes (1e9 bytes); what was not used for longest is removed first."""
    workers: int = 0
    """Processes that read pictures ahead; 0 reads in the training process. Results do not depend on it."""

    def __post_init__(self) -> None:
        for name, low in (("workers", 0), ("size", 8), ("keep_tags", 0), ("window", 1), ("bucket_step", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"data.{name} is {value}; expected {low} or more")
        for name in ("tag_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"data.{name} is {getattr(self, name)}; expected 0 or more and less than 1")
        if self.max_aspect < 1:
            raise ConfigError(f"data.max_aspect is {self.max_aspect}; expected 1 or more")
        if self.prior_weight < 0:
            raise ConfigError(f"data.prior_weight is {self.prior_weight}; expected 0 or more")
        if self.cache_limit_gb <= 0:
            raise ConfigError(f"data.cache_limit_gb is {self.cache_limit_gb}; expected more than 0")
        if not self.caption_suffix.startswith("."):
            raise ConfigError(f"data.caption_suffix is '{self.caption_suffix}'; expected a dot and a suffix: .txt")
        if self.folder and self.folders:
            raise ConfigError("data.folder and data.folders exclude each other; put it into data.folders as a path")
        parts = [part for part in self.parts() if not part.prior]
        weighted = [part for part in parts if part.weight is not None]
        if weighted and len(weighted) < len(parts):
            missing = next(part.path for part in parts if part.weight is None)
            raise ConfigError(f"data.folders: '{missing}' has no weight and '{weighted[0].path}' has; give all or none")
        if (self.folder or self.folders) and not parts:
            raise ConfigError("data.folders holds regularisation sets alone; expected pictures to train on")
        if any(part.masks for part in parts) and self.masks != "files":
            raise ConfigError(f"data.folders has masks, and data.masks is {self.masks}; expected files")

    def parts(self) -> list[FolderConfig]:
        """All folders: `folder` or `folders`, then `prior_folder`."""
        parts = list(self.folders) or ([FolderConfig(self.folder)] if self.folder else [])
        return parts + ([FolderConfig(self.prior_folder, prior=True)] if self.prior_folder else [])
