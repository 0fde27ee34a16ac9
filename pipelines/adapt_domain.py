"""`vislr adapt-domain`: adapt a classifier or a segmentation model to a domain without labels.

vislr adapt-domain --config adapt-domain/emoji-styles.yaml --output.folder result
vislr adapt-domain --config adapt-domain/volumes.yaml --source.data a.nii.gz --source.masks a_mask.nii.gz \
    --target.data b.nii.gz --output.folder result
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.arguments import dump_config, parse_config, plain_data
from vislr.core.cli_guard import run
from vislr.core.errors import ModelError, OutputError
from vislr.core.files import check_output, write_json, write_text
from vislr.train.self_training_config import AdaptConfig

if TYPE_CHECKING:
    from vislr.train.self_training import Adapted
    from vislr.train.self_training_data import Domain
    from vislr.train.self_training_figures import Verdict
    from vislr.train.self_training_models import Net

REPORT = "report.json"
# Everything that a run writes into its folder; `output.overwrite` removes these and nothing else.
_OURS = (
    "config.yaml", REPORT, "README.md", "overview.png", "slices.png", "model.safetensors", "stages",
    "adabn.safetensors", "convlora.safetensors", "both.safetensors",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr adapt-domain` with these arguments; returns the exit code."""
    config = parse_config(
        AdaptConfig, argv, prog="vislr adapt-domain",
        description="Adapt a classifier or a segmentation model to a domain without labels.",
    )  # fmt: skip
    folder = Path(config.output.folder)
    if _finished(config, folder):
        print(f"'{folder}' is finished already")
        return 0
    source, target = read_domains(config)

    import torch

    from vislr import recipe
    from vislr.data import key_seed
    from vislr.train.self_training import adapt_domain
    from vislr.train.self_training_models import build_net, module_at

    torch.manual_seed(key_seed(config.seed, "model"))
    net = build_net(config.model, len(source.classes), source.inputs.shape[1])
    source, target = (with_input_of(domain, net) for domain in (source, target))
    if config.model.weights is not None:
        _load_weights(net, config.model.weights)
    module_at(net.model, config.early_head.layer or net.layer)
    parameters = sum(value.numel() for value in net.model.parameters())
    needed = (2 + len(config.adaptation.variants)) * 12 * parameters + 2**20
    print(_plan(config, net, source, target, parameters, needed))
    if config.dry_run:
        return 0
    check_output(folder, needed)
    if config.output.overwrite:
        _clear(folder)
    dump_config(config, folder / "config.yaml")

    def save(model: Any, name: str, path: Path, aux: dict[str, torch.Tensor]) -> None:
        recipe.save_adapter(model, path, name=name, aux=aux)

    adapted = adapt_domain(config, net, source, target, trained=config.model.weights is not None, save_adapter=save)
    verdicts = write_result(config, adapted, source, target)
    shutil.rmtree(folder / "stages", ignore_errors=True)
    print(summary(config, adapted, verdicts))
    return 0


def read_domains(config: AdaptConfig) -> tuple[Domain, Domain]:
    """The source with its labels, and the target with the labels that it has.

    Raises:
        DataError: a domain is missing, empty, damaged, or does not fit the other.
    """
    from vislr.core.errors import DataError
    from vislr.train.self_training_data import read_pictures, read_slices

    size = config.model.size
    if config.task == "classification":
        source = read_pictures(config.source, size)
        return source, read_pictures(config.target, size, source.classes)
    source = read_slices(config.source, config.slices, size, labelled=True)
    target = read_slices(config.target, config.slices, size, labelled=False)
    if source.inputs.shape[1] != target.inputs.shape[1]:
        raise DataError("source and target have different channels")
    return source, target


def with_input_of(domain: Domain, net: Net) -> Domain:
    """The domain, scaled as the net wants it."""
    import dataclasses

    return dataclasses.replace(domain, mean=net.mean, std=net.std)


def _load_weights(net: Net, path: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model.weights '{path}' cannot be read: {error}") from error
    own = net.model.state_dict()
    wrong = [key for key in own.keys() | stored.keys() if key not in own or key not in stored]
    wrong += [key for key in own if key in stored and own[key].shape != stored[key].shape]
    if wrong:
        raise ModelError(
            f"model.weights '{path}' is of another model: {len(wrong)} tensors differ, for example '{min(wrong)}'"
        )
    net.model.load_state_dict(stored)


def _finished(config: AdaptConfig, folder: Path) -> bool:
    """Whether a resume has nothing to do; refuses to mix a new run into an old result."""
    from vislr.train.checkpoints import check_same_run

    output = config.output
    if output.overwrite or not (folder / REPORT).is_file():
        return False
    if not output.resume:
        raise OutputError(f"'{folder}' holds a finished run; expected a new folder, or output.overwrite")
    from vislr.core.files import read_json

    check_same_run(read_json(folder / REPORT)["config"], plain_data(config))
    return True


def _clear(folder: Path) -> None:
    for name in _OURS:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _domain(domain: Domain) -> str:
    examples = "pictures" if domain.classes else f"slices of {len(domain.volumes())} volumes"
    labels = "labelled" if domain.truth is not None else "no labels"
    return f"{len(domain)} {examples} ({labels}), '{domain.name}'"


def _plan(config: AdaptConfig, net: Net, source: Domain, target: Domain, parameters: int, needed: int) -> str:
    """What would be done, in a few lines."""
    training, early, adaptation = config.training, config.early_head, config.adaptation
    trained = "weights given" if config.model.weights else f"{training.train}, {training.epochs} epochs"
    return "\n".join(
        [
            f"model     {config.model.base} ({type(net.model).__name__}), {parameters:,} parameters, "
            f"size {config.model.size}",
            f"source    {_domain(source)}; {trained}",
            f"target    {_domain(target)}",
            f"early     reads '{early.layer or net.layer}', {early.epochs} epochs",
            f"variants  {', '.join(adaptation.variants)}; rank {config.adapter.r}, {adaptation.epochs} epochs, "
            f"statistics {config.statistics.mode}",
            f"output    '{config.output.folder}', at most {needed / 2**20:.1f} MiB",
        ]
    )


def write_result(config: AdaptConfig, adapted: Adapted, source: Domain, target: Domain) -> dict[str, Verdict]:
    """Write plots, card and, last, the report; gives the verdicts."""
    from vislr.core.files import atomic_path
    from vislr.core.versions import versions_of
    from vislr.train.self_training_figures import draw_overview, slice_grid, verdict

    folder = Path(config.output.folder)
    base = adapted.trials["source"]
    verdicts = {
        name: verdict(name, trial, base, config.seed) for name, trial in adapted.trials.items() if name != "source"
    }
    draw_overview(adapted.trials, folder / "overview.png")
    if config.task == "segmentation":
        test = target.split(config.target.held_out)[1]
        with atomic_path(folder / "slices.png") as temporary:
            slice_grid(adapted.trials, test).save(temporary, format="png")
    trials = {
        name: {
            "target": trial.outcome.figures,
            "agreement": trial.agreement,
            "losses": trial.losses,
            "epoch": trial.epoch,
            "sites": trial.sites,
            "trainable": trial.parameters,
            "file": trial.file.name if trial.file else None,
        }
        | (_said(verdicts[name]) if name in verdicts else {})
        for name, trial in adapted.trials.items()
    }
    report = {
        "config": plain_data(config),
        "trials": trials,
        "worse": [name for name, said in verdicts.items() if said.word == "worse"],
        "chosen_without_labels": _chosen(adapted),
        "source": {"figures": adapted.source.figures, "taken_on_training_examples": adapted.source_shared},
        "target_figures_on_the_examples_adapted_to": adapted.transductive,
        "classes": list(source.classes),
        "examples": {"source": len(source), "target": len(target)},
        "data": {"source": source.fingerprint(), "target": target.fingerprint()},
        "model": adapted.model_hash,
        "stages": adapted.histories,
        "seconds": round(adapted.seconds, 3),
        "versions": versions_of("vislr", "torch", "peft", "timm"),
    }
    write_text(folder / "README.md", _card(config, adapted, verdicts, len(source.classes)))
    write_json(folder / REPORT, report)
    return verdicts


def _said(verdict: Verdict) -> dict[str, Any]:
    return {
        "verdict": verdict.word,
        "gain": verdict.gain,
        "interval": None if verdict.interval is None else list(verdict.interval),
        "line": verdict.line,
    }


def _chosen(adapted: Adapted) -> str:
    """The variant whose early and full output agree best."""
    return max(adapted.trials, key=lambda name: adapted.trials[name].agreement[adapted.trials[name].epoch])


def summary(config: AdaptConfig, adapted: Adapted, verdicts: dict[str, Verdict]) -> str:
    """What came out; what got worse stands first and in capitals."""
    lines = sorted(verdicts.values(), key=lambda said: said.word != "worse")
    shown = ", ".join(f"{key} {value:.3f}" for key, value in adapted.source.figures.items())
    where = "on the examples trained on" if adapted.source_shared else "on held-out examples"
    notes = [f"source model on the source: {shown} ({where})"]
    if adapted.trials["source"].outcome.figures:
        figures = ", ".join(f"{key} {value:.3f}" for key, value in adapted.trials["source"].outcome.figures.items())
        notes.append(f"source model on the target: {figures}")
    if adapted.transductive:
        notes.append("figures of the target are taken on the examples that were adapted to (nothing is held out)")
    notes.append(f"best agreement without labels: {_chosen(adapted)}")
    return "\n".join([*(said.line for said in lines), *notes, f"result: {config.output.folder}"])


def _card(config: AdaptConfig, adapted: Adapted, verdicts: dict[str, Verdict], classes: int) -> str:
    """How to use what the run made."""
    model = config.model
    build = f"build_net(NetConfig(base={model.base!r}, pretrained=False, size={model.size}), {classes}, 1).model.eval()"
    files = [trial.file.name for trial in adapted.trials.values() if trial.file]
    lines = [
        f"# {model.base} adapted from '{', '.join(config.source.data)}' to '{', '.join(config.target.data)}'",
        "",
        "![figures](overview.png)",
        "",
        *(f"- {said.line}" for said in verdicts.values()),
        "",
        "```python",
        "import vislr",
        "from safetensors.torch import load_file",
        "from vislr.train.self_training_config import NetConfig",
        "from vislr.train.self_training_models import build_net",
        "",
        f"model = {build}",
        'model.load_state_dict(load_file("model.safetensors"))',
    ]
    if files:
        lines.append(f'vislr.load_adapter(model, "{files[-1]}")  # statistics too')
    return "\n".join([*lines, "```", ""])


if __name__ == "__main__":
    sys.exit(run(main))
