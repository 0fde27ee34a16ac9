"""What goes with what: which ordered pairs of changes are refused, and why. Data alone; `docs/together.md` renders it.

Every pair that no rule names works: both on in this order, off in the reverse order bit for bit, saved and
loaded in a new process with the same output. `python tests/support/pairs.py` writes the page's tables anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

KINDS = {
    "lora": "LoRA",
    "convlora": "ConvLoRA",
    "flora": "FLoRA",
    "sara": "SaRA",
    "adabn": "AdaBN",
    "layers": "LayerPlan",
    "quant": "QuantPlan",
    "tokens": "TokenPlan",
    "cache": "CachePlan",
    "compose": "ComposePlan",
}
FAMILIES = {
    "unet": "Stable Diffusion UNet",
    "sd3": "SD3",
    "flux": "FLUX",
    "vit": "ViT classifier",
    "conv": "conv net",
}
ADAPTERS = ("lora", "convlora", "flora", "sara")
CLASSIFIERS = ("vit", "conv")
MARKS = ("begin: written by tests/support/pairs.py", "end")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "together.md"


@dataclass(frozen=True)
class Alone:
    """A kind that a family cannot carry at all.

    Attributes:
        kind: of change.
        families: that refuse it.
        error: class of the error.
        match: of its text.
        reason: for the page.
    """

    kind: str
    families: tuple[str, ...]
    error: str
    match: str
    reason: str


@dataclass(frozen=True)
class Rule:
    """A pair that is refused, or in which the second change waits.

    Attributes:
        first, second: kinds, in the order of application.
        mark: in the table.
        reason: for the page.
        error: class of the error; "": nothing is refused, but the second changes nothing yet.
        match: of its text.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    mark: str
    reason: str
    error: str = ""
    match: str = ""


ALONE = (
    Alone(
        "adabn", ("unet", "sd3", "flux", "vit"), "AdapterError", "no BatchNorm with running statistics",
        "AdaBN gives BatchNorms other statistics; GroupNorm, LayerNorm and RMSNorm keep none",
    ),
    Alone(
        "tokens", ("conv",), "ModelError", "no tokens to prune",
        "a conv net has no tokens",
    ),
    Alone(
        "cache", CLASSIFIERS, "ModelError", "no denoising steps",
        "a cache uses features of earlier denoising steps; a classifier has one step",
    ),
    Alone(
        "compose", CLASSIFIERS, "ModelError", "no denoiser",
        "composition mixes adapters over the denoising steps of a picture",
    ),
)  # fmt: skip

RULES = (
    Rule(
        ("tokens",), ("tokens",), "1",
        "one token plan at a time: two would choose among tokens that the other has taken away",
        "ConfigError", "already; remove it first",
    ),
    Rule(
        ("cache",), ("cache",), "2",
        "one cache plan at a time; one plan may hold several regions",
        "ConfigError", "already; remove it first",
    ),
    Rule(
        ("compose",), ("compose",), "3",
        "one composition at a time; one plan names any number of adapters",
        "ConfigError", "already; remove it first",
    ),
    Rule(
        ("sara",), ("quant",), "4",
        "SaRA's change is in entries of the weight itself, in whose place integers go: fuse it (`vislr.fuse`), then "
        "quantise",
        "ModelError", "an adapter is in the weight of",
    ),
    Rule(
        ("quant",), ("sara",), "5",
        "SaRA trains entries of a weight, and a quantised layer has none; LoRA, ConvLoRA, FLoRA and QALoRA go on it",
        "AdapterError", "cannot adapt",
    ),
    Rule(
        ("compose",), ADAPTERS, "*",
        "it goes on, and is off while the composition is on that does not name it",
    ),
)  # fmt: skip


def carries(family: str, kind: str) -> Alone | None:
    """Why the family cannot carry this kind; None: it can."""
    return next((alone for alone in ALONE if alone.kind == kind and family in alone.families), None)


def rule_for(first: str, second: str) -> Rule | None:
    """The rule of a pair of kinds that a family can carry; None: it works."""
    return next((rule for rule in RULES if first in rule.first and second in rule.second), None)


def _table(families: tuple[str, ...]) -> list[str]:
    kinds = [kind for kind in KINDS if any(carries(family, kind) is None for family in families)]
    lines = ["| first, then | " + " | ".join(KINDS[kind] for kind in kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for first in kinds:
        cells = []
        for second in kinds:
            both = any(carries(one, first) is None and carries(one, second) is None for one in families)
            rule = rule_for(first, second)
            cells.append("-" if not both else "yes" if rule is None else f"[{rule.mark}]")
        lines.append(f"| **{KINDS[first]}** | " + " | ".join(cells) + " |")
    return lines


def render() -> str:
    """The tables and their reasons, as Markdown."""
    reasons: dict[str, str] = {}
    for rule in RULES:
        reasons.setdefault(rule.mark, rule.reason)
    lines = ["## Pipelines: Stable Diffusion UNet, SD3, FLUX", "", *_table(("unet", "sd3", "flux")), ""]
    lines += ["## Classifiers: ViT, conv net", "", *_table(CLASSIFIERS), "", "## Reasons", ""]
    lines += [f"- [{mark}] {reason}." for mark, reason in reasons.items()]
    lines += ["", "What a model cannot carry at all:", ""]
    for alone in ALONE:
        where = ", ".join(FAMILIES[family] for family in alone.families)
        lines.append(f"- {KINDS[alone.kind]} on {where} (`{alone.error}`): {alone.reason}.")
    return "\n".join(lines)


def split(text: str) -> tuple[str, str, str]:
    """A page before, between and behind the marks."""
    begin, end = (f"<!-- {mark} -->\n" for mark in MARKS)
    head, _, rest = text.partition(begin)
    inside, _, tail = rest.partition(end)
    return head + begin, inside, end + tail


if __name__ == "__main__":
    head, _, tail = split(PAGE.read_text())
    PAGE.write_text(f"{head}\n{render()}\n\n{tail}")
