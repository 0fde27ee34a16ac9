"""Composition on real pipelines: identities, state, and what runs beside it."""

import copy
import gc
import json
import warnings
import weakref

import pytest
import torch
from adapted import NAMES, Tiny, fill
from peft import LoraConfig

import vislr
from vislr import cache, compose
from vislr.adapters import inject
from vislr.cache.plan import Refresh
from vislr.compose.evaluate import compose_hook
from vislr.compose.handler import put_plan, take_plan
from vislr.core.errors import AdapterError, ConfigError, TargetError, UndoError


def options(method, count=1):
    return {"prompt": "a cat face", "triggers": ["cat", "face", "a cat"][:count]} if method.startswith("w_") else {}


def snapshot(tiny):
    """Everything of a pipeline that generating must not change."""
    tensors = {f"{part}.{key}": value.clone() for part, module in tiny.pipe.components.items()
               if isinstance(module, torch.nn.Module) for key, value in module.state_dict().items()}  # fmt: skip
    layers = [
        (path, copy.copy(layer.active_adapters), dict(getattr(layer, "scaling", {})), layer.disable_adapters,
         {key: p.requires_grad for key, p in layer.named_parameters()})
        for path, layer in inject.tuner_layers(tiny.model)
    ]  # fmt: skip
    return tensors, layers


def assert_same(before, after):
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])


def traces(model):
    """Modules that hold anything of hooks."""
    return [name for name, part in model.named_modules() if {"_diffusers_hook", "forward"} & set(vars(part))]


def test_one_adapter_is_plain_sampling_bit_for_bit_on_every_backbone(tiny):
    plain = tiny.alone("a", 0.7, steps=2)
    for method in compose.METHODS:
        plan = compose.compose_plan(tiny.pipe, ["a"], [0.7], method, **options(method))
        with compose.composed(tiny.pipe, plan):
            assert torch.equal(tiny.draw(steps=2), plain), method
    assert traces(tiny.model) == []


@pytest.mark.parametrize("kind", ["convlora", "flora", "dora", "loha", "sara"])
def test_one_adapter_of_every_kind_is_plain_sampling(sd, kind):
    from peft import LoHaConfig

    config = {
        "convlora": vislr.ConvLoraConfig(r=2, target_modules=["conv1", "to_q"]),
        "flora": vislr.FloraConfig(ranks=2, target_modules=["conv1", "to_q"]),
        "dora": LoraConfig(r=2, use_dora=True, target_modules=["to_q", "conv1"]),
        "loha": LoHaConfig(r=2, alpha=3, target_modules=["to_q"]),
        "sara": vislr.SaraConfig(threshold=2e-3),
    }[kind]
    report = sd.put("k", config, 9)
    try:
        plain = sd.alone("k", 0.6, steps=2)
        vislr.set_adapters(sd.pipe, ["a", "k"], [0.5, 0.6])
        both = sd.draw(steps=2)
        vislr.set_adapters(sd.pipe, [])
        before = snapshot(sd)
        for method in ("merge", "ties", "composite", "cmlora"):
            with compose.composed(sd.pipe, compose.compose_plan(sd.pipe, ["k"], [0.6], method)):
                assert torch.equal(sd.draw(steps=2), plain), method
        # Beside another: the sum is diffusers' own, merged ways agree with it where they are exact.
        with compose.composed(sd.pipe, compose.merge_plan(sd.pipe, ["a", "k"], [0.5, 0.6])):
            assert torch.equal(sd.draw(steps=2), both)
        if kind != "dora":  # which scales what the other adds, too
            with compose.composed(sd.pipe, compose.merge_plan(sd.pipe, ["a", "k"], [0.5, 0.6], "cat")):
                torch.testing.assert_close(sd.draw(steps=2), both, rtol=1e-4, atol=1e-4)
        with compose.composed(sd.pipe, compose.composite_plan(sd.pipe, ["a", "k"])):
            assert torch.isfinite(sd.draw(steps=2)).all()
        assert_same(before, snapshot(sd))
    finally:
        sd.take(report)


def test_sums_are_diffusers_own_and_linear_merging_is_not(sd):
    weights = [0.8, -0.5, 1.3]
    sd.pipe.set_adapters(list(NAMES), weights)
    own = sd.draw()
    vislr.set_adapters(sd.pipe, [])
    with compose.composed(sd.pipe, compose.merge_plan(sd.pipe, NAMES, weights)):
        assert torch.equal(sd.draw(), own)
    for method, values in (
        ("cat", {}),
        ("svd", {"rank": 99}),
        ("magnitude", {"density": 1.0}),
        ("dare", {"density": 1.0}),
    ):
        with compose.composed(sd.pipe, compose.merge_plan(sd.pipe, NAMES, weights, method, **values)):
            torch.testing.assert_close(sd.draw(), own, rtol=1e-4, atol=1e-4)


def test_cat_is_the_sum_of_the_deltas_as_peft_s_and_linear_is_not():
    from peft import get_peft_model
    from tiny import tiny_unet

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"])
    model = get_peft_model(tiny_unet(), config, "x")
    model.add_adapter("y", config)
    for place, name in enumerate("xy"):
        fill(model, name, place)
    for way in ("cat", "linear", "svd"):
        model.add_weighted_adapter(["x", "y"], [0.8, 1.3], way, combination_type=way, svd_rank=2)
    base, site = model.get_base_model(), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = base.get_submodule(site)
    wanted = 0.8 * layer.get_delta_weight("x") + 1.3 * layer.get_delta_weight("y")
    theirs = {way: layer.get_delta_weight(way) for way in ("cat", "linear", "svd")}
    ours = {}
    for way in ("cat", "svd"):
        with compose.composed(base, compose.merge_plan(base, ["x", "y"], [0.8, 1.3], way)):
            up, down = compose_hook(base).changes[site].factors
            ours[way] = up @ down
    for found in (theirs["cat"], ours["cat"]):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["svd"], theirs["svd"], rtol=1e-4, atol=1e-5)
    # Factors that are mixed apart have cross terms.
    assert (theirs["linear"] - wanted).norm() > 0.1 * wanted.norm()


def test_identical_adapters_give_one_of_them_by_every_mixing(sd):
    config = LoraConfig(r=2, target_modules=["to_q", "conv1"])
    reports = [sd.put(name, config, 5) for name in ("p", "q", "r")]
    try:
        single = sd.alone("p", 1.0)
        plans = [
            compose.switch_plan(sd.pipe, ["p", "q", "r"], every=1),
            compose.composite_plan(sd.pipe, ["p", "q", "r"]),
            *(compose.cmlora_plan(sd.pipe, ["p", "q", "r"], beta=beta, refresh=1) for beta in (0.3, 1.0, 7.0)),
        ]
        for plan in plans:
            with compose.composed(sd.pipe, plan):
                torch.testing.assert_close(sd.draw(), single, rtol=1e-4, atol=1e-5)
    finally:
        sd.take(*reports)


def test_zero_adapters_are_the_base(sd):
    reports = [inject.attach(sd.model, LoraConfig(r=2, target_modules=["to_q"]), name) for name in ("p", "q")]
    inject.set_adapters(sd.model, [])
    try:
        base = sd.draw()
        for method in compose.METHODS:
            plan = compose.compose_plan(sd.pipe, ["p", "q"], None, method, **options(method, 2))
            if method == "cmlora":
                plan = compose.cmlora_plan(sd.pipe, ["p", "q"], refresh=1)
            with compose.composed(sd.pipe, plan):
                torch.testing.assert_close(sd.draw(), base, rtol=1e-4, atol=1e-5)
    finally:
        sd.take(*reports)


def test_refreshing_always_is_no_cache_bit_for_bit_and_beta_one_is_composite(tiny):
    if tiny.family in ("sdxl", "pixart"):
        pytest.skip("as sd and sd3")
    every = {"steps": 4, "guidance": 3.0}
    with compose.composed(tiny.pipe, compose.cmlora_plan(tiny.pipe, NAMES, cache=None, refresh=1)):
        plain = tiny.draw(**every)
    with compose.composed(tiny.pipe, compose.cmlora_plan(tiny.pipe, NAMES, refresh=1)):
        assert torch.equal(tiny.draw(**every), plain)
    with compose.composed(tiny.pipe, compose.composite_plan(tiny.pipe, NAMES)):
        composite = tiny.draw(**every)
    with compose.composed(tiny.pipe, compose.cmlora_plan(tiny.pipe, NAMES, beta=1.0, cache=None)):
        torch.testing.assert_close(tiny.draw(**every), composite, rtol=1e-5, atol=1e-6)
    with compose.composed(tiny.pipe, compose.cmlora_plan(tiny.pipe, NAMES)):
        kept = tiny.draw(**every)
        assert torch.equal(tiny.draw(**every), kept)
        assert not torch.equal(kept, plain)


@pytest.mark.parametrize("method", ["composite", "cmlora"])
def test_one_forward_for_several_adapters_is_one_after_another(tiny, method):
    found = []
    for passes in ("separate", "batched"):
        plan = compose.compose_plan(tiny.pipe, NAMES, [1.0, 0.5, 2.0], method, passes=passes)
        with compose.composed(tiny.pipe, plan):
            found.append(tiny.draw())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_composite_is_the_mean_of_guided_predictions(sd):
    """By hand: one step of a scheduler on the mean of what each adapter predicts alone."""
    from vislr.anatomy import sample_inputs

    inputs = sample_inputs(sd.model, {"batch": 2, "tokens": 8}, device="cpu")
    alone = []
    with torch.no_grad():
        for name in NAMES:
            vislr.set_adapters(sd.pipe, [name])
            alone.append(sd.model(**inputs).sample)
        vislr.set_adapters(sd.pipe, [])
        with compose.composed(sd.pipe, compose.composite_plan(sd.pipe, NAMES, passes="separate")):
            torch.testing.assert_close(sd.model(**inputs).sample, sum(alone) / 3, rtol=1e-6, atol=1e-6)
            assert isinstance(sd.model(**inputs, return_dict=False), tuple)
        mix = (0.5, 0.2, 0.3)
        with compose.composed(sd.pipe, compose.composite_plan(sd.pipe, NAMES, mix=mix, passes="separate")):
            wanted = sum(m * one for m, one in zip(mix, alone, strict=True))
            torch.testing.assert_close(sd.model(**inputs).sample, wanted, rtol=1e-6, atol=1e-6)
        scaled = {**inputs, "cross_attention_kwargs": {"scale": 0.5}}
        vislr.set_adapters(sd.pipe, ["a"])
        half = sd.model(**scaled).sample
        vislr.set_adapters(sd.pipe, [])
        with compose.composed(sd.pipe, compose.merge_plan(sd.pipe, ["a"])):
            torch.testing.assert_close(sd.model(**scaled).sample, half, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["merge", "ties", "switch", "composite", "cmlora"])
def test_generation_exceptions_and_cancelling_leave_no_trace(sd, method):
    before = snapshot(sd)
    plain = sd.draw()

    def stop(pipe, step, timestep, values):
        raise KeyboardInterrupt

    def cancel(pipe, step, timestep, values):
        pipe._interrupt = True
        return values

    def fail(module, args):
        raise RuntimeError("inside")

    with compose.composed(sd.pipe, compose.compose_plan(sd.pipe, NAMES, None, method)):
        right = sd.draw()
        assert_same(before, snapshot(sd))
        with pytest.raises(KeyboardInterrupt):
            sd.draw(callback_on_step_end=stop)
        sd.draw(callback_on_step_end=cancel)
        # A failure in the middle of a forward.
        handle = sd.model.get_submodule("up_blocks.1.resnets.0").register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="inside"):
            sd.draw()
        handle.remove()
        assert_same(before, snapshot(sd))
        assert torch.equal(sd.draw(), right)
    assert traces(sd.model) == []
    assert torch.equal(sd.draw(), plain)


def test_a_plan_comes_off_once(sd):
    report = vislr.apply(sd.pipe, compose.switch_plan(sd.pipe, ["a", "b"]), name="mix")
    assert [step["change"]["kind"] for step in vislr.recipe_of(sd.pipe)] == ["compose"]
    vislr.remove(sd.pipe, report)
    assert traces(sd.model) == []
    with pytest.raises(UndoError):
        vislr.remove(sd.pipe, report)


def test_any_scheduler_guidance_batch_and_image_to_image(sd):
    from diffusers import (
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        StableDiffusionImg2ImgPipeline,
    )

    plan = compose.cmlora_plan(sd.pipe, NAMES, high=["a", "b"])
    own = sd.pipe.scheduler
    with compose.composed(sd.pipe, plan):
        for kind in (DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler):
            sd.pipe.scheduler = kind.from_config(own.config)
            first = sd.draw(steps=4, guidance=1.0)
            assert torch.isfinite(first).all()
            assert torch.equal(sd.draw(steps=4, guidance=1.0), first)
        sd.pipe.scheduler = own
        pair = sd.draw(num_images_per_prompt=2)
        assert pair.shape[0] == 2
        other = StableDiffusionImg2ImgPipeline.from_pipe(sd.pipe)
        other.set_progress_bar_config(disable=True)
        picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        made = [
            other(["a cat face"], image=picture, strength=0.5, num_inference_steps=6, output_type="latent",
                  generator=torch.Generator().manual_seed(1)).images for _ in range(2)
        ]  # fmt: skip
        assert torch.equal(*made)
        hook = compose_hook(sd.model)
        assert hook.conductor.program.total == 3


def test_text_encoders_run_the_adapters_that_were_asked_for(tmp_path):
    tiny = Tiny("sd")
    encoder = tiny.pipe.text_encoder
    for place, name in enumerate("ab"):
        inject.attach(encoder, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), name)
        fill(encoder, name, 20 + place, 0.5)
        inject.set_adapters(encoder, [])

    def encoded():
        return tiny.pipe.encode_prompt("a cat face", "cpu", 1, False)[0]

    base = encoded()
    expected = {}
    for names in (["a"], ["b"], ["a", "b"]):
        inject.set_adapters(encoder, names, [0.5] * len(names))
        expected[tuple(names)] = encoded()
    inject.set_adapters(encoder, [])
    with torch.no_grad():
        for method in ("switch", "merge", "composite"):
            with compose.composed(tiny.pipe, compose.compose_plan(tiny.pipe, ["a", "b"], [0.5, 0.5], method)):
                assert torch.equal(encoded(), expected["a", "b"])
        plan = compose.switch_plan(tiny.pipe, ["a", "b"], [0.5, 0.5], text_adapters=["a"])
        with compose.composed(tiny.pipe, plan):
            assert torch.equal(encoded(), expected[("a",)])
        with compose.composed(tiny.pipe, compose.switch_plan(tiny.pipe, ["a", "b"], text_adapters=[])):
            assert torch.equal(encoded(), base)
        with compose.composed(tiny.pipe, compose.merge_plan(tiny.pipe, ["a", "b"], [0.5, 0.5], "cat")):
            torch.testing.assert_close(encoded(), expected["a", "b"], rtol=1e-4, atol=1e-5)
    assert torch.equal(encoded(), base)
    assert traces(encoder) == []


def test_weights_by_layer(sd):
    only = compose.merge_plan(sd.pipe, ["a", "c"], layers={"up_blocks.*": (0, 1), "*": (1, 0)})
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with compose.composed(sd.pipe, only):
        first = sd.draw()
    dense = compose.merge_plan(sd.pipe, ["a", "c"], method="cat", layers={"up_blocks.*": (0, 1), "*": (1, 0)})
    with compose.composed(sd.pipe, dense):
        torch.testing.assert_close(sd.draw(), first, rtol=1e-4, atol=1e-4)
        change = compose_hook(sd.model).changes[layer]
        wanted = sd.model.get_submodule(layer).get_delta_weight("a")
        torch.testing.assert_close(change.factors[0] @ change.factors[1], wanted, rtol=1e-5, atol=1e-6)
    unused = compose.merge_plan(sd.pipe, ["a", "c"], method="ties", layers={"up_block.*": (0, 1)})
    for plan in (unused, compose.merge_plan(sd.pipe, ["a", "c"], layers={"up_block.*": (0, 1)})):
        with pytest.raises(TargetError, match="up_block"):
            vislr.apply(sd.pipe, plan)
    assert traces(sd.model) == []


@pytest.mark.parametrize("method", ["cat", "magnitude"])
def test_weights_by_input(sd, method):
    layer = sd.model.get_submodule("mid_block.resnets.0.conv1")
    site, rng = "mid_block.resnets.0.conv1", torch.Generator().manual_seed(0)
    inputs = torch.rand(layer.get_base_layer().in_channels, generator=rng)
    other = compose.merge_plan(
        sd.pipe, ["a", "b"], method=method, density=1.0, layers={site: (inputs.tolist(), 0.5), "*": (1, 1)}
    )
    assert compose.ComposePlan.from_dict(json.loads(json.dumps(other.to_dict()))) == other
    with compose.composed(sd.pipe, other):
        change = compose_hook(sd.model).changes[site]
        assert torch.isfinite(sd.draw(steps=1)).all()
    wanted = layer.get_delta_weight("a") * inputs[:, None, None]
    made = change.weight if change.factors is None else (change.factors[0] @ change.factors[1]).reshape(wanted.shape)
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-6)
    wrong = compose.merge_plan(sd.pipe, ["a", "b"], method=method, layers={site: ([1.0, 2.0], 1)})
    with pytest.raises(ConfigError, match="2 weights by input"):
        vislr.apply(sd.pipe, wrong)
    with pytest.raises(ConfigError, match="cannot use"):
        compose.merge_plan(sd.pipe, ["a", "b"], layers={site: ([1.0], 1)})


def test_dare_drops_by_seed_and_layer_alone(sd):
    def changes(seed, method="dare"):
        with compose.composed(sd.pipe, compose.merge_plan(sd.pipe, NAMES, method=method, seed=seed)):
            return compose_hook(sd.model).changes

    one, again, other = changes(0), changes(0), changes(1)
    assert all(torch.equal(one[site].weight, again[site].weight) for site in one)
    assert any(not torch.equal(one[site].weight, other[site].weight) for site in one)


def test_other_run_time_changes_beside_a_composition(sd):
    base = sd.draw()
    tokens = vislr.apply(
        sd.pipe, vislr.tokens.at_edm_plan(sd.pipe, keep=0.9, steps=3, inside_first=True), name="tokens"
    )
    deep = vislr.apply(sd.pipe, cache.interval_plan(sd.pipe, 2), name="deep")
    mix = vislr.apply(sd.pipe, compose.composite_plan(sd.pipe, NAMES), name="mix")
    first = sd.draw()
    assert torch.isfinite(first).all()
    assert torch.equal(sd.draw(), first)
    # Each adapter has features of its own in the cache beside.
    from vislr.cache.handler import schedule_of

    store = schedule_of(sd.model).state.store
    assert {key for (_, key), kept in store.items() if kept is not None} == {(0, 0), (0, 1), (0, 2)}
    for report in (deep, mix, tokens):
        vislr.remove(sd.pipe, report)
    assert traces(sd.model) == []
    assert torch.equal(sd.draw(), base)
    with compose.composed(sd.pipe, compose.cmlora_plan(sd.pipe, NAMES)), pytest.raises(ConfigError, match="cached by"):
        vislr.apply(sd.pipe, cache.interval_plan(sd.pipe, 2, compose.cmlora_plan(sd.pipe, NAMES).cache))


def test_adapters_that_come_and_go_are_noticed(sd):
    put_plan(sd.model, compose.composite_plan(sd.pipe, ["a", "b"]), sd.pipe)
    right = sd.draw()
    new = vislr.apply(sd.pipe, LoraConfig(r=2, target_modules=["to_q", "proj_in"]), name="new")
    fill(sd.model, "new", 3)
    assert inject.active_adapters(sd.model) == {"new": 1.0}
    # It is not in the plan: off while the plan is on.
    assert torch.equal(sd.draw(), right)
    vislr.remove(sd.pipe, new)
    take_plan(sd.model)
    vislr.set_adapters(sd.pipe, [])
    gone = sd.put("gone", LoraConfig(r=2, target_modules=["to_q"]), 1)
    put_plan(sd.model, compose.merge_plan(sd.pipe, ["a", "gone"]), sd.pipe)
    sd.take(gone)
    with pytest.raises(AdapterError, match="'gone'"):
        sd.draw()
    take_plan(sd.model)
    assert traces(sd.model) == []


def test_wrong_plans_are_refused_and_change_nothing(sd):
    with pytest.raises(AdapterError, match="no adapter is called 'd'"):
        compose.merge_plan(sd.pipe, ["a", "d"])
    with pytest.raises(ConfigError, match="did you mean 'composite'"):
        compose.compose_plan(sd.pipe, ["a"], method="compsite")
    with pytest.raises(ConfigError, match="no option 'evry'; did you mean 'every'"):
        compose.compose_plan(sd.pipe, ["a", "b"], method="switch", evry=3)
    with pytest.raises(ConfigError, match="none of the plan's"):
        compose.cmlora_plan(sd.pipe, ["a", "b"], high=["c"])
    with pytest.raises(ConfigError, match="not in the prompt"):
        compose.w_switch_plan(sd.pipe, ["a", "b"], prompt="a cat face", triggers=["cat", "dog"])
    with pytest.raises(TargetError, match=r"up_blocks.5"):
        compose.cmlora_plan(sd.pipe, ["a", "b"], cache="up_blocks.5")
    with pytest.raises(ConfigError, match="refresh"):
        compose.cmlora_plan(sd.pipe, ["a", "b"], refresh="often")
    from peft import OFTConfig

    report = sd.put("turn", OFTConfig(r=2, oft_block_size=0, target_modules=["to_q"]), 2)
    with pytest.raises(AdapterError, match="no addition to a weight"):
        vislr.apply(sd.pipe, compose.merge_plan(sd.pipe, ["a", "turn"], method="ties"))
    with pytest.raises(ConfigError, match="batched"):
        vislr.apply(sd.pipe, compose.composite_plan(sd.pipe, ["a", "turn"], passes="batched"))
    assert traces(sd.model) == []
    sd.take(report)
    report = vislr.apply(sd.pipe, compose.merge_plan(sd.pipe, ["a"]))
    with pytest.raises(ConfigError, match="already"):
        vislr.apply(sd.pipe, compose.switch_plan(sd.pipe, ["a", "b"]))
    vislr.remove(sd.pipe, report)


def test_a_saved_folder_brings_its_composition_back(tmp_path):
    tiny = Tiny("sd", ("a", "b"))
    plan = compose.cmlora_plan(tiny.pipe, ["a", "b"], [1.0, 0.5], high=["a"], steps=4)
    report = vislr.apply(tiny.pipe, plan, name="mix")
    right = tiny.draw()
    vislr.save(tiny.pipe, tmp_path / "folder")
    stored = json.loads((tmp_path / "folder" / "vislr.json").read_text())["plans"]
    assert [entry["kind"] for entry in stored] == ["compose"]
    assert compose.ComposePlan.from_dict(stored[0]["plan"]) == plan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.pipe = vislr.load(tmp_path / "folder")
    tiny.pipe.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.draw(), right)
    assert list(vislr.recipe_of(tiny.pipe)[-1]["report"]["notes"]) == list(report.notes)


def test_a_plan_keeps_no_pipeline_alive():
    tiny = Tiny("sd")
    put_plan(tiny.model, compose.composite_plan(tiny.pipe, NAMES), tiny.pipe)
    tiny.draw(steps=1)
    held, tiny.pipe = weakref.ref(tiny.pipe), None
    gc.collect()
    assert held() is None


def test_prompts_weigh_adapters(sd):
    found = compose.prompt_weights(sd.pipe, "a cat face, a red car", ["cat face", "red car"])
    assert all(-1 <= value <= 1 for value in found.trigger)
    assert all(0 <= value <= 2 for value in found.absence)
    plan = compose.w_composite_plan(
        sd.pipe, ["a", "b"], prompt="a cat face, a red car", triggers=["cat face", "red car"]
    )
    positive = [max(0.0, value) for value in found.trigger]
    assert plan.mix == pytest.approx([value / sum(positive) for value in positive])
    turns = compose.w_switch_plan(
        sd.pipe, ["a", "b"], prompt="a cat face, a red car", triggers=["cat face", "red car"], last="b", last_steps=2
    )
    assert turns.switching.shares == pytest.approx([value / sum(found.absence) for value in found.absence])
    assert [turn.full for turn in compose.turns(turns, 5)][-2:] == [(1,), (1,)]
    from vislr.compose.prompts import without

    assert without("a cat face, a red car, blue", "a red car") == "a cat face, blue"


def test_cached_boundaries_run_every_adapter(sd):
    # "a", "b" and "c" have layers in up_blocks.0 and behind; only convs of the last block are left at up_blocks.1.
    assert compose.cmlora_plan(sd.pipe, ["a", "b"]).cache == "up_blocks.1"
    assert compose.cmlora_plan(sd.pipe, ["a", "c"]).cache == "up_blocks.0"
    assert compose.cmlora_plan(sd.pipe, ["a"]).cache is None
    assert compose.composite_plan(sd.pipe, ["a", "c"], cache="auto", refresh=4).refresh == Refresh(every=4)


def test_memory_that_runs_out_makes_adapters_run_one_after_another(sd):
    with compose.composed(sd.pipe, compose.composite_plan(sd.pipe, NAMES, passes="separate")):
        right = sd.draw()

    def full(module, args):
        if args[0].shape[0] > 2:
            raise torch.OutOfMemoryError("a batch of more than 2 does not fit")

    handle = sd.model.conv_in.register_forward_pre_hook(full)
    try:
        with (
            compose.composed(sd.pipe, compose.composite_plan(sd.pipe, NAMES)),
            pytest.warns(UserWarning, match="no memory for several adapters"),
        ):
            assert torch.equal(sd.draw(), right)
        with (
            compose.composed(sd.pipe, compose.composite_plan(sd.pipe, NAMES, passes="batched")),
            pytest.raises(torch.OutOfMemoryError),
        ):
            sd.draw()
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("method", "graphs"),
    [("merge", 1), ("ties", 1), ("switch", 2), ("composite", 1), pytest.param("cmlora", 5, marks=pytest.mark.slow)],
)
def test_compiled_it_is_a_graph_for_each_kind_of_step_without_breaks(sd, method, graphs):
    """CMLoRA: for each leader one of steps that refresh and one of those that reuse, and one again for features of
    another shape: those that a pass of both adapters kept, or a pass of one."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = sd.model
    plan = compose.compose_plan(sd.pipe, ["a", "b"], [0.8, 0.7], method, steps=8)
    with compose.composed(sd.pipe, plan):
        eager = sd.draw(steps=8)
        model.compile(backend=counter, fullgraph=True)
        try:
            compiled = sd.draw(steps=8)
        finally:
            model._compiled_call_impl = None
    assert torch.equal(compiled, eager)
    assert counter.frame_count == graphs
