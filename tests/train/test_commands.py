"""`vislr train` and `vislr generate` as commands: results, dry run, and every bad input by name."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image, ImageDraw

import vislr
from vislr import zoo
from vislr.cli import main
from vislr.core.cli_guard import run
from vislr.core.errors import (
    AdapterError,
    ConfigError,
    DataError,
    FormatError,
    LaunchError,
    ModelError,
    OutputError,
    TargetError,
)
from vislr.pipelines import generate, train_adapter

SHORT = ["--steps", "3", "--optim.batch", "4", "--sample.steps", "1"]


def arguments(base, data, out, *more):
    return ["--model.base", str(base), "--data.folder", str(data), "--output.folder", str(out), *SHORT, *more]


@pytest.fixture(scope="module")
def trained(sd_folder, pictures, tmp_path_factory):
    """A finished run: a strong adapter, so that its effect is seen in 8-bit pixels."""
    out = tmp_path_factory.mktemp("runs") / "style"
    more = [
        "--optim.lr",
        "0.05",
        "--optim.warmup",
        "0",
        "--sample.prompts",
        "a cat face",
        "--data.trigger",
        "fluent style",
    ]
    assert train_adapter.main(arguments(sd_folder, pictures, out, *more, "--output.checkpoint_every", "2")) == 0
    return out


def test_a_run_leaves_everything(trained, sd_folder, pictures):
    files = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert {
        "adapter.safetensors", "config.yaml", "report.json", "README.md", "before_after.png", "curves.png",
        "samples/000000.png", "samples/000003.png", "checkpoints/000002/adapter.safetensors",
        "checkpoints/000002/state.json",
    } <= files  # fmt: skip
    assert [name for name in files if name.startswith("tensorboard/events")]
    report = json.loads((trained / "report.json").read_text())
    assert report["steps"] == 3
    assert (report["data"]["pictures"], report["data"]["held_out"]) == (22, 2)
    assert report["trainable"] == report["adapter"]["trainable"] > 1000
    assert report["held_out"]["loss"]["before"] > 0
    assert report["recipe"][0]["report"]["kind"] == "convlora"
    card = (trained / "README.md").read_text()
    assert "Trigger words: fluent style" in card
    assert f"Base: `{sd_folder}`" in card
    # Three rows of one prompt: before, after, a training picture; with their labels.
    with Image.open(trained / "before_after.png") as grid:
        assert grid.height > 3 * 128
    scalars = list((trained / "tensorboard").iterdir())
    assert sum(path.stat().st_size for path in scalars) > 1000


def test_the_saved_adapter_makes_the_pictures_of_the_run(trained, sd_folder, tmp_path):
    command = ["--model", str(sd_folder), "--prompts", "a cat face", "--steps", "1", "--out"]
    assert generate.main([*command, str(tmp_path / "with"), "--adapter", str(trained / "adapter.safetensors")]) == 0
    assert generate.main([*command, str(tmp_path / "off"), "--adapter", f"{trained / 'adapter.safetensors'}:0"]) == 0
    assert generate.main([*command, str(tmp_path / "base")]) == 0
    pixels = {
        name: np.asarray(Image.open(tmp_path / name / "000-a-cat-face-0.png")).astype(int)
        for name in ("with", "off", "base")
    }
    assert np.array_equal(pixels["off"], pixels["base"])
    assert np.abs(pixels["with"] - pixels["base"]).max() > 3
    # The grid of the run shows the same picture, enlarged four times, below its title and its prompt.
    grid = np.asarray(Image.open(trained / "samples" / "000003.png")).astype(int)
    shown = grid[-132:-4:4, 4:132:4]
    assert np.abs(shown - pixels["with"]).max() <= 2


def test_generate_is_the_same_in_any_batch_and_says_how(sd_folder, tmp_path):
    prompts = ["a cat face", "a dog face", "a red car"]
    command = ["--model", str(sd_folder), "--prompts", *prompts, "--seeds", "5", "6", "--steps", "2"]
    assert generate.main([*command, "--out", str(tmp_path / "a"), "--batch", "1"]) == 0
    assert generate.main([*command, "--out", str(tmp_path / "b"), "--batch", "4", "--grid"]) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 6
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted([*names, "grid.png"])
    several = []
    for name in names:
        one, other = (np.asarray(Image.open(tmp_path / part / name)).astype(int) for part in "ab")
        assert np.abs(one - other).max() <= 1  # rounding of convolutions over other batches
        several.append(one)
    assert len(np.unique(np.stack(several), axis=0)) == 6
    with Image.open(tmp_path / "a" / "002-a-red-car-6.png") as image:
        made = json.loads(image.text["vislr"])
    assert (made["prompts"], made["seeds"], made["steps"], made["model"]) == (["a red car"], [6], 2, str(sd_folder))


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (["--prompts", "a quokka"], DataError, "prompt 1: the embedded models do not know the word 'quokka'"),
        ([], ConfigError, "prompts is empty"),
        (
            ["--prompts", "a cat", "--adapter", "none.safetensors:0.5"],
            AdapterError,
            "no adapter file 'none.safetensors'",
        ),
        (["--prompts", "a cat", "--steps", "0"], ConfigError, "steps is 0"),
        (["--prompts", "a cat", "--device", "cuda:99"], ConfigError, "device 'cuda:99' cannot be used"),
        (["--promts", "a cat"], ConfigError, "unknown key 'promts'; did you mean 'prompts'"),
    ],
)
def test_generate_refuses(argv, error, message, sd_folder, tmp_path):
    with pytest.raises(error, match=message):
        generate.main(["--model", str(sd_folder), "--out", str(tmp_path / "o"), *argv])


def test_dry_run_writes_nothing(sd_folder, pictures, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert train_adapter.main(arguments(sd_folder, pictures, out, "--dry-run")) == 0
    assert list(tmp_path.iterdir()) == []
    text = capsys.readouterr().out
    assert "22 to train on, 2 held out" in text
    assert "3 steps of 4 pictures" in text
    assert "at most" in text
    assert "trainable" in text


def test_a_finished_folder_is_kept_replaced_or_left(trained, sd_folder, pictures, tmp_path, capsys):
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(trained, out)
    (out / "notes.txt").write_text("mine")
    adapter = (out / "adapter.safetensors").read_bytes()
    with pytest.raises(OutputError, match="holds a finished run"):
        train_adapter.main(arguments(sd_folder, pictures, out))
    assert train_adapter.main(arguments(sd_folder, pictures, out, "--output.resume")) == 0
    assert "finished already" in capsys.readouterr().out
    assert (out / "adapter.safetensors").read_bytes() == adapter
    assert train_adapter.main(arguments(sd_folder, pictures, out, "--output.overwrite", "--seed", "1")) == 0
    assert (out / "adapter.safetensors").read_bytes() != adapter
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "checkpoints").exists()


def bad(name, tmp_path, sd_folder, pictures):
    """Arguments of a run that must fail."""
    data, out, base, more = pictures, tmp_path / "out", sd_folder, []
    if name == "empty folder":
        data = tmp_path / "empty"
        data.mkdir()
    elif name == "missing captions":
        data = tmp_path / "bare"
        data.mkdir()
        zoo.images()[0].image().save(data / "a.png")
    elif name == "corrupt picture":
        data = tmp_path / "cut"
        zoo.export(data, zoo.images()[:3])
        cut = sorted(data.glob("*.png"))[0]
        cut.write_bytes(cut.read_bytes()[:500])
        more = ["--data.broken", "stop"]
    elif name == "no folder":
        data = tmp_path / "nowhere"
    elif name == "unknown word":
        data = tmp_path / "words"
        zoo.export(data, zoo.images()[:3])
        sorted(data.glob("noto-*.txt"))[0].write_text("a zyzzyva")
    elif name == "unknown key":
        more = ["--optim.lrr", "1"]
    elif name == "unknown target":
        more = ["--adapter.target_modules", "to_qq"]
    elif name == "rank 0":
        more = ["--adapter.r", "0"]
    elif name == "no pipeline":
        base = pictures
    elif name == "unknown base":
        base = "emoji-unt"
    elif name == "below a file":
        (tmp_path / "file").write_text("x")
        out = tmp_path / "file" / "out"
    elif name == "processes":
        more = ["--processes", "2"]
    elif name == "odd size":
        more = ["--data.size", "36"]
    elif name == "classifier without classes":
        base = "timm/resnet10t"
    elif name == "unknown classifier":
        base, data = "timm/resnet10x", classes_in(tmp_path)
    elif name == "lora format":
        more = ["--output.format", "diffusers", "--adapter.kind", "sara", "--adapter.fraction", "0.1"]
    return arguments(base, data, out, *more), out


def classes_in(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        zoo.images()[0].image().save(tmp_path / "classes" / name / "1.png")
    return tmp_path / "classes"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("empty folder", DataError, "holds no pictures"),
        ("missing captions", DataError, r"a\.png.*caption"),
        ("corrupt picture", DataError, r"\.png.*truncated"),
        ("no folder", DataError, "there is no folder"),
        ("unknown word", DataError, r"\.png: the embedded models do not know the word 'zyzzyva'"),
        ("unknown key", ConfigError, "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ("unknown target", TargetError, "'to_qq' matches no layer; did you mean 'to_q'"),
        ("rank 0", ConfigError, "adapter.r is 0"),
        ("no pipeline", ModelError, "is no diffusers folder"),
        ("unknown base", ModelError, "there is no folder 'emoji-unt'"),
        ("below a file", OutputError, "a part of the path is a regular file"),
        ("processes", LaunchError, "processes is 2, but 1 took part; on CPUs: ACCELERATE_USE_CPU=true torchrun"),
        ("odd size", ModelError, "data.size is 36; expected a multiple of 8"),
        ("classifier without classes", DataError, "has 0 class folders"),
        ("unknown classifier", ModelError, "timm has no model 'resnet10x'; did you mean 'resnet10t'"),
        ("lora format", FormatError, r"format 'diffusers' has no place for a .* change; use 'kohya'"),
    ],
)
def test_bad_input_fails_before_training(name, error, message, sd_folder, pictures, tmp_path, capsys):
    argv, out = bad(name, tmp_path, sd_folder, pictures)
    with pytest.raises(error, match=message) as raised:
        train_adapter.main(argv)
    assert not (out / "checkpoints").exists()
    assert not (out / "samples").exists()
    # As a command: the same error as one line, and its exit code.
    assert run(train_adapter.main, argv) == raised.value.exit_code != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"{type(raised.value).__name__}: ")


def test_a_full_disk_is_found_before_training(sd_folder, pictures, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(OutputError, match=r"needs about .* MiB and its disk has 0\.3 MiB left"):
            train_adapter.main(arguments(sd_folder, pictures, small / "out"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_classifier_and_its_card(classes, tmp_path, monkeypatch):
    import torch

    base = ["--model.base", "timm/resnet10t", "--model.pretrained", "false", "--adapter.kind", "convlora"]
    argv = [*base, "--data.folder", str(classes), "--data.size", "32", "--output.folder", str(tmp_path / "out"), *SHORT]
    assert train_adapter.main(argv) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Classes: colour, grey" in card
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["held_out"]) == {"loss", "accuracy"}
    # The code on the card runs; a random base has no weights to fetch, so its seed is set.
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    torch.manual_seed(0)
    names: dict = {}
    exec(code.replace('adapter.safetensors")', 'adapter.safetensors", any_base=True)'), names)
    logits = names["model"].eval()(torch.zeros(1, 3, 32, 32))
    assert logits.shape == (1, 2)


def test_a_lora_for_diffusers_loads_in_stock_diffusers(sd_folder, pictures, tmp_path):
    import torch

    more = ["--adapter.kind", "lora", "--output.format", "diffusers", "--optim.lr", "0.05", "--optim.warmup", "0"]
    assert train_adapter.main(arguments(sd_folder, pictures, tmp_path / "out", *more)) == 0
    pipe = tiny.tiny_sd_pipeline()
    x, t, text = torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 16, 16)
    with torch.no_grad():
        base = pipe.unet(x, t, text).sample
        pipe.load_lora_weights(str(tmp_path / "out"), weight_name="adapter.safetensors")
        ours = vislr.load(str(sd_folder))
        vislr.load_adapter(ours, Path(tmp_path / "out" / "adapter.safetensors"))
        torch.testing.assert_close(pipe.unet(x, t, text).sample, ours.unet(x, t, text).sample)
        assert not torch.equal(pipe.unet(x, t, text).sample, base)


@pytest.mark.parametrize("base", ["emoji-unet", "emoji-mmdit"])
def test_end_to_end_on_the_embedded_pipelines(base, tmp_path, capsys):
    """Plain PNG and TXT files in; adapter, grids and a picture drawn with it out."""
    data, out = tmp_path / "pictures", tmp_path / "out"
    data.mkdir()
    ring = [(math.sin(i * math.pi / 5), math.cos(i * math.pi / 5), 24 - 14 * (i % 2)) for i in range(10)]
    shapes = {
        "star": [(40 + r * x, 32 - r * y) for x, y, r in ring],
        "diamond": [(40, 8), (60, 32), (40, 56), (20, 32)],
    }
    for number, (colour, shape) in enumerate(itertools.product(("red", "green", "blue", "yellow"), shapes)):
        image = Image.new("RGB", (80, 64), "white")
        ImageDraw.Draw(image).polygon(shapes[shape], fill=colour)
        image.save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"a {colour} {shape}\n")
    argv = [
        "--model.base", base, "--data.folder", str(data), "--output.folder", str(out), "--steps", "4", "--optim.batch",
        "4", "--optim.warmup", "0", "--optim.lr", "0.02", "--adapter.kind", "lora", "--sample.steps", "2",
        "--sample.prompts", "a red star", "--held_out.fraction", "0.25", "--held_out.every", "0",
    ]  # fmt: skip
    assert main(["train", *argv]) == 0
    assert "6 to train on, 2 held out" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["base"] == base
    assert report["held_out"]["loss"]["after"] < report["held_out"]["loss"]["before"]
    for name, more in (("base", []), ("adapted", ["--adapter", str(out / "adapter.safetensors")])):
        drawn = [
            "generate",
            "--model",
            base,
            "--prompts",
            "a red star",
            "--steps",
            "2",
            "--out",
            str(tmp_path / name),
        ]
        assert main([*drawn, *more]) == 0
    base_picture, adapted = (
        np.asarray(Image.open(tmp_path / name / "000-a-red-star-0.png")).astype(int) for name in ("base", "adapted")
    )
    assert base_picture.shape == adapted.shape == (64, 64, 3)
    assert np.abs(base_picture - adapted).max() > 3


def test_training_under_a_token_plan(sd_folder, pictures, tmp_path, capsys):
    plan = vislr.tokens.at_edm_plan(vislr.load(sd_folder), keep=0.5)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    given = arguments(sd_folder, pictures, tmp_path / "run", "--adapter.kind", "lora")
    assert run(train_adapter.main, [*given, "--model.tokens", str(tmp_path / "plan.json")]) == 0
    assert "tokens    tokens 'tokens'" in capsys.readouterr().out
    whole = arguments(sd_folder, pictures, tmp_path / "whole", "--adapter.kind", "lora")
    assert run(train_adapter.main, whole) == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("run", "whole")]
    assert [[step["report"]["kind"] for step in report["recipe"]] for report in reports] == [
        ["tokens", "peft"],
        ["peft"],
    ]
    # Same weights, noise and pictures: what differs is that tokens were missing.
    before = [report["held_out"]["loss"]["before"] for report in reports]
    assert before[0] != before[1]
    assert before[0] == pytest.approx(before[1], rel=0.2)
    for text, message in (("{", "no plan of"), ('{"keep": 1}', "'keep'")):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            train_adapter.main([*given, "--output.overwrite", "true", "--model.tokens", str(tmp_path / "wrong.json")])
