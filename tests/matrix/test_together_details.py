"""What the pairs showed: the order of hooks, copies, counts, what lies under a plan, and what is in a weight."""

import copy

import pytest
import torch
from adapted import SHORT, fill
from peft import LoraConfig
from tiny import tiny_sd3_pipeline, tiny_sd3_transformer, tiny_unet

import vislr
from vislr import cache, compose, quantize
from vislr.adapters import inject
from vislr.anatomy import sample_inputs
from vislr.core.context import context_of, step_context
from vislr.core.errors import AdapterError, ConfigError, ModelError, UndoError
from vislr.prune import LayerPlan
from vislr.tokens import Cut, Span, TokenPlan, at_edm_plan, tome_plan

LORA = LoraConfig(r=2, target_modules=["to_q"])
SMALL = {"batch": 2, "tokens": 8}


def sd3(seed=0, blocks=4):
    torch.manual_seed(seed)
    return tiny_sd3_transformer(num_layers=blocks)


def calls(model, times=(900.0, 600.0, 300.0, 100.0)):
    """Outputs of a run of falling timesteps."""
    inputs = sample_inputs(model, SMALL, device="cpu")
    with torch.no_grad():
        return torch.stack([model(**inputs | {"timestep": torch.full((2,), time)}).sample for time in times])


def traces(model):
    return [
        name for name, part in model.named_modules() if {"_diffusers_hook", "forward", "__deepcopy__"} & set(vars(part))
    ]


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return tiny_unet()


@pytest.mark.parametrize("tokens_first", [True, False])
def test_tokens_that_come_back_inside_of_the_cached_blocks(tokens_first):
    """Cached blocks 1 to 2; tokens leave after 1 and come back after 2: the cache is around, whoever came first."""
    inside = TokenPlan((Span((Cut("transformer_blocks.1", 0.5),), "transformer_blocks.2"),), recovery="update")
    model = sd3()
    plain = calls(model)
    plans = [inside, cache.interval_plan(model, 2, steps=4)]
    alone = []
    for plan in plans:
        report = vislr.apply(model, plan)
        alone.append(calls(model))
        vislr.remove(model, report)
    reports = [vislr.apply(model, plan) for plan in (plans if tokens_first else plans[::-1])]
    both = calls(model)
    # Whole steps are the token plan's, cached ones add what the last whole step added.
    assert torch.equal(both[0], alone[0][0])
    assert not torch.equal(both[1], alone[0][1])
    assert not torch.equal(both[1], alone[1][1])
    assert torch.equal(both[2], alone[0][2])
    vislr.remove(model, reports[0])
    assert torch.equal(calls(model), alone[1] if tokens_first else alone[0])
    vislr.remove(model, reports[1])
    assert traces(model) == []
    assert torch.equal(calls(model), plain)


@pytest.mark.parametrize("change", ["cache", "cmlora"])
def test_tokens_missing_in_a_part_of_the_cached_blocks_are_refused_in_both_orders(change):
    model = sd3()
    for name in ("a", "b"):
        inject.attach(model, LORA, name)
        fill(model, name, ord(name))
    inject.set_adapters(model, [])
    across = at_edm_plan(model, keep=0.5, early=0.0)
    if change == "cache":
        plan = cache.interval_plan(model, 2, steps=4)
    else:
        plan = compose.cmlora_plan(model, ["a", "b"], refresh=2, cache="")
    plain = calls(model)
    for first, second in ((across, plan), (plan, across)):
        report = vislr.apply(model, first)
        before = calls(model)
        with pytest.raises(ConfigError, match=r"tokens leave in 'transformer_blocks.0'.* cache leaves"):
            vislr.apply(model, second)
        assert torch.equal(calls(model), before)
        vislr.remove(model, report)
        assert traces(model) == []
    assert torch.equal(calls(model), plain)


def names(first, last):
    return (f"transformer_blocks.{first}", f"transformer_blocks.{last}")


def test_a_cache_is_planned_around_or_beside_the_blocks_that_tokens_miss():
    model = sd3(blocks=12)
    usual = cache.interval_plan(model, 2, steps=4)
    cases = {
        # Tokens leave after, come back after; what is cached then.
        (0, 11): (0, 11), (0, 3): (4, 9), (3, 8): (2, 9), (1, 10): (1, 10), (9, 11): (2, 8), (0, 9): (0, 9),
    }  # fmt: skip
    assert (usual.regions[0].first, usual.regions[0].last) == names(2, 9)
    for (leave, back), cached in cases.items():
        span = Span((Cut(names(leave, back)[0], 0.5),), names(leave, back)[1])
        tokens = vislr.apply(model, TokenPlan((span,), recovery="update"))
        plan = cache.interval_plan(model, 2, steps=4)
        assert (plan.regions[0].first, plan.regions[0].last) == names(*cached), (leave, back)
        report = vislr.apply(model, plan)
        note = [line for line in report.notes if line.startswith("not the usual")]
        assert len(note) == (cached != (2, 9))
        assert all(f"from '{span.cuts[0].after}' to '{span.until}'" in line for line in note)
        for one in (report, tokens):
            vislr.remove(model, one)
    assert cache.interval_plan(model, 2, steps=4) == usual


@pytest.mark.parametrize(
    ("tokens", "boundary", "nearest"),
    [((0, 11), 6, r"leave it out \(null\), which caches 'transformer_blocks.0' to 'transformer_blocks.11'"),
     ((3, 8), 7, "'transformer_blocks.9', which caches 'transformer_blocks.2' to 'transformer_blocks.8'")],
)  # fmt: skip
def test_a_boundary_that_is_given_and_does_not_fit_is_refused_with_the_nearest(tokens, boundary, nearest):
    model = sd3(blocks=12)
    first, last = names(*tokens)
    vislr.apply(model, TokenPlan((Span((Cut(first, 0.5),), last),), recovery="update"))
    with pytest.raises(ConfigError, match=rf"boundary 'transformer_blocks.{boundary}' does not fit.*{nearest}"):
        cache.interval_plan(model, 2, f"transformer_blocks.{boundary}")


def test_tokens_are_planned_among_blocks_that_a_cache_leaves_out_together():
    model = sd3(blocks=12)
    report = vislr.apply(model, cache.interval_plan(model, 2, steps=4))
    plan = at_edm_plan(model, keep=0.5, early=0.5, steps=4)
    assert [(span.cuts[0].after, span.until) for span in plan.late] == [names(2, 9)]
    assert [(span.cuts[0].after, span.until) for span in plan.early] == [names(2, 8)]
    assert [(span.cuts[0].after, span.until) for span in tome_plan(model, keep=0.5).late] == [names(2, 9)]
    tokens = vislr.apply(model, plan)
    assert any("from 'transformer_blocks.2' to 'transformer_blocks.9' alone" in line for line in tokens.notes)
    both = calls(model)
    vislr.remove(model, report)
    assert not torch.equal(calls(model), both)
    vislr.remove(model, tokens)
    three = sd3(blocks=3)
    lone = [cache.Region(name, name, cache.Refresh(every=2)) for name in names(0, 2)]
    vislr.apply(three, cache.CachePlan(tuple(lone)))
    with pytest.raises(ConfigError, match="neither leave out nor run two blocks in a row together"):
        at_edm_plan(three, keep=0.5, early=0.0)


def test_what_tokens_miss_together_is_measured_and_kept_as_one():
    pipe = tiny_sd3_pipeline()
    pipe.register_modules(transformer=sd3(blocks=6))
    pipe.set_progress_bar_config(disable=True)
    model = pipe.transformer
    call = {"steps": 3, "guidance": 3.0, **SHORT}
    alone = cache.measured_changes(pipe, ["a cat face"], [0], **call)
    assert list(alone) == [names(n, n) for n in range(6)]
    vislr.apply(pipe, TokenPlan((Span((Cut(names(1, 3)[0], 0.5),), names(1, 3)[1]),), recovery="update"))
    changes = cache.measured_changes(pipe, ["a cat face"], [0], **call)
    assert list(changes) == [names(0, 0), names(1, 3), names(4, 4), names(5, 5)]
    assert all(len(curve) == 2 and min(curve) > 0 for curve in changes.values())
    plan = cache.measured_plan(pipe, ["a cat face"], threshold=10.0, **call)
    assert [(region.first, region.last) for region in plan.regions] == list(changes)
    assert vislr.apply(pipe, plan).flops[1] < vislr.measure.flops(model)


def test_hooks_come_off_in_any_order(unet):
    """diffusers drops the forward of a hook when the one below it goes."""
    for name in ("a", "b"):
        inject.attach(unet, LORA, name)
        fill(unet, name, ord(name))
    inject.set_adapters(unet, [])
    plain = calls(unet)
    plans = {
        "tokens": at_edm_plan(unet, keep=0.5, early=0.0),
        "cache": cache.interval_plan(unet, 2, steps=4),
        "compose": compose.composite_plan(unet, ["a", "b"], steps=4),
    }
    reports = {name: vislr.apply(unet, plan, name=name) for name, plan in plans.items()}
    vislr.remove(unet, reports.pop("tokens"))
    two = calls(unet)
    vislr.remove(unet, reports.pop("cache"))
    one = calls(unet)
    for report in reports.values():
        vislr.remove(unet, report)
    assert traces(unet) == []
    assert torch.equal(calls(unet), plain)
    with compose.composed(unet, plans["compose"]):
        assert torch.equal(calls(unet), one)
        with cache.cached(unet, plans["cache"]):
            assert torch.equal(calls(unet), two)


def test_a_copy_of_a_model_with_plans_runs_itself(unet):
    for name in ("a", "b"):
        inject.attach(unet, LORA, name)
        fill(unet, name, ord(name))
    plans = [
        at_edm_plan(unet, keep=0.5, early=0.5, steps=4),
        cache.interval_plan(unet, 2, steps=4),
        compose.composite_plan(unet, ["a", "b"], steps=4),
    ]
    reports = [vislr.apply(unet, plan, name=f"plan{n}") for n, plan in enumerate(plans)]
    made = calls(unet)
    twin = copy.deepcopy(unet)
    assert context_of(twin) is not context_of(unet)
    assert torch.equal(calls(twin), made)
    with torch.no_grad():
        twin.conv_out.weight.zero_()
        twin.conv_out.bias.zero_()
    assert not calls(twin).any(), "the copy's own weights run"
    assert torch.equal(calls(unet), made), "and the original's are as they were"
    for report in reversed(reports):
        vislr.remove(twin, report)
    assert traces(twin) == []
    assert torch.equal(calls(unet), made), "what is on the original stays"


def test_counts_do_not_depend_on_what_ran_last(unet):
    report = vislr.apply(unet, cache.interval_plan(unet, 2, steps=2))
    counted = vislr.measure.flops(unet)
    calls(unet, (900.0, 600.0))  # ends with a cached step
    assert vislr.measure.flops(unet) == counted == report.flops[0]
    inject.attach(unet, LORA, "a")
    assert vislr.apply(unet, at_edm_plan(unet, keep=0.5, early=0.0)).flops[0] > counted


def test_structure_goes_below_the_plans_that_are_on(unet):
    plain = calls(unet)
    over = vislr.apply(unet, cache.interval_plan(unet, 2, steps=4), name="cache")
    cut = LayerPlan(("mid_block.attentions.0",))
    below = vislr.apply(unet, cut, name="cut")
    both = calls(unet)
    vislr.remove(unet, over)  # a run-time plan comes off whatever was applied since
    pruned = calls(unet)
    vislr.remove(unet, below)
    assert torch.equal(calls(unet), plain)
    vislr.apply(unet, cut)
    assert torch.equal(calls(unet), pruned)
    vislr.apply(unet, cache.interval_plan(unet, 2, steps=4))
    assert torch.equal(calls(unet), both)


def test_structure_under_which_a_plan_would_not_fit_is_refused():
    model = sd3()
    vislr.apply(model, cache.interval_plan(model, 2, steps=4), name="blocks")
    before, state = calls(model), dict(model.state_dict())
    with pytest.raises(ModelError, match=r"'blocks' would not fit any more: .*transformer_blocks.2.*; remove it first"):
        vislr.apply(model, LayerPlan(("transformer_blocks.2",)))
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(calls(model), before)
    assert [step["report"]["name"] for step in vislr.recipe_of(model)] == ["blocks"]
    fixed = sd3()
    vislr.apply(fixed, cache.interval_plan(fixed, 2, steps=4), name="fixed", undo=False)
    with pytest.raises(ModelError, match=r"'fixed' .* undo=False"):
        vislr.apply(fixed, LayerPlan(("transformer_blocks.0.ff",)))


def test_quantised_under_an_adapter_is_quantised_and_then_adapted(unet):
    plan = quantize.weight_only_plan(unet, 8, group=None)
    twin = copy.deepcopy(unet)
    for model, changes in ((unet, ("lora", "quant")), (twin, ("quant", "lora"))):
        reports = []
        for change in changes:
            reports.append(vislr.apply(model, LORA if change == "lora" else plan, name=change))
            if change == "lora":
                fill(model, "lora", 1)
        model.reports = reports
    assert quantize.weight_only_plan(tiny_unet(), 8, group=None).layers == plan.layers
    assert torch.equal(calls(unet), calls(twin))
    with pytest.raises(UndoError):
        vislr.remove(unet, unet.reports[0])
    site = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    unet.get_submodule(site).merged_adapters.append("lora")
    vislr_plan = quantize.QuantPlan({site: (8, 16)}, group=None)
    vislr.remove(unet, unet.reports[1])
    with pytest.raises(ModelError, match="an adapter is in the weight of"):
        vislr.apply(unet, vislr_plan)


def test_step_sizes_of_two_plans_have_their_own_places(unet):
    half = {name: pair for n, (name, pair) in enumerate(quantize.weight_only_plan(unet, 8, group=None).layers.items())}
    first, second = list(half)[::2], list(half)[1::2]
    reports = []
    for names, times in ((first, (100.0, 900.0)), (second, (300.0, 500.0, 700.0))):
        plan = quantize.QuantPlan(
            dict.fromkeys(names, (8, 8)), inputs="timestep", ranges=dict.fromkeys(names, (-3.0, 3.0)), timesteps=times
        )
        reports.append(vislr.apply(unet, plan))
    both = calls(unet)
    assert torch.isfinite(both).all()
    vislr.remove(unet, reports[1])
    assert len(context_of(unet).schedules) == 1
    calls(unet)
    vislr.remove(unet, reports[0])
    assert traces(unet) == []


@pytest.mark.parametrize("way", ["off", "removed"])
def test_sara_comes_off_and_leaves_what_another_kind_has_merged(way):
    layer = torch.nn.Linear(6, 5).double()
    model = torch.nn.Sequential(layer)
    base = layer.weight.detach().clone()
    sparse = inject.attach(model, vislr.SaraConfig(fraction=0.4, target_modules=["0"]), "s")
    fill(model, "s", 1)
    inject.attach(model, LoraConfig(r=2, target_modules=["0"]), "l")
    fill(model, "l", 2)
    inject.set_adapters(model, ["s", "l"])
    lora = next(one for _, one in inject.tuner_layers(model) if hasattr(one, "lora_A"))
    delta = lora.get_delta_weight("l")
    lora.merge(adapter_names=["l"])
    holder = next(one for _, one in inject.tuner_layers(model) if hasattr(one, "sara_values"))
    if way == "off":
        holder.set_adapter([])
    else:
        holder.delete_adapter("s")
    torch.testing.assert_close(layer.weight, base + delta, rtol=0, atol=1e-12)
    lora.unmerge()
    torch.testing.assert_close(layer.weight, base, rtol=0, atol=1e-12)
    assert sparse.sites == ("0",)


def test_qalora_in_a_composition(unet):
    vislr.apply(unet, quantize.weight_only_plan(unet, 4, group=None, layers={"*conv*": None}))
    vislr.apply(unet, vislr.adapters.QALoraConfig(r=2, target_modules=["to_q"]), name="q")
    inject.attach(unet, LoraConfig(r=2, target_modules=["to_k"]), "l")
    for name in ("q", "l"):
        fill(unet, name, ord(name))
    alone = {}
    for name in ("q", "l"):
        inject.set_adapters(unet, [name])
        alone[name] = calls(unet)
    inject.set_adapters(unet, [])
    with compose.composed(unet, compose.composite_plan(unet, ["q", "l"], steps=4)):
        torch.testing.assert_close(calls(unet), (alone["q"] + alone["l"]) / 2, rtol=1e-5, atol=1e-5)
    with compose.composed(unet, compose.switch_plan(unet, ["q", "l"], every=1)):
        switched = calls(unet)
    assert torch.equal(switched[0], alone["q"][0])
    assert torch.equal(switched[1], alone["l"][1])
    with (
        pytest.raises(AdapterError, match=r"'q' on .* is no addition to a weight"),
        compose.composed(unet, compose.merge_plan(unet, ["q", "l"], method="ties")),
    ):
        pass
    assert step_context(unet).owners == set()
