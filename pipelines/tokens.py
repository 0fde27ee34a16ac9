"""`vislr tokens`: a plan of token pruning for a budget, what it saves, and what was kept.

vislr tokens --model sdxl --flops-saved 0.388
vislr tokens --config tokens/emoji-unet.yaml --prompts "a cat face" --measure
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vislr.core.arguments import dump_config, parse_config
from vislr.core.cli_guard import run
from vislr.core.errors import ConfigError
from vislr.core.files import atomic_path, check_output, write_json, write_text


@dataclass
class TokensConfig:
    """What to prune, and how far."""

    model: str = "emoji-unet"
    """With prompts or measure: an embedded pipeline, a diffusers folder or a hub id. Else the structure is enough: also
    a public architecture (sdxl, sd15, flux-dev, ...) or timm:NAME."""
    method: Literal["at-edm", "tome", "random", "stride"] = "at-edm"
    """at-edm ranks by attention; tome merges similar tokens in every block; random and stride are for comparison."""
    flops_saved: float | None = None
    """Share of the FLOPs to save on average over a run. Give one of flops_saved, speedup and keep."""
    speedup: float | None = None
    """The same as a ratio, dense FLOPs over pruned FLOPs."""
    keep: float | None = None
    """Share of the tokens that stay."""
    early: float | None = None
    """Share of the steps that prune less (the first ones). null: 0.3 for at-edm, random and stride, 0 for tome."""
    steps: int = 25
    """Denoising steps of a run."""
    mid: bool = True
    """Prune the middle block of a UNet too."""
    inside_first: bool = False
    """Tokens leave already inside of the first block (UNet, PixArt); saves more."""
    prune_after: list[int] | None = None
    """Blocks of each transformer (from 0) after which tokens leave; null: the first."""
    iterations: int = 1
    """Iterations of the page rank; 1 is the fast path."""
    ranking: Literal["self", "cross"] = "self"
    """Rank by self-attention, or by attention to the text."""
    recovery: Literal["copy", "update", "zeros", "interpolate", "cached"] | None = None
    """What pruned tokens get; null: copy on UNets, update on diffusion transformers."""
    similarity: Literal["attention", "symmetric"] = "attention"
    """How the most similar kept token is found."""
    masks: Literal["separate", "shared"] = "separate"
    """Whether the unconditional and the conditional half choose for themselves."""
    seed: int = 0
    """Of random choices and of tome's cells."""
    sample: dict[str, int] = field(default_factory=dict)
    """Shapes that FLOPs are counted at: height and width in latent units, tokens, batch. Left out: the model's own."""
    measure: bool = False
    """Time the model without and with the plan."""
    prompts: list[str] = field(default_factory=list)
    """Pictures to make without and with the plan; none: no pictures."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of the pictures."""
    guidance: float = 4.0
    """Classifier-free guidance scale of the pictures."""
    device: str | None = None
    """cpu, cuda, mps; null: a GPU if there is one."""
    out: str = "runs/tokens"
    """Folder for plan.json, report.txt, and with prompts before_after.png and kept.png."""

    def __post_init__(self) -> None:
        given = [name for name in ("flops_saved", "speedup", "keep") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"{' and '.join(given) or 'no budget'} given; expected one of flops_saved, speedup, keep")
        if self.prompts and not self.seeds:
            raise ConfigError("prompts without seeds; give at least one seed")
        others = self.inside_first or self.prune_after or self.recovery or self.ranking == "cross"
        if self.method == "tome" and others:
            raise ConfigError("tome knows no inside_first, prune_after, recovery and ranking; leave them out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vislr tokens` with these arguments; returns the exit code."""
    config = parse_config(
        TokensConfig,
        argv,
        prog="vislr tokens",
        description="Prune tokens: a plan for a budget, what it saves and keeps.",
    )
    folder = check_output(config.out)
    from vislr import record, tokens

    target = _target(config)
    plan = plan_of(config, target)
    report = record.apply(target, plan, name="tokens", measure=config.measure)
    print(report)
    if config.prompts:
        _pictures(config, target, folder, tokens)
    write_json(folder / "plan.json", plan.to_dict())
    write_text(folder / "report.txt", f"{report}\n")
    dump_config(config, folder / "config.yaml")
    print(f"plan -> {folder / 'plan.json'}")
    return 0


def _target(config: TokensConfig) -> Any:
    """The pipeline with its weights where they are needed, else the structure alone."""
    from vislr import anatomy, folders, zoo

    if not config.prompts and not config.measure:
        embedded = {name: zoo.pipeline_folder(name) for name in zoo.pipeline_names()}
        return anatomy.skeleton(config.model, embedded)
    import torch

    pipe = folders.load(config.model)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from error
    return pipe


def plan_of(config: TokensConfig, target: Any) -> Any:
    """The TokenPlan that the config asks for, for a pipeline or a model without weights."""
    from vislr.tokens import at_edm_plan, tome_plan

    common: dict[str, Any] = {
        "flops_saved": config.flops_saved, "speedup": config.speedup, "keep": config.keep, "steps": config.steps,
        "mid": config.mid, "seed": config.seed, "sample": config.sample or None,
    }  # fmt: skip
    if config.method == "tome":
        return tome_plan(target, early=config.early or 0.0, **common)
    return at_edm_plan(
        target, criterion="g-wpr" if config.method == "at-edm" else config.method, early=config.early,
        inside_first=config.inside_first, prune_after=config.prune_after, iterations=config.iterations,
        ranking=config.ranking, recovery=config.recovery, similarity=config.similarity, guidance=config.masks, **common,
    )  # fmt: skip


def _pictures(config: TokensConfig, pipe: Any, folder: Any, tokens: Any) -> None:
    """before_after.png: the same prompts and seeds without and with the plan; kept.png: what the last one kept."""
    from vislr.anatomy import denoiser_of
    from vislr.data import make_grid
    from vislr.tokens.handler import held_in
    from vislr.train import sample_images
    from vislr.train.prompts import check_prompts

    check_prompts(pipe, [("prompts", prompt) for prompt in config.prompts])
    pairs = [(prompt, seed) for seed in config.seeds for prompt in config.prompts]
    options: dict[str, Any] = {"steps": config.steps, "guidance": config.guidance, "batch": 1}

    def draw() -> list[Any]:
        return sample_images(pipe, [prompt for prompt, _ in pairs], [seed for _, seed in pairs], **options)

    model = denoiser_of(pipe)[1]
    with held_in(model, None):
        before = draw()
    with tokens.watching(model) as seen:
        after = draw()
    labels = [prompt if len(config.seeds) == 1 else f"{prompt}, seed {seed}" for prompt, seed in pairs]
    grid = make_grid([before, after], row_labels=["whole", "pruned"], column_labels=labels)
    with atomic_path(folder / "before_after.png") as temporary:
        grid.save(temporary, format="png")
    # One picture at a time: under guidance the conditional sample comes second.
    last = seen[len(seen) - len(seen) // len(pairs) :]
    picture = tokens.kept_picture(after[-1], last, sample=len(last[-1].keep) - 1)
    with atomic_path(folder / "kept.png") as temporary:
        picture.save(temporary, format="png")


if __name__ == "__main__":
    sys.exit(run(main))
