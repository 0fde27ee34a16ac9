"""Pipelines for tools without vislr: plain diffusers folders, single files, ONNX."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from vislr.core.errors import FormatError, ModelError, OutputError
from vislr.core.files import atomic_path, write_tensors
from vislr.prune.plain import as_stock, stock_model
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
        FormatError: the layout cannot express the plan or the class. OutputError: it cannot be written.
    """
    from vislr.formats.single_file import original_state

    name, config, state = as_stock(_checked(target, "a single file")[1])
    write_tensors(path, original_state(name, config, state))
    return Path(path)


def export_onnx(target: Any, path: str | os.PathLike, *, sample: dict[str, int] | None = None) -> Path:
    """The denoiser as ONNX, by torch's exporter; any plan, shapes fixed to the sample.

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

    module = _checked(target, "ONNX")[1]
    inputs = sample_inputs(module, sample, device=next(module.parameters()).device) | {"return_dict": False}
    try:
        with torch.no_grad():
            program = torch.onnx.export(module, (), kwargs=inputs, dynamo=True, verbose=False)
    except Exception as error:
        # The exporter raises dozens of types; all mean that it cannot express the model.
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"torch cannot export this {type(module).__name__} to ONNX: {reason}") from error
    assert program is not None
    with atomic_path(path) as temporary:
        program.save(str(temporary), external_data=False)
    return Path(path)


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
