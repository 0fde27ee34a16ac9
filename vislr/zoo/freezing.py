"""From a training folder to the embedded folders: half precision, shared parts as links, a card with hashes.

A model's card is `card.json`; `README.md` beside it is the same for people.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from vislr.core.files import read_json, write_json, write_text
from vislr.zoo.checkpoints import weight_hashes
from vislr.zoo.retraining import assemble

# Parts of the MMDiT's folder that are the UNet's.
SHARED = {
    "vae": "vae", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder", "tokenizer": "tokenizer",
    "tokenizer_2": "tokenizer",
}  # fmt: skip


# What the pictures are and whose: every embedded model was trained on them.
_DATA = """\
64 px emoji of 1,375 concepts (Noto Color Emoji, Apache-2.0, Google; Twemoji, CC-BY-4.0, Twitter, Inc and other
contributors{more}), and scenes composed of them. {held} was never seen."""
_PIPELINE = {"more": "", "held": "A tenth of the concepts (with Fluent Emoji 3D and four computed styles)"}
_NETS = {"more": "; Fluent Emoji 3D, MIT, Microsoft Corporation"}
_SEEN = {
    "emoji-unet": _DATA.format(**_PIPELINE),
    "emoji-mmdit": _DATA.format(**_PIPELINE),
    "emoji-net": _DATA.format(**_NETS, held="A tenth of the pairs of concept and style"),
    "emoji-vit": _DATA.format(**_PIPELINE).replace(", and scenes composed of them", ""),
    "emoji-conv": _DATA.format(**_PIPELINE).replace(", and scenes composed of them", ""),
}


def freeze(out: Path, folder: Path, name: str, about: str, time: str = "") -> None:
    """Write one model of the training folder `out` into `folder`/`name`, with its card.

    Args:
        out: where `vislr zoo retrain` left its stages.
        folder: of all embedded models; the MMDiT's links point to `emoji-unet` in it.
        name: emoji-unet, emoji-mmdit, emoji-net, emoji-vit or emoji-conv.
        about: one sentence for the card.
        time: machine and hours of the training, for the card.
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
    card["training"] = time
    card["losses"] = state["losses"][:: max(1, len(state["losses"]) // 50)]
    _write_card(place, card)


def note_gates(place: Path, record: Path) -> None:
    """Put the figures of a record into the card of the model in folder `place`."""
    card, found = read_json(place / "card.json"), read_json(record / "record.json")
    card["gates"] = {
        name: [round(x, 4) for x in (one["value"], *one["interval"])] for name, one in found["measurements"].items()
    }
    card["record"] = record.name
    _write_card(place, card)


def _write_card(place: Path, card: dict[str, Any]) -> None:
    write_json(place / "card.json", card)
    stage = card["name"].removeprefix("emoji-")
    lines = [
        f"# {card['name']}", "", card["about"], "", "## Data", "", _SEEN[card["name"]], "", "## Training", "",
        f"{card['steps']:,} steps. {card['training']}".strip(),
        f"Again: `vislr zoo retrain --config zoo/{stage}.yaml`.", "",
        "The weights are under the licence of vislr; the pictures keep theirs.", "",
    ]  # fmt: skip
    if "gates" in card:
        lines += ["## Gates", "", f"Record `{card['record']}`; 95 % intervals.", "", "| figure | value | interval |"]
        lines += ["|---|---|---|"]
        lines += [f"| {name} | {value:g} | {low:g} to {high:g} |" for name, (value, low, high) in card["gates"].items()]
        lines.append("")
    lines += ["## Weights", "", "| file | content hash |", "|---|---|"]
    lines += [f"| {file} | {value[:16]} |" for file, value in card["weights"].items()]
    write_text(place / "README.md", "\n".join([*lines, ""]))


def _share(place: Path, other: Path) -> None:
    for part, origin in SHARED.items():
        shutil.rmtree(place / part)
        os.symlink(Path("..") / other.name / origin, place / part, target_is_directory=True)
