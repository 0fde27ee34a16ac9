"""Token plans with the rest: pipelines, adapters, gradients, checkpointing, folders, compilation."""

import copy
import json

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_flux_transformer, tiny_sd_pipeline, tiny_sdxl_pipeline, tiny_unet

import vislr
from vislr.anatomy import sample_inputs
from vislr.core.errors import ConfigError
from vislr.tokens import TokenPlan, at_edm_plan, kept_shares, time_plan, tome_plan, watching
from vislr.tokens.handler import put_hooks, take_hooks

PROMPT = "a red car"


def picture(pipe, steps=4):
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(pipe(PROMPT, num_inference_steps=steps, generator=generator, output_type="np").images)


@pytest.mark.parametrize("make", [tiny_sd_pipeline, tiny_sdxl_pipeline])
def test_a_pipeline_with_a_plan_runs_and_is_the_base_again(make):
    pipe = make()
    before = picture(pipe)
    plan = at_edm_plan(pipe, keep=0.4, steps=4)
    assert plan.component == "unet"
    report = vislr.apply(pipe, plan)
    assert report.kind == "tokens"
    assert report.component == "unet"
    assert report.sites
    assert report.flops[1] < report.flops[0]
    during = picture(pipe)
    assert not torch.equal(during, before)
    assert torch.equal(picture(pipe), during)
    vislr.remove(pipe, report)
    assert torch.equal(picture(pipe), before)


def test_early_calls_of_a_run_are_the_share_that_the_plan_says():
    pipe = tiny_sdxl_pipeline()
    plan = at_edm_plan(pipe, keep=0.4, early=0.5, steps=6)
    assert plan.early_share == 0.5
    report = vislr.apply(pipe, plan)
    with watching(pipe.unet) as seen:
        picture(pipe, steps=6)
    blocks = {}
    for one in seen:
        blocks.setdefault(one.timestep, set()).add(one.block)
    early = {span.cuts[0].after for span in plan.early}
    late = {span.cuts[0].after for span in plan.late}
    assert early < late
    assert list(blocks.values()) == [early] * 3 + [late] * 3
    shares = kept_shares(seen, sample=1)
    assert all(0 < share.mean() < 1 for levels in shares.values() for share in levels.values())
    vislr.remove(pipe, report)


def test_a_folder_brings_the_plan_back(tmp_path):
    pipe = tiny_sd_pipeline()
    plan = at_edm_plan(pipe, keep=0.4, steps=4)
    vislr.apply(pipe, plan)
    during = picture(pipe)
    vislr.save(pipe, tmp_path / "folder")
    stored = json.loads((tmp_path / "folder" / "vislr.json").read_text())
    assert TokenPlan.from_dict(stored["plans"][0]["plan"]) == plan
    again = vislr.load(tmp_path / "folder")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(again), during)


@pytest.mark.parametrize("plan_first", [False, True])
def test_adapters_go_on_before_and_after_a_plan_and_come_off(plan_first):
    unet = tiny_unet(transformer_layers_per_block=2)
    inputs = sample_inputs(unet, {"height": 16, "width": 16, "batch": 2, "tokens": 8}, device="cpu")
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "ff.net.2"])
    plan = at_edm_plan(unet, keep=0.4, early=0.0)

    def run():
        with torch.no_grad():
            return unet(**inputs).sample

    base = run()
    outputs, reports = [], []
    for change in (plan, lora) if plan_first else (lora, plan):
        torch.manual_seed(3)
        reports.append(vislr.apply(unet, change))
        outputs.append(run())
    both = outputs[-1]
    assert not torch.equal(outputs[0], base)
    assert not torch.equal(both, outputs[0])
    first, second = reports
    vislr.remove(unet, first)
    alone = run()
    assert not torch.equal(alone, both)
    vislr.remove(unet, second)
    assert torch.equal(run(), base)


def gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs)
    (out[0] if not torch.is_tensor(out) else out).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["unet", "sd3", "flux"])
def test_gradient_checkpointing_gives_the_same_gradients(build, kind):
    family = build(kind)
    model = family.model.train()
    put_hooks(model, at_edm_plan(model, keep=0.4, early=0.0))
    inputs = family.inputs(timestep=100.0)
    plain = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    again = gradients(model, inputs)
    assert plain.keys() == again.keys()
    assert len(plain) > 50
    for name, gradient in plain.items():
        assert torch.allclose(gradient, again[name], rtol=1e-4, atol=1e-7), name


def test_pruned_tokens_pass_gradients_to_their_sources():
    torch.manual_seed(0)
    unet = tiny_unet(transformer_layers_per_block=2)
    inputs = sample_inputs(unet, {"height": 16, "width": 16, "batch": 1, "tokens": 8}, device="cpu")
    hooked = put_hooks(unet, at_edm_plan(unet, keep=0.3, early=0.0))
    pruned = gradients(unet, inputs)
    take_hooks(unet, hooked)
    dense = gradients(unet, inputs)
    assert pruned.keys() == dense.keys(), "every weight is still reached"
    later = "down_blocks.1.attentions.0.transformer_blocks.1.ff.net.2.weight"
    assert pruned[later].abs().sum() > 0
    assert not torch.allclose(pruned[later], dense[later])


@pytest.mark.parametrize("kind", ["unet", "unet-tome", "flux"])
def test_compiled_it_is_one_graph_a_phase_without_breaks(kind):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    torch.manual_seed(0)
    if kind == "flux":
        model = tiny_flux_transformer(num_single_layers=2).requires_grad_(False)
    else:
        layers = 1 if kind == "unet-tome" else 2
        model = tiny_unet(transformer_layers_per_block=layers).requires_grad_(False)
    sample = {"height": 16, "width": 16, "batch": 2, "tokens": 8}
    make = tome_plan if kind == "unet-tome" else at_edm_plan
    plan = make(model, keep=0.5, early=0.3, sample=sample)
    assert plan.boundary is not None
    put_hooks(model, plan)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    unit = 1e-3 if kind == "flux" else 1
    with torch.no_grad():
        for timestep in (950, 900, 850, 500, 300, 100, 920, 10):
            inputs = sample_inputs(model, sample, device="cpu")
            inputs["timestep"] = torch.full((2,), timestep * unit)
            assert torch.equal(compiled(**inputs)[0], model(**inputs)[0])
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_a_copied_model_carries_its_own_plan():
    unet = tiny_unet(transformer_layers_per_block=2)
    put_hooks(unet, at_edm_plan(unet, keep=0.5, early=0.0))
    twin = copy.deepcopy(unet.config)
    assert twin == unet.config
    assert vislr.anatomy.flops(unet) < vislr.anatomy.flops(tiny_unet(transformer_layers_per_block=2))


def test_timing_has_a_line_for_each_phase_and_asks_for_a_plan():
    unet = tiny_unet(transformer_layers_per_block=2)
    with pytest.raises(ConfigError, match="no token plan"):
        time_plan(unet)
    report = vislr.apply(unet, at_edm_plan(unet, keep=0.5), measure=True)
    assert any(note.startswith("measured: ") for note in report.notes)
    # Models this small are slower with a plan: ranking costs more than a few tokens. It is said loudly.
    figures = time_plan(unet, rounds=2)
    assert list(figures) == ["dense", "early", "late"]
    assert figures["late"].parts["speedup"].value > 0


def test_merging_reaches_every_level_of_a_unet():
    """The usual default merges at the highest level alone, where SDXL has no attention."""
    unet = tiny_sdxl_pipeline().unet
    plan = tome_plan(unet, keep=0.5)
    inputs = sample_inputs(unet, {"height": 16, "width": 16, "batch": 2, "tokens": 8}, device="cpu")
    with torch.no_grad():
        before = unet(**inputs).sample
        put_hooks(unet, plan)
        with watching(unet) as seen:
            after = unet(**inputs).sample
    blocks = [name for name, module in unet.named_modules() if type(module).__name__ == "BasicTransformerBlock"]
    assert {one.block for one in seen} == set(blocks)
    assert not torch.equal(before, after)
