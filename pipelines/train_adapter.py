"""`vislr train`: train an adapter on a folder of pictures.

vislr train --config train/emoji-unet-convlora.yaml --data.folder pictures --output.folder result
accelerate launch pipelines/train_adapter.py --config configs/train/emoji-unet-convlora.yaml ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.arguments import dump_config, parse_config
from vislr.core.cli_guard import run
from vislr.core.errors import ModelError
from vislr.core.files import check_output
from vislr.train.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from vislr.core.report import Report
    from vislr.data import ImageFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr train` with these arguments; returns the exit code."""
    config = parse_config(
        TrainConfig, argv, prog="vislr train", description="Train an adapter on a folder of pictures."
    )
    train, held_out = _data(config)

    import torch

    from vislr import recipe
    from vislr.train import classifiers, fit, make_accelerator, results
    from vislr.train.prompts import check_prompts

    folder = Path(config.output.folder)
    results.check_folder(config)
    accelerator = make_accelerator(config.precision, config.processes)
    if config.output.resume and results.finished(folder):
        accelerator.print(f"'{folder}' is finished already")
        return 0
    torch.manual_seed(config.seed)
    target, head = _model(config, train)
    texts = [(str(sample.path), sample.caption) for sample in (*train.samples, *held_out.samples)]
    check_prompts(target, texts + [("sample.prompts", prompt) for prompt in config.sample.prompts])
    applied = recipe.apply(target, config.adapter.to_change(), name=config.adapter.name)
    trainable = applied.trainable + (sum(p.numel() for p in head.parameters()) if head is not None else 0)
    needed = results.bytes_needed(
        config, trainable, max(6, len(config.sample.prompts)) * (len(config.sample.seeds) + 1)
    )
    accelerator.print(_plan(config, train, held_out, applied, trainable, needed, accelerator.num_processes))
    if config.dry_run:
        return 0
    check_output(folder, needed)
    if accelerator.is_main_process:
        if config.output.overwrite:
            results.clear(folder)
        dump_config(config, folder / "config.yaml")
    accelerator.wait_for_everyone()

    def save_adapter(path: Path) -> None:
        recipe.save_adapter(target, path, name=config.adapter.name, format=config.output.format)

    result = fit(
        target, config.adapter.name, config, train, held_out,
        head=head, accelerator=accelerator, save_adapter=save_adapter,
    )  # fmt: skip
    if accelerator.is_main_process:
        save_adapter(folder / "adapter.safetensors")
        if head is not None:
            classifiers.save_head(target, head, folder / "head.safetensors", train.classes)
        results.write_result(config, result, applied, train, held_out, recipe.recipe_of(target))
        print(_summary(folder, result))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def _data(config: TrainConfig) -> tuple[ImageFolder, ImageFolder]:
    """Training and held-out pictures, every one of them readable."""
    from vislr.data import ImageFolder
    from vislr.train.classifiers import is_classifier

    def read(root: str, classes: tuple[str, ...] | None) -> ImageFolder:
        if is_classifier(config.model.base):
            return ImageFolder.with_classes(root, classes)
        return ImageFolder.with_captions(root).triggered(config.data.trigger)

    whole = read(config.data.folder, None)
    whole.check()
    if config.held_out.folder is None:
        return whole.split(config.held_out.fraction)
    held_out = read(config.held_out.folder, whole.classes)
    held_out.check()
    return whole, held_out


def _model(config: TrainConfig, train: ImageFolder) -> tuple[Any, nn.Module | None]:
    """The frozen base, and of a classifier the head."""
    import torch

    from vislr import recipe
    from vislr.train.classifiers import is_classifier, load_classifier
    from vislr.train.families import family_of
    from vislr.train.tasks import latent_shape

    dtype = getattr(torch, config.model.dtype)
    if is_classifier(config.model.base):
        model, head = load_classifier(
            config.model.base, len(train.classes), pretrained=config.model.pretrained, size=config.data.size
        )
        return model.to(dtype), head.to(torch.float32)
    target = recipe.load(config.model.base, dtype=dtype)
    if not hasattr(target, "components"):
        raise ModelError(f"'{config.model.base}' is one model; expected a whole pipeline")
    family_of(target)
    latent_shape(target, config.data.size)
    return target, None


def _plan(
    config: TrainConfig, train: ImageFolder, held_out: ImageFolder, applied: Report, trainable: int, needed: int,
    processes: int,
) -> str:  # fmt: skip
    """What would be done, in a few lines."""
    pictures = config.optim.batch * config.optim.accumulation * processes
    return "\n".join(
        [
            f"base      {config.model.base} ({config.model.dtype})",
            f"pictures  {len(train)} to train on, {len(held_out)} held out, in '{train.root}'",
            f"adapter   {applied}",
            f"training  {trainable:,} parameters, {config.steps} steps of {pictures} pictures "
            f"({config.steps * pictures / len(train):.1f} epochs), {config.precision}, processes: {processes}",
            f"output    '{config.output.folder}', at most {needed / 2**20:.1f} MiB",
        ]
    )


def _summary(folder: Path, result: Any) -> str:
    lines = [f"{result.steps} steps; {result.seconds:.0f} s of training since the last start"]
    for name, points in result.history.held_out.items():
        lines.append(f"held-out {name}: {points[0][1]:.4f} before, {points[-1][1]:.4f} after")
    return "\n".join([*lines, f"adapter: {folder / 'adapter.safetensors'}", f"pictures: {folder / 'before_after.png'}"])


if __name__ == "__main__":
    sys.exit(run(main))
