"""`vislr estimate`: what a training run needs, before it starts.

vislr estimate --config train/sdxl-lora.yaml
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.arguments import parse_config
from vislr.core.cli_guard import run
from vislr.core.errors import ConfigError, ModelError
from vislr.core.files import read_json
from vislr.train.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

# Components of a pipeline that are models, beside the denoiser.
_OTHERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")


@dataclass
class EstimateConfig(TrainConfig):
    """A training run that is looked at and not made. Every key of a training config, and:"""

    device: str | None = None
    """Device that the run is for (cpu, cuda, cuda:1); null: the one that training would use."""
    memory_gb: float | None = None
    """Its memory in GiB, if it is another machine's; null: what is free there now."""
    timed: bool = True
    """Make one real step with random weights, if it fits."""
    json: bool = False
    """Print JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr estimate` with these arguments; exit code 0 if the run fits, 1 if not."""
    config = parse_config(
        EstimateConfig, argv, prog="vislr estimate",
        description="Say what a training run needs: memory by part, time, file sizes, and whether it fits.",
    )  # fmt: skip
    import torch

    from vislr.core.arguments import plain_data
    from vislr.train import make_accelerator
    from vislr.train.estimates import estimate_run
    from vislr.train.results import bytes_needed

    try:
        device = torch.device(config.device) if config.device else make_accelerator().device
    except RuntimeError as error:
        raise ConfigError(f"device '{config.device}' is none that torch knows") from error
    models, others, size, head = on_meta(config)
    entries = sparse_entries(models[""], config) if config.adapter.kind == "sara" else None
    pictures = max(6, len(config.sample.prompts)) * (len(config.sample.seeds) + 1)
    found = estimate_run(
        models, others, config, size=size, device=device, head=head, timed=config.timed, entries=entries,
        available=None if config.memory_gb is None else int(config.memory_gb * 2**30),
        run_bytes=lambda trainable: bytes_needed(config, trainable, pictures),
    )  # fmt: skip
    print(json.dumps(plain_data(found.to_dict()), indent=2) if config.json else found)
    return 0 if found.fits is not False else 1


def on_meta(
    config: TrainConfig,
) -> tuple[dict[str, nn.Module], dict[str, nn.Module], dict[str, int], nn.Module | None]:
    """The models of a run without weights, adapters attached (SaRA, which needs values, is not).

    Returns:
        those that carry the adapter by prefix, the others by name, the size that the denoiser sees, and of a
        classifier the head.

    Raises:
        ModelError: there is no such base. TargetError, AdapterError: the adapter does not fit it.
        ConfigError: the adapter's size depends on the values of the weights.
    """
    import torch

    from vislr.adapters import attach
    from vislr.train.classifiers import is_classifier, load_classifier
    from vislr.train.tasks import input_of

    adapter = config.adapter
    if adapter.kind == "sara" and adapter.text_encoders:
        raise ConfigError("sara on text encoders cannot be estimated; estimate the denoiser alone")
    if is_classifier(config.model.base):
        with torch.device("meta"):
            model, head = load_classifier(config.model.base, 1000, pretrained=False, size=config.data.size)
        if adapter.kind != "sara":
            attach(model, adapter.to_change(), adapter.name)
        side = input_of(model, config.data.size).size
        return {"": model}, {}, {"height": side, "width": side}, head
    folder = config_folder(config.model.base)
    models, others, size = pipeline_on_meta(folder, config)
    kind = getattr(torch, config.model.dtype)
    for module in (*models.values(), *others.values()):
        # Not the libraries' own `to`, which warn about weights that these models do not have.
        torch.nn.Module.to(module, kind)
    if adapter.kind != "sara":
        for name, module in models.items():
            change = adapter.to_text_change(module) if name else adapter.to_change()
            attach(module, change, adapter.name)
    return models, others, size, None


def sparse_entries(model: nn.Module, config: TrainConfig) -> dict[str, int]:
    """Layer -> entries that SaRA trains. A count or share goes over the layers by their size; a threshold reads values.

    Raises:
        ConfigError: a threshold, and the base's weights are not in a folder here.
        TargetError, AdapterError: the adapter does not fit the model.
    """
    from vislr.adapters.sara_select import chosen_layers, wanted_count

    change: Any = config.adapter.to_change()
    own = {site: model.get_submodule(site)._parameters for site in chosen_layers(model, change)}
    if change.threshold is not None:
        return _below(change.threshold, own, config.model.base)
    sizes = {site: sum(part.numel() for part in parts.values() if part is not None) for site, parts in own.items()}
    left, total, found = wanted_count(change, sum(sizes.values())), sum(sizes.values()), {}
    for site, size in sizes.items():
        found[site] = round(left * size / total)
        left, total = left - found[site], total - size
    return found


def _below(threshold: float, own: dict[str, Any], base: str) -> dict[str, int]:
    """Layer -> entries of smaller magnitude, from the denoiser's files."""
    from safetensors import safe_open

    folder = None if base.startswith("timm/") else config_folder(base)
    parts = [folder / name for name in ("unet", "transformer")] if folder else []
    files = [file for part in parts for file in sorted(part.glob("*.safetensors"))]
    # A variant in half precision may lie beside the weights.
    files = [file for file in files if file.name.count(".") == 1] or files
    if not files:
        raise ConfigError(
            f"the weights of '{base}' are not here to compare with adapter.threshold; give adapter.count or fraction"
        )
    places = {f"{site}.{key}": site for site, parts in own.items() for key in ("weight", "bias") if key in parts}
    found: dict[str, int] = {}
    for file in files:
        with safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118  (no mapping)
                if key in places:
                    below = int((stored.get_tensor(key).float().abs() < threshold).sum())
                    found[places[key]] = found.get(places[key], 0) + below
    return found


def config_folder(base: str) -> Path:
    """A folder with the JSON of a pipeline: the embedded one, the one given, or of a hub id fetched without weights."""
    from vislr import zoo
    from vislr.core.errors import hint

    if not Path(base).exists() and base in zoo.pipeline_names():
        return zoo.pipeline_folder(base)
    if (Path(base) / "model_index.json").is_file():
        return Path(base)
    if Path(base).exists() or base.count("/") != 1:
        raise ModelError(f"'{base}' is no diffusers folder and no embedded name{hint(base, zoo.pipeline_names())}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=["*.json"]))
    except Exception as error:
        # The hub raises a dozen types; all mean that the configs cannot be had.
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"cannot fetch the configs of '{base}': {type(error).__name__}: {reason}") from error


def pipeline_on_meta(
    folder: Path, config: TrainConfig
) -> tuple[dict[str, nn.Module], dict[str, nn.Module], dict[str, int]]:
    """The modules of a diffusers folder on the meta device: adapted, others, and the size of the latents.

    Raises:
        ModelError: a component is of a class that is not known.
    """
    from vislr.anatomy.skeletons import skeleton

    index = read_json(folder / "model_index.json")
    denoiser: Any = skeleton(folder)
    parts: dict[str, Any] = {}
    for name in _OTHERS:
        library, kind = index.get(name) or (None, None)
        if library is not None:
            parts[name] = _component(folder / name, str(library), str(kind))
    for name in config.adapter.text_encoders:
        if name not in parts:
            raise ConfigError(f"adapter.text_encoders names '{name}'; a {index.get('_class_name')} has none")
    factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1) if "vae" in parts else 8
    latent = config.data.size // factor if config.data.size else int(denoiser.config.get("sample_size") or 128)
    adapted = {"": denoiser} | {name: parts.pop(name) for name in config.adapter.text_encoders}
    return adapted, parts, {"height": latent, "width": latent}


def _component(folder: Path, library: str, kind: str) -> nn.Module:
    import torch

    if library == "diffusers":
        import diffusers

        cls: Any = getattr(diffusers, kind, None)
        if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin):
            with torch.device("meta"):
                return cls.from_config(read_json(folder / "config.json"))
    if library == "transformers":
        import transformers

        cls = getattr(transformers, kind, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            with torch.device("meta"):
                config_class: Any = cls.config_class
                return cls(config_class.from_pretrained(folder))
    raise ModelError(f"'{folder}' holds a {library}.{kind}, which is no model that is known")


if __name__ == "__main__":
    sys.exit(run(main))
