"""From a training folder to the embedded folders: half precision, shared parts as links, a card with hashes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from vislr.core.files import write_json
from vislr.zoo.checkpoints import weight_hashes
from vislr.zoo.retraining import assemble

# Parts of the MMDiT's folder that are the UNet's.
SHARED = {
    "vae": "vae", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder", "tokenizer": "tokenizer",
    "tokenizer_2": "tokenizer",
}  # fmt: skip


def freeze(out: Path, folder: Path, name: str, about: str) -> None:
    """Write one model of the training folder `out` into `folder`/`name`, with its card.

    Args:
        out: where `vislr zoo retrain` left its stages.
        folder: of all embedded models; the MMDiT's links point to `emoji-unet` in it.
        name: emoji-unet, emoji-mmdit, emoji-net, emoji-vit or emoji-conv.
        about: one sentence for the card.
    """
    from transformers import CLIPTextModelWithProjection

    place, stage = folder / name, name.removeprefix("emoji-")
    shutil.rmtree(place, ignore_errors=True)
    if stage in ("unet", "mmdit"):
        pipe = assemble(out, name)
        pipe.to(dtype=torch.float16).save_pretrained(place)
        if stage == "mmdit":
            _share(place, folder / "emoji-unet")
        else:
            # With the projection, which this pipeline leaves aside and the MMDiT's reads.
            text = CLIPTextModelWithProjection.from_pretrained(out / "text_encoder", dtype=torch.float16)
            text.save_pretrained(place / "text_encoder")
    else:
        shutil.copytree(out / name, place)
    card: dict[str, Any] = {"name": name, "about": about, "weights": weight_hashes(place)}
    state = json.loads((out / f"{stage}-state" / "state.json").read_text())
    card["steps"] = state["step"]
    card["training"] = {k: state[k] for k in ("config", "machine", "hours") if k in state}
    write_json(place / "card.json", card)


def _share(place: Path, other: Path) -> None:
    for part, origin in SHARED.items():
        shutil.rmtree(place / part)
        os.symlink(Path("..") / other.name / origin, place / part, target_is_directory=True)
