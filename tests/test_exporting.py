"""Exports and recipes: stock folders without vislr, release layouts that diffusers reads back, replay and undo."""

import json
import subprocess
import sys

import diffusers
import pytest
import tiny
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

import vislr
from vislr import exporting, replaying
from vislr.anatomy import sample_inputs
from vislr.cli import main
from vislr.core.errors import FormatError, ModelError, UndoError
from vislr.formats.single_file import PREFIX
from vislr.prune import LayerPlan, Random, plan_layers, ssd_1b_plan
from vislr.prune.plain import as_stock, stock_model


def sdxl_unet():
    torch.manual_seed(0)
    return tiny.tiny_unet(
        cross_attention_dim=16, transformer_layers_per_block=(1, 3), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip


def sd3(**changes):
    torch.manual_seed(0)
    return tiny.tiny_sd3_transformer(num_layers=4, **changes)


def flux():
    torch.manual_seed(0)
    return tiny.tiny_flux_transformer(num_layers=2, num_single_layers=3)


def blocks(model, layers):
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    torch.manual_seed(0)
    if model == "dit":
        return DiTTransformer2DModel(
            sample_size=8, patch_size=2, num_layers=layers, num_attention_heads=2, attention_head_dim=8, in_channels=4,
            out_channels=8, num_embeds_ada_norm=10, norm_num_groups=4,
        ).eval()  # fmt: skip
    return PixArtTransformer2DModel(
        sample_size=8, patch_size=2, num_layers=layers, num_attention_heads=3, attention_head_dim=8, in_channels=4,
        out_channels=8, cross_attention_dim=24, caption_channels=24, norm_num_groups=4, use_additional_conditions=True,
    ).eval()  # fmt: skip


_T = "transformer_blocks"
PLAIN = {
    "unet": (sdxl_unet, [f"down_blocks.1.attentions.0.{_T}.1", f"down_blocks.1.attentions.0.{_T}.2",
                         f"mid_block.attentions.0.{_T}.0", f"mid_block.attentions.0.{_T}.1",
                         f"up_blocks.0.attentions.1.{_T}.0"], {"tokens": 16}),
    "unet depths": (sdxl_unet, [f"mid_block.attentions.0.{_T}.0", f"up_blocks.0.attentions.0.{_T}.2",
                                f"up_blocks.0.attentions.1.{_T}.0", f"up_blocks.0.attentions.1.{_T}.1"],
                    {"tokens": 16}),
    "unet stage": (sdxl_unet, ["up_blocks.0.attentions.0", "up_blocks.0.attentions.1",
                               f"mid_block.attentions.0.{_T}.2"], {"tokens": 16}),
    "unet small middle": (sdxl_unet, ["mid_block.attentions.0", "mid_block.resnets.1"], {"tokens": 16}),
    "unet no middle": (sdxl_unet, ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"],
                       {"tokens": 16}),
    "sd3 middle": (sd3, [f"{_T}.1"], {"tokens": 16}),
    "sd3 last": (sd3, [f"{_T}.3", f"{_T}.0"], {"tokens": 16}),
    "sd3 dual": (lambda: sd3(dual_attention_layers=(0, 2)), [f"{_T}.1", f"{_T}.3"], {"tokens": 16}),
    "flux": (flux, [f"{_T}.0", f"single_{_T}.1"], {"tokens": 16, "height": 4, "width": 4}),
    "pixart": (lambda: blocks("pixart", 3), [f"{_T}.0"], {"tokens": 5}),
    "dit": (lambda: blocks("dit", 3), [f"{_T}.1"], {}),
}  # fmt: skip


def answer(model, sample):
    with torch.no_grad():
        return model(**sample_inputs(model, sample, device="cpu"))[0]


@pytest.mark.parametrize("name", PLAIN)
def test_a_stock_model_answers_the_same(name, tmp_path):
    build, removed, sample = PLAIN[name]
    model = build()
    vislr.apply(model, LayerPlan(tuple(removed)))
    expected = answer(model, sample)
    stock = stock_model(model)
    assert type(stock).__module__.startswith("diffusers.")
    torch.testing.assert_close(answer(stock, sample), expected, rtol=0, atol=1e-6)
    assert sum(p.numel() for p in stock.parameters()) <= sum(p.numel() for p in model.parameters())
    exporting.export_plain(model, tmp_path / "plain")
    loaded = getattr(diffusers, type(model).__name__).from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(answer(loaded, sample), expected, rtol=0, atol=1e-5)
    assert type(model).__module__ == "vislr", "the pruned model stays what it is"


@pytest.mark.parametrize(
    ("build", "removed", "unit"),
    [
        (tiny.tiny_unet, ["up_blocks.0.resnets.1"], "up_blocks.0.resnets.1"),
        (sdxl_unet, ["mid_block.attentions.0"], "mid_block.attentions.0"),
        (sdxl_unet, ["up_blocks.0.attentions.1"], "up_blocks.0.attentions.1"),
        (sd3, [f"{_T}.1.ff"], f"{_T}.1.ff"),
        (sd3, [f"{_T}.1.norm1"], f"{_T}.1.norm1"),
        (lambda: blocks("dit", 3), [f"{_T}.0"], f"{_T}.0"),
    ],
)
def test_what_no_stock_config_says_is_refused_by_name(build, removed, unit):
    model = build()
    vislr.apply(model, LayerPlan(tuple(removed)))
    with pytest.raises(FormatError, match=f"'{unit}'"):
        as_stock(model)


def test_a_plain_folder_needs_no_vislr(tmp_path):
    torch.set_num_threads(1)
    pipe = tiny.tiny_sd_pipeline()
    pipe.register_modules(unet=tiny.tiny_unet(transformer_layers_per_block=(1, 2)))
    removed = [f"{stage}.{_T}.1" for stage in ("down_blocks.1.attentions.0", "mid_block.attentions.0",
                                               "up_blocks.0.attentions.0")]  # fmt: skip
    vislr.apply(pipe, LayerPlan(tuple(removed)))
    expected = answer(pipe.unet, {"tokens": 16})
    folder = exporting.export_plain(pipe, tmp_path / "plain")
    assert pipe.config.unet[0] == "vislr"
    assert "vislr" not in json.loads((folder / "unet" / "config.json").read_text())
    code = (
        "import sys, torch; torch.set_num_threads(1)\nfrom diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\nassert 'vislr' not in sys.modules\n"
        "print(sum(p.numel() for p in pipe.unet.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(p.numel() for p in pipe.unet.parameters())
    again = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    torch.testing.assert_close(answer(again, {"tokens": 16}), expected, rtol=0, atol=1e-5)


def read_back(name, model, checkpoint):
    if name.startswith("unet"):
        return single_file_utils.convert_ldm_unet_checkpoint(checkpoint, {**model.config, "class_embed_type": None})
    if name.startswith("sd3"):
        return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    return single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)


@pytest.mark.parametrize("name", ["unet whole", "unet depths", "unet small middle", "sd3 whole", "sd3 dual whole"])
def test_single_files_are_what_diffusers_reads_from_releases(name, tmp_path):
    """The layout is the release's: diffusers' own converter gives every tensor back."""
    wholes = {"unet whole": sdxl_unet, "sd3 whole": sd3, "sd3 dual whole": PLAIN["sd3 dual"][0]}
    build, removed, _ = PLAIN.get(name) or (wholes[name], [], {})
    model = build()
    vislr.apply(model, LayerPlan(tuple(removed)))
    _, _, state = as_stock(model)
    path = exporting.export_single_file(model, tmp_path / "file.safetensors")
    checkpoint = load_file(path)
    assert all(key.startswith(PREFIX) for key in checkpoint)
    back = read_back(name, stock_model(model), checkpoint)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["unet", "sd3 middle"])
def test_what_comfyui_would_take_for_another_model_is_refused(name, tmp_path):
    build, removed, _ = PLAIN[name]
    model = build()
    vislr.apply(model, LayerPlan(tuple(removed)))
    with pytest.raises(FormatError, match=r"ComfyUI.*export --plain"):
        exporting.export_single_file(model, tmp_path / "file.safetensors")


@pytest.mark.slow
def test_ssd_1b_is_a_stock_config_that_comfyui_knows():
    """The published list on SDXL at true size says what SSD-1B's own config says."""
    from vislr.anatomy import skeleton

    unet = skeleton("sdxl")
    vislr.apply(unet, ssd_1b_plan(unet))
    name, config, state = as_stock(unet)
    assert config["mid_block_type"] == "UNetMidBlock2D"
    assert config["transformer_layers_per_block"] == [1, 2, 4]
    assert config["reverse_transformer_layers_per_block"] == [[4, 4, 10], [2, 1, 1], 1]
    exporting._check_comfy(unet, name, config)
    total = sum(value.numel() for value in state.values())
    assert total == sum(p.numel() for p in unet.parameters())


def test_flux_single_file_has_the_release_s_keys_and_shapes(tmp_path):
    """diffusers' converter knows FLUX at its true width alone, so shapes are checked by hand."""
    model = flux()
    vislr.apply(model, LayerPlan((f"{_T}.0", f"single_{_T}.1")))
    file = load_file(exporting.export_single_file(model, tmp_path / "flux.safetensors"))
    file = {key.removeprefix(PREFIX): value for key, value in file.items()}
    numbers = {(key.split(".")[0], int(key.split(".")[1])) for key in file if "_blocks." in key}
    assert numbers == {("double_blocks", 0), ("single_blocks", 0), ("single_blocks", 1)}
    last = model.single_transformer_blocks[2]
    joined = torch.cat([last.attn.to_q.weight, last.attn.to_k.weight, last.attn.to_v.weight, last.proj_mlp.weight])
    assert torch.equal(file["single_blocks.1.linear1.weight"], joined)
    assert torch.equal(file["single_blocks.1.norm.query_norm.scale"], last.attn.norm_q.weight)
    scale, shift = model.norm_out.linear.weight.chunk(2)
    assert torch.equal(file["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))
    total = sum(value.numel() for value in file.values())
    assert total == sum(p.numel() for p in model.parameters())


def test_what_exports_refuse(tmp_path):
    with pytest.raises(FormatError, match="PixArtTransformer2DModel has no single-file layout"):
        exporting.export_single_file(blocks("pixart", 2), tmp_path / "x.safetensors")
    unet = tiny.tiny_unet()
    vislr.apply(unet, vislr.ConvLoraConfig(r=1), name="style")
    with pytest.raises(FormatError, match="fuse 'style'"):
        exporting.export_plain(unet, tmp_path / "plain")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(vislr.VislrError, match="holds other files"):
        exporting.export_plain(tiny.tiny_unet(), tmp_path / "mine")


def test_onnx_needs_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install onnx onnxscript"):
        exporting.export_onnx(tiny.tiny_unet(), tmp_path / "unet.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "apart"), [("unet", False), ("unet", True), ("sd3", False), ("flux", False)])
def test_onnx_answers_the_same(name, apart, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    build, removed, sample = {
        "unet": (tiny.tiny_unet, ("mid_block.attentions.0", "up_blocks.0.resnets.0"), {"tokens": 16}),
        "sd3": (tiny.tiny_sd3_transformer, ("transformer_blocks.0.attn",), {"tokens": 16}),
        "flux": (tiny.tiny_flux_transformer, ("transformer_blocks.0.ff",), {"tokens": 16, "height": 4, "width": 4}),
    }[name]
    torch.manual_seed(0)
    model = build()
    vislr.apply(model, LayerPlan(removed))
    if apart:
        monkeypatch.setattr(exporting, "_ONNX_LIMIT", 0)
    path = exporting.export_onnx(model, tmp_path / "model.onnx", sample=sample)
    files = {"model.onnx", "model.onnx.data"} if apart else {"model.onnx"}
    assert {file.name for file in tmp_path.iterdir()} == files
    session = runtime.InferenceSession(str(path))
    inputs = {key: value for key, value in sample_inputs(model, sample, device="cpu").items() if torch.is_tensor(value)}
    (found, *_) = session.run(None, {one.name: inputs[one.name].numpy() for one in session.get_inputs()})
    torch.testing.assert_close(torch.from_numpy(found), answer(model, sample), rtol=0, atol=1e-5)


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny.tiny_sd_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def changed(base, tmp_path):
    """Pruned, with an adapter beside it and a figure."""
    pipe = vislr.load(base)
    vislr.apply(pipe, plan_layers(pipe, Random(0), 0.2), name="cut")
    report = vislr.apply(pipe, vislr.ConvLoraConfig(r=1), name="style")
    assert report.sites
    vislr.note_measurement(pipe, "KID", 0.25, 0.5)
    return vislr.save(pipe, tmp_path / "changed")


def test_show_and_diff(changed, base, tmp_path, capsys):
    assert main(["recipe", "show", str(changed)]) == 0
    text = capsys.readouterr().out
    parts = (
        "   made on weights ",
        "1. layers 'cut' on unet",
        "criterion random, ratio 0.2",
        "2. convlora 'style'",
        "KID: before 0.25",
    )
    assert [part for part in parts if part not in text] == []
    assert main(["recipe", "diff", str(changed), str(changed)]) == 0
    assert capsys.readouterr().out == "no difference\n"
    other = vislr.load(base)
    vislr.apply(other, plan_layers(other, Random(1), 0.2), name="cut")
    vislr.save(other, tmp_path / "other")
    assert main(["recipe", "diff", str(changed), str(tmp_path / "other")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("-2. convlora 'style'") for line in lines)


def test_replay_makes_the_folder_again_and_undo_the_one_before(changed, base, tmp_path, capsys):
    target, notes = replaying.replay(changed, base)
    assert notes == ("the weights are the folder's, bit for bit",)
    want = vislr.load(changed)
    inputs = {"tokens": 16}
    torch.testing.assert_close(answer(target.unet, inputs), answer(want.unet, inputs), rtol=0, atol=1e-6)
    command = ["recipe", "undo", str(changed), "--base", str(base), "--out", str(tmp_path / "undone")]
    assert main(command) == 0
    assert "weights are the base's" in capsys.readouterr().out
    undone = vislr.load(tmp_path / "undone")
    assert [step["report"]["name"] for step in vislr.recipe_of(undone)] == ["cut"]
    before, notes = replaying.replay(changed, base, leave_out=2)
    assert vislr.recipe_of(before) == []
    torch.testing.assert_close(answer(before.unet, inputs), answer(vislr.load(base).unet, inputs), rtol=0, atol=1e-6)


def test_a_replay_on_another_base_or_beyond_the_first_step_is_named(changed, base, tmp_path, capsys):
    with pytest.raises(UndoError, match="has 2 steps; cannot leave out 3"):
        replaying.replay(changed, base, leave_out=3)
    tiny.tiny_sd_pipeline(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="not those that the plan was made on"):
        replaying.replay(changed, tmp_path / "other")
    replaying.replay(changed, tmp_path / "other", any_base=True)
    tiny.tiny_sd3_pipeline().save_pretrained(tmp_path / "sd3")
    with pytest.raises(ModelError, match="recipe is of a UNet2DConditionModel"):
        replaying.replay(changed, tmp_path / "sd3")
    for command, message in (
        (["recipe", "sow", str(changed)], "no action 'sow'; did you mean 'show'"),
        (["recipe", "show", str(base)], "has no vislr.json"),
        (["recipe", "undo", str(changed)], "undo needs base"),
        (["export", str(changed)], "nothing to write"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
