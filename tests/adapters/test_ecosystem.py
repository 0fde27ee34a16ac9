"""Our kinds are peft methods: diffusers' and peft's own calls work on them."""

import subprocess
import sys

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tiny import tiny_sd_pipeline, tiny_unet, tiny_vit

from vislr.adapters import ConvLoraConfig, FloraConfig, adapter_names, adapter_parameters, attach, detach
from vislr.adapters.conv_lora import ConvLoraLayer
from vislr.adapters.flora import FloraLayer
from vislr.formats import write_adapter

CONFIGS = {"convlora": ConvLoraConfig(r=2), "flora": FloraConfig(ranks=3)}
LAYERS = {"convlora": ConvLoraLayer, "flora": FloraLayer}
both = pytest.mark.parametrize("kind", CONFIGS)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randomise(model, name, size=0.05, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd_pipeline()


def picture(pipe):
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe("red car", num_inference_steps=2, generator=generator, output_type="np").images)


@both
def test_diffusers_switches_fuses_and_deletes(kind, pipe):
    other = "flora" if kind == "convlora" else "convlora"
    off = picture(pipe)
    weights = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    attach(pipe.unet, CONFIGS[kind], "one")
    randomise(pipe.unet, "one")
    one = picture(pipe)
    attach(pipe.unet, CONFIGS[other], "two")
    randomise(pipe.unet, "two", seed=2)
    two = picture(pipe)
    assert pipe.get_list_adapters() == {"unet": ["one", "two"]}
    assert not torch.equal(one, off)
    assert not torch.equal(one, two)
    pipe.set_adapters(["one"], [1.0])
    assert pipe.get_active_adapters() == ["one"]
    assert torch.equal(picture(pipe), one)
    pipe.disable_lora()
    assert torch.equal(picture(pipe), off)
    pipe.enable_lora()
    assert torch.equal(picture(pipe), one)
    pipe.set_adapters(["one", "two"], [0.7, 0.4])
    mixed = picture(pipe)
    pipe.fuse_lora()
    assert torch.allclose(picture(pipe), mixed, atol=1e-4)
    pipe.unfuse_lora()
    assert torch.equal(picture(pipe), mixed)
    state = {name.replace(".base_layer", ""): value for name, value in pipe.unet.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    pipe.delete_adapters("one")
    assert adapter_names(pipe.unet) == ["two"]
    pipe.set_adapters(["two"])
    assert torch.equal(picture(pipe), two)
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe), off)
    assert not hasattr(pipe.unet, "peft_config")
    # Adapters that others took off leave nothing that the next one would trip over.
    pipe.unet.requires_grad_(True)
    detach(pipe.unet, attach(pipe.unet, CONFIGS[kind], "one"))
    assert torch.equal(picture(pipe), off)
    assert "_vislr_adapters" not in vars(pipe.unet)
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())


@both
def test_the_scale_of_a_call(kind, pipe):
    attached = attach(pipe.unet, CONFIGS[kind], "one")
    randomise(pipe.unet, "one")
    pipe.set_adapters(["one"], [0.5])
    half = picture(pipe)
    pipe.set_adapters(["one"])
    generator = torch.Generator().manual_seed(0)
    scaled = pipe("red car", num_inference_steps=2, generator=generator, output_type="np",
                  cross_attention_kwargs={"scale": 0.5}).images  # fmt: skip
    assert torch.allclose(torch.from_numpy(scaled), half, atol=1e-6)
    detach(pipe.unet, attached)


@both
def test_add_adapter_of_diffusers(kind):
    torch.manual_seed(0)
    unet = tiny_unet()
    unet.add_adapter(CONFIGS[kind], "mine")
    assert unet.active_adapters() == ["mine"]
    assert any(isinstance(module, LAYERS[kind]) for module in unet.modules())
    assert CONFIGS[kind].sites is None  # the user's config is not written to


@both
def test_inject_adapter_in_model_and_peft_state_dicts(kind):
    torch.manual_seed(0)
    model, fresh = tiny_vit(seed=3), tiny_vit(seed=3)
    inject_adapter_in_model(CONFIGS[kind], model, "x")
    randomise(model, "x")
    state = get_peft_model_state_dict(model, adapter_name="x")
    assert len(state) == len(adapter_parameters(model, "x"))
    inject_adapter_in_model(CONFIGS[kind], fresh, "y")
    result = set_peft_model_state_dict(fresh, state, adapter_name="y")
    assert result.unexpected_keys == []
    assert torch.equal(fresh(IMAGES), model(IMAGES))


@both
def test_peft_model_saves_loads_and_merges(kind, tmp_path):
    base = tiny_vit(seed=3)
    expected_off = base(IMAGES)
    model = get_peft_model(base, CONFIGS[kind])
    assert torch.equal(model(IMAGES), expected_off)
    randomise(model, "default")
    adapted = model(IMAGES)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in adapter_parameters(model, "default").values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_vit(seed=3), tmp_path)
    assert torch.equal(again(IMAGES), adapted)
    assert again.peft_config["default"].sites == list(model.peft_config["default"].sites)
    with model.disable_adapter():
        assert torch.equal(model(IMAGES), expected_off)
    model.add_adapter("second", CONFIGS[kind])
    model.set_adapter("second")
    assert torch.equal(model(IMAGES), expected_off)
    model.set_adapter("default")
    model.merge_adapter()
    assert torch.allclose(model(IMAGES), adapted, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(IMAGES), adapted)
    model.delete_adapter("second")
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LAYERS[kind]) for module in merged.modules())
    assert torch.allclose(merged(IMAGES), adapted, atol=1e-5)


def test_files_load_in_a_new_process(tmp_path):
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([7]),
              "encoder_hidden_states": torch.randn(1, 5, 16)}  # fmt: skip
    torch.manual_seed(0)
    unet = tiny_unet()
    for kind, config in CONFIGS.items():
        attach(unet, config, kind)
        randomise(unet, kind)
        torch.save({"inputs": inputs, "output": unet(**inputs).sample.detach()}, tmp_path / f"{kind}.pt")
        write_adapter(unet, kind, tmp_path / f"{kind}.safetensors")
    code = f"""
import sys, torch
sys.path[:0] = {sys.path!r}
from tiny import tiny_unet
from vislr.formats import attach_file, read_adapter
torch.manual_seed(0)
unet = tiny_unet()
for kind in {list(CONFIGS)!r}:
    attach_file(unet, kind, read_adapter({str(tmp_path)!r} + f"/{{kind}}.safetensors"))
    expected = torch.load({str(tmp_path)!r} + f"/{{kind}}.pt", weights_only=True)
    assert torch.equal(unet(**expected["inputs"]).sample, expected["output"]), kind
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
