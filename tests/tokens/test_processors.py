"""xformers, sliced attention and other backends beside a token plan: blocks that rank use torch's function."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from tiny import tiny_flux_transformer, tiny_sd3_transformer, tiny_unet

import vislr
from vislr.anatomy import sample_inputs
from vislr.core.errors import ModelError
from vislr.tokens import at_edm_plan, tome_plan
from vislr.tokens.handler import applied, looked_into, put_hooks, take_hooks
from vislr.tokens.layout import token_layout

SAMPLE = {"height": 16, "width": 16, "batch": 2, "tokens": 8}


def built(kind):
    torch.manual_seed(0)
    if kind == "unet":
        return tiny_unet(transformer_layers_per_block=2).requires_grad_(False)
    if kind == "sd3":
        return tiny_sd3_transformer(num_layers=4, sample_size=16).requires_grad_(False)
    return tiny_flux_transformer(num_single_layers=2).requires_grad_(False)


def output(model):
    with torch.no_grad():
        return model(**sample_inputs(model, SAMPLE, device="cpu"))[0]


def attentions(model, blocks):
    inside = [module for block in blocks for module in model.get_submodule(block).modules()]
    return [module for module in inside if getattr(module, "processor", None) is not None]


@pytest.mark.parametrize(
    ("kind", "foreign"),
    [
        ("unet", "XFormersAttnProcessor"),
        ("unet", "SlicedAttnProcessor"),
        ("unet", "AttnProcessor"),
        ("sd3", "XFormersJointAttnProcessor"),
        ("flux", "xformers"),
    ],
)
def test_blocks_that_rank_compute_by_torch_and_get_their_processor_back(kind, foreign):
    model = built(kind)
    plan = at_edm_plan(model, keep=0.5, sample=SAMPLE)
    hooked = put_hooks(model, plan)
    wanted = output(model)
    take_hooks(model, hooked)
    # xformers itself runs on GPUs alone: its processors are on the blocks that must not use them.
    touched = attentions(model, looked_into(plan, token_layout(model)))
    for attention in touched:
        if kind == "flux":
            attention.processor._attention_backend = foreign
        else:
            make = getattr(attention_processor, foreign)
            attention.processor = make(1) if foreign.startswith("Sliced") else make()
    before = [attention.processor for attention in touched]
    hooked = put_hooks(model, plan)
    assert len(applied(model).switched) == len(touched) > 0
    assert torch.equal(output(model), wanted)
    take_hooks(model, hooked)
    assert all(attention.processor is own for attention, own in zip(touched, before, strict=True))


def test_a_backend_in_force_for_every_model_is_seen():
    model = built("flux")
    plan = at_edm_plan(model, keep=0.5, sample=SAMPLE)
    hooked = put_hooks(model, plan)
    assert applied(model).switched == []
    wanted = output(model)
    take_hooks(model, hooked)
    before = _AttentionBackendRegistry._active_backend
    try:
        _AttentionBackendRegistry.set_active_backend("flash")
        hooked = put_hooks(model, plan)
        touched = attentions(model, looked_into(plan, token_layout(model)))
        assert [attention for attention, _, _ in applied(model).switched] == touched
        _AttentionBackendRegistry.set_active_backend(before)
        assert torch.equal(output(model), wanted)
    finally:
        _AttentionBackendRegistry.set_active_backend(before)
    take_hooks(model, hooked)


def test_merging_leaves_processors_alone_and_later_ones_stay():
    model = built("unet")
    model.set_attn_processor(attention_processor.SlicedAttnProcessor(1))
    report = vislr.apply(model, tome_plan(model, keep=0.5, sample=SAMPLE))
    assert applied(model).switched == []
    output(model)
    vislr.remove(model, report)
    report = vislr.apply(model, at_edm_plan(model, keep=0.5, sample=SAMPLE))
    later = attention_processor.SlicedAttnProcessor(2)
    model.set_attn_processor(later)
    with pytest.raises(ModelError, match="set its processor before the token plan"):
        output(model)
    vislr.remove(model, report)
    assert set(model.attn_processors.values()) == {later}
