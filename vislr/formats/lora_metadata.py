"""`lora_adapter_metadata`: the LoraConfigs that diffusers (0.34 and later) rebuilds adapters from.

JSON object: `<component>.<field of LoraConfig>` -> value, e.g. "unet.r", "unet.lora_alpha",
"unet.target_modules". It stands in place of `.alpha` tensors, never beside them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from vislr.core.errors import FormatError
from vislr.formats.canonical import Entry

# CLIP's modules have this prefix in transformers before 5.6 and not after; an ending matches both.
_CLIP_ROOT = "text_model."
_PLAIN = re.compile(r"[\w.-]+")


def alphas(text: str, located: list[Any], where: str) -> Iterator[tuple[Any, Any, float]]:
    """(place, (keys, parts), alpha of scale alpha / r) for every located LoRA layer of a described component.

    Raises:
        FormatError: not a JSON object, or values of other types.
    """
    configs = _configs(text, where)
    for group, place in located:
        values = configs.get(place.component)
        if values is None or "lora_down.weight" not in group[1]:
            continue
        rank = group[1]["lora_down.weight"].shape[0]
        try:
            pattern = values.get("alpha_pattern") or {}
            default = values.get("lora_alpha", 8)
            alpha = float(next((pattern[p] for p in pattern if _matches(p, place.paths[0])), default))
            alpha = alpha * rank**0.5 if values.get("use_rslora") else alpha
        except (re.error, AttributeError, TypeError, ValueError) as error:
            raise FormatError(
                f"'{where}': lora_alpha or alpha_pattern of its metadata is impossible: {error}"
            ) from error
        yield place, group, alpha


def _configs(text: str, where: str) -> dict[str, dict[str, Any]]:
    try:
        packed = json.loads(text)
        found: dict[str, dict[str, Any]] = {}
        for key, value in packed.items():
            component, _, field = key.partition(".")
            found.setdefault(component, {})[field] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"'{where}': its lora_adapter_metadata is no JSON object: {error}") from error
    return found


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern of peft names this module: a whole name ("^" before it) or its ending.

    Other regular expressions are refused: they come from a file, and one can be made to run for ever.
    """
    plain = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^"))
    if not _PLAIN.fullmatch(plain):
        raise ValueError(f"'{pattern[:80]}' is no module's name")
    return path == plain or (not pattern.startswith("^") and path.endswith(f".{plain}"))


def config_values(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Fields of a LoraConfig that makes exactly these layers: path -> LoRA entry, all with alpha or none.

    Ranks and alphas that differ from the commonest ones go to `rank_pattern` and `alpha_pattern`.
    """
    ranks = {path: int(entry.rank or 1) for path, entry in entries.items()}
    scaled = {path: _number(entry.scale * ranks[path]) for path, entry in entries.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(scaled.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted(path.removeprefix(_CLIP_ROOT) for path in entries),
        "rank_pattern": {_only(path): rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {_only(path): value for path, value in scaled.items() if value != alpha},
        "use_dora": any(entry.dora for entry in entries.values()),
        "lora_bias": False,
        "bias": "none",
        "use_rslora": False,
        "peft_type": "LORA",
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _number(value: float) -> float | int:
    return int(value) if math.isfinite(value) and value == int(value) else value


def _only(path: str) -> str:
    """A pattern that matches this one layer: peft also lets patterns match endings."""
    if path.startswith(_CLIP_ROOT):
        return re.escape(path.removeprefix(_CLIP_ROOT))
    return "^" + re.escape(path)


def packed(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Component -> values as the header's text."""
    flat = {f"{component}.{key}": value for component, values in configs.items() for key, value in values.items()}
    return json.dumps(flat, indent=2, sort_keys=True)
