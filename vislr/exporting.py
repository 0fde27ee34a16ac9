"""Pipelines for tools without vislr: plain diffusers folders, single files, ONNX."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vislr.core.errors import FormatError, ModelError, OutputError
from vislr.core.files import atomic_path, write_tensors
from vislr.prune.plain import as_stock, stock_model
from vislr.prune.skips import Removed
from vislr.record import component_of, entries_of


def export_plain(target: Any, folder: str | os.PathLike) -> Path:
    """A diffusers folder that needs no vislr, where a stock config can express every plan on the target.

    Args:
        target: a pipeline, or a pruned model of diffusers.
        folder: new, or a diffusers folder that is replaced.

    Raises:
        FormatError: a plan that no stock config can say, an unmerged adapter, or a run-time plan.
        OutputError: the folder holds other things, or cannot be written.
    """
    component, module = _checked(target, "a plain folder")
    folder = Path(folder)
    ours = any((folder / known).exists() for known in ("model_index.json", "config.json"))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise OutputError(f"'{folder}' holds other files; export into a new folder")
    plain: Any = stock_model(module)
    with atomic_path(folder) as temporary:
        if not component:
            plain.save_pretrained(temporary)
        else:
            before, index = module, target.config[component]
            # The pipeline itself writes its folder, with the stock denoiser in its place for as long.
            target.register_modules(**{component: plain})
            try:
                target.save_pretrained(temporary)
            finally:
                target.register_modules(**{component: before})
                assert tuple(target.config[component]) == tuple(index)
    return folder


def export_single_file(target: Any, path: str | os.PathLike) -> Path:
    """The denoiser as one safetensors file in its release's layout, for ComfyUI's "Load Diffusion Model".

    Raises:
        FormatError: the layout cannot express the plan or the class, or ComfyUI would build another model for it.
            OutputError: it cannot be written.
    """
    from vislr.formats.single_file import original_state

    module = _checked(target, "a single file")[1]
    name, config, state = as_stock(module)
    _check_comfy(module, name, config)
    write_tensors(path, original_state(name, config, state))
    return Path(path)


# Blocks of SDXL's down path, a number for each resnet, that ComfyUI knows: SDXL, SSD-1B, Vega.
_COMFY_DEPTHS = ([0, 0, 2, 2, 10, 10], [0, 0, 2, 2, 4, 4], [0, 0, 1, 1, 2, 2])


def _check_comfy(module: Any, name: str, config: Mapping[str, Any]) -> None:
    """Refuse what ComfyUI would take for another model: it tells models apart by shapes and counts in the file.

    It counts FLUX's blocks, and the middle and up path of a UNet. An SD3 has as many blocks as its width
    says, whatever the file holds; an SDXL is known by the blocks of its down path.
    """
    removed = [unit for unit, part in module.named_modules() if isinstance(part, Removed)]
    if name == "SD3Transformer2DModel" and removed:
        raise FormatError(
            f"ComfyUI builds an SD3 with the blocks that its width says, so a file without '{removed[0]}' would leave "
            "random layers in it; export --plain"
        )
    below = [unit for unit in removed if unit.startswith("down_blocks.")]
    if name == "UNet2DConditionModel" and config.get("addition_embed_type") == "text_time" and below:
        depths: list[int] = []
        for stage, kind, count in zip(
            module.down_blocks, config["down_block_types"], config["transformer_layers_per_block"], strict=False
        ):
            resnets = len(stage.resnets)
            counts = [count] * resnets if isinstance(count, int) else list(count)
            depths += counts if kind.startswith("CrossAttn") else [0] * resnets
        if depths not in _COMFY_DEPTHS:
            raise FormatError(
                f"ComfyUI knows no SDXL whose down path has {depths} blocks, as it has without '{below[0]}'; expected "
                f"one of {', '.join(map(str, _COMFY_DEPTHS))}, or export --plain"
            )


# What one file of ONNX can hold: the format's messages end at 2 GiB.
_ONNX_LIMIT = 2**31 - 2**24


def export_onnx(target: Any, path: str | os.PathLike, *, sample: dict[str, int] | None = None) -> Path:
    """The denoiser as ONNX, by torch's exporter; any plan, shapes fixed to the sample.

    Weights beyond 2 GiB are written beside the file, as `NAME.data`.

    Args:
        sample: shapes, as in `vislr.anatomy.sample_of`; default: the model's own.

    Raises:
        ModelError: onnx and onnxscript are missing, or the exporter fails. OutputError: it cannot be written.
    """
    import importlib.util

    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"ONNX export needs {' and '.join(missing)}: pip install onnx onnxscript")
    import torch

    from vislr.anatomy import sample_inputs

    path, module = Path(path), _checked(target, "ONNX")[1]
    inputs = sample_inputs(module, sample, device=next(module.parameters()).device) | {"return_dict": False}
    try:
        with torch.no_grad():
            program = torch.onnx.export(module, (), kwargs=inputs, dynamo=True, verbose=False)
    except Exception as error:
        # The exporter raises dozens of types; all mean that it cannot express the model.
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"torch cannot export this {type(module).__name__} to ONNX: {reason}") from error
    assert program is not None
    apart = sum(p.numel() * p.element_size() for p in module.parameters()) > _ONNX_LIMIT
    # The file names its weights' file, so both are written under their own names and moved together.
    with atomic_path(path.with_name(f"{path.name}.parts")) as parts:
        parts.mkdir()
        program.save(str(parts / path.name), external_data=apart)
        for file in sorted(parts.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))
    path.with_name(f"{path.name}.parts").rmdir()
    return path


def _checked(target: Any, what: str) -> tuple[str, Any]:
    """Component and denoiser of a target that holds nothing but structure."""
    from vislr.adapters import inject

    component, module = component_of(target)
    left = [name for name in inject.adapter_names(module) if name not in inject.merged_adapters(module)]
    if left:
        raise FormatError(f"{what} holds no adapters; fuse '{left[0]}' (pipe.fuse_lora()) or remove it first")
    if inject.adapter_names(module):
        with contextlib.suppress(AttributeError):
            target.unload_lora_weights()
        if inject.adapter_names(module):
            raise FormatError(f"{what} holds no adapters; unload the fused '{inject.adapter_names(module)[0]}' first")
    for entry in entries_of(target):
        if entry.is_plan and not entry.structural:
            raise FormatError(f"{what} holds no run-time plan; remove '{entry.report.name}' first")
        if entry.structural and entry.report.kind != "layers":
            raise FormatError(f"{what} cannot express '{entry.report.name}' of kind '{entry.report.kind}'")
        if entry.structural and entry.report.component not in ("", component):
            raise FormatError(f"{what} cannot express the plan on '{entry.report.component}'")
    return component, module
