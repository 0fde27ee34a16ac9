"""What a finished run leaves in its folder: pictures, report, model card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vislr.core.errors import OutputError
from vislr.core.files import atomic_path, write_json, write_text
from vislr.core.report import Report
from vislr.core.versions import versions_of
from vislr.train.card import model_card
from vislr.train.checkpoints import checkpoints_in
from vislr.train.config import TrainConfig
from vislr.train.curves import draw_curves
from vislr.train.loop import Result

REPORT = "report.json"
# Everything that a run writes into its folder; `output.overwrite` removes these and nothing else.
_OURS = (
    "adapter.safetensors", "head.safetensors", "config.yaml", REPORT, "README.md", "before_after.png", "curves.png",
    "samples", "checkpoints", "tensorboard", "best.safetensors", "adapter-best.safetensors", "wandb",
)  # fmt: skip


def finished(folder: Path) -> bool:
    """Whether the folder holds a whole result: the report is written last."""
    return (folder / REPORT).is_file()


def check_folder(config: TrainConfig) -> None:
    """Refuse to mix a new run into an old result.

    Raises:
        OutputError: the folder holds a result or a stopped run, and the config does not say what to do with it.
    """
    folder = Path(config.output.folder)
    if config.output.overwrite or config.output.resume:
        return
    if finished(folder):
        raise OutputError(f"'{folder}' holds a finished run; expected a new folder, or output.overwrite")
    stopped = checkpoints_in(folder)
    if stopped:
        raise OutputError(
            f"'{folder}' holds a run that stopped at step {int(stopped[-1].name)}; expected output.resume to go on, "
            "or output.overwrite to replace it"
        )


def clear(folder: Path) -> None:
    """Remove an earlier result; other files in the folder stay."""
    for name in _OURS:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def bytes_needed(config: TrainConfig, trainable: int, pictures: int) -> int:
    """Room on the disk for a run: adapter, checkpoints (one more than are kept), grids, curves.

    Args:
        trainable: trained parameters, stored as float32, in a checkpoint with two moments and the adapter's file.
        pictures: in one sample grid.
    """
    adapter = trainable * 4
    checkpoints = (config.output.keep + 1) * 4 * adapter
    grids = 2 + (config.steps // config.sample.every if config.sample.every else 0)
    # A cell of a grid is 128 x 128; each grid is kept as a file and in tensorboard.
    return adapter + checkpoints + 2 * (grids + 2) * pictures * 128 * 128 * 3 + 2**20


def write_result(config: TrainConfig, result: Result, applied: Sequence[Report], recipe: list[Any], kind: str) -> None:
    """Write pictures, card and, last, the report. The adapter is there already.

    Args:
        applied: a report for each component that carries the adapter, the denoiser's first. kind: of the adapter.
    """
    folder = Path(config.output.folder)
    if result.before is not None and result.after is not None:
        with atomic_path(folder / "before_after.png") as temporary:
            result.task.before_after(result.before, result.after).save(temporary, format="png")
    draw_curves(result.history, folder / "curves.png")
    train, history = result.task.train.source, result.history
    held_out = result.task.held_out.source.count if result.task.held_out is not None else 0
    report = {
        "steps": result.steps,
        "kept": result.kept,
        "seconds": round(result.seconds, 3),
        "trainable": result.trainable,
        "adapter": applied[0].to_dict(),
        "text_encoders": [report.to_dict() for report in applied[1:]],
        "held_out": {name: _ends(points, result.kept) for name, points in history.held_out.items()},
        "samples": history.last("samples"),
        "train_loss": history.last("train").get("loss"),
        "base": config.model.base,
        "license": config.output.license,
        "data": {
            "folder": config.data.parts()[0].path,
            "folders": [part.path for part in config.data.parts()],
            "pictures": train.count,
            "held_out": held_out,
            "classes": list(train.pool.classes),
            "hash": train.fingerprint(),
        },
        "recipe": recipe,
        "versions": versions_of("torch", "diffusers", "peft", "accelerate", "timm"),
    }
    card = model_card(config, result, kind=kind, pictures=train.count, held_out=held_out, components=len(applied))
    write_text(folder / "README.md", card)
    write_json(folder / REPORT, report)


def _ends(points: list[tuple[int, float]], kept: int) -> dict[str, float]:
    """The first value of a curve, and the one of the step whose weights are the result (else the last)."""
    return {"before": points[0][1], "after": dict(points).get(kept, points[-1][1])}
