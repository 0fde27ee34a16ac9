"""Plans: classes of layers, apply and undo, folders that reload, plans of other families, refusals."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import diffusers
import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import vislr
from vislr.anatomy import describe, sample_inputs
from vislr.core.errors import ConfigError, FormatError, ModelError, TargetError
from vislr.prune import LayerPlan
from vislr.quantize import QuantPlan, layer_classes, ptq_plan, quant_layers, quantizable, sizes, weight_only_plan
from vislr.quantize.layers import SCALES, Spec, quantized

SAMPLES = {
    "unet": (tiny.tiny_unet, {"tokens": 16}),
    "sd3": (tiny.tiny_sd3_transformer, {"tokens": 16}),
    "flux": (tiny.tiny_flux_transformer, {"tokens": 16, "height": 4, "width": 4}),
    "pixart": (lambda: tiny.tiny_pixart_pipeline().transformer, {"tokens": 5}),
    "dit": (lambda: tiny.tiny_dit_pipeline().transformer, {}),
    "vit": (tiny.tiny_vit, {}),
    "resnet": (tiny.tiny_conv_net, {}),
}


def answer(model, sample=None):
    inputs = sample_inputs(model, sample, device="cpu", batch=2)
    with torch.no_grad():
        found = model(**inputs)
    return found if torch.is_tensor(found) else found[0]


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, "static") for family in SAMPLES), ("sd3", "dynamic"), ("vit", "weights")]
)
def test_every_family_is_quantised_and_comes_back(family, kind):
    build, sample = SAMPLES[family]
    torch.manual_seed(0)
    model = build()
    before = answer(model, sample)
    inputs = [sample_inputs(model, sample, device="cpu", batch=2)]
    if kind == "weights":
        plan = weight_only_plan(model, 8, group=None, ends=True)
    else:
        plan = ptq_plan(model, 8, 8, inputs=kind, source=inputs, input_observer="minmax")
    whole = describe(model, sample)
    report = vislr.apply(model, plan)
    assert set(report.sites) == set(plan.layers) == set(quant_layers(model))
    assert report.parameters[0] == report.parameters[1] == whole.parameters
    error = float((answer(model, sample) - before).norm() / before.norm())
    assert 0 < error < 0.05
    # The anatomy reads the same sites, shapes and FLOPs.
    now = describe(model, sample)
    assert [(s.name, s.kind, s.shape, s.parameters, s.flops) for s in now.sites] == [
        (s.name, s.kind, s.shape, s.parameters, s.flops) for s in whole.sites
    ]
    vislr.remove(model, report)
    assert torch.equal(answer(model, sample), before)
    assert not quant_layers(model)


def test_layer_classes_of_a_unet_and_of_a_timm_net(sd):
    classes = layer_classes(sd.unet)
    assert classes.ends == ("conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out")
    assert all("conv_shortcut" in name or "downsamplers" in name for name in classes.whole)
    assert len(classes.whole) == 6
    assert {*classes.body, *classes.ends, *classes.whole} == set(quantizable(sd.unet))
    net = timm.create_model("resnet10t", pretrained=False)
    assert "fc" in layer_classes(net).ends
    assert all("downsample" in name for name in layer_classes(net).whole)


def test_patterns_say_what_stays_and_in_how_many_bits(sd):
    plan = ptq_plan(sd, 4, 8, inputs="dynamic", bits={"*.attn2.*": (8, 8), "mid_block.*": None, "conv_out": (6, 8)})
    assert plan.layers["conv_out"] == (6, 8)
    assert not any(name.startswith("mid_block.") for name in plan.layers)
    assert plan.layers["up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"] == (8, 8)
    assert plan.layers["up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"] == (4, 8)
    with pytest.raises(TargetError, match=r"'mid_blok\.\*' fits no layer"):
        ptq_plan(sd, inputs="dynamic", bits={"mid_blok.*": None})


def test_a_plan_is_plain_json(w4a4):
    assert QuantPlan.from_dict(json.loads(json.dumps(w4a4.to_dict()))) == w4a4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {}}, "quantises no layer"),
        ({"layers": {"conv_in": [9, 16]}}, "weight of 'conv_in' is 9"),
        ({"layers": {"conv_in": [4, 8]}}, "inputs is 'none' and 1 layers"),
        ({"layers": {"conv_in": [4, 8]}, "inputs": "static"}, "no range for the input of 'conv_in'"),
        ({"layers": {"conv_in": [4, 8]}, "inputs": "dynamic", "group": 64}, "scales of their own only where"),
        ({"layers": {"conv_in": [8, 16]}, "format": "nf4"}, "'nf4' is for weights of 4 bits"),
        ({"layers": {"conv_in": [4, 16]}, "observer": "mze"}, "did you mean 'mse'"),
        ({"layers": {"conv_in": [4, 16]}, "timesteps": [3.0, 1.0]}, "timesteps ascend"),
        ({"layers": {"conv_in": [4, 16]}, "gruop": 64}, "did you mean 'group'"),
    ],
)
def test_impossible_plans_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        QuantPlan.from_dict(changes)


def test_plans_that_do_not_fit_leave_the_model_alone(student):
    before = {name: type(layer) for name, layer in student.named_modules()}
    for plan, error, message in (
        (QuantPlan({"conv_inn": (4, 16)}), TargetError, "did you mean 'conv_in'"),
        (QuantPlan({"conv_norm_out": (4, 16)}), TargetError, "is a GroupNorm, which cannot be quantised"),
        (QuantPlan({"conv_in": (4, 16)}, architecture="FluxTransformer2DModel"), ModelError, "for a FluxTransformer"),
    ):
        with pytest.raises(error, match=message):
            vislr.apply(student, plan)
    timed = QuantPlan({"head": (4, 8)}, inputs="timestep", ranges={"head": (-1.0, 1.0)}, timesteps=(1.0, 2.0))
    with pytest.raises(ModelError, match="is told no timestep"):
        vislr.apply(tiny.tiny_vit(), timed)
    assert {name: type(layer) for name, layer in student.named_modules()} == before
    report = vislr.apply(student, QuantPlan({"conv_in": (4, 16)}))
    with pytest.raises(ModelError, match="'conv_in' is quantised already"):
        vislr.apply(student, QuantPlan({"conv_in": (4, 16)}))
    vislr.remove(student, report)


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        *((tiny.tiny_sd_pipeline, kind) for kind in ("w8a8 static", "w4a4 timestep", "w3 groups", "w2", "pruned")),
        *((tiny.tiny_sd3_pipeline, kind) for kind in ("w4a4 timestep", "nf4")),
    ],
)
def test_folders_hold_integers_and_reload_strictly(build, kind, tmp_path, runs):
    """Codes equal bit for bit, answers too; scales stay float32 when the rest is loaded as bfloat16."""
    pipe = build()
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    if component == "transformer":
        runs = replace(runs, options={**runs.options, "max_sequence_length": 16})
    if kind == "pruned":
        cut = "mid_block.attentions.0" if component == "unet" else "transformer_blocks.0"
        vislr.apply(pipe, LayerPlan((cut,), component=component))
    plan = {
        "w8a8 static": lambda: ptq_plan(pipe, 8, 8, source=runs),
        "w4a4 timestep": lambda: vislr.quantize.efficientdm_plan(pipe, 4, 4, source=runs),
        "w3 groups": lambda: weight_only_plan(pipe, 3, group=16),
        "w2": lambda: weight_only_plan(pipe, 2, group=None, ends=True),
        "nf4": lambda: weight_only_plan(pipe, 4, format="nf4"),
        "pruned": lambda: weight_only_plan(pipe, 4),
    }[kind]()
    vislr.apply(pipe, plan, name="quantised")
    inputs = sample_inputs(denoiser, {"tokens": 16, "height": 8, "width": 8}, device="cpu", batch=2)
    with torch.no_grad():
        expected = denoiser(**inputs)[0]
    folder = vislr.save(pipe, tmp_path / "folder")
    options = {"text_encoder_3": None, "tokenizer_3": None} if component == "transformer" else {}
    own = quant_layers(denoiser)
    for low in (True, False):
        again = diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=low, **options)
        loaded = getattr(again, component)
        assert type(loaded).__module__ == "vislr"
        assert {name: type(layer) for name, layer in quant_layers(loaded).items()} == {
            name: type(layer) for name, layer in own.items()
        }
        for name, layer in quant_layers(loaded).items():
            for key, value in layer._buffers.items():
                assert (value is None and own[name]._buffers[key] is None) or torch.equal(
                    value, own[name]._buffers[key]
                )
        with torch.no_grad():
            assert torch.equal(loaded(**inputs)[0], expected)
        half = diffusers.DiffusionPipeline.from_pretrained(
            folder, low_cpu_mem_usage=low, torch_dtype=torch.bfloat16, **options
        )
        for name, layer in quant_layers(getattr(half, component)).items():
            for key in SCALES:
                kept, other = own[name]._buffers[key], layer._buffers[key]
                assert kept is None or (other.dtype == torch.float32 and torch.equal(other, kept))
    # True sizes: codes in the file take the bits that they need.
    stored = load_file(folder / component / "diffusion_pytorch_model.safetensors")
    for name, layer in own.items():
        codes = stored[f"{name}.codes"]
        held = {2: 2, 3: 4, 4: 4, 8: 8}[layer.spec.bits]
        padded = layer.rows * -(-layer.columns // layer.block) * layer.block if held == 4 else layer.weight_count
        assert codes.element_size() * codes.numel() <= -(-padded * held // 8) + layer.rows
    assert vislr.recipe_of(vislr.load(folder))[-1]["report"]["kind"] == "quant"
    assert sizes(denoiser).total < sum(p.numel() * 4 for p in build().components[component].parameters())


@pytest.mark.slow
def test_a_folder_reloads_in_a_new_process_and_refuses_other_weights(sd, tmp_path, runs):
    pipe = copy.deepcopy(sd)
    vislr.apply(pipe, ptq_plan(pipe, 8, 8, source=runs))
    folder = vislr.save(pipe, tmp_path / "folder")
    code = (
        "import sys, torch, vislr; from diffusers import DiffusionPipeline;"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1]); print(type(pipe.unet.conv_in).__name__,"
        "int(pipe.unet.conv_in.codes.sum()))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["QuantConv2d", str(int(pipe.unet.conv_in.codes.sum()))]
    # Weights that are not the plan's: diffusers' own classes would fill in random numbers.
    sd.unet.save_pretrained(tmp_path / "plain")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(
        (tmp_path / "plain" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    with pytest.raises(FormatError, match="do not fit the plan"):
        vislr.UNet2DConditionModel.from_pretrained(folder / "unet")


def test_lora_goes_on_and_refuses_to_merge(sd):
    from peft import LoraConfig

    pipe = copy.deepcopy(sd)
    vislr.apply(pipe, weight_only_plan(pipe, 4))
    sample = {"tokens": 16, "height": 8, "width": 8}
    plain = answer(pipe.unet, sample)
    report = vislr.apply(pipe, LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"]), name="style")
    assert torch.equal(answer(pipe.unet, sample), plain)
    with torch.no_grad():
        for name, p in pipe.unet.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    changed = answer(pipe.unet, sample)
    assert (changed - plain).norm() > 0.01 * plain.norm()
    with pytest.raises(vislr.VislrError, match="cannot merge into a quantised weight"):
        pipe.fuse_lora()
    pipe.unfuse_lora()
    assert torch.equal(answer(pipe.unet, sample), changed)
    vislr.remove(pipe, report)
    ours = vislr.apply(pipe, vislr.ConvLoraConfig(r=2), name="ours")
    assert torch.equal(answer(pipe.unet, sample), plain)
    with pytest.raises(vislr.VislrError, match="cannot merge 'ours' into a quantised weight"):
        next(m for m in pipe.unet.modules() if hasattr(m, "convlora_A")).merge()
    vislr.remove(pipe, ours)
    assert torch.equal(answer(pipe.unet, sample), plain)


def test_a_file_of_a_lora_made_on_the_original_loads(sd, tmp_path):
    from peft import LoraConfig

    first = copy.deepcopy(sd)
    vislr.apply(first, LoraConfig(r=2, target_modules=["to_q", "conv1"]), name="style")
    with torch.no_grad():
        for name, p in first.unet.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    vislr.save_adapter(first, tmp_path / "style.safetensors", format="kohya")
    pipe = copy.deepcopy(sd)
    vislr.apply(pipe, weight_only_plan(pipe, 8, group=None))
    vislr.load_adapter(pipe, tmp_path / "style.safetensors", name="style")
    sample = {"tokens": 16, "height": 8, "width": 8}
    wanted, base = answer(first.unet, sample), answer(sd.unet, sample)
    assert (answer(pipe.unet, sample) - wanted).norm() < 0.1 * (wanted - base).norm()


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_for_all_timesteps(sd, w4a4):
    """No graph breaks; another timestep is another value, not another graph."""
    model = copy.deepcopy(sd.unet)
    vislr.apply(model, w4a4)
    inputs = sample_inputs(model, {"tokens": 16, "height": 8, "width": 8}, device="cpu", batch=2)
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    times = [torch.tensor([t, t]) for t in (999.0, 500.0, 7.0)]
    with torch.no_grad():
        expected = [model(**inputs | {"timestep": t})[0] for t in times]
        compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
        found = [compiled(**inputs | {"timestep": t})[0] for t in times]
    assert len(graphs) == 1
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_packed_eight_bit_weights_compile_in_bfloat16():
    torch.manual_seed(0)
    layer = quantized(torch.nn.Linear(64, 96), Spec(8, 16, "none", None, "uniform", True, 0), "minmax")
    layer = layer.to(torch.bfloat16)
    layer.way = "packed"
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_compiled_layers_are_one_graph():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 1))
    for name, spec in (("0", Spec(8, 8, "dynamic", None, "uniform", True, 0)),
                       ("2", Spec(4, 16, "none", None, "uniform", False, 0))):  # fmt: skip
        block[int(name)] = quantized(block[int(name)], spec, "minmax")
    x = torch.randn(2, 4, 8, 8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), block(x), atol=1e-5)
