"""Ready-made plans: AT-EDM, ToMe, and the choices to compare them with, for a budget or a share of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vislr.anatomy import denoiser_of
from vislr.core.errors import ConfigError, hint
from vislr.tokens.layout import Layout, Run, beside_caches, token_layout
from vislr.tokens.plan import CRITERIA, Cut, Span, TokenPlan
from vislr.tokens.solving import LEAST, Counter, early_boundary, solve

# Early steps of AT-EDM: 15 of 50.
EARLY = 0.3


def at_edm_plan(
    target: Any,
    *,
    flops_saved: float | None = None,
    speedup: float | None = None,
    keep: float | None = None,
    early: float | None = None,
    steps: int = 50,
    prune_after: Sequence[int] | None = None,
    inside_first: bool = False,
    mid: bool = True,
    ends: int | None = None,
    criterion: str = "g-wpr",
    recovery: str | None = None,
    iterations: int = 1,
    ranking: str = "self",
    similarity: str = "attention",
    guidance: str = "separate",
    seed: int = 0,
    sample: dict[str, int] | None = None,
) -> TokenPlan:
    """AT-EDM (arXiv 2405.05252): tokens that little attention goes to leave, and come back as copies.

    In a UNet they leave after the first block of every transformer and come back at its end; a transformer of
    one block (SD 1 and 2) is pruned inside of it: cross-attention and feed-forward see few tokens. In the
    early steps the first transformer of each down stage and the last of each up stage stay whole. In a
    diffusion transformer they leave after the first block and come back after the last, in the early steps
    between the first and last `ends` blocks. In a ViT classifier they leave after a quarter, half and three
    quarters of the blocks (a share of `keep` of what is left, each time) and do not come back. Under a
    cache plan that is on, the blocks of a diffusion transformer are the most in a row that cached steps leave out, or
    run, together.

    Exactly one of `flops_saved`, `speedup` and `keep` is given.

    Args:
        target: a pipeline, or a backbone.
        flops_saved: share of the FLOPs to save on average over a run, ranking and recovery counted; met
            within 1 % of the FLOPs that remain.
        speedup: the same as a ratio of FLOPs, dense over pruned. Measured time is another figure.
        keep: share of the tokens that stay.
        early: share of the steps that are early; default .3; 0 without a schedule. Classifiers: none.
        steps: of a run, for the place of the early steps in the scheduler's timesteps.
        prune_after: blocks of each run (numbers from 0) after which tokens leave, each time to the share of `keep` of
            what is left; default as above. Blocks are taken as given, also under a cache.
        inside_first: tokens leave already inside of the first of these blocks (UNet, PixArt, DiT).
        mid: prune the middle block of a UNet too.
        ends: blocks at both ends of a diffusion transformer that stay whole in early steps; default an
            eighth of its blocks.
        criterion: "g-wpr"; "random" and "stride" leave all else as it is, to compare with.
        recovery: default "copy", in diffusion transformers "update"; others are for comparison.
        iterations, ranking, similarity, guidance, seed: as in `TokenPlan`.
        sample: shapes to count at, as in `vislr.anatomy.sample_of`; default: the model's own. The plan
            itself fits every size.

    Raises:
        ConfigError: none or several budgets, one that cannot be reached (names the reachable maximum).
        ModelError: the model has no tokens to prune.
    """
    if criterion not in CRITERIA or criterion == "tome":
        raise ConfigError(f"criterion '{criterion}' ranks no attention{hint(criterion, set(CRITERIA) - {'tome'})}")
    model = denoiser_of(target)[1]
    layout = token_layout(model)
    if prune_after is None:
        layout = beside_caches(model, layout)
    places = _places(layout, prune_after)
    if inside_first and not layout.parts:
        raise ConfigError(f"the blocks of a {layout.family} cannot be pruned inside; leave inside_first out")
    parts = tuple(part for part in layout.parts if part != "attn1" and (part, ranking) != ("attn2", "cross"))
    early = (EARLY if layout.recovers else 0.0) if early is None else early
    boundary, share = early_boundary(target, early, steps)
    if boundary is not None and not layout.recovers:
        raise ConfigError("a classifier has no early steps; leave 'early' out")
    default = "copy" if layout.family in ("unet", "vit") else "update"
    whole = _whole_early(layout)

    def spans(run: Run, keep: float, margin: int) -> list[Span]:
        last = run.blocks[len(run.blocks) - 1 - margin] if margin < len(run.blocks) else None
        after = [i for i in places[run] if i < len(run.blocks) - 1 - margin and i >= margin - 1]
        if margin and not after and margin - 1 < len(run.blocks) - 1 - margin:
            after = [margin - 1]
        if not after and layout.parts and not margin:
            # One block, or tokens may only leave after the last: inside of it.
            block = run.blocks[-1]
            return [Span((Cut(block, keep),), block, parts)]
        if not after:
            return []
        cuts = tuple(Cut(run.blocks[i], keep ** (n + 1)) for n, i in enumerate(after))
        return [Span(cuts, last if layout.recovers else None, parts if inside_first else ())]

    def build(keep: float) -> TokenPlan:
        runs = [run for run in layout.runs if mid or run.stage != "mid_block"]
        late = tuple(span for run in runs for span in spans(run, keep, 0))
        first: tuple[Span, ...] = ()
        if boundary is not None and layout.family == "unet":
            first = tuple(span for run in runs if run not in whole for span in spans(run, keep, 0))
        elif boundary is not None:
            count = len(layout.runs[0].blocks)
            margin = max(1, round(count / 8)) if ends is None else ends
            first = tuple(spans(layout.runs[0], keep, margin))
        return TokenPlan(
            late=late, early=first, boundary=boundary, early_share=share, criterion=criterion,
            recovery=recovery or default, iterations=iterations, ranking=ranking, similarity=similarity,
            guidance=guidance, seed=seed, component=denoiser_of(target)[0],
        )  # fmt: skip

    return _for_budget(target, build, flops_saved, speedup, keep, sample, LEAST)


def tome_plan(
    target: Any,
    *,
    flops_saved: float | None = None,
    speedup: float | None = None,
    keep: float | None = None,
    early: float = 0.0,
    steps: int = 50,
    parts: Sequence[str] = ("attn1", "attn2", "ff"),
    mid: bool = True,
    seed: int = 0,
    sample: dict[str, int] | None = None,
) -> TokenPlan:
    """Token merging (ToMe for Stable Diffusion, arXiv 2303.17604): in every block, similar tokens are averaged.

    Tokens merge at the entry of each of `parts` of a block and come back as copies at its exit, at every
    level of a UNet (what merges only at the highest level, the usual default, does nothing on SDXL). One
    token of every 2 x 2 cell stays, so at most three quarters leave. Where blocks cannot be pruned inside (SD3,
    FLUX, ViT), they merge after the blocks where AT-EDM prunes, and come back with the update of what they merged into.

    Args:
        parts: of a block: "attn1" (self-attention), "attn2" (cross-attention), "ff". All three save most;
            ("attn1",) is what ToMe does by default.
        early: share of the steps in which, as in AT-EDM, the ends of a UNet's stages stay whole; UNets only.
        target, flops_saved, speedup, keep, steps, mid, seed, sample: as in `at_edm_plan`.

    Raises:
        ConfigError: as `at_edm_plan`, or unknown `parts`.
    """
    model = denoiser_of(target)[1]
    layout = token_layout(model)
    if not layout.parts:
        layout = beside_caches(model, layout)
    if early and layout.family != "unet":
        raise ConfigError(f"merging has early steps on UNets only; this is a {layout.family}, leave 'early' out")
    unknown = [part for part in parts if layout.parts and part not in layout.parts]
    if "attn2" in unknown and layout.family == "dit":
        # Its blocks have no cross-attention; the default means all that there are.
        parts, unknown = [part for part in parts if part != "attn2"], []
    if unknown or not parts:
        raise ConfigError(f"parts {list(parts)}; expected some of {', '.join(layout.parts)}")
    boundary, share = early_boundary(target, early, steps)
    whole = _whole_early(layout)

    places = _places(layout, None)

    def spans(keep: float, some: Sequence[Run]) -> tuple[Span, ...]:
        if not layout.parts:
            cuts = [(run, [Cut(run.blocks[i], keep ** (n + 1)) for n, i in enumerate(places[run])]) for run in some]
            return tuple(Span(tuple(own), run.blocks[-1] if layout.recovers else None) for run, own in cuts)
        blocks = [block for run in some for block in run.blocks]
        return tuple(Span((Cut(block, keep),), block, tuple(parts)) for block in blocks)

    def build(keep: float) -> TokenPlan:
        runs = [run for run in layout.runs if mid or run.stage != "mid_block"]
        return TokenPlan(
            late=spans(keep, runs),
            early=() if boundary is None else spans(keep, [run for run in runs if run not in whole]),
            boundary=boundary, early_share=share, criterion="tome",
            recovery="copy" if layout.parts or not layout.recovers else "update", seed=seed,
            component=denoiser_of(target)[0],
        )  # fmt: skip

    return _for_budget(target, build, flops_saved, speedup, keep, sample, 0.25)


def _for_budget(
    target: Any,
    build: Any,
    flops_saved: float | None,
    speedup: float | None,
    keep: float | None,
    sample: dict[str, int] | None,
    least: float,
) -> TokenPlan:
    given = {"flops_saved": flops_saved, "speedup": speedup, "keep": keep}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ConfigError(f"{' and '.join(chosen) or 'no budget'} given; expected one of flops_saved, speedup, keep")
    if keep is not None:
        if not 0 < keep <= 1:
            raise ConfigError(f"keep is {keep}; expected above 0 and at most 1")
        return build(keep)
    if flops_saved is not None and not 0 < flops_saved < 1:
        raise ConfigError(f"flops_saved is {flops_saved}; expected above 0 and below 1")
    if speedup is not None and speedup <= 1:
        raise ConfigError(f"speedup is {speedup}; expected above 1")
    counter = Counter(target, sample)
    share = 1 - flops_saved if flops_saved is not None else 1 / float(speedup or 1)
    return solve(counter, build, share * counter.dense, least)


def _whole_early(layout: Layout) -> set[Run]:
    """Runs that stay whole in early steps: the first of each down stage, the last of each up stage."""
    whole = set()
    for stage in dict.fromkeys(run.stage for run in layout.runs):
        own = [run for run in layout.runs if run.stage == stage]
        if stage.startswith("down"):
            whole.add(own[0])
        elif stage.startswith("up"):
            whole.add(own[-1])
    return whole


def _places(layout: Layout, prune_after: Sequence[int] | None) -> dict[Run, list[int]]:
    """For each run the blocks after which tokens leave."""
    found = {}
    for run in layout.runs:
        count = len(run.blocks)
        if prune_after is not None:
            wrong = [i for i in prune_after if i < 0 or (layout.family != "unet" and i >= count)]
            if wrong or not list(prune_after):
                raise ConfigError(f"prune_after {list(prune_after)}; expected numbers of blocks from 0 to {count - 1}")
            found[run] = sorted(set(prune_after))
        elif layout.recovers:
            found[run] = [0]
        else:
            found[run] = sorted({max(0, round(count * share) - 1) for share in (0.25, 0.5, 0.75)})
    return found
