"""`vislr generate`: models, prompts, adapters, image to image; pictures made again from their notes, bit for bit."""

import dataclasses
import json

import pytest
import tiny
import torch
import yaml
from adapted import fill
from peft import LoraConfig
from PIL import Image

import vislr
from vislr.cli import main
from vislr.core.arguments import find_config, parse_config
from vislr.core.errors import ConfigError
from vislr.core.files import read_picture, write_picture
from vislr.pipelines.generate import GenerateConfig, image_to_image, load, read_prompts
from vislr.train import sample_images

PIPELINES = {"sd": tiny.tiny_sd_pipeline, "sdxl": tiny.tiny_sdxl_pipeline, "sd3": tiny.tiny_sd3_pipeline,
             "flux": tiny.tiny_flux_pipeline}  # fmt: skip
PROMPTS = ["noto style, a cat face", "a red car"]
SHORT = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny pipeline as a folder, and two adapters of it."""
    folder = tmp_path_factory.mktemp("generate")
    pipe = tiny.tiny_sd_pipeline()
    vislr.save(pipe, folder / "base")
    for seed, (name, layers) in enumerate((("style", ["to_q", "to_v"]), ("subject", ["to_k", "conv1"]))):
        report = vislr.apply(pipe, LoraConfig(r=2, target_modules=layers), name=name)
        fill(pipe.unet, name, seed, 0.3)
        vislr.save_adapter(pipe, folder / f"{name}.safetensors", name=name)
        vislr.remove(pipe, report)
    return folder


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def generate(*arguments):
    assert main(["generate", *map(str, arguments), *SHORT]) == 0


def refusal(capsys, *arguments):
    assert main(["generate", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_the_config_that_comes_with_vislr_fits_and_names_every_field():
    path = find_config("generate.yaml")
    parse_config(GenerateConfig, ["--config", str(path)], prog="vislr generate", description="")
    assert list(yaml.safe_load(path.read_text())) == [field.name for field in dataclasses.fields(GenerateConfig)]


def test_pictures_their_names_and_notes_and_the_same_again_bit_for_bit(place, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    base, files = place / "base", [f"{place}/style.safetensors:0.8", f"{place}/subject.safetensors"]
    generate("--model", base, "--adapter", *files, "--prompts", *PROMPTS, "--seeds", 0, 1, "--batch", 3, "--out", out,
             "--negative", "blue", "--grid")  # fmt: skip
    names = ["000-noto-style-a-cat-face-0", "000-noto-style-a-cat-face-1", "001-a-red-car-0", "001-a-red-car-1"]
    assert sorted(path.stem for path in out.iterdir()) == [*names, "grid"]
    note = read_picture(out / f"{names[1]}.png")
    assert (note["prompts"], note["seeds"], note["negative"], note["adapter"]) == ([PROMPTS[0]], [1], "blue", files)
    assert note["beside"]["place"] == 1
    assert len(note["beside"]["prompts"]) == 3
    assert len(read_picture(out / "grid.png")["pictures"]) == 4
    assert len({pixels(out / f"{name}.png") for name in names}) == 4
    for name in (names[1], names[3]):
        assert main(["generate", "--again", str(out / f"{name}.png"), "--out", str(again)]) == 0
        assert pixels(again / f"{name}.png") == pixels(out / f"{name}.png")
    first, second = read_picture(out / f"{names[1]}.png"), read_picture(again / f"{names[1]}.png")
    assert first == second


def test_a_composition_made_again_with_files_that_have_moved(place, tmp_path, capsys):
    out, moved = tmp_path / "out", tmp_path / "moved"
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file, name in zip(files, ("style", "subject"), strict=True):
        file.write_bytes((place / f"{name}.safetensors").read_bytes())
    generate("--model", place / "base", "--adapter", *files, "--compose", "switch", "--prompts", PROMPTS[0],
             "--out", out)  # fmt: skip
    (picture,) = out.iterdir()
    assert read_picture(picture)["plan"]["method"] == "switch"
    generate("--model", place / "base", "--adapter", *files, "--prompts", PROMPTS[0], "--out", tmp_path / "sum")
    assert pixels(tmp_path / "sum" / picture.name) != pixels(picture)
    moved.mkdir()
    others = [file.rename(moved / f"moved_{file.name}") for file in files]
    assert "say where the files are now" in refusal(capsys, "--again", picture, "--out", tmp_path / "again")
    arguments = ["--again", picture, "--out", tmp_path / "again", "--adapter"]
    assert "made with 2" in refusal(capsys, *arguments, others[0])
    assert main(["generate", *map(str, [*arguments, *others])]) == 0
    assert pixels(tmp_path / "again" / picture.name) == pixels(picture)
    assert "its content differs" in refusal(capsys, *arguments, others[1], others[0])
    assert "is not the file" in refusal(capsys, *arguments, others[1], others[0])


def test_what_cannot_be_made_again_is_named(place, tmp_path, capsys):
    out = tmp_path / "out"
    vislr.save(tiny.tiny_sd_pipeline(), tmp_path / "base")
    generate("--model", tmp_path / "base", "--prompts", *PROMPTS, "--grid", "--out", out)
    assert "take one of its pictures" in refusal(capsys, "--again", out / "grid.png")
    vislr.save(tiny.tiny_sd_pipeline(seed=1), tmp_path / "base")
    picture = next(path for path in sorted(out.iterdir()) if path.stem != "grid")
    assert "is not the model" in refusal(capsys, "--again", picture)
    note = read_picture(picture) | {"hashes": {"model": None, "adapter": [], "image": None}}
    for wrong, message in (
        ({"steps": "many"}, "steps is 'many'"), ({"beside": {}}, "cannot be read"), ({"plan": {}}, "cannot be read"),
        ({"beside": note["beside"] | {"place": 9}}, "batch is not whole"), ({"hashes": {}}, "cannot be read"),
    ):  # fmt: skip
        write_picture(tmp_path / "edited.png", Image.new("RGB", (4, 4)), note | wrong)
        assert message in refusal(capsys, "--again", tmp_path / "edited.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert "does not say how it was made" in refusal(capsys, "--again", tmp_path / "plain.png")


def test_prompts_from_files(tmp_path):
    plain, lines, wrong = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl", tmp_path / "wrong.jsonl"
    plain.write_text("# faces\na cat face\n\n  a dog face  \n")
    config = GenerateConfig(prompts_file=str(plain), seeds=[1, 2], negative="red")
    assert read_prompts(config) == [("a cat face", [1, 2], "red"), ("a dog face", [1, 2], "red")]
    lines.write_text('{"prompt": "a cat face"}\n{"prompt": "a bus", "seeds": [7], "negative": ""}\n')
    config = GenerateConfig(prompts_file=str(lines), seeds=[1, 2], negative="red")
    assert read_prompts(config) == [("a cat face", [1, 2], "red"), ("a bus", [7], "")]
    for text in ('{"prompts": "a"}', '{"prompt": "a", "seeds": 1}', '{"prompt": "a", "seeds": ["1"]}', "a cat"):
        wrong.write_text(f"\n{text}\n")
        with pytest.raises(vislr.core.errors.DataError, match="line 2"):
            read_prompts(GenerateConfig(prompts_file=str(wrong)))
    plain.write_text("# nothing\n")
    with pytest.raises(vislr.core.errors.DataError, match="holds no prompt"):
        read_prompts(GenerateConfig(prompts_file=str(plain)))


def test_refusals_before_any_work(place, tmp_path, capsys):
    some = ["--prompts", "a red car", "--model", place / "base"]
    style = place / "style.safetensors"
    cases = [
        (["--prompts", "a", "--prompts_file", "x"], "expected one"),
        ([], "prompts is empty"),
        ([*some, "--compose", "merge", "--adapter", style], "two adapters or more; 1 given"),
        ([*some, "--compose", "swich"], "did you mean 'switch'"),
        ([*some, "--offload", "model", "--device", "cpu"], "expected none"),
        ([*some, "--strength", "0"], "strength is 0"),
        ([*some, "--image", style, "--steps", "2", "--strength", ".4"], "leaves no step"),
        ([*some, "--image", tmp_path / "none.png"], "there is no picture"),
        ([*some, "--image", style], "cannot be read"),
        ([*some, "--adapter", tmp_path / "none.safetensors"], "there is no adapter file"),
        ([*some, "--base", "emoji-unet"], "belongs to a recipe"),
        (["--prompts", "a", "--model", "x/vislr.json"], "needs base"),
        ([*some, "--again", style], "no PNG"),
    ]
    for arguments, message in cases:
        assert message in refusal(capsys, *arguments, "--out", tmp_path / "out"), arguments


def test_a_recipe_and_a_folder_with_run_time_plans_as_model(place, tmp_path):
    from vislr.cache import interval_plan

    pipe = vislr.load(place / "base")
    vislr.load_adapter(pipe, place / "style.safetensors", weight=0.5)
    vislr.apply(pipe, interval_plan(pipe, 2, steps=2), name="cache")
    vislr.save(pipe, tmp_path / "changed")
    for name, model in (("folder", [tmp_path / "changed"]),
                        ("recipe", [tmp_path / "changed" / "vislr.json", "--base", place / "base"])):  # fmt: skip
        generate("--model", *model, "--prompts", PROMPTS[0], "--out", tmp_path / name)
    generate("--model", place / "base", "--prompts", PROMPTS[0], "--out", tmp_path / "plain")
    made = {name: pixels(next((tmp_path / name).iterdir())) for name in ("folder", "recipe", "plain")}
    assert made["folder"] == made["recipe"] != made["plain"]
    again = tmp_path / "again"
    (picture,) = (tmp_path / "recipe").iterdir()
    assert main(["generate", "--again", str(picture), "--out", str(again)]) == 0
    assert pixels(again / picture.name) == made["recipe"]


@pytest.mark.parametrize("name", PIPELINES)
def test_image_to_image_keeps_what_was_done_to_the_denoiser(name, tmp_path):
    """Strength 1 begins from noise alone where a scheduler says so; strength .5 depends on the picture and the plan."""
    from vislr.cache import interval_plan

    pipe = PIPELINES[name]()
    vislr.save(pipe, tmp_path / "base")
    vislr.apply(pipe, interval_plan(pipe, 2, steps=4), name="cache")
    vislr.save(pipe, tmp_path / "cached")
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    image.save(tmp_path / "start.png")
    made = {}
    for model in ("base", "cached"):
        out = tmp_path / f"{model}-out"
        assert main(["generate", "--model", str(tmp_path / model), "--prompts", PROMPTS[0], "--image",
                     str(tmp_path / "start.png"), "--strength", ".75", "--steps", "4", "--device", "cpu", "--size",
                     "32", "--out", str(out)]) == 0  # fmt: skip
        (picture,) = out.iterdir()
        made[model] = pixels(picture)
        assert main(["generate", "--again", str(picture), "--out", str(tmp_path / "again")]) == 0
        assert pixels(tmp_path / "again" / picture.name) == made[model]
    assert made["base"] != made["cached"]
    both = vislr.load(tmp_path / "cached")
    other = image_to_image(both)
    assert type(other).__name__.endswith("Img2ImgPipeline")
    assert vislr.recipe_of(other) == vislr.recipe_of(both)


def test_a_pipeline_without_image_to_image_or_negative_prompt_is_refused():
    with pytest.raises(ConfigError, match="FluxPipeline takes no negative prompt"):
        sample_images(tiny.tiny_flux_pipeline(), PROMPTS[:1], [0], steps=1, guidance=4.0, negative="red")
    with pytest.raises(vislr.core.errors.ModelError, match="no image to image for a DiTPipeline"):
        image_to_image(tiny.tiny_dit_pipeline())


@pytest.mark.slow
def test_a_compiled_denoiser_makes_nearly_the_same_picture(place):
    import numpy as np

    from vislr.pipelines.generate import Job, draw

    made = []
    for on in (False, True):
        config = GenerateConfig(str(place / "base"), prompts=PROMPTS, steps=2, compile=on)
        loaded = load(config, [], [])
        ((_, images),) = draw(config, loaded, None, [Job(prompt, 0) for prompt in PROMPTS])
        made.append(np.stack([np.asarray(image, dtype=int) for image in images]))
    assert abs(made[0] - made[1]).max() <= 2
    torch._dynamo.reset()


def test_the_note_is_plain_json(place, tmp_path):
    generate("--model", place / "base", "--prompts", PROMPTS[0], "--out", tmp_path)
    (picture,) = tmp_path.iterdir()
    note = read_picture(picture)
    assert json.loads(json.dumps(note)) == note
    assert set(note["machine"]) == {"threads", "torch", "diffusers", "transformers", "peft"}
    assert len(note["hashes"]["model"]) == 64
