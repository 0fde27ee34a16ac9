"""The copy on meta: the same structure, adapters and run-time changes included, the model untouched."""

import pytest
import tiny
import torch
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from vislr.anatomy import describe, flops, meta_copy, sample_inputs
from vislr.core.context import step_context

ADAPTED = {
    "unet": (tiny.tiny_unet, ["to_q", "conv1", "conv_in", "time_emb_proj"]),
    "sd3": (tiny.tiny_sd3_transformer, ["to_q", "add_k_proj", "net.2"]),
    "flux": (tiny.tiny_flux_transformer, ["to_q", "proj_out"]),
    "vit": (tiny.tiny_vit, ["qkv", "attn.proj", "fc1", "patch_embed.proj"]),
    "conv": (tiny.tiny_conv_net, ["layer1.0.conv1", "layer2.0.conv2", "fc"]),
}
SAMPLES = {"flux": {"height": 8, "width": 8}}


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("family", ADAPTED)
def test_lora_is_named_and_counted(family):
    """Sites keep the base's names; FLOPs and parameters grow by exactly the adapters'."""
    build, targets = ADAPTED[family]
    model, sample = build(), SAMPLES.get(family)
    before = describe(model, sample)
    inject_adapter_in_model(LoraConfig(r=3, target_modules=targets), model, "one")
    after = describe(model, sample)
    assert [(s.name, s.kind, s.type, s.stage, s.shape, s.removable) for s in after.sites] == [
        (s.name, s.kind, s.type, s.stage, s.shape, s.removable) for s in before.sites
    ]
    grown = 0
    for old, new in zip(before.sites, after.sites, strict=True):
        if old.kind not in ("conv", "linear"):
            continue
        if not any(old.name == t or old.name.endswith(f".{t}") for t in targets):
            assert new == old
            continue
        # down: 3 rows over a whole input patch; up: from 3 to the outputs; both at every output place.
        places = old.flops // (2 * torch.Size(old.shape).numel())
        added = 3 * torch.Size(old.shape[1:]).numel() + old.shape[0] * 3
        assert new.parameters - old.parameters == added
        assert new.flops - old.flops == 2 * places * added
        grown += new.flops - old.flops
    assert grown > 0
    assert after.flops - before.flops == grown == flops(model, sample) - before.flops
    assert after.parameters - before.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("family", ADAPTED)
def test_copy_has_the_same_tensors_without_memory(family):
    build, targets = ADAPTED[family]
    model = build().to(torch.bfloat16)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model, "one")
    twin = meta_copy(model)

    def seen(m):
        return {n: (tuple(t.shape), t.dtype, t.requires_grad, type(t)) for n, t in tensors(m).items()}

    assert seen(twin) == seen(model)
    assert {t.device.type for t in tensors(twin).values()} == {"meta"}
    assert {t.device.type for t in tensors(model).values()} == {"cpu"}
    assert [(n, type(m), m.training) for n, m in twin.named_modules()] == [
        (n, type(m), m.training) for n, m in model.named_modules()
    ]
    assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}


def test_nothing_of_the_model_changes():
    unet = tiny.tiny_unet().train()
    unet.conv_in.requires_grad_(False)
    called = []
    handle = unet.register_forward_hook(lambda *a: called.append(a))
    before = {n: t.clone() for n, t in tensors(unet).items()}
    flags = {n: p.requires_grad for n, p in unet.named_parameters()}
    describe(unet)
    flops(unet)
    assert called == []
    assert {n: p.requires_grad for n, p in unet.named_parameters()} == flags
    assert all(m.training for m in unet.modules())
    assert all(torch.equal(t, before[n]) for n, t in tensors(unet).items())
    unet(**sample_inputs(unet, device="cpu"))
    assert len(called) == 1
    handle.remove()


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    net.loose = [torch.ones(3), {"inner": torch.zeros(2)}]
    twin = meta_copy(net)
    assert twin[1].weight is twin[0].weight
    assert twin[0].weight is not net[0].weight
    assert twin.loose[0].is_meta
    assert twin.loose[1]["inner"].is_meta
    assert torch.equal(net.loose[0], torch.ones(3))


def test_the_step_hook_does_not_run_the_real_model():
    unet = tiny.tiny_unet()
    plain = flops(unet)
    context = step_context(unet)
    assert flops(unet) == plain
    assert context.timestep is None
    twin = meta_copy(unet)
    own = step_context(twin)
    assert own is not context
    assert twin(**sample_inputs(twin)).sample.is_meta
    assert own.timestep.is_meta
    assert context.timestep is None
    unet(**sample_inputs(unet, device="cpu"))
    assert context.timestep.tolist() == [500]


class Skip(ModelHook):
    """A run-time change: the block passes its input on."""

    def new_forward(self, module, hidden_states, *args, **kwargs):
        return hidden_states


def test_a_run_time_change_is_counted():
    model = tiny.tiny_vit()
    block = model.blocks[1]
    cost = describe(model).select(name="blocks.1")[0].flops
    whole = flops(model)
    registry = HookRegistry.check_if_exists_or_initialize(block)
    registry.register_hook(Skip(), "skip")
    assert flops(model) == whole - cost
    assert describe(model).select(name="blocks.1")[0].flops == 0
    registry.remove_hook("skip")
    assert flops(model) == whole


def test_hooks_that_move_weights_stay_behind():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    unet = tiny.tiny_unet()
    whole = flops(unet)
    add_hook_to_module(unet, AlignDevicesHook("cpu", io_same_device=True))
    assert flops(unet) == whole
    assert not hasattr(meta_copy(unet), "_hf_hook")
    assert hasattr(unet, "_hf_hook")


def test_a_peft_model_reads_as_its_base():
    model = tiny.tiny_vit()
    before = describe(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"]))
    after = describe(wrapped)
    assert [s.name for s in after.sites] == [s.name for s in before.sites]
    head = after.select(name="head")[0]
    assert (head.kind, head.type, head.shape) == ("linear", "Linear", (3, 32))
    # The original head and the copy that is trained.
    assert head.parameters == 2 * (3 * 32 + 3)
    assert flops(wrapped) == after.flops


def test_a_compiled_model_reads_as_itself():
    model = tiny.tiny_vit()
    assert describe(torch.compile(model)) == describe(model)
    assert flops(torch.compile(model)) == flops(model)
