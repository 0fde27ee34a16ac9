"""What must hold on every family of backbones."""

import dataclasses

import pytest
import torch

from vislr.anatomy import flops
from vislr.core.errors import ConfigError
from vislr.tokens import TokenPlan, at_edm_plan, tome_plan, watching
from vislr.tokens.handler import held_in, put_hooks, take_hooks
from vislr.tokens.selection import kept_count
from vislr.tokens.solving import Counter

EARLY, LATE = 950.0, 100.0


def kept(family, plan, timestep=LATE, sample=None):
    """What was chosen in one forward, and its output. Without the counting of `attach`."""
    hooked = put_hooks(family.model, plan)
    try:
        with watching(family.model) as seen:
            out = family.run(sample, timestep)
    finally:
        take_hooks(family.model, hooked)
    return seen, out


def test_keeping_everything_is_the_dense_model_bit_for_bit(family):
    before = family.run()
    put_hooks(family.model, at_edm_plan(family.model, keep=1.0))
    assert torch.equal(family.run(), before)


@pytest.mark.parametrize("other", [False, True], ids=["square", "other"])
def test_a_plan_changes_the_output_keeps_its_shape_and_comes_off(family, other):
    sample = family.other if other else family.sample
    modules = dict(family.model.named_modules())
    forwards = {name: module.forward for name, module in modules.items()}
    own = {name: set(vars(module)) for name, module in modules.items()}
    keys = list(family.model.state_dict())
    before = family.run(sample)
    hooked = put_hooks(family.model, at_edm_plan(family.model, keep=0.5))
    during = family.run(sample)
    assert during.shape == before.shape
    assert torch.isfinite(during).all()
    assert not torch.equal(during, before)
    assert list(family.model.state_dict()) == keys
    take_hooks(family.model, hooked)
    assert torch.equal(family.run(sample), before)
    assert {name: module.forward for name, module in family.model.named_modules()} == forwards
    assert {name: set(vars(module)) for name, module in family.model.named_modules()} == own


def test_every_sample_keeps_exactly_as_many_and_again_the_same(family):
    plan = at_edm_plan(family.model, keep=0.4)
    first, out = kept(family, plan)
    again, same = kept(family, plan)
    assert first
    shares = {cut.after: cut.keep for span in plan.late for cut in span.cuts}
    for one, two in zip(first, again, strict=True):
        assert one.keep.shape == (family.sample["batch"], kept_count(shares[one.block], one.tokens))
        assert all(len(set(row)) == len(row) and max(row) < one.tokens for row in one.keep.tolist())
        assert torch.equal(one.keep, two.keep)
    assert torch.equal(out, same)
    assert not torch.equal(first[0].keep[0], first[0].keep[1]), "samples choose for themselves"


def test_a_plan_of_shared_guidance_chooses_alike_in_both_halves(family):
    if not family.steps:
        with pytest.raises(ConfigError, match="classifier"):
            kept(family, at_edm_plan(family.model, keep=0.4, guidance="shared"))
        return
    seen, _ = kept(family, at_edm_plan(family.model, keep=0.4, guidance="shared"))
    assert all(torch.equal(*one.keep) for one in seen)


@pytest.mark.parametrize("recovery", ["copy", "update", "interpolate", "cached"])
def test_recovered_tokens(family, recovery):
    """Kept tokens are what the blocks made of them, whatever the others get; a copy is some kept token's value."""
    if not family.steps:
        pytest.skip("a classifier recovers nothing")
    plan = at_edm_plan(family.model, keep=0.5, recovery="zeros")
    spans = [span for span in plan.late if not span.parts]
    plan = dataclasses.replace(plan, late=tuple(spans[:1]), early=(), boundary=None, early_share=0.0)
    last = family.model.get_submodule(plan.late[0].until)
    outputs = []
    handle = last.register_forward_hook(
        lambda module, args, out: outputs.append(out[1] if isinstance(out, tuple) else out)
    )
    seen, _ = kept(family, plan)
    zeros, keep = outputs.pop(), seen[0].keep
    if recovery == "interpolate" and family.name == "flux":
        with pytest.raises(ConfigError, match="rows and columns"):
            kept(family, dataclasses.replace(plan, recovery=recovery))
        return
    kept(family, dataclasses.replace(plan, recovery=recovery))
    handle.remove()
    full = outputs.pop()
    assert full.shape == zeros.shape
    for b in range(len(keep)):
        gone = torch.tensor(sorted(set(range(zeros.shape[1])) - set(keep[b].tolist())))
        assert torch.equal(full[b, keep[b]], zeros[b, keep[b]])
        assert (zeros[b, gone] == 0).all()
        assert (full[b, gone] != 0).any(-1).all()
        copies = (full[b, gone][:, None] == zeros[b, keep[b]][None]).all(-1).any(-1)
        assert copies.all() if recovery in ("copy", "cached") else not copies.any()


def test_early_and_late_steps_differ_as_planned(family):
    if not family.steps:
        with pytest.raises(ConfigError, match="no early steps"):
            at_edm_plan(family.model, keep=0.5, early=0.3)
        return
    plan = at_edm_plan(family.model, keep=0.5, early=0.3)
    late = [one.block for one in kept(family, plan, LATE)[0]]
    early = [one.block for one in kept(family, plan, EARLY)[0]]
    assert set(late) == {span.cuts[0].after for span in plan.late}
    assert set(early) == {span.cuts[0].after for span in plan.early}
    assert len(late) > len(early) or family.name != "unet"
    assert not set(early) & set(family.whole)
    assert set(family.whole) <= set(late)
    if family.name != "unet":
        last = "single_transformer_blocks.1" if family.name == "flux" else "transformer_blocks.3"
        assert plan.late[0].until == last
        assert plan.early[0].until != last, "the last blocks stay whole in early steps"
    always = at_edm_plan(family.model, keep=0.5, early=1.0)
    never = at_edm_plan(family.model, keep=0.5, early=0.0)
    assert [one.block for one in kept(family, always, LATE)[0]] == early
    assert [one.block for one in kept(family, never, EARLY)[0]] == late
    assert never.boundary is None


def test_a_dense_early_phase_is_the_base_bit_for_bit(family):
    if not family.steps:
        pytest.skip("a classifier has no phases")
    plan = dataclasses.replace(at_edm_plan(family.model, keep=0.5, early=0.3), early=())
    base = family.run(timestep=EARLY)
    seen, out = kept(family, plan, EARLY)
    assert seen == []
    assert torch.equal(out, base)


def test_flops_fall_with_the_share_that_stays_and_meet_a_budget(family):
    counter = Counter(family.model, family.sample)
    counts = [counter(at_edm_plan(family.model, keep=k)) for k in (0.5, 0.25, 0.1)]
    averages = [one.average for one in counts]
    assert averages[0] > averages[1] > averages[2]
    budget = 1 - 0.6 * counts[-1].saved
    wish = {"speedup": 1 / budget} if family.name == "dit" else {"flops_saved": 1 - budget}
    plan = at_edm_plan(family.model, **wish, sample=family.sample)
    # Not by the solver's own counter: one forward of the changed model in each phase.
    dense, measured = flops(family.model, family.sample), {}
    assert dense == counter.dense
    hooked = put_hooks(family.model, plan)
    for phase in plan.phases():
        with held_in(family.model, phase):
            measured[phase] = flops(family.model, family.sample)
    take_hooks(family.model, hooked)
    average = plan.early_share * measured.get("early", 0) + (1 - plan.early_share) * measured["late"]
    assert abs(average - budget * dense) <= 0.01 * budget * dense
    if family.name in ("dit", "vit"):  # one with a schedule, one without
        with pytest.raises(ConfigError, match=r"at most \d+\.\d% \("):
            at_edm_plan(family.model, flops_saved=0.97, sample=family.sample)


@pytest.mark.parametrize("criterion", ["random", "stride"])
def test_other_choices_work_in_the_same_plan(family, criterion):
    seen, out = kept(family, at_edm_plan(family.model, keep=0.5, criterion=criterion))
    ranked, _ = kept(family, at_edm_plan(family.model, keep=0.5))
    assert torch.isfinite(out).all()
    assert [one.block for one in seen] == [one.block for one in ranked]
    assert any(not torch.equal(a.keep, b.keep) for a, b in zip(seen, ranked, strict=True))


def test_merging_works_on_every_family(family):
    before = family.run()
    plan = tome_plan(family.model, keep=0.5)
    assert TokenPlan.from_dict(plan.to_dict()) == plan
    seen, out = kept(family, plan)
    keeps = {cut.after: cut.keep for span in plan.late for cut in span.cuts}
    assert {one.block for one in seen} == set(keeps)
    assert all(one.keep.shape[1] == kept_count(keeps[one.block], one.tokens) for one in seen)
    assert out.shape == before.shape
    assert torch.isfinite(out).all()
    assert not torch.equal(out, before)
    whole, _ = kept(family, tome_plan(family.model, keep=1.0))
    assert whole == []
    if family.name != "unet":
        with pytest.raises(ConfigError, match="early"):
            tome_plan(family.model, keep=0.5, early=0.3)


@pytest.mark.parametrize("options", [{"ranking": "cross"}, {"similarity": "symmetric"}, {"iterations": 5}], ids=str)
def test_other_ways_to_rank_and_to_find_sources(family, options):
    if "ranking" in options and family.name in ("dit", "vit"):
        with pytest.raises(ConfigError, match="needs text"):
            kept(family, at_edm_plan(family.model, keep=0.5, **options))
        return
    seen, out = kept(family, at_edm_plan(family.model, keep=0.5, **options))
    plain, usual = kept(family, at_edm_plan(family.model, keep=0.5))
    assert torch.isfinite(out).all()
    assert len(seen) == len(plain)
    if "similarity" not in options and family.steps:  # a ViT of random weights ranks alike again and again
        assert any(not torch.equal(a.keep, b.keep) for a, b in zip(seen, plain, strict=True))
    elif family.steps:
        assert all(torch.equal(a.keep, b.keep) for a, b in zip(seen[:1], plain[:1], strict=True))
        assert not torch.equal(out, usual)


def test_repeated_cuts_shrink_step_by_step_and_come_back(family):
    if family.name == "unet":
        family.model = type(family.model).from_config({**family.model.config, "transformer_layers_per_block": 3}).eval()
    before = family.run()
    plan = at_edm_plan(family.model, keep=0.5, prune_after=(0, 1), early=0.0)
    seen, out = kept(family, plan)
    assert out.shape == before.shape
    span = plan.late[0]
    assert [cut.keep for cut in span.cuts] == [0.5, 0.25]
    first, second = (next(one for one in seen if one.block == cut.after) for cut in span.cuts)
    assert second.keep.shape[1] == kept_count(0.25, first.tokens)
    for b in range(len(first.keep)):
        assert set(second.keep[b].tolist()) < set(first.keep[b].tolist())
