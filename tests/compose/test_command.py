"""`vislr compose` and `vislr compose profile`."""

import dataclasses
import json

import pytest
import torch
import yaml
from adapted import fill
from peft import LoraConfig
from PIL import Image

import vislr
from vislr import compose
from vislr.cli import main
from vislr.core.arguments import find_config, parse_config
from vislr.core.files import read_picture
from vislr.pipelines.compose import ComposeConfig, ProfileConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two random adapters of the embedded pipeline."""
    folder = tmp_path_factory.mktemp("adapters")
    pipe = vislr.load("emoji-unet")
    made = []
    for place, (name, layers) in enumerate((("style", ["to_q", "to_v"]), ("subject", ["to_k", "conv1"]))):
        report = vislr.apply(pipe, LoraConfig(r=2, target_modules=layers), name=name)
        fill(pipe.unet, name, place, 0.05)
        made.append(str(vislr.save_adapter(pipe, folder / f"{name}.safetensors", name=name)))
        vislr.remove(pipe, report)
    return made


@pytest.mark.parametrize(("name", "config"), [("emoji-unet", ComposeConfig), ("profile", ProfileConfig)])
def test_the_configs_that_come_with_vislr_fit_and_name_every_field(name, config):
    path = find_config(f"compose/{name}.yaml")
    parse_config(config, ["--config", str(path), "--adapters", "[x]"], prog="vislr compose", description="")
    given = yaml.safe_load(path.read_text())
    assert list(given) == [field.name for field in dataclasses.fields(config)]


@pytest.mark.slow
def test_methods_side_by_side_and_the_folder_that_keeps_the_first(files, tmp_path, capsys):
    out, kept = tmp_path / "out", tmp_path / "kept"
    assert main([
        "compose", "--adapters", json.dumps([f"{files[0]}:0.8", files[1]]), "--methods", '["cmlora", "merge"]',
        "--prompts", '["noto style, a cat face"]', "--steps", "3", "--out", str(out), "--save", str(kept),
        "--device", "cpu",
    ]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "full forwards a step" in printed
    assert "style and subject" in printed
    plan = compose.ComposePlan.from_dict(json.loads((out / "cmlora.json").read_text()))
    assert (plan.adapters, plan.weights, plan.method) == (("style", "subject"), (0.8, 1.0), "cmlora")
    for name in ("grid.png", "conflicts.png", "turns.png"):
        with Image.open(out / name) as image:
            assert image.width > 150
    (picture,) = out.glob("cmlora-*.png")
    assert compose.ComposePlan.from_dict(read_picture(picture)["plan"]) == plan
    pipe = vislr.load(kept)
    assert [step["report"]["kind"] for step in vislr.recipe_of(pipe)][-1] == "compose"
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        again = pipe(["noto style, a cat face"], num_inference_steps=3, guidance_scale=4.0,
                     generator=torch.Generator().manual_seed(0)).images[0]  # fmt: skip
    with Image.open(picture) as image:
        assert again.tobytes() == image.convert("RGB").tobytes()


def test_profiles_beside_the_files_split_the_adapters(files, tmp_path, capsys):
    arguments = ["--adapters", json.dumps(files), "--prompts", '["noto style, a cat face"]', "--steps", "3"]
    assert main(["compose", "profile", *arguments, "--out", str(tmp_path / "p"), "--device", "cpu"]) == 0
    profiles = [compose.read_profile(file) for file in files]
    assert [one.adapter for one in profiles] == ["style", "subject"]
    assert (tmp_path / "p" / "profiles.png").is_file()
    high, low = compose.split_profiles(profiles)
    assert main([
        "compose", "--adapters", json.dumps(files), "--methods", '["cmlora"]', "--out", str(tmp_path / "c"),
        "--device", "cpu",
    ]) == 0  # fmt: skip
    assert "full forwards a step" in (tmp_path / "c" / "report.txt").read_text()
    assert "style and subject" in (tmp_path / "c" / "conflicts.txt").read_text()
    assert (tmp_path / "c" / "turns.png").is_file()
    plan = json.loads((tmp_path / "c" / "cmlora.json").read_text())
    assert (tuple(plan["dominance"]["high"]), tuple(plan["dominance"]["low"])) == (high, low)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "adapters is empty"),
        (["--adapters", '["missing.safetensors"]'], "no adapter file 'missing.safetensors'"),
        (["--adapters", "FILES", "--methods", '["compsite"]'], "did you mean 'composite'"),
        (["--adapters", "FILES", "--methods", '["w_switch"]'], "weigh one prompt"),
        (["--adapters", "FILES", "--evry", "3"], "every"),
        (["profile", "--adapters", "FILES"], "prompts must be given"),
        (["profile", "--adapters", "FILES", "--prompts", '["noto style, a cat fase"]'], "'fase'"),
    ],
)
def test_wrong_wishes_are_one_line(files, tmp_path, capsys, arguments, said):
    given = [json.dumps(files) if one == "FILES" else one for one in arguments]
    assert main(["compose", *given, "--out", str(tmp_path)]) == 2
    # A wrong word of a prompt is found with the pipeline's tokenizer, below the bar of its loading.
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert said in last
    assert last.startswith(("ConfigError", "AdapterError", "DataError"))
