"""`vislr doctor`: every rule on a file made for it, and diffusers' verdicts against what diffusers really does."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline

from vislr.cli import main
from vislr.core.errors import FormatError
from vislr.formats.canonical import CanonicalAdapter, Entry
from vislr.formats.doctor import as_data, block_of, examine, norm_of
from vislr.formats.doctor_picture import as_text, draw
from vislr.formats.doctor_rules import RULES, TOOLS, TRAITS, VERDICTS
from vislr.formats.exchange import write_canonical
from vislr.formats.weights_base import open_checkpoint

TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
FLUX_OUT = "single_transformer_blocks.0.proj_out"
SD3_OUT = "transformer_blocks.0.attn.to_out.0"
TEXT = "text_model_encoder_layers_0_"


def draw_values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def weight(kind, path):
    pipe = MODELS[kind]()
    return getattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer").get_submodule(path).weight


MODELS = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline, "sd3": tiny_sd3_pipeline, "flux": tiny_flux_pipeline}
SHAPES = {}


def shape(kind, path):
    if (kind, path) not in SHAPES:
        SHAPES[kind, path] = tuple(weight(kind, path).shape)
    return SHAPES[kind, path]


def pair(key, of, r=2, style="down/up", out=None):
    """The two tensors of a LoRA on a weight of shape `of`, behind `key`."""
    a, b = {"down/up": ("lora_down", "lora_up"), "A/B": ("lora_A", "lora_B")}[style]
    ones = (1,) * (len(of) - 2)
    return {f"{key}.{a}.weight": draw_values(r, *of[1:]), f"{key}.{b}.weight": draw_values(out or of[0], r, *ones)}


def kohya(path, prefix="lora_unet_"):
    return prefix + path.replace(".", "_")


def sd(extra=None, path=TO_Q, alpha=1.0):
    """A kohya LoRA on one layer of the tiny SD UNet, and more tensors."""
    key = kohya(path)
    return {**pair(key, shape("sd", path)), f"{key}.alpha": torch.tensor(alpha), **(extra or {})}


def tucker(r_out, r_in):
    out, inside, *kernel = shape("sd", CONV)
    key = kohya(CONV)
    return {f"{key}.lora_down.weight": draw_values(r_in, inside, 1, 1), f"{key}.alpha": torch.tensor(1.0),
            f"{key}.lora_mid.weight": draw_values(r_out, r_in, *kernel),
            f"{key}.lora_up.weight": draw_values(out, r_out, 1, 1)}  # fmt: skip


def loha(key, of):
    sizes = {"a": (of[0], 2), "b": (2, of[1])}
    factors = {f"{key}.hada_w{n}_{side}": draw_values(*sizes[side]) for n in "12" for side in "ab"}
    return {**factors, f"{key}.alpha": torch.tensor(1.0)}


def lokr(key, of):
    return {f"{key}.lokr_w1": draw_values(2, 2), f"{key}.lokr_w2": draw_values(of[0] // 2, of[1] // 2)}


def text(parts):
    found = {}
    for part in parts:
        wide = {"mlp_fc1": (32, 16), "mlp_fc2": (16, 32)}.get(part, (16, 16))
        key = f"lora_te_{TEXT}{part}"
        found |= {**pair(key, wide), f"{key}.alpha": torch.tensor(1.0)}
    return found


def header_of(component, path, alpha):
    values = {"r": 2, "lora_alpha": alpha, "target_modules": [path]}
    return {"lora_adapter_metadata": json.dumps({f"{component}.{key}": value for key, value in values.items()})}


def plain(prefix, kind, path, alpha=None):
    key = prefix + path
    return pair(key, shape(kind, path), style="A/B") | ({} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)})


def flux_linear2():
    return shape("flux", FLUX_OUT)


def flux_fused():
    inside = shape("flux", "transformer_blocks.0.attn.to_q")[1]
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    return {**pair(key, (3 * inside, inside), r=6), f"{key}.alpha": torch.tensor(2.0)}


FLUX_KEY, FLUX_DOT = "lora_unet_single_blocks_0_linear2", "single_blocks.0.linear2"
SD3_KEY = "lora_unet_joint_blocks_0_x_block_attn_proj"
SGM_Q = "middle_block.1.transformer_blocks.0.attn1.to_q"
DIT_Q = "transformer_blocks.0.attn1.to_q"
EMBEDDING = "add_embedding.linear_1"

CONVLORA = {"convlora_A": draw_values(3, 48), "convlora_B": draw_values(48, 3)}
STATISTICS = {"adabn_mean": torch.zeros(4), "adabn_var": torch.ones(4), "adabn_count": torch.tensor(3)}


def lora(size):
    return {"lora_down.weight": draw_values(2, size), "lora_up.weight": draw_values(size, 2)}


def own(kind, path, of, tensors):
    """Entries of a file in vislr's own format."""
    return {f"unet.{path}": Entry(kind, tensors, of)}


# name -> (model, tensors, header)
FILES = {
    "lora": ("sd", lambda: sd(), {"ss_base_model_version": "sd_v1"}),
    "diffusers": ("sd", lambda: plain("unet.", "sd", TO_Q), {}),
    "diffusers scale": ("sd", lambda: plain("unet.", "sd", TO_Q), header_of("unet", TO_Q, 6)),
    "diffusers dora": (
        "sd",
        lambda: plain("unet.", "sd", TO_Q)
        | {f"unet.{TO_Q}.lora_magnitude_vector": draw_values(shape("sd", TO_Q)[0]).abs()},
        {},
    ),
    "nan": ("sd", lambda: sd(path=CONV) | {f"{kohya(TO_Q)}.diff": torch.full(shape("sd", TO_Q), torch.nan)}, {}),
    "half": ("sd", lambda: {key: value * 1e7 if "up" in key else value for key, value in sd().items()}, {}),
    "fused": ("flux", flux_fused, {"ss_network_dim": "2", "ss_network_alpha": "2"}),
    "sd3 kohya": ("sd3", lambda: {**pair(SD3_KEY, shape("sd3", SD3_OUT)), f"{SD3_KEY}.alpha": torch.tensor(1.0)}, {}),
    "tucker": ("sd", lambda: tucker(2, 2), {}),
    "tucker not square": ("sd", lambda: tucker(3, 2), {}),
    "loha": ("sd", lambda: loha(kohya(TO_Q), shape("sd", TO_Q)), {}),
    "lokr": ("sd", lambda: lokr(kohya(TO_Q), shape("sd", TO_Q)), {}),
    "flux loha": ("flux", lambda: loha(FLUX_KEY, flux_linear2()), {}),
    "flux lokr": ("flux", lambda: lokr(FLUX_KEY, flux_linear2()), {}),
    "oft": ("sd", lambda: {f"{kohya(TO_Q)}.oft_blocks": draw_values(2, 4, 4)}, {}),
    "diff": ("sd", lambda: sd(path=CONV) | {f"{kohya(TO_Q)}.diff": draw_values(*shape("sd", TO_Q))}, {}),
    "bias": ("sd", lambda: sd(path=CONV) | {f"{kohya(CONV)}.diff_b": draw_values(shape("sd", CONV)[0])}, {}),
    "flux bias": (
        "flux",
        lambda: pair(FLUX_KEY, flux_linear2()) | {f"{FLUX_KEY}.diff_b": draw_values(flux_linear2()[0])},
        {},
    ),
    "norm": ("sd", lambda: sd() | {"lora_unet_conv_norm_out.w_norm": draw_values(*shape("sd", "conv_norm_out"))}, {}),
    "dora": ("sd", lambda: sd({f"{kohya(TO_Q)}.dora_scale": draw_values(shape("sd", TO_Q)[0], 1)}), {}),
    "dora in": ("sd", lambda: sd({f"{kohya(TO_Q)}.dora_scale": draw_values(1, shape("sd", TO_Q)[1])}), {}),
    "text q": ("sd", lambda: sd() | text(["self_attn_q_proj"]), {}),
    "text q mlp": ("sd", lambda: sd() | text(["self_attn_q_proj", "mlp_fc1"]), {}),
    "text all": ("sd", lambda: sd() | text(["self_attn_q_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2"]), {}),
    "add_embedding": ("sdxl", lambda: pair(kohya(EMBEDDING), shape("sdxl", EMBEDDING)), {}),
    "comfy": ("sd", lambda: pair(f"diffusion_model.{SGM_Q}", shape("sd", TO_Q)), {}),
    "sd3 comfy": ("sd3", lambda: pair("diffusion_model.joint_blocks.0.x_block.attn.proj", shape("sd3", SD3_OUT)), {}),
    "flux comfy": ("flux", lambda: pair(f"diffusion_model.{FLUX_DOT}", flux_linear2()), {}),
    "flux comfy A/B": ("flux", lambda: pair(f"diffusion_model.{FLUX_DOT}", flux_linear2(), style="A/B"), {}),
    "flux model": ("flux", lambda: pair(f"model.diffusion_model.{FLUX_DOT}", flux_linear2()), {}),
    "flux kohya": ("flux", lambda: pair(FLUX_KEY, flux_linear2()), {}),
    "bare": ("sd", lambda: plain("", "sd", TO_Q), {}),
    "peft": ("sd", lambda: plain("base_model.model.", "sd", TO_Q), {}),
    "sd3 peft": ("sd3", lambda: plain("base_model.model.", "sd3", SD3_OUT), {"ss_base_model_version": "medium"}),
    "flux peft": ("flux", lambda: plain("base_model.model.", "flux", FLUX_OUT), {}),
    "diffusers alpha": ("sd", lambda: plain("unet.", "sd", TO_Q, 1.0), {}),
    "sd3 alpha": ("sd3", lambda: plain("transformer.", "sd3", SD3_OUT, 1.0), {"ss_base_model_version": "medium"}),
    "sd3 diffusers": ("sd3", lambda: plain("transformer.", "sd3", SD3_OUT), {"ss_base_model_version": "medium"}),
    "flux alpha": ("flux", lambda: plain("transformer.", "flux", FLUX_OUT, 1.0), {}),
    "flux both": ("flux", lambda: plain("transformer.", "flux", FLUX_OUT, 6.0), header_of("transformer", FLUX_OUT, 6)),
    "wrong version": (
        None,
        lambda: pair("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", (1280, 768)),
        {"ss_base_model_version": "sdxl_base_v1-0"},
    ),
    "alpha 0": ("sd", lambda: sd(alpha=0.0), {}),
    "glora": ("sd", lambda: sd({f"{kohya(CONV)}.a1.weight": draw_values(2, 2)}), {}),
    "unknown": ("sd", lambda: sd({"lora_unet_no_such_layer.alpha": torch.tensor(1.0)}), {}),
    "pixart": (None, lambda: pair(kohya(DIT_Q, "lora_transformer_"), (16, 16)), {"ss_base_model_version": "pixart"}),
    "dit": (None, lambda: pair(f"transformer.{DIT_Q}", (16, 16)), {"ss_base_model_version": "dit"}),
    "vislr": (None, lambda: own("lora", TO_Q, (16, 16), lora(16)), "sd15"),
    "convlora": (None, lambda: own("convlora", CONV, (16, 16, 3, 3), CONVLORA), "sd15"),
    "adabn": (None, lambda: {"bn1": Entry("adabn", STATISTICS, (4,))}, "timm"),
}  # fmt: skip

# (tool, needs) -> the file that shows it; one for every rule.
SHOWN_BY = {
    ("not finite",): "nan",
    ("beyond half",): "half",
    ("fused, alpha kept",): "fused",
    ("ours",): "convlora",
    ("adabn",): "adabn",
    ("vislr",): "vislr",
    ("other family",): "dit",
    ("kohya", "sd3"): "sd3 kohya",
    ("tucker", "unet"): "tucker",
    ("loha", "unet"): "loha",
    ("lokr", "unet"): "lokr",
    ("loha", "flux"): "flux loha",
    ("lokr", "flux"): "flux lokr",
    ("oft",): "oft",
    ("diff", "unet"): "diff",
    ("bias", "unet"): "bias",
    ("bias", "flux"): "flux bias",
    ("norm", "unet"): "norm",
    ("dora by output",): "dora",
    ("dora by input",): "dora in",
    ("text q/k/v without out", "kohya"): "text q",
    ("text q/k/v without out", "text mlp", "kohya"): "text q mlp",
    ("add_embedding", "kohya"): "add_embedding",
    ("comfy", "unet"): "comfy",
    ("comfy", "sd3"): "sd3 comfy",
    ("comfy", "A/B", "flux"): "flux comfy A/B",
    ("comfy", "model prefix", "flux"): "flux model",
    ("bare",): "bare",
    ("bare", "unet"): "bare",
    ("peft",): "peft",
    ("peft", "unet"): "peft",
    ("peft", "sd3"): "sd3 peft",
    ("peft", "flux"): "flux peft",
    ("diffusers", "alpha tensors", "unet"): "diffusers alpha",
    ("diffusers", "alpha tensors", "sd3"): "sd3 alpha",
    ("diffusers", "alpha tensors", "header", "flux"): "flux both",
    ("tucker not square",): "tucker not square",
    ("scale in header",): "diffusers scale",
    ("diffusers", "unet"): "diffusers",
    ("sd3",): "sd3 kohya",
    ("flux",): "flux kohya",
    ("pixart",): "pixart",
    ("pixart", "kohya"): "pixart",
    ("wrong base version",): "wrong version",
    ("diffusers",): "diffusers",
    ("comfy",): "comfy",
    ("tucker", "kohya"): "tucker",
    ("loha", "kohya"): "loha",
    ("lokr", "kohya"): "lokr",
    ("oft", "kohya"): "oft",
    ("diff", "kohya"): "diff",
    ("bias", "kohya"): "bias",
    ("norm", "kohya"): "norm",
    ("dora by output", "kohya"): "dora",
    ("dora by input", "kohya"): "dora in",
    ("alpha 0", "kohya"): "alpha 0",
    ("unsupported",): "glora",
    ("unplaced",): "unknown",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("doctor")


def made(name, folder):
    path = folder / f"{name.replace(' ', '-').replace('/', '')}.safetensors"
    if not path.is_file():
        _, tensors, header = FILES[name]
        if isinstance(header, str):
            write_canonical(CanonicalAdapter(tensors(), header), path, "vislr")
        else:
            save_file({key: value.contiguous() for key, value in tensors().items()}, path, metadata=header or None)
    return path


def verdict_of(found, tool):
    return next(verdict for verdict in found.verdicts if verdict.tool == tool)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.tool}: {', '.join(rule.needs)}")
def test_every_rule_fires_on_its_file(rule, folder):
    found = examine(made(SHOWN_BY[rule.needs], folder))
    verdict = verdict_of(found, rule.tool)
    assert rule.says.format(n=found.traits[rule.needs[0]]) in verdict.says
    fired = [r for r in RULES if r.tool == rule.tool and r.says.format(n=found.traits[r.needs[0]]) in verdict.says]
    assert rule in fired
    assert verdict.verdict == max((r.verdict for r in fired), key=VERDICTS.index)


def test_rules_and_traits_are_whole():
    used = {trait for rule in RULES for trait in (*rule.needs, *rule.unless)}
    assert used == set(TRAITS)
    assert {rule.verdict for rule in RULES} | {"loads"} == set(VERDICTS)
    assert {rule.tool for rule in RULES} == set(TOOLS)
    assert len({(rule.tool, rule.needs) for rule in RULES}) == len(RULES)
    assert set(SHOWN_BY) == {rule.needs for rule in RULES}


@pytest.mark.parametrize(
    ("name", "tools"),
    [
        ("lora", tuple(TOOLS)),
        ("text all", tuple(TOOLS)),
        ("diffusers", ("diffusers", "comfyui", "vislr")),
        ("diffusers dora", ("diffusers", "vislr")),
        ("tucker", ("comfyui", "a1111", "vislr")),
        ("loha", ("comfyui", "a1111", "vislr")),
        ("dora in", ("a1111", "vislr")),
        ("sd3 kohya", ("comfyui", "sd-scripts", "vislr")),
        ("flux kohya", ("diffusers", "comfyui", "sd-scripts", "vislr")),
        ("flux comfy", ("diffusers", "comfyui", "vislr")),
        ("vislr", ("vislr",)),
        ("convlora", ("vislr",)),
        ("adabn", ("vislr",)),
    ],
)
def test_what_loads_is_said_to_load(name, tools, folder):
    found = examine(made(name, folder))
    for tool in tools:
        assert verdict_of(found, tool) == replace(verdict_of(found, tool), verdict="loads", says=(), fix="")


def really(kind, path, layers):
    """What diffusers does: "refuses" (raises), "drops" (layers missing), "loads"."""
    from diffusers.utils import logging
    from peft.tuners.tuners_utils import BaseTunerLayer

    logging.set_verbosity_error()
    pipe = MODELS[kind]()
    try:
        pipe.load_lora_weights(str(path), adapter_name="a")
    except (ValueError, KeyError):
        return "refuses", {}
    modules = [getattr(pipe, name, None) for name in ("unet", "transformer", "text_encoder", "text_encoder_2")]
    scales = {
        name: float(module.scaling["a"])
        for model in modules if model is not None
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and "a" in module.scaling
    }  # fmt: skip
    return ("loads" if len(scales) >= layers else "drops"), scales


# What no conversion mends: the values or the keys themselves are wrong.
BROKEN = ("nan", "half", "fused", "glora", "unknown", "alpha 0")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "pipe"
    tiny_sd_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in FILES if name not in BROKEN])
def test_the_fix_makes_a_file_that_loads(name, folder, base, capsys):
    path = made(name, folder)
    found = examine(path)
    for verdict in found.verdicts:
        if not verdict.fix:
            # Nothing in a format can hold these, or there is nothing to mend.
            assert verdict.verdict in ("loads", "loads if", "unknown") or {"oft", "adabn", "bias"} & set(found.traits)
            continue
        words = [str(base) if word == "BASE" else word for word in shlex.split(verdict.fix)]
        assert words[0] == "vislr"
        assert main(words[1:]) == 0, capsys.readouterr().err
        mended = examine(words[3])
        again = verdict_of(mended, verdict.tool)
        assert again.verdict in ("loads", "loads if", "unknown"), again
        if verdict.tool == "diffusers" and FILES[name][0] is not None:
            assert really(FILES[name][0], words[3], sum(mended.components.values()))[0] == "loads"


REAL = [name for name, (kind, _, _) in FILES.items() if kind is not None and name not in ("unknown", "glora")]


@pytest.mark.parametrize("name", REAL)
def test_diffusers_does_what_the_doctor_says(name, folder):
    path = made(name, folder)
    found = examine(path)
    said = verdict_of(found, "diffusers")
    layers = sum(found.components.values())
    did, scales = really(FILES[name][0], path, layers)
    if said.verdict in ("breaks", "mis-scales"):
        assert did in ("loads", "refuses")
    elif name in ("dora", "dora in", "flux bias"):
        assert (said.verdict, did) == ("drops", "loads")  # of each layer a part is dropped
    else:
        assert did == said.verdict
    if said.verdict == "loads":
        assert sorted(set(scales.values())) == sorted(found.scales)


def test_norms_are_those_of_the_deltas():
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    low = {"lora_down.weight": draw(2, 6, 3, 3), "lora_up.weight": draw(8, 2, 1, 1), "alpha": torch.tensor(5.0)}
    wide = {"lora_down.weight": draw(9, 6), "lora_up.weight": draw(8, 9), "diff_b": draw(8)}
    entries = [
        Entry("lora", low, (8, 6, 3, 3)),
        Entry("lora", wide, (8, 6)),
        Entry("loha", {f"hada_w{n}_{s}": draw(*((8, 2) if s == "a" else (2, 6))) for n in "12" for s in "ab"}, (8, 6)),
        Entry("lokr", {"lokr_w1": draw(2, 2), "lokr_w2": draw(4, 3)}, (8, 6)),
        Entry("diff", {"diff": draw(8, 6)}, (8, 6)),
        Entry("norm", {"w_norm": draw(8), "b_norm": draw(8)}, (8,)),
        Entry("convlora", {"convlora_A": draw(6, 18), "convlora_B": draw(24, 6)}, (8, 6, 3, 3)),
    ]
    for entry in entries:
        squared = entry.delta(dtype=torch.float64).square().sum()
        bias = entry.bias_delta(torch.float64)
        expected = float((squared + (0 if bias is None else bias.square().sum())).sqrt())
        assert norm_of(entry) == pytest.approx(expected, rel=1e-5)
    dora = Entry("lora", {**low, "dora_scale": draw(8, 1, 1, 1).abs()}, (8, 6, 3, 3))
    assert norm_of(dora) is None
    weight = draw(8, 6, 3, 3)
    assert norm_of(dora, weight) == pytest.approx(float(dora.delta(weight, torch.float64).norm()), rel=1e-5)
    assert norm_of(Entry("adabn", {"adabn_mean": draw(2)})) is None


def test_blocks():
    names = {
        "unet.down_blocks.1.attentions.0.proj_in": "unet.down_blocks.1",
        "unet.mid_block.resnets.0.conv1": "unet.mid_block",
        "unet.conv_in": "unet.other",
        "transformer.single_transformer_blocks.7.proj_out": "transformer.single_transformer_blocks.7",
        "text_encoder.text_model.encoder.layers.3.mlp.fc1": "text_encoder.layers.3",
        "layer1.0.conv1": "layer1.0",
        "blocks.3.attn.qkv": "blocks.3",
        "head": "other",
    }
    assert {name: block_of(name) for name in names} == names


def many(folder, change, name):
    """A LoRA on eight layers, with one changed."""
    layers = [f"lora_unet_down_blocks_{b}_attentions_{a}_transformer_blocks_0_attn{n}_to_q"
              for b in (0, 1) for a in (0, 1) for n in (1, 2)]  # fmt: skip
    tensors = {}
    for layer in layers:
        tensors |= {**pair(layer, (320, 320)), f"{layer}.alpha": torch.tensor(1.0)}
    change(tensors, layers)
    save_file(tensors, folder / name, metadata={"ss_sd_model_name": "/home/someone/models/base.safetensors"})
    return folder / name


def test_dead_and_exploding_layers_and_leaks_are_named(folder):
    def change(tensors, layers):
        tensors[f"{layers[0]}.lora_up.weight"].zero_()
        tensors[f"{layers[5]}.lora_up.weight"].mul_(1000)

    found = examine(many(folder, change, "sick.safetensors"))
    dead = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    loud = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
    assert found.problems == [
        f"1 of 8 layers do nothing, '{dead}' for one",
        f"'{loud}' explodes: 1000 times the median layer's change",
    ]
    assert found.layers[dead] == 0
    assert found.notes == ["the header names folders of a machine: ss_sd_model_name"]
    assert list(found.blocks) == ["unet.down_blocks.0", "unet.down_blocks.1"]
    inside = [norm for name, norm in found.layers.items() if "down_blocks.1" in name]
    assert found.blocks["unet.down_blocks.1"] == pytest.approx(sum(norm**2 for norm in inside) ** 0.5)
    text = as_text(found)
    assert "lora 8 for sd15 in kohya's format" in text
    assert "2 x 8" in text
    assert "0.5 x 8" in text
    assert "ss_sd_model_name = /home/someone/models/base.safetensors" in text


def test_the_picture_has_a_bar_for_every_block(folder):
    from PIL import Image

    found = examine(many(folder, lambda tensors, layers: None, "well.safetensors"))
    assert found.problems == []
    path = draw(found, folder / "norms.png")
    with Image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
    # The bars' colour covers two bars' worth of the picture.
    blue = sum(count for count, (r, g, b) in colours if b > r + 40 and b > g + 20)
    assert blue > 10_000


def test_a_base_is_compared(folder, tmp_path):
    pipe = tiny_sd_pipeline()
    pipe.save_pretrained(tmp_path / "pipe", safe_serialization=True)
    base = open_checkpoint(tmp_path / "pipe")
    found = examine(made("lora", folder), base)
    assert found.problems == []
    layer = pipe.unet.get_submodule(TO_Q).weight.detach()
    assert found.relative[f"unet.{TO_Q}"] == pytest.approx(found.layers[f"unet.{TO_Q}"] / float(layer.norm()), rel=1e-5)
    assert "% of a weight" in as_text(found)
    assert "--base BASE" in verdict_of(examine(made("dora", folder)), "comfyui").fix
    with_base = examine(made("dora", folder), base)
    assert f"--base {tmp_path / 'pipe'}" in verdict_of(with_base, "comfyui").fix
    assert f"unet.{TO_Q}" in with_base.layers
    wrong = examine(many(folder, lambda tensors, layers: None, "other.safetensors"), base)
    assert wrong.problems[0].startswith("the base has no layer for ")
    assert "2 layers have another shape in the base" in wrong.problems[1]


def test_the_base_that_it_was_made_on_is_recognised(tmp_path):
    from peft import LoraConfig

    from vislr.adapters import attach
    from vislr.formats import write_adapter

    pipe = tiny_sd_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    attach(pipe.unet, LoraConfig(r=2, target_modules=["to_q"]), "a")
    write_adapter(pipe.unet, "a", tmp_path / "a.safetensors", component="unet")
    found = examine(tmp_path / "a.safetensors", open_checkpoint(tmp_path / "pipe"))
    assert "the base is the one that it was made on, bit for bit" in found.notes
    # A new LoRA changes nothing.
    count = len(found.layers)
    assert [line.split(",")[0] for line in found.problems] == [f"{count} of {count} layers do nothing"]
    tiny_sd_pipeline(seed=1).save_pretrained(tmp_path / "other")
    found = examine(tmp_path / "a.safetensors", open_checkpoint(tmp_path / "other"))
    assert "the base has other weights than the one that it was made on" in found.notes


def test_the_command(folder, tmp_path, capsys):
    path = made("loha", folder)
    assert main(["doctor", str(path), "--picture", str(tmp_path / "p.png")]) == 0
    said = capsys.readouterr().out
    assert "loha 1 for sd15" in said
    assert "refuses" in said
    assert f"fix: vislr convert {path} " in said
    assert (tmp_path / "p.png").stat().st_size > 1000
    shipped = ["--config", "doctor.yaml", "--picture", str(tmp_path / "q.png")]
    assert main(["doctor", str(path), *shipped]) == 0
    assert "the base has no layer for" not in capsys.readouterr().out
    assert main(["doctor", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["traits"]["loha"] == 1
    assert [verdict["tool"] for verdict in data["verdicts"]] == list(TOOLS)
    assert json.loads(as_data(examine(path))) == data
    assert main(["doctor", str(tmp_path / "none.safetensors")]) == 2
    assert capsys.readouterr().err.startswith("FormatError: there is no file")


def test_a_folder_of_peft(tmp_path):
    from peft import LoraConfig, get_peft_model
    from torch import nn

    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "folder")
    found = examine(tmp_path / "folder")
    assert found.format == "peft"
    assert found.kinds == {"lora": 1}
    with pytest.raises(FormatError, match=r"no folder of peft"):
        examine(tmp_path)
