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
from vislr.core.errors import DataError
from vislr.core.files import check_output
from vislr.train.config import TrainConfig
from vislr.train.launch import shard_if_asked

if TYPE_CHECKING:
    from vislr.core.report import Report
    from vislr.data import Pool


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr train` with these arguments; returns the exit code."""
    config = parse_config(
        TrainConfig, argv, prog="vislr train", description="Train an adapter on a folder of pictures."
    )
    shard_if_asked(config)
    return carry_out(config)


def carry_out(config: TrainConfig) -> int:
    """Do what the config says; returns the exit code."""
    if config.check_data:
        return _check(config)
    from vislr.pipelines import training_setup as setup

    train, held_out = setup.open_data(config)

    import torch

    from vislr import recipe
    from vislr.train import classifiers, fit, make_accelerator, results
    from vislr.train.curves import check_wandb
    from vislr.train.evaluation import check_similarity
    from vislr.train.prompts import check_prompts

    folder = Path(config.output.folder)
    results.check_folder(config)
    if config.held_out.similarity:
        check_similarity()
    if config.output.wandb:
        check_wandb()
    accelerator = make_accelerator(config.precision, config.processes)
    if config.output.resume and results.finished(folder):
        accelerator.print(f"'{folder}' is finished already")
        return 0
    torch.manual_seed(config.seed)
    target, head = setup.load_base(config, len(train.classes))
    if not train.classes:
        check_prompts(target, setup.texts_of(config, train, held_out))
    pruned = setup.put_tokens(config, target)
    applied = setup.attach(config, target)
    save_adapter = setup.adapter_writer(config, target)
    trainable = sum(report.trainable for report in applied)
    trainable += sum(p.numel() for p in head.parameters()) if head is not None else 0
    needed = results.bytes_needed(
        config, trainable, max(6, len(config.sample.prompts)) * (len(config.sample.seeds) + 1)
    )
    accelerator.print(_plan(config, train, held_out, pruned + applied, trainable, needed, accelerator.num_processes))
    if config.dry_run:
        return 0
    check_output(folder, needed)
    if accelerator.is_main_process:
        if config.output.overwrite:
            results.clear(folder)
        dump_config(config, folder / "config.yaml")
    accelerator.wait_for_everyone()
    result = fit(
        target, config.adapter.name, config, train, held_out,
        head=head, accelerator=accelerator, save_adapter=save_adapter,
    )  # fmt: skip
    if accelerator.is_main_process:
        save_adapter(folder / "adapter.safetensors")
        if head is not None:
            classifiers.save_head(target, head, folder / "head.safetensors", train.classes)
        kind = setup.kind_on(target, config.adapter.name)
        results.write_result(config, result, applied, recipe.recipe_of(target), kind)
        print(_summary(folder, config, result))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def _check(config: TrainConfig) -> int:
    """`--check-data`: the report, and exit code 0 if training could start."""
    from vislr.data import check_data
    from vislr.pipelines.training_setup import wants_classes

    report = check_data(config.data, config.output.folder, classes=wants_classes(config.model.base))
    print(report)
    if not report.pictures or (report.left_out and config.data.broken == "stop"):
        raise DataError(f"{len(report.left_out)} pictures or lines cannot be used; they are named above")
    return 0


def _plan(
    config: TrainConfig, train: Pool, held_out: Pool, applied: list[Report], trainable: int, needed: int,
    processes: int,
) -> str:  # fmt: skip
    """What would be done, in a few lines."""
    pictures = config.optim.batch * config.optim.accumulation * processes
    return "\n".join(
        [
            f"base      {config.model.base} ({config.model.dtype}, {config.model.storage})",
            f"pictures  {len(train)} to train on, {len(held_out)} held out",
            *(f"          {line}" for line in train.summary().splitlines()),
            *(f"{'tokens' if report.kind == 'tokens' else 'adapter':9} {report}" for report in applied),
            f"training  {trainable:,} parameters, {config.steps} steps of {pictures} pictures "
            f"({config.steps * pictures / max(1, len(train)):.1f} epochs), {config.optim.optimizer}, "
            f"{config.precision}, processes: {processes}",
            f"output    '{config.output.folder}', at most {needed / 2**20:.1f} MiB",
        ]
    )


def _summary(folder: Path, config: TrainConfig, result: Any) -> str:
    lines = [f"{result.steps} steps; {result.seconds:.0f} s of training since the last start"]
    if result.steps < config.steps:
        lines.append(f"stopped early: {config.held_out.patience} held-out losses in a row were not the lowest")
    for name, points in result.history.held_out.items():
        after = dict(points).get(result.kept, points[-1][1])
        lines.append(f"held-out {name}: {points[0][1]:.4f} before, {after:.4f} after")
    if result.kept != result.steps:
        lines.append(f"the weights are those of step {result.kept}")
    return "\n".join([*lines, f"adapter: {folder / 'adapter.safetensors'}", f"pictures: {folder / 'before_after.png'}"])


if __name__ == "__main__":
    sys.exit(run(main))
