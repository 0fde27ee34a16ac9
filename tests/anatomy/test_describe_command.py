"""`vislr describe`: from a config alone, readable, wrong input in one line."""

import json

import pytest
import tiny

from vislr.anatomy import describe
from vislr.core import cli_guard
from vislr.pipelines.describe import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline with its weights taken away."""
    path = tmp_path_factory.mktemp("saved") / "pipe"
    tiny.tiny_sd_pipeline().save_pretrained(path)
    for weights in path.rglob("*.safetensors"):
        weights.unlink()
    return path


def test_a_pipeline_folder_needs_no_weights(folder, capsys):
    # The pipeline's tokenizer says how long its text is; a component by itself has the family's 77.
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == describe(tiny.tiny_unet(), {"tokens": 16}).table()
    expected = describe(tiny.tiny_unet())
    assert main(["--model", str(folder / "unet"), "--kind", "unit", "--stage", "mid_block"]) == 0
    assert capsys.readouterr().out.strip() == expected.table(expected.select(kind="unit", stage="mid_block"))


def test_json(folder, capsys):
    assert main([str(folder), "--json", "--name", "*.conv1", "--sample.height", "16", "--sample.batch=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = describe(tiny.tiny_unet(), {"height": 16, "tokens": 16, "batch": 2})
    assert found["sample"] == {"height": 16, "width": 8, "tokens": 16, "batch": 2}
    assert (found["family"], found["parameters"], found["flops"]) == ("unet", expected.parameters, expected.flops)
    assert [(s["name"], s["flops"]) for s in found["sites"]] == [
        (s.name, s.flops) for s in expected.select(name="*.conv1")
    ]
    assert sum(stage["flops"] for stage in found["stages"]) == found["flops"]


def test_a_config_file_and_removable(tmp_path, capsys):
    config = tmp_path / "describe.yaml"
    config.write_text("model: timm:resnet18\nsample: {height: 64, width: 64}\njson: true\n")
    assert main(["--config", str(config), "--kind", "unit", "--removable", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in found["sites"]] == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert found["sample"] == {"height": 64, "width": 64, "batch": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sdx"], "ModelError: 'sdx' is no folder and no known model; did you mean 'sdxl'"),
        (["timm:resnet_18"], "ModelError: timm has no model 'resnet_18'; did you mean 'resnet18'"),
        (["torchvision:resnet19"], "ModelError: torchvision has no model 'resnet19'; did you mean 'resnet1"),
        (["FOLDER", "--kind", "cnv"], "TargetError: no sites of kind 'cnv'; did you mean 'conv'?"),
        (["FOLDER", "--sample.heigth", "8"], "ConfigError: a sample of a unet model has no 'heigth'"),
        (["FOLDER", "--stge", "mid_block"], "ConfigError: unknown key 'stge'; did you mean 'stage'"),
        (["FOLDER/scheduler"], "ModelError: 'FOLDER/scheduler' is no diffusers folder"),
        (["FOLDER/vae"], "ModelError: no reader for a AutoencoderKL; supported are"),
        (["EMPTY"], "ModelError: 'EMPTY' is no diffusers folder: neither model_index.json nor config.json in it"),
        (["BROKEN"], "ModelError: 'BROKEN/config.json' is no JSON"),
        (["FOREIGN"], "ModelError: 'FOREIGN' holds a 'DiffusionPipeline', which diffusers does not know as a model"),
        (["LIST"], "ModelError: 'LIST/config.json' is no config: it holds a list"),
        (["WRONG"], "ModelError: cannot build 'WRONG': ValueError"),
    ],
)
def test_wrong_input_is_one_line(folder, tmp_path, capsys, arguments, message):
    configs = {
        "BROKEN": "{",
        "FOREIGN": '{"_class_name": "DiffusionPipeline"}',
        "LIST": "[]",
        "WRONG": '{"_class_name": "UNet2DConditionModel", "down_block_types": ["DownBlock2D"]}',
    }
    for name, text in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "EMPTY").mkdir()
    places = {"FOLDER": str(folder), **{name: str(tmp_path / name) for name in (*configs, "EMPTY")}}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
        message = message.replace(name, place)
    assert cli_guard.run(main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
