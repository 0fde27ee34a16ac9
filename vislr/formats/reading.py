"""Read an adapter file: find its format, check everything that can be checked without a model."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from vislr.adapters.inject import exactly
from vislr.core.errors import FormatError, VislrError, hint
from vislr.formats.adapter_file import AdapterFile
from vislr.formats.container import check_finite, read_header, read_tensors, shown
from vislr.formats.kinds import SUFFIXES
from vislr.formats.manifest import AUX, CANONICAL_SCHEMA, DIFFUSERS_METADATA, MANIFEST, read_manifest

NO_NOTES: tuple[str, ...] = ()
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
INTEGERS = (".sara_index", ".sara_shape", ".sara_kept", ".adabn_count")
_DIFFUSERS = {".lora_A.weight": "lora_down.weight", ".lora_B.weight": "lora_up.weight", ".alpha": "alpha"}


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Read a file of format `vislr` or `diffusers`.

    Raises:
        FormatError: no file, not safetensors, truncated, an unknown schema or format, a tensor that no
            kind has or that is not finite, or a config that does not fit; names the key.
    """
    path = Path(path)
    opened = read_header(path)
    tensors, header = read_tensors(path, opened), opened.metadata
    if not tensors:
        raise FormatError(f"'{path}' holds no tensors")
    for key, tensor in tensors.items():
        whole = key.endswith(INTEGERS) or key.startswith(AUX)
        if not tensor.is_floating_point() and not whole:
            raise FormatError(f"'{path}': '{shown(key)}' is {tensor.dtype}, expected floating point")
    check_finite(tensors, path)
    manifest = read_manifest(header[MANIFEST], path) if MANIFEST in header else None
    if manifest is not None and manifest["schema"] == CANONICAL_SCHEMA:
        raise FormatError(f"'{path}' holds an adapter in canonical form; `read_canonical` reads it")
    if manifest is not None and manifest["format"] == "vislr":
        return _read_vislr(path, tensors, manifest)
    if (manifest is not None and manifest["format"] == "diffusers") or any(
        key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors
    ):
        return _read_diffusers(path, tensors, header, manifest)
    if manifest is not None:
        raise FormatError(f"'{path}' is of format '{manifest['format']}'; this vislr reads 'vislr' and 'diffusers'")
    raise FormatError(
        f"'{path}' has no {MANIFEST} and no lora_A/lora_B keys (first key '{min(tensors)}'); "
        "known formats are 'vislr' and 'diffusers'"
    )


def _read_vislr(path: Path, tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> AdapterFile:
    kind, sites = manifest["kind"], manifest["sites"]
    if kind not in SUFFIXES:
        raise FormatError(f"'{path}' holds a '{kind}' adapter, which this vislr does not know{hint(kind, SUFFIXES)}")
    found: dict[str, dict[str, torch.Tensor]] = {}
    aux = {key.removeprefix(AUX): tensor for key, tensor in tensors.items() if key.startswith(AUX)}
    for key, tensor in tensors.items():
        if key.startswith(AUX):
            continue
        known = (*SUFFIXES[kind], *SUFFIXES["adabn"])
        suffix = next((s for s in known if key.endswith("." + s)), None)
        site = key.removesuffix(f".{suffix}")
        if suffix is None or site not in sites or suffix not in SUFFIXES.get(sites[site], known):
            raise FormatError(f"'{path}': tensor '{key}' belongs to no layer of this {kind} adapter{hint(key, sites)}")
        found.setdefault(site, {})[suffix] = tensor
    for site, other in sites.items():
        if other not in (kind, "adabn"):
            raise FormatError(f"'{path}': '{site}' is of kind {other!r} in a '{kind}' file")
        if site not in found:
            raise FormatError(f"'{path}' lacks the tensors of '{site}'")
    config = _config(manifest["config"], kind, [site for site, other in sites.items() if other == kind], path)
    norms = [site for site, other in sites.items() if other == "adabn"] if kind != "adabn" else []
    if bool(norms) != ("statistics" in manifest):
        raise FormatError(f"'{path}': its manifest and its layers disagree about BatchNorm statistics")
    if not norms:
        return AdapterFile(kind, config, found, manifest, "vislr", aux=aux)
    statistics = _config(manifest["statistics"], "adabn", norms, path)
    return AdapterFile(kind, config, found, manifest, "vislr", statistics=statistics, aux=aux)


def _config(values: dict[str, Any], kind: str, sites: list[str], path: Path) -> Any:
    """The config in a manifest as an object that goes on exactly `sites`."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    given = values.get("peft_type") if isinstance(values, dict) else values
    if str(given).lower() != kind:
        raise FormatError(f"'{path}': its config is of {given!r}, its tensors of '{kind}'")
    cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind.upper()]  # type: ignore[index]
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in values:
        if key not in known:
            raise FormatError(f"'{path}': unknown config key '{key}' of {cls.__name__}{hint(key, known)}")
    try:
        config = cls(**values)
    except (TypeError, ValueError, VislrError) as error:
        raise FormatError(f"'{path}': its config is impossible: {' '.join(str(error).split())}") from error
    config.inference_mode = False
    config.exclude_modules = None
    if hasattr(config, "sites"):
        config.sites = sites
        return config
    config.target_modules = exactly(sites)
    for field in ("layers_to_transform", "layers_pattern"):
        if hasattr(config, field):
            setattr(config, field, None)
    return config


def _read_diffusers(
    path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str], manifest: dict[str, Any] | None
) -> AdapterFile:
    found: dict[str, dict[str, torch.Tensor]] = {}
    components = set()
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        suffix = next((s for s in _DIFFUSERS if rest.endswith(s)), None)
        if component not in _COMPONENTS or suffix is None:
            raise FormatError(
                f"'{path}': tensor '{key}' is not '<component>.<layer>.lora_A.weight', '.lora_B.weight' or '.alpha'"
            )
        components.add(component)
        found.setdefault(rest.removesuffix(suffix), {})[_DIFFUSERS[suffix]] = tensor
    if len(components) > 1:
        raise FormatError(f"'{path}' holds adapters of {', '.join(sorted(components))}; expected one component")
    component = components.pop()
    for site, parts in found.items():
        down, up = parts.get("lora_down.weight"), parts.get("lora_up.weight")
        if down is None or up is None:
            missing = "lora_A" if down is None else "lora_B"
            raise FormatError(f"'{path}' lacks '{component}.{site}.{missing}.weight'")
        if down.dim() < 2 or up.dim() < 2 or up.shape[1] != down.shape[0]:
            raise FormatError(f"'{path}': ranks of '{site}' disagree: {tuple(down.shape)} and {tuple(up.shape)}")
        if "alpha" in parts and parts["alpha"].numel() != 1:
            raise FormatError(f"'{path}': alpha of '{site}' has shape {tuple(parts['alpha'].shape)}, expected ()")
    if DIFFUSERS_METADATA in header:
        config, notes = _metadata_config(header[DIFFUSERS_METADATA], component, list(found), path), NO_NOTES
        if any("alpha" in parts for parts in found.values()):
            raise FormatError(f"'{path}' has both {DIFFUSERS_METADATA} and .alpha tensors")
    else:
        config, notes = _shape_config(found)
    for site, parts in found.items():
        if "alpha" not in parts:
            parts["alpha"] = torch.tensor(_alpha_of(config, site, parts["lora_down.weight"].shape[0], path))
        parts["alpha"] = parts["alpha"].reshape(()).to(torch.float32)
    manifest = manifest or {
        "format": "diffusers", "kind": "lora", "component": component, "family": "", "architecture": "",
        "sites": dict.fromkeys(found, "lora"), "base": {},
    }  # fmt: skip
    if set(manifest["sites"]) != set(found):
        odd = sorted(set(manifest["sites"]) ^ set(found))
        raise FormatError(f"'{path}': its manifest and its tensors disagree about '{odd[0]}'")
    return AdapterFile("lora", config, found, manifest, "diffusers", notes)


def _metadata_config(text: str, component: str, sites: list[str], path: Path) -> Any:
    try:
        packed = json.loads(text)
        values = {
            key.removeprefix(f"{component}."): value for key, value in packed.items() if key.startswith(f"{component}.")
        }
    except (ValueError, AttributeError) as error:
        raise FormatError(f"'{path}': its {DIFFUSERS_METADATA} is no JSON object: {error}") from error
    if not values:
        raise FormatError(f"'{path}': its {DIFFUSERS_METADATA} says nothing of '{component}'")
    return _config({"peft_type": "LORA", **values}, "lora", sites, path)


def _shape_config(found: dict[str, dict[str, torch.Tensor]]) -> tuple[Any, tuple[str, ...]]:
    """A LoraConfig from shapes and alphas alone; a missing alpha means scale 1, as in diffusers."""
    from peft import LoraConfig

    ranks = {site: parts["lora_down.weight"].shape[0] for site, parts in found.items()}
    alphas = {site: float(parts.get("alpha", torch.tensor(ranks[site]))) for site, parts in found.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config: Any = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=exactly(list(found)),
        rank_pattern={_only(site): rank for site, rank in ranks.items() if rank != r},
        alpha_pattern={_only(site): value for site, value in alphas.items() if value != alpha},
    )
    bare = sum("alpha" not in parts for parts in found.values())
    return config, (f"no alpha in the file for {bare} layers: scale 1",) if bare else ()


def _only(site: str) -> str:
    """A key of rank_pattern that matches this one layer: peft also lets patterns match endings."""
    return "^" + re.escape(site)


def _alpha_of(config: Any, site: str, r: int, path: Path) -> float:
    """The alpha that means the same with alpha / r, for `site` of a LoraConfig."""
    from peft.utils.other import get_pattern_key

    try:
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), site), config.lora_alpha)
        return float(alpha * r**0.5 if config.use_rslora else alpha)
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise FormatError(f"'{path}': lora_alpha or alpha_pattern of its config is impossible: {error}") from error
