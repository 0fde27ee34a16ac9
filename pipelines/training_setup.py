"""What `vislr train` and `vislr estimate` do before a step: pictures, base, adapters, and how the result is written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislr.core.errors import ConfigError, ModelError
from vislr.core.files import read_json
from vislr.train.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from vislr.core.report import Report
    from vislr.data import Pool


def wants_classes(base: str) -> bool:
    """Whether a base is trained on folders of classes: a classifier, or a pipeline that is told classes."""
    from vislr.train.classifiers import is_classifier

    if is_classifier(base):
        return True
    index = Path(base) / "model_index.json"
    if index.is_file():
        return "DiT" in str(read_json(index).get("_class_name"))
    if Path(base).exists() or base.count("/") != 1:
        return False
    import diffusers

    try:
        return "DiT" in str(diffusers.DiffusionPipeline.load_config(base).get("_class_name"))
    except Exception:
        # Loading the pipeline itself says better what is wrong with it.
        return False


def open_data(config: TrainConfig, quiet: bool = True) -> tuple[Pool, Pool]:
    """Training and held-out pictures; the held-out part may be empty.

    Raises:
        DataError: nothing usable, or something broken while `data.broken` is stop.
    """
    from vislr.data import open_pool

    classes = wants_classes(config.model.base)
    whole = open_pool(config.data, classes, quiet=quiet)
    if config.held_out.folder is None:
        return whole.split(config.held_out.fraction)
    other = replace(config.data, folder=config.held_out.folder, folders=[], prior_folder=None)
    return whole, open_pool(other, whole.classes if classes else False, quiet=quiet)


def texts_of(config: TrainConfig, *pools: Pool) -> Iterator[tuple[str, str]]:
    """(where it stands, text) of every caption and prompt of a run."""
    from vislr.data.captions import with_trigger

    for pool in pools:
        for part in pool.parts:
            for index in part.chosen.tolist():
                picture = part.store.picture(index)
                yield picture.name, with_trigger(picture.caption, pool.trigger(part))
    for prompt in config.sample.prompts:
        yield "sample.prompts", prompt


def load_base(config: TrainConfig, classes: int) -> tuple[Any, nn.Module | None]:
    """The frozen base, and of a classifier the head, without adapters.

    Raises:
        ModelError: it cannot be loaded, or not be trained.
    """
    import torch

    from vislr import folders
    from vislr.train.classifiers import is_classifier, load_classifier
    from vislr.train.diffusion import latent_shape
    from vislr.train.families import family_of

    dtype = getattr(torch, config.model.dtype)
    if is_classifier(config.model.base):
        model, head = load_classifier(
            config.model.base, classes, pretrained=config.model.pretrained, size=config.data.size
        )
        return model.to(dtype), head.to(torch.float32)
    target = folders.load(config.model.base, dtype=dtype)
    if not hasattr(target, "components"):
        raise ModelError(f"'{config.model.base}' is one model; expected a whole pipeline")
    family_of(target)
    latent_shape(target, config.data.size)
    if dtype == torch.float16 and target.vae.config.get("force_upcast"):
        target.vae.to(torch.float32)
    return target, None


def put_tokens(config: TrainConfig, target: Any) -> list[Report]:
    """Put the token plan of a config on the base, before an adapter: the adapter is then tuned under it.

    Returns:
        its report; none without a plan.

    Raises:
        ConfigError: there is no such file, or it holds no token plan.
        TargetError, ModelError: the plan is of another model.
    """
    from vislr import record
    from vislr.tokens import TokenPlan

    if config.model.tokens is None:
        return []
    try:
        data = read_json(config.model.tokens)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.tokens '{config.model.tokens}' is no plan of `vislr tokens`: {error}") from error
    return [record.apply(target, TokenPlan.from_dict(data), name="tokens")]


def attach(config: TrainConfig, target: Any) -> list[Report]:
    """Put the adapter of a config on a pipeline or classifier: on the denoiser, then on text encoders.

    Returns:
        a report for each.

    Raises:
        TargetError, AdapterError, ConfigError: it does not fit.
    """
    import torch

    from vislr import recipe
    from vislr.adapters import adapter_names, adapter_parameters
    from vislr.anatomy import denoiser_of
    from vislr.train.base import store_base
    from vislr.train.families import family_of

    name = config.adapter.name
    if config.init_adapter is not None:
        # Its own base may have been another number type, or kept in fewer bits.
        loaded = recipe.load_adapter(target, config.init_adapter, name=name, any_base=True)
        carriers = [denoiser_of(target)[1], *(getattr(target, key, None) for key in config.adapter.text_encoders)]
        held = [adapter_parameters(one, name) for one in carriers if one is not None and name in adapter_names(one)]
        # A file's adapter comes frozen; here it is what is trained.
        reports = [replace(loaded, trainable=sum(p.numel() for part in held for p in part.values()))]
    else:
        reports = [recipe.apply(target, config.adapter.to_change(), name=name)]
    for component in config.adapter.text_encoders:
        encoder = getattr(target, component, None)
        if encoder is None or family_of(target).labelled:
            raise ConfigError(f"adapter.text_encoders names '{component}'; a {type(target).__name__} has none")
        if name not in adapter_names(encoder):
            reports.append(recipe.apply(encoder, config.adapter.to_text_change(encoder), name=name))
    store_base(denoiser_of(target)[1], config.model.storage, getattr(torch, config.model.dtype))
    return reports


def kind_on(target: Any, name: str) -> str:
    """The kind of an adapter that is on a target, as files name it."""
    from vislr.anatomy import denoiser_of
    from vislr.formats.kinds import kind_of_config

    denoiser: Any = denoiser_of(target)[1]
    return kind_of_config(denoiser.peft_config[name])


def adapter_writer(config: TrainConfig, target: Any) -> Callable[[Path], Any]:
    """What writes the adapter to a path: one file, in the format of the config, with all components.

    Tries it once, so that a format that cannot hold the adapter is found before training.

    Raises:
        FormatError: the format cannot hold it.
    """
    from vislr import formats, recipe
    from vislr.anatomy import denoiser_of

    if config.model.shard:
        formats.remember_adapters_base(denoiser_of(target)[1], config.adapter.name)

    def write(path: Path) -> None:
        recipe.save_adapter(target, path, name=config.adapter.name, format=config.output.format)

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "adapter.safetensors")
    return write
