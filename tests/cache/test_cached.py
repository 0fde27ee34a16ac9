"""Caches on real denoisers: exact where nothing is reused, off again without a trace, and cheaper as counted."""

import json

import pytest
import torch
from tiny import (
    tiny_flux_pipeline,
    tiny_pixart_pipeline,
    tiny_sd3_pipeline,
    tiny_sd3_transformer,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
)

import vislr
from vislr import cache
from vislr.anatomy import sample_inputs
from vislr.cache.handler import schedule_of
from vislr.cache.plan import CachePlan, Refresh, Region
from vislr.core.errors import ConfigError, ModelError, TargetError, UndoError

SHORT = {"max_sequence_length": 8}
FAMILIES = {
    "sd": (tiny_sd_pipeline, {}),
    "sdxl": (tiny_sdxl_pipeline, {}),
    "sd3": (tiny_sd3_pipeline, SHORT),
    "flux": (tiny_flux_pipeline, SHORT),
    "pixart": (tiny_pixart_pipeline, {"use_resolution_binning": False, "clean_caption": False}),
}


def draw(pipe, steps=5, guidance=3.0, **call):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return pipe(
            ["a cat face"], num_inference_steps=steps, guidance_scale=guidance, generator=generator, height=32,
            width=32, output_type="latent", **call,
        ).images  # fmt: skip


def traces(model):
    """Modules that hold anything of hooks."""
    return [name for name, part in model.named_modules() if {"_diffusers_hook", "forward"} & set(vars(part))]


@pytest.fixture(scope="module")
def sd():
    return tiny_sd_pipeline()


@pytest.mark.parametrize("family", FAMILIES)
def test_interval_one_is_exact_and_more_saves(family):
    build, call = FAMILIES[family]
    pipe = build()
    model = pipe.unet if family in ("sd", "sdxl") else pipe.transformer
    plain = draw(pipe, **call)
    keys = list(model.state_dict())
    report = vislr.apply(pipe, cache.interval_plan(pipe, 1, steps=5), name="cache")
    assert report.flops[0] == report.flops[1] == vislr.measure.flops(model)
    assert torch.equal(draw(pipe, **call), plain)
    assert list(model.state_dict()) == keys
    vislr.remove(pipe, report)
    report = vislr.apply(pipe, cache.interval_plan(pipe, 2, steps=5), name="cache")
    assert report.flops[1] < report.flops[0]
    first = draw(pipe, **call)
    assert not torch.equal(first, plain)
    assert torch.isfinite(first).all()
    assert torch.equal(draw(pipe, **call), first)  # nothing of the last run is left in the next
    vislr.remove(pipe, report)
    assert traces(model) == []
    assert torch.equal(draw(pipe, **call), plain)


@pytest.mark.parametrize("boundary", ["up_blocks.0", "up_blocks.1"])
def test_a_fresh_unet_cache_gives_the_whole_forward_bit_for_bit(sd, boundary):
    model = sd.unet
    inputs = sample_inputs(model, {"batch": 2, "tokens": 8}, device="cpu")
    with torch.no_grad():
        plain = model(**inputs).sample
        with cache.cached(model, cache.interval_plan(model, 9, boundary)):
            state = schedule_of(model).state
            assert torch.equal(model(**inputs).sample, plain)
            assert state.reused == frozenset()
            # A lower timestep is the next step of the run; the forward itself gets the old one.
            schedule_of(model)(torch.tensor([400.0]))
            assert state.reused == {0}
            model._diffusers_hook.get_hook("vislr_step_context").context.schedules.clear()
            ran = []
            handles = [
                model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
                for name in ("conv_in", "mid_block.resnets.0", "up_blocks.1.resnets.0", "conv_out")
            ]
            assert torch.equal(model(**inputs).sample, plain)
    for handle in handles:
        handle.remove()
    assert ran == ["conv_in", "up_blocks.1.resnets.0", "conv_out"]


def test_a_fresh_transformer_cache_gives_the_whole_forward():
    torch.manual_seed(0)
    model = tiny_sd3_transformer(num_layers=6).double()
    inputs = sample_inputs(model, {"batch": 2, "tokens": 8}, device="cpu")
    with torch.no_grad():
        plain = model(**inputs).sample
        with cache.cached(model, cache.interval_plan(model, 9)):
            state = schedule_of(model).state
            assert torch.equal(model(**inputs).sample, plain)
            context = model._diffusers_hook.get_hook("vislr_step_context").context
            context.schedules.clear()
            state.reused = frozenset({0})
            # What the blocks added is added again: the same up to rounding.
            torch.testing.assert_close(model(**inputs).sample, plain, rtol=1e-12, atol=1e-12)
            changed = inputs | {"hidden_states": inputs["hidden_states"] + 1}
            assert not torch.allclose(model(**changed).sample, plain, atol=1e-3)


def test_flops_are_those_of_the_blocks_that_run():
    torch.manual_seed(0)
    model = tiny_sd3_transformer(num_layers=6)
    anatomy = vislr.describe(model)
    flops = {site.name: site.flops for site in anatomy.sites if site.name.startswith("transformer_blocks.")}
    plan = cache.interval_plan(model, 2, steps=4)
    assert (plan.regions[0].first, plan.regions[0].last) == ("transformer_blocks.1", "transformer_blocks.4")
    report = vislr.apply(model, plan)
    skipped = sum(flops[f"transformer_blocks.{i}"] for i in range(1, 5))
    assert report.flops == (anatomy.flops, anatomy.flops - skipped // 2)
    assert "2 of 4 steps" in str(report)
    vislr.remove(model, report)


def test_measured_plans_keep_what_changes_little(sd):
    plain = draw(sd)
    changes = cache.measured_changes(sd, ["a cat face"], [0], steps=5, guidance=3.0)
    assert all(len(curve) == 4 and min(curve) > 0 for curve in changes.values())
    middle = sorted(max(curve) for curve in changes.values())[len(changes) // 2]
    plan = cache.measured_plan(sd, ["a cat face"], steps=5, threshold=middle, guidance=3.0)
    assert plan.criterion == "measured"
    assert 0 < len(plan.regions) <= len(changes)
    for region in plan.regions:
        assert region.refresh.chosen == cache.planning.refreshes(changes[region.first, region.last], middle)
    assert cache.plan_picture(plan).width > 400
    report = vislr.apply(sd, plan)
    assert report.flops[1] < report.flops[0]
    assert not torch.equal(draw(sd), plain)
    vislr.remove(sd, report)
    with pytest.raises(ConfigError, match="nothing is kept"):
        cache.measured_plan(sd, ["a cat face"], steps=3, threshold=0.0)
    assert traces(sd.unet) == []
    assert torch.equal(draw(sd), plain)


def test_a_stopped_run_leaves_nothing_for_the_next(sd):
    report = vislr.apply(sd, cache.interval_plan(sd, 3))
    right = draw(sd)

    def stop(pipe, step, timestep, values):
        if step == 1:
            raise KeyboardInterrupt
        return values

    with pytest.raises(KeyboardInterrupt):
        draw(sd, callback_on_step_end=stop)
    assert torch.equal(draw(sd), right)
    vislr.remove(sd, report)


def test_image_to_image_and_odd_sizes_and_batches(sd):
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline.from_pipe(sd)
    other.set_progress_bar_config(disable=True)
    picture = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))

    def run():
        generator = [torch.Generator().manual_seed(i) for i in (1, 2)]
        return other(["a cat face", "a dog face"], image=picture, strength=0.6, num_inference_steps=10,
                     generator=generator, output_type="latent").images  # fmt: skip

    plain = run()
    with cache.cached(sd, cache.interval_plan(sd, 1)):
        assert torch.equal(run(), plain)
    with cache.cached(sd, cache.interval_plan(sd, 2)):
        first = run()
        assert torch.equal(run(), first)
        assert not torch.equal(first, plain)


def test_freeu_scales_in_place_and_the_cache_stays(sd):
    sd.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    try:
        inputs = sample_inputs(sd.unet, {"batch": 2, "tokens": 8}, device="cpu")
        with torch.no_grad(), cache.cached(sd.unet, cache.interval_plan(sd.unet, 9)):
            state = schedule_of(sd.unet).state
            sd.unet(**inputs)
            kept = state.store[0, 0][0].clone()
            state.reused = frozenset({0})
            context = sd.unet._diffusers_hook.get_hook("vislr_step_context").context
            context.schedules.clear()
            sd.unet(**inputs)
            assert torch.equal(state.store[0, 0][0], kept)
    finally:
        sd.unet.disable_freeu()


def test_controls_reach_the_skips_of_blocks_that_do_not_run(sd):
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    control = ControlNetModel.from_unet(sd.unet, conditioning_channels=3).eval()
    for part in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(part.weight, std=0.1)
    inputs = sample_inputs(sd.unet, {"batch": 2, "tokens": 8}, device="cpu")
    with torch.no_grad():
        down, middle = control(**inputs, controlnet_cond=torch.rand(2, 3, 64, 64), return_dict=False)
        inputs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        plain = sd.unet(**inputs).sample
        with cache.cached(sd.unet, cache.interval_plan(sd.unet, 9)):
            assert torch.equal(sd.unet(**inputs).sample, plain)
            schedule = schedule_of(sd.unet)
            schedule(torch.tensor([400.0]))
            assert schedule.state.reused == {0}
            sd.unet._diffusers_hook.get_hook("vislr_step_context").context.schedules.clear()
            assert torch.equal(sd.unet(**inputs).sample, plain)


def test_a_saved_folder_brings_its_cache_back(sd, tmp_path):
    report = vislr.apply(sd, cache.interval_plan(sd, 2, steps=7), name="deep")
    right = draw(sd)
    vislr.save(sd, tmp_path / "folder")
    vislr.remove(sd, report)
    stored = json.loads((tmp_path / "folder" / "vislr.json").read_text())["plans"]
    assert [entry["kind"] for entry in stored] == ["cache"]
    pipe = vislr.load(tmp_path / "folder")
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe), right)
    assert [step["report"]["name"] for step in vislr.recipe_of(pipe)] == ["deep"]


def test_wrong_plans_are_refused_and_change_nothing(sd):
    with pytest.raises(TargetError, match=r"up_blocks.7"):
        cache.interval_plan(sd, 2, "up_blocks.7")
    with pytest.raises(ConfigError, match="every is 0"):
        cache.interval_plan(sd, 0)
    with pytest.raises(ModelError):
        cache.interval_plan(torch.nn.Linear(2, 2), 2)
    three = Refresh(every=3)
    wrong = [
        (Region("mid_block.resnets.0", "mid_block.resnets.1", three), ConfigError),
        (Region("down_blocks.0", "up_blocks.0", three), ConfigError),
        (Region("up_blocks.1", "up_blocks.1", three), ConfigError),
        (Region("down_blocks.1", "up_block.0", three), TargetError),
    ]
    for region, error in wrong:
        with pytest.raises(error):
            vislr.apply(sd, CachePlan((region,)))
    whole = cache.region_at(sd.unet)
    with pytest.raises(ConfigError, match="overlap"):
        vislr.apply(sd, CachePlan((whole, Region("mid_block.resnets.0", "mid_block.resnets.0", three))))
    assert traces(sd.unet) == []
    report = vislr.apply(sd, cache.interval_plan(sd, 2))
    with pytest.raises(ConfigError, match="already"):
        vislr.apply(sd, cache.interval_plan(sd, 3))
    vislr.remove(sd, report)
    with pytest.raises(UndoError):
        vislr.remove(sd, report)


@pytest.mark.slow
def test_a_compiled_unet_has_one_graph_a_phase(sd):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = sd.unet
    inputs = sample_inputs(model, {"batch": 2, "tokens": 8}, device="cpu")
    with torch.no_grad(), cache.cached(model, cache.interval_plan(model, 2, steps=6)):
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for time in (900.0, 700.0, 500.0, 300.0, 100.0, 50.0):
            inputs["timestep"] = torch.full_like(inputs["timestep"].float(), time)
            compiled(**inputs)
    assert counter.frame_count == 2
