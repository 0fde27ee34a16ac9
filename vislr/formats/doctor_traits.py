"""The traits of an adapter file that `doctor_rules` asks for, and the verdicts that follow from them."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vislr.formats import naming, suffixes
from vislr.formats.canonical import COMPONENTS, CanonicalAdapter, split_name
from vislr.formats.doctor_rules import RULES, TOOLS, VERDICTS
from vislr.formats.manifest import DIFFUSERS_METADATA

OURS = ("convlora", "flora", "sara", "qalora")
_UNETS = ("sd15", "sd2", "sdxl")
_TEXT_ATTENTION = re.compile(r"(lora_te\d?)_.*self_attn_([qkv]|out)_proj$")


@dataclass(frozen=True)
class Verdict:
    """What one tool does.

    Attributes:
        tool: a key of `TOOLS`.
        verdict: one of `VERDICTS`, the worst that fired; "loads" if none did.
        says: one line for each rule that fired.
        fix: a command, or "".
    """

    tool: str
    verdict: str
    says: tuple[str, ...] = ()
    fix: str = ""


def traits_of(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], adapter: CanonicalAdapter
) -> Counter[str]:
    """The file's traits, each with how many layers or tensors have it; those of values are `examine`'s."""
    traits: Counter[str] = Counter()
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        cut = suffixes.cut(key)
        if cut is not None:
            modules.setdefault(cut[0], {})[cut[1]] = tensor
        traits["alpha tensors"] += key.endswith(".alpha")
        if key.startswith(naming.COMFY):
            traits["A/B"] += ".lora_A" in key or ".lora_B" in key
            traits["model prefix"] += key.startswith("model.")
        traits["unsupported"] += cut is None and bool(suffixes.unsupported(key))
    for name in modules:
        traits[_spelling(name, adapter.format)] += 1
        traits["add_embedding"] += name.startswith("lora_unet_add_embedding_")
        traits["text mlp"] += naming.is_flat(name) and name.endswith(("_mlp_fc1", "_mlp_fc2"))
    _text_traits(traits, list(modules))
    _entry_traits(traits, adapter, DIFFUSERS_METADATA in metadata)
    traits["unplaced"] = len(adapter.unplaced)
    traits["fused, alpha kept"] = sum(_alpha_kept(parts, metadata) for n, parts in modules.items() if _fused(n))
    traits["wrong base version"] = _hidden(adapter.family, metadata)
    return +traits


def _spelling(name: str, form: str) -> str:
    if form == "vislr":
        return "vislr"
    if naming.is_flat(name):
        return "kohya"
    if name.startswith(naming.PEFT):
        return "peft"
    if name.startswith((*naming.COMFY, "text_encoders.")):
        return "comfy"
    return "diffusers" if name.partition(".")[0] in COMPONENTS else "bare"


def _text_traits(traits: Counter[str], names: list[str]) -> None:
    parts: dict[str, Counter[str]] = {}
    for name in names:
        match = _TEXT_ATTENTION.match(name)
        if match:
            parts.setdefault(match[1], Counter())["out" if match[2] == "out" else "qkv"] += 1
    if parts and not any(count["out"] for count in parts.values()):
        traits["text q/k/v without out"] = sum(count["qkv"] for count in parts.values())


def _entry_traits(traits: Counter[str], adapter: CanonicalAdapter, header: bool) -> None:
    traits["header"] = int(header)
    family = adapter.family
    for name, entry in adapter.entries.items():
        t = entry.tensors
        component = split_name(name)[0]
        if component == "unet" and family in _UNETS:
            traits["unet"] += 1
        elif component == "transformer" and family in ("sd3", "flux", "pixart"):
            traits[family] += 1
        elif not component.startswith("text_encoder"):
            traits["other family"] += 1
        if entry.kind in ("loha", "lokr", "oft", "diff", "norm", "adabn"):
            # A bias alone is of kind diff without a matrix.
            traits[entry.kind] += entry.kind != "diff" or "diff" in t
        traits["ours"] += entry.kind in OURS
        traits["bias"] += "diff_b" in t
        if "lora_mid.weight" in t:
            traits["tucker"] += 1
            traits["tucker not square"] += t["lora_mid.weight"].shape[0] != t["lora_mid.weight"].shape[1]
        if entry.dora:
            traits["dora by output" if entry.dora == "out" else "dora by input"] += 1
        traits["alpha 0"] += entry.alpha == 0 and entry.rank is not None
        traits["scale in header"] += header and entry.rank is not None and abs(entry.scale - 1) > 1e-6


def _fused(name: str) -> bool:
    return naming.is_flat(name) and name.endswith(("_qkv", "_linear1"))


def _alpha_kept(parts: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether a fused layer has 3 or 4 times the rank that the header states, and the header's alpha as it was."""
    try:
        dim, alpha = int(metadata["ss_network_dim"]), float(metadata["ss_network_alpha"])
        rank, own = parts["lora_down.weight"].shape[0], float(parts["alpha"])
    except (KeyError, ValueError, RuntimeError, IndexError):
        return False
    return rank in (3 * dim, 4 * dim) and math.isclose(own, alpha, rel_tol=1e-3)


def _hidden(family: str, metadata: Mapping[str, str]) -> int:
    """A1111 sorts by the header: SDXL by the version's name, SD2 by ss_v2."""
    version = metadata.get("ss_base_model_version")
    if not version or family not in _UNETS:
        return 0
    claimed = "sdxl" if version.startswith("sdxl_") else "sd2" if metadata.get("ss_v2") == "True" else "sd15"
    return int(claimed != family)


def verdicts(traits: Mapping[str, int], file: str, base: str = "BASE") -> list[Verdict]:
    """What each tool does with a file of these traits; `file` and `base` stand in the commands."""
    has = {trait for trait, count in traits.items() if count}
    stem = file.rstrip("/").removesuffix(".safetensors")
    found = []
    for tool in TOOLS:
        fired = [r for r in RULES if r.tool == tool and has.issuperset(r.needs) and has.isdisjoint(r.unless)]
        fired.sort(key=lambda rule: -VERDICTS.index(rule.verdict))
        says = tuple(rule.says.format(n=traits[rule.needs[0]]) for rule in fired)
        # Of several commands the most particular one does what the others do, too.
        fix = max((rule.fix for rule in fired), key=len, default="")
        words = {"file": shlex.quote(file), "out": shlex.quote(f"{stem}-{tool}.safetensors"), "base": shlex.quote(base)}
        found.append(Verdict(tool, fired[0].verdict if fired else "loads", says, fix.format(**words)))
    return found
