"""`vislr.fuse`: adapters in the weights for good, undone, saved, replayed; bit for bit."""

import pytest
import tiny
import torch
from adapted import fill
from peft import LoraConfig

import vislr
from vislr import replaying
from vislr.adapters import inject
from vislr.core.errors import AdapterError, ModelError, UndoError
from vislr.quantize import weight_only_plan

PIPELINES = {"sd": tiny.tiny_sd_pipeline, "sd3": tiny.tiny_sd3_pipeline}
KINDS = {
    "lora": LoraConfig(r=2, target_modules=["to_q", "to_v"]),
    "dora": LoraConfig(r=2, target_modules=["to_q", "to_v"], use_dora=True),
    "convlora": vislr.ConvLoraConfig(r=1),
    "flora": vislr.FloraConfig(ranks=2),
    "sara": vislr.SaraConfig(fraction=0.1),
}


def model_of(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet


def picture(pipe):
    options = {"max_sequence_length": 16} if hasattr(pipe, "transformer") else {}
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return pipe("noto style, a cat face", num_inference_steps=2, generator=rng, output_type="pt", **options).images


def adapted(model, kind, name="style"):
    pipe = PIPELINES[model]()
    report = vislr.apply(pipe, KINDS[kind], name=name)
    fill(model_of(pipe), name, 0, 0.2)
    # torch rounds a product with a trainable factor differently.
    model_of(pipe).requires_grad_(False)
    return pipe, report


@pytest.mark.parametrize(("model", "kind"), [*(("sd", kind) for kind in KINDS), ("sd3", "lora")])
def test_fused_saved_replayed_and_undone(model, kind, tmp_path):
    vislr.save(PIPELINES[model](), tmp_path / "base")
    plain = PIPELINES[model]()
    base, modules, flags = picture(plain), set(dict(model_of(plain).named_modules())), [
        p.requires_grad for p in model_of(plain).parameters()]  # fmt: skip
    pipe, first = adapted(model, kind)
    vislr.set_adapters(pipe, "style", 0.5)
    with_adapter = picture(pipe)
    report = vislr.fuse(pipe, name="in")
    assert report.kind == "fuse"
    assert set(report.sites) == set(first.sites)
    assert set(dict(model_of(pipe).named_modules())) == modules
    assert not inject.adapter_names(model_of(pipe))
    fused = picture(pipe)
    assert torch.allclose(fused, with_adapter, atol=1e-4)
    assert not torch.equal(fused, base)
    with pytest.raises(UndoError, match="remove 'in' first"):
        vislr.remove(pipe, first)

    vislr.save(pipe, tmp_path / "fused")
    loaded = vislr.load(tmp_path / "fused")
    assert torch.equal(picture(loaded), fused)
    assert [step["report"]["name"] for step in vislr.recipe_of(loaded)] == ["style", "in"]
    # A folder that is saved anew keeps what it knows.
    vislr.save(loaded, tmp_path / "second")
    again, notes = replaying.replay(tmp_path / "second", tmp_path / "base")
    assert torch.equal(picture(again), fused)
    assert notes == ("the weights are the folder's, bit for bit",)
    before, _ = replaying.replay(tmp_path / "fused", tmp_path / "base", leave_out=1)
    assert torch.equal(picture(before), with_adapter)
    assert "'style' at weight" in replaying.show(tmp_path / "second")

    vislr.remove(pipe, report)
    assert torch.equal(picture(pipe), with_adapter)
    vislr.remove(pipe, first)
    assert torch.equal(picture(pipe), base)
    assert [p.requires_grad for p in model_of(pipe).parameters()] == flags
    assert vislr.recipe_of(pipe) == []


def test_fuse_then_quantise_then_adapt_again_replays(tmp_path):
    vislr.save(tiny.tiny_sd_pipeline(), tmp_path / "base")
    pipe, _ = adapted("sd", "lora")
    vislr.fuse(pipe)
    vislr.apply(pipe, weight_only_plan(pipe, 8), name="int8")
    vislr.apply(pipe, KINDS["lora"], name="style")
    fill(pipe.unet, "style", 3, 0.2)
    model_of(pipe).requires_grad_(False)
    with pytest.raises(AdapterError, match="fuse first, then quantise"):
        vislr.fuse(pipe)
    made = picture(pipe)
    vislr.save(pipe, tmp_path / "small")
    again, notes = replaying.replay(tmp_path / "small", tmp_path / "base")
    assert torch.equal(picture(again), made)
    assert "bit for bit" in notes[0]
    loaded = vislr.load(tmp_path / "small")
    names = [step["report"]["name"] for step in vislr.recipe_of(loaded)]
    assert names == ["style", "fused", "int8", "style"]
    assert torch.equal(picture(loaded), made)


def test_an_adapter_below_quantising_replays_too(tmp_path):
    vislr.save(tiny.tiny_sd_pipeline(), tmp_path / "base")
    pipe, _ = adapted("sd", "lora")
    vislr.apply(pipe, weight_only_plan(pipe, 8), name="int8")
    vislr.save(pipe, tmp_path / "small")
    again, _ = replaying.replay(tmp_path / "small", tmp_path / "base")
    assert torch.equal(picture(again), picture(pipe))
    assert [step["report"]["name"] for step in vislr.recipe_of(again)] == ["style", "int8"]


def test_what_cannot_be_fused():
    pipe = tiny.tiny_sd_pipeline()
    with pytest.raises(AdapterError, match="no adapter to fuse"):
        vislr.fuse(pipe)
    pipe, _ = adapted("sd", "lora", "a")
    vislr.apply(pipe, KINDS["convlora"], name="b")
    with pytest.raises(AdapterError, match="'b'"):
        vislr.fuse(pipe, "c")
    with pytest.raises(AdapterError, match="'a' is off"):
        vislr.fuse(pipe, ["a", "b"])
    vislr.set_adapters(pipe, ["a"])
    with pytest.raises(AdapterError, match="'b' would stay"):
        vislr.fuse(pipe, "a")
    vislr.set_adapters(pipe, ["a", "b"])
    from vislr.compose import merge_plan

    report = vislr.apply(pipe, merge_plan(pipe, ["a", "b"]), name="both")
    with pytest.raises(ModelError, match="'both' composes"):
        vislr.fuse(pipe)
    vislr.remove(pipe, report)
    vislr.fuse(pipe)
    assert not inject.adapter_names(pipe.unet)


def test_adapters_that_were_off_are_off_after_a_replay(tmp_path):
    vislr.save(PIPELINES["sd"](), tmp_path / "base")
    pipe, _ = adapted("sd", "convlora")
    on = picture(pipe)
    vislr.set_adapters(pipe, [])
    off = picture(pipe)
    assert not torch.equal(on, off)
    vislr.save(pipe, tmp_path / "kept")
    again, _ = replaying.replay(tmp_path / "kept", tmp_path / "base")
    assert inject.active_adapters(again.unet) == inject.active_adapters(vislr.load(tmp_path / "kept").unet) == {}
    assert torch.equal(picture(again), off)


def test_two_adapters_with_statistics_are_saved_loaded_and_replayed(tmp_path):
    def fresh():
        return tiny.tiny_conv_net()

    net, x = fresh(), torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    vislr.save(net, tmp_path / "base")
    for number, name in enumerate(("dusk", "dawn")):
        vislr.set_adapters(net, [])
        vislr.apply(net, vislr.AdaBnConfig(), name=name)
        vislr.adapt_statistics(net, [x * (number + 1)], name=name)
    vislr.set_adapters(net, "dusk")
    wanted = net(x)
    vislr.save(net, tmp_path / "both")
    again, _ = replaying.replay(tmp_path / "both", tmp_path / "base")
    for found in (vislr.load(tmp_path / "both"), again):
        assert inject.adapter_names(found) == ["dusk", "dawn"]
        assert torch.equal(found(x), wanted)
        vislr.set_adapters(found, "dawn")
        assert not torch.equal(found(x), wanted)
    vislr.set_adapters(net, "dawn")
    assert torch.equal(found(x), net(x))
