"""Pruned pipelines as diffusers folders: loaded anywhere vislr is installed, refused loudly where it is not."""

import json
import shutil
import subprocess
import sys

import diffusers
import pytest
import tiny
import torch
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file

import vislr
from vislr import models
from vislr.anatomy import sample_inputs, skeleton
from vislr.core.errors import FormatError, ModelError
from vislr.prune import LayerPlan, units_of

CUTS = {
    "sd": (tiny.tiny_sd_pipeline, ("up_blocks.0.resnets.1", "mid_block.attentions.0.transformer_blocks.0.attn1")),
    "sdxl": (tiny.tiny_sdxl_pipeline, ("down_blocks.1.attentions.0.transformer_blocks.1", "up_blocks.1.resnets.0")),
    "sd3": (tiny.tiny_sd3_pipeline, ("transformer_blocks.1", "transformer_blocks.0.ff", "transformer_blocks.0.norm1")),
    "flux": (tiny.tiny_flux_pipeline, ("single_transformer_blocks.0", "transformer_blocks.0.ff_context")),
}


# Loaded in a new process too; their pipelines are asked in other ways.
MORE = {
    "pixart": (tiny.tiny_pixart_pipeline, ("transformer_blocks.1", "transformer_blocks.0.attn2")),
    "dit": (tiny.tiny_dit_pipeline, ("transformer_blocks.0", "transformer_blocks.1.ff")),
}


def tiny_pixart():
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=8, patch_size=2, num_layers=3, num_attention_heads=3, attention_head_dim=8, in_channels=4,
        out_channels=8, cross_attention_dim=24, caption_channels=24, norm_num_groups=4, use_additional_conditions=True,
    ).eval()  # fmt: skip


def tiny_dit(layers=3):
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=8, patch_size=2, num_layers=layers, num_attention_heads=2, attention_head_dim=8, in_channels=4,
        out_channels=8, num_embeds_ada_norm=10, norm_num_groups=4,
    ).eval()  # fmt: skip


MODELS = {
    "unet": (tiny.tiny_unet, CUTS["sd"][1], {"tokens": 16}),
    "sd3": (tiny.tiny_sd3_transformer, CUTS["sd3"][1], {"tokens": 16}),
    "flux": (tiny.tiny_flux_transformer, CUTS["flux"][1], {"tokens": 16, "height": 4, "width": 4}),
    "pixart": (tiny_pixart, ("transformer_blocks.1", "transformer_blocks.0.attn2"), {"tokens": 5}),
    "dit": (tiny_dit, ("transformer_blocks.0", "transformer_blocks.2.ff"), {}),
}


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = {"max_sequence_length": 16} if hasattr(pipe, "transformer") else {}
    options |= {"height": 32, "width": 32}
    rng = torch.Generator().manual_seed(1)
    return pipe("a cat face", num_inference_steps=2, generator=rng, output_type="pt", **options).images


def answer(model, sample):
    with torch.no_grad():
        return model(**sample_inputs(model, sample, device="cpu"))[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pruned and saved: name -> (folder, the picture that it makes, the denoiser's answer)."""
    root, made = tmp_path_factory.mktemp("pruned"), {}
    torch.set_num_threads(1)
    for name, (build, removed) in (CUTS | MORE).items():
        pipe = build()
        component = "unet" if hasattr(pipe, "unet") else "transformer"
        vislr.apply(pipe, LayerPlan(removed, component=component, settings={"why": "test"}), name="cut")
        sample = {"height": 8, "width": 8} | ({} if name == "dit" else {"tokens": 16})
        answered = answer(getattr(pipe, component), sample)
        made[name] = (vislr.save(pipe, root / name), None if name in MORE else picture(pipe), answered)
    return made


LOAD = """
import json, sys, torch
torch.set_num_threads(1)
import vislr
from diffusers import DiffusionPipeline
from pathlib import Path
from safetensors.torch import save_file
from vislr.anatomy import denoiser_of, sample_inputs
images = {}
for folder in sys.argv[2:]:
    # SD3 without T5: diffusers wants to be told what the index says.
    index = json.load(open(f"{folder}/model_index.json"))
    absent = {key: None for key, value in index.items() if value == [None, None]}
    for low in (True, False):
        pipe = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=low, **absent)
        pipe.set_progress_bar_config(disable=True)
        denoiser = denoiser_of(pipe)[1]
        sample = {"height": 8, "width": 8} | ({} if Path(folder).name == "dit" else {"tokens": 16})
        with torch.no_grad():
            images[f"{folder}/{low}/answer"] = denoiser(**sample_inputs(denoiser, sample, device="cpu"))[0]
        if Path(folder).name in ("pixart", "dit"):
            continue
        options = {"max_sequence_length": 16} if hasattr(pipe, "transformer") else {}
        rng = torch.Generator().manual_seed(1)
        options |= {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
        images[f"{folder}/{low}"] = pipe("a cat face", generator=rng, **options).images
save_file(images, sys.argv[1])
"""


def test_stock_from_pretrained_in_a_new_process_is_the_same_bit_for_bit(folders, tmp_path):
    paths = [str(folder) for folder, _, _ in folders.values()]
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "images"), *paths], check=True, timeout=300)
    images = load_file(tmp_path / "images")
    for folder, expected, answered in folders.values():
        for low in (True, False):
            assert torch.equal(images[f"{folder}/{low}/answer"], answered), (folder.name, low)
            if expected is None:
                continue
            # Text encoders and VAE are stock diffusers': mapped from their files, they round as they lie.
            torch.testing.assert_close(images[f"{folder}/{low}"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CUTS)
def test_the_index_names_vislr_and_vislr_load_restores_the_record(folders, name):
    folder, expected, _ = folders[name]
    component = "unet" if name.startswith("sd") and name != "sd3" else "transformer"
    index = json.loads((folder / "model_index.json").read_text())
    assert index[component][0] == "vislr"
    config = json.loads((folder / component / "config.json").read_text())
    assert [entry["kind"] for entry in config["vislr"]] == ["layers"]
    pipe = vislr.load(folder)
    torch.testing.assert_close(picture(pipe), expected, rtol=0, atol=1e-5)
    (step,) = vislr.recipe_of(pipe)
    assert step["report"]["name"] == "cut"
    assert step["report"]["parameters"][0] > step["report"]["parameters"][1]
    assert step["report"]["flops"][0] > step["report"]["flops"][1]
    assert step["change"]["plan"]["settings"] == {"why": "test"}
    # A model that stock diffusers loaded says what its config says.
    stock = getattr(vislr, index[component][1]).from_pretrained(folder, subfolder=component)
    assert [one["change"] for one in vislr.recipe_of(stock)] == [step["change"]]


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_component_by_itself(name, low, tmp_path):
    build, removed, sample = MODELS[name]
    torch.manual_seed(0)
    model = build()
    stock = type(model)
    report = vislr.apply(model, LayerPlan(removed))
    expected, shapes = answer(model, sample), {key: value.shape for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes, "saving leaves the model alone"
    ours = getattr(vislr, stock.__name__)
    assert type(model) is ours
    assert issubclass(ours, stock)
    assert ours.__module__ == "vislr"
    loaded, info = ours.from_pretrained(tmp_path, low_cpu_mem_usage=low, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(answer(loaded, sample), expected)
    assert torch.equal(answer(vislr.load(tmp_path), sample), expected)
    assert {key: value.shape for key, value in loaded.state_dict().items()} == shapes
    half = ours.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises((ValueError, RuntimeError), match=r"expected shape|size mismatch"):
        stock.from_pretrained(tmp_path, low_cpu_mem_usage=low)
    with pytest.raises(ValueError, match="expected shape"):
        AutoModel.from_pretrained(tmp_path)
    vislr.remove(model, report)
    assert type(model) is stock
    assert "vislr" not in model.config


def test_describe_reads_the_pruned_structure(folders, capsys):
    from vislr.cli import main

    folder, _, _ = folders["sd"]
    assert main(["describe", str(folder), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["parameters"] == sum(p.numel() for p in vislr.load(folder).unet.parameters())


def test_shards_and_from_config(tmp_path):
    unet = tiny.tiny_unet()
    vislr.apply(unet, LayerPlan(CUTS["sd"][1]))
    unet.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = vislr.UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(answer(again, {"tokens": 16}), answer(unet, {"tokens": 16}))
    built = vislr.UNet2DConditionModel.from_config(unet.config)
    assert list(built.state_dict()) == list(unet.state_dict())
    assert vislr.recipe_of(built)[0]["change"] == vislr.recipe_of(unet)[0]["change"]


def test_a_pipeline_hands_on_variant_and_shards(tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    vislr.apply(pipe, LayerPlan(CUTS["sd"][1]))
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    shards = [path.name for path in (tmp_path / "unet").glob("*.safetensors")]
    assert len(shards) > 1
    assert all(".fp16-" in name or ".fp16." in name for name in shards), shards
    state = pipe.unet.state_dict()
    again = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16).unet
    mapped = vislr.UNet2DConditionModel.from_pretrained(
        tmp_path, subfolder="unet", variant="fp16", dtype=torch.float16, device_map={"": "cpu"}
    )
    for loaded in (again, mapped):
        assert type(loaded).__module__ == "vislr"
        assert list(loaded.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_without_vislr_the_pipeline_names_it(folders, tmp_path):
    code = "import sys; from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folders["sd"][0])], capture_output=True, text=True)
    assert done.returncode != 0
    assert "vislr" in done.stderr.splitlines()[-1]


def test_pruned_twice_and_undone_in_order(tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    base = picture(pipe)
    first = vislr.apply(pipe, LayerPlan(("up_blocks.0.resnets.1",)), name="first")
    second = vislr.apply(pipe, LayerPlan(("up_blocks.0.resnets.0",)), name="second")
    expected = picture(pipe)
    again = vislr.load(vislr.save(pipe, tmp_path / "twice"))
    torch.testing.assert_close(picture(again), expected, rtol=0, atol=1e-5)
    assert [step["report"]["name"] for step in vislr.recipe_of(again)] == ["first", "second"]
    vislr.remove(pipe, second)
    vislr.remove(pipe, first)
    assert torch.equal(picture(pipe), base)
    assert pipe.config.unet == ("diffusers", "UNet2DConditionModel")


def test_applied_to_the_bare_component_the_pipeline_still_saves_right(tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    vislr.apply(pipe.unet, LayerPlan(CUTS["sd"][1]))
    folder = vislr.save(pipe, tmp_path / "bare")
    torch.testing.assert_close(picture(DiffusionPipeline.from_pretrained(folder)), picture(pipe), rtol=0, atol=1e-5)


def test_adapters_stand_beside_a_pruned_model(tmp_path):
    pipe = tiny.tiny_sd_pipeline()
    vislr.apply(pipe, LayerPlan(CUTS["sd"][1]), name="cut")
    vislr.apply(pipe, vislr.ConvLoraConfig(r=1), name="style")
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "style" in name:
                parameter.add_(0.1)
    pipe.unet.requires_grad_(False)
    expected = picture(pipe)
    again = vislr.load(vislr.save(pipe, tmp_path / "both"))
    torch.testing.assert_close(picture(again), expected, rtol=0, atol=1e-5)
    assert [step["report"]["name"] for step in vislr.recipe_of(again)] == ["cut", "style"]
    with pytest.raises(ModelError, match=r"vislr\.save"):
        pipe.unet.save_pretrained(tmp_path / "stock")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "flux-dev"])
def test_true_size_on_meta(name):
    """From the config alone, as JSON: class, structure and count of a model that this machine could not hold."""
    model = skeleton(name)
    total = sum(p.numel() for p in model.parameters())
    inventory = units_of(model, "block")
    removed = tuple(unit.name for unit in inventory.units[::3])
    vislr.apply(model, LayerPlan(removed))
    count = sum(p.numel() for p in model.parameters())
    assert count == total - inventory.saved(removed) < total
    config = json.loads(model.to_json_string())
    with torch.device("meta"):
        built = getattr(vislr, type(model).__name__).from_config(config)
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def edited(folder, tmp_path, change, component="unet"):
    """A copy of a folder with its component's config changed."""
    copy = tmp_path / "edited"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    path = copy / component / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return copy


def resealed(entry):
    """The entry with a fitting sha256, as a careful forger would write it."""
    return models.entry_of(entry["kind"], entry["name"], entry["plan"])


def set_plan(**values):
    def change(config):
        config["vislr"][0]["plan"] |= values
        config["vislr"][0] = resealed(config["vislr"][0])

    return change


def without_plan(config):
    del config["vislr"]


def other_names(config):
    config["vislr"][0]["plan"]["removed"].pop()


def other_kind(config):
    config["vislr"][0]["kind"] = "os:system"


def run_time_kind(config):
    config["vislr"] = [models.entry_of("convlora", "x", {})]


def other_text(config):
    config["vislr"] = "import os"


def extra_key(config):
    config["vislr"][0]["code"] = "print()"


TAMPERED = {
    "missing": (without_plan, FormatError, "names no plans"),
    "edited": (other_names, FormatError, "was edited"),
    "forged": (set_plan(removed=["up_blocks.0.resnets.1"]), FormatError, "do not fit the plan.*lack"),
    "fewer weights": (set_plan(removed=[*CUTS["sd"][1], "up_blocks.0.resnets.0"]), FormatError, "have no place for"),
    "unknown unit": (set_plan(removed=["__class__"]), vislr.VislrError, "no unit '__class__'"),
    "unknown key": (set_plan(hook="os.system"), FormatError, "a plan has no 'hook'"),
    "unknown kind": (other_kind, FormatError, "no kind of plan is called 'os:system'"),
    "run-time kind": (run_time_kind, FormatError, "'convlora' is no kind of plan"),
    "no list": (other_text, FormatError, "expected a list of plans"),
    "extra key": (extra_key, FormatError, "unknown key"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_folder_is_refused_by_name(folders, case, tmp_path):
    change, error, message = TAMPERED[case]
    folder = edited(folders["sd"][0], tmp_path, change)
    with pytest.raises(error, match=message):
        DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(error, match=message):
        vislr.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)


@pytest.mark.parametrize("entry", [["vislr", "apply"], ["os", "system"], "pipeline"])
def test_nothing_that_a_folder_names_or_holds_is_run(folders, entry, tmp_path):
    folder = edited(folders["sd"][0], tmp_path, lambda config: None)
    code = f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\nclass Mine: pass\n"
    for path in (folder / "pipeline.py", folder / "unet" / "pipeline.py"):
        path.write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": ["pipeline", "Mine"]} if entry == "pipeline" else {"unet": entry}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="cannot load"):
        vislr.load(folder)
    with pytest.raises((TypeError, ValueError)):
        DiffusionPipeline.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_of_the_unpruned_model_are_refused(folders, tmp_path):
    folder = edited(folders["sd"][0], tmp_path, lambda config: None)
    tiny.tiny_unet().save_pretrained(tmp_path / "full")
    shutil.copy(tmp_path / "full" / "diffusion_pytorch_model.safetensors", folder / "unet")
    for low in (True, False):
        with pytest.raises(FormatError, match="do not fit the plan"):
            vislr.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=low)


def test_every_guard_is_a_tensor_of_its_class():
    builds = {build().__class__.__name__: build() for build, _, _ in MODELS.values()}
    assert set(builds) == set(models.GUARDS)
    for name, model in builds.items():
        assert model.get_parameter(models.GUARDS[name]).ndim == 1
        assert getattr(vislr, name) is getattr(models, name)
        assert getattr(vislr, name).__bases__[1] is getattr(diffusers, name)


def test_what_cannot_carry_a_plan_is_not_saved(tmp_path):
    class Mine(diffusers.UNet2DConditionModel):
        pass

    unet = Mine(**{k: v for k, v in tiny.tiny_unet().config.items() if not k.startswith("_")})
    vislr.apply(unet, LayerPlan(("mid_block.attentions.0",)))
    assert type(unet) is Mine
    with pytest.raises(ModelError, match="no config to keep the plan in"):
        vislr.save(unet, tmp_path / "mine")
    with pytest.raises(ModelError, match="cannot carry plans"):
        models.planned_class("AutoencoderKL")


def test_a_hub_index_is_known_only_while_it_is_read():
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    from vislr.folders import _known_to_diffusers

    with _known_to_diffusers(True):
        assert "vislr" in LOADABLE_CLASSES
    assert "vislr" not in LOADABLE_CLASSES
