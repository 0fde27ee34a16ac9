"""What a finished run leaves in its folder: pictures, report, model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vislr.core.errors import OutputError
from vislr.core.files import atomic_path, write_json, write_text
from vislr.core.report import Report
from vislr.core.versions import versions_of
from vislr.data import ImageFolder
from vislr.train.checkpoints import checkpoints_in
from vislr.train.classifiers import is_classifier
from vislr.train.config import TrainConfig
from vislr.train.curves import draw_curves
from vislr.train.loop import Result

REPORT = "report.json"
# Everything that a run writes into its folder; `output.overwrite` removes these and nothing else.
_OURS = (
    "adapter.safetensors", "head.safetensors", "config.yaml", REPORT, "README.md", "before_after.png", "curves.png",
    "samples", "checkpoints", "tensorboard",
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


def write_result(
    config: TrainConfig, result: Result, applied: Report, train: ImageFolder, held_out: ImageFolder, recipe: list[Any]
) -> None:
    """Write pictures, card and, last, the report. The adapter is there already."""
    folder = Path(config.output.folder)
    if result.before is not None and result.after is not None:
        with atomic_path(folder / "before_after.png") as temporary:
            result.task.before_after(result.before, result.after).save(temporary, format="png")
    draw_curves(result.history, folder / "curves.png")
    curve = result.history.held_out.get("loss")
    report = {
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "trainable": result.trainable,
        "adapter": applied.to_dict(),
        "held_out": {
            name: {"before": points[0][1], "after": points[-1][1]} for name, points in result.history.held_out.items()
        },
        "train_loss": result.history.last("train").get("loss"),
        "base": config.model.base,
        "data": {
            "folder": str(train.root),
            "pictures": len(train),
            "held_out": len(held_out),
            "classes": list(train.classes),
            "hash": train.fingerprint(),
        },
        "recipe": recipe,
        "versions": versions_of("torch", "diffusers", "peft", "accelerate", "timm"),
    }
    write_text(folder / "README.md", _card(config, train, held_out, result, curve))
    write_json(folder / REPORT, report)


def _card(
    config: TrainConfig,
    train: ImageFolder,
    held_out: ImageFolder,
    result: Result,
    curve: list[tuple[int, float]] | None,
) -> str:
    """The model card."""
    adapter, base = config.adapter, config.model.base
    lines = [
        "---",
        f"base_model: {base}",
        f"tags: [vislr, {adapter.kind}]",
        "---",
        f"# {adapter.kind} adapter for {base}",
        "",
        "![before and after](before_after.png)",
        "",
        f"- Base: `{base}`",
        f"- Method: {adapter.kind}, {result.trainable:,} trained parameters, {result.steps} steps, seed {config.seed}",
        f"- Data: {len(train)} pictures ({len(held_out)} more held out)",
    ]
    if train.classes:
        lines.append(f"- Classes: {', '.join(train.classes)}")
    else:
        lines.append(f"- Trigger words: {config.data.trigger or 'none; write prompts like the captions'}")
        lines.append(f"- A caption: `{train.samples[0].caption}`")
    if curve:
        lines.append(f"- Held-out loss: {curve[0][1]:.4f} before, {curve[-1][1]:.4f} after")
    lines += ["- Licence: not stated; that of the pictures and of the base apply", "", "## Use", "", "```python"]
    if is_classifier(base):
        lines += [
            "import vislr",
            "from safetensors.torch import load_file",
            "from vislr.train.classifiers import load_classifier",
            "",
            f'model, _ = load_classifier("{base}", {len(train.classes)}, pretrained={config.model.pretrained})',
            'model.load_state_dict(load_file("head.safetensors"), strict=False)',
            'vislr.load_adapter(model, "adapter.safetensors")',
        ]
    else:
        lines += [
            "import vislr",
            "",
            f'pipe = vislr.load("{base}")',
            'vislr.load_adapter(pipe, "adapter.safetensors")',
            f'image = pipe("{_prompt(config, train)}").images[0]',
        ]
        if config.output.format == "diffusers":
            lines += ["", '# or, without vislr: pipe.load_lora_weights("adapter.safetensors")']
    lines += ["```", ""]
    if not is_classifier(base):
        command = f'vislr generate --model {base} --adapter adapter.safetensors --prompts "{_prompt(config, train)}"'
        lines += ["```", command, "```", ""]
    return "\n".join(lines)


def _prompt(config: TrainConfig, train: ImageFolder) -> str:
    return config.sample.prompts[0] if config.sample.prompts else train.samples[0].caption
