"""`vislr recipe run` on a tiny pipeline: the whole chain, resumed, loaded, replayed and undone, bit for bit."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml

import vislr
from vislr.cli import main
from vislr.core.arguments import find_config
from vislr.core.errors import AdapterError, ConfigError
from vislr.core.files import read_json
from vislr.pipelines.recipe_run import Run, RunConfig
from vislr.record import entries_of

PROMPT = "noto style, a cat face"
SHORT = {"steps": 2, "optim": {"batch": 2}, "sample": {"steps": 1}, "held_out": {"fraction": 0.25}}
STEPS = [
    {"train": {"adapter": {"kind": "lora", "name": "style", "r": 2}, "data": {"folder": "zoo:outline:8"}, **SHORT}},
    {"train": {"adapter": {"kind": "convlora", "name": "subject", "r": 1}, **SHORT}},
    {"prune": {"plan": {"criterion": "magnitude", "ratio": 0.1}, "recovery": {"train": "none"}}},
    {"recover": {"recovery": {"train": "lora", "rank": 2, **SHORT}}},
    {"fuse": {}},
    {"quantize": {
        "plan": {"method": "ptq", "weights": 8, "activations": 8, "inputs": "static"}, "ways": False,
        "calibration": {"prompts": [PROMPT], "trajectories": 1, "batch": 1, "steps": 2},
    }},
    {"tokens": {"keep": 0.7, "steps": 2}},
    {"cache": {"every": 2, "steps": 2}},
    {"compose": {"adapters": ["style:0.8", "subject:0.5"], "methods": ["switch"], "every": 1, "steps": 2}},
]  # fmt: skip
NAMES = ["01-train", "02-train", "03-prune", "04-recover", "05-fuse", "06-quantize", "07-tokens", "08-cache",
         "09-compose"]  # fmt: skip
# Steps of the last folder's recipe behind the quantised weights: tokens, cache, two adapters, their composition.
TAIL = 5


def config(base, out, steps, **more):
    judge = {"prompts": [PROMPT], "steps": 2, "pictures": 0, "rounds": 0}
    return {"base": str(base), "data": {"folder": "zoo:noto:8"}, "steps": steps, "judge": judge, "device": "cpu",
            "out": str(out), **more}  # fmt: skip


def run(path, values):
    path.write_text(yaml.safe_dump(values))
    return main(["recipe", "run", str(path)])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The chain on a tiny pipeline; begun with its first steps alone, a stale part beside them, and gone on with."""
    folder = tmp_path_factory.mktemp("chain")
    vislr.save(tiny.tiny_sd_pipeline(), folder / "base")
    assert run(folder / "run.yaml", config(folder / "base", folder / "out", STEPS[:3])) == 0
    first = {name: (folder / "out" / name / "step.json").stat().st_mtime_ns for name in NAMES[:3]}
    stale = folder / "out" / ".04-recover.part"
    stale.mkdir()
    (stale / "left").write_text("of a run with other settings")
    assert run(folder / "run.yaml", config(folder / "base", folder / "out", STEPS)) == 0
    assert not stale.exists()
    assert {name: (folder / "out" / name / "step.json").stat().st_mtime_ns for name in NAMES[:3]} == first
    return folder


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt").images


def test_every_step_has_its_folder_its_figures_and_its_row(place):
    out = place / "out"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["00-base", *NAMES, "pictures"]
    report = read_json(out / "report.json")
    assert list(report["figures"]) == ["00-base", *NAMES[2:]]
    assert list(report["seconds"]) == NAMES
    count = {name: one["parameters"]["value"] for name, one in report["figures"].items()}
    size = {name: one["bytes"]["value"] for name, one in report["figures"].items()}
    assert count["03-prune"] < 0.9 * count["00-base"] < count["00-base"]
    assert count["04-recover"] > count["03-prune"] == count["05-fuse"] == count["06-quantize"] == count["08-cache"]
    assert size["06-quantize"] < size["05-fuse"] / 2
    assert (out / "sheet.png").is_file()
    assert len((out / "report.txt").read_text().splitlines()) == 1 + len(report["figures"])
    kinds = [step["report"]["kind"] for step in vislr.recipe_of(vislr.load(out / "09-compose" / "pipeline"))]
    assert kinds == ["layers", "peft", "fuse", "quant", "peft", "convlora", "tokens", "cache", "compose"]
    kept = read_json(out / "09-compose" / "pipeline" / "vislr.json")["measurements"]["bytes"]
    assert (kept["before"]["value"], kept["after"]["value"]) == (size["00-base"], size["09-compose"])


def test_loaded_in_a_new_process_by_vislr_and_by_diffusers(place):
    code = f"""
import sys, hashlib, vislr, torch
from diffusers import DiffusionPipeline
last = {str(place / "out" / "09-compose" / "pipeline")!r}
for pipe in (vislr.load(last), DiffusionPipeline.from_pretrained(last)):
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        made = pipe({PROMPT!r}, num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt")
    print("MADE", hashlib.sha256(made.images.numpy().tobytes()).hexdigest())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    seen = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("MADE")]
    own = [vislr.load(place / "out" / name / "pipeline") for name in ("09-compose", "06-quantize")]
    # Diffusers reads the weights; run-time plans and adapters come with vislr.load.
    assert seen == [hashlib.sha256(picture(pipe).numpy().tobytes()).hexdigest() for pipe in own]


def test_replayed_from_the_base_and_undone_to_the_state_before(place, tmp_path, capsys):
    out = place / "out"
    last, base = str(out / "09-compose" / "pipeline"), str(place / "base")
    assert main(["recipe", "replay", last, "--base", base, "--out", str(tmp_path / "again")]) == 0
    assert "the weights are the folder's, bit for bit" in capsys.readouterr().out
    made = picture(vislr.load(last))
    again = vislr.load(tmp_path / "again")
    assert torch.equal(picture(again), made)
    before = picture(vislr.load(out / "06-quantize" / "pipeline"))
    assert not torch.equal(before, made)
    undo = ["recipe", "undo", last, "--base", base, "--steps", str(TAIL), "--out", str(tmp_path / "before")]
    assert main(undo) == 0
    assert torch.equal(picture(vislr.load(tmp_path / "before")), before)
    # In a running program the tail comes off the loaded pipeline itself.
    for entry in reversed(entries_of(again)[-TAIL:]):
        vislr.remove(again, entry.report)
    assert torch.equal(picture(again), before)


def test_a_finished_run_does_nothing_and_other_settings_are_refused(place, capsys):
    out, path = place / "out", place / "run.yaml"
    times = {name: (out / name / "step.json").stat().st_mtime_ns for name in NAMES}
    assert run(path, config(place / "base", out, STEPS)) == 0
    assert {name: (out / name / "step.json").stat().st_mtime_ns for name in NAMES} == times
    other = json.loads(json.dumps(STEPS))
    other[2]["prune"]["plan"]["ratio"] = 0.2
    assert run(path, config(place / "base", out, other)) == 3
    assert "made by other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_inside_of_its_steps_a_run_ends_in_the_same_bits(tmp_path):
    script = Path(__file__).with_name("recipe_kills.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tiny.__file__).parent)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == [
        ["update", 1, ".01-train.part"],  # before a checkpoint
        ["update", 3, ".01-train.part"],  # behind one
        ["update", 3, ".03-recover.part"],  # before a checkpoint of the recovery
        ["update", 5, ".03-recover.part"],
        ["done", 1, ".03-recover.part"],  # all is there but the folder's name
        ["save", 2, ".04-fuse.part"],
    ]
    assert found["files"] > 50
    assert found["different"] == []


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        ([], ConfigError, "steps is empty"),
        ([{"prunes": {}}], ConfigError, "did you mean 'prune'"),
        ([{"fuse": {}, "cache": {}}], ConfigError, "expected one verb"),
        ([{"fuse": []}], ConfigError, "expected a table"),
        ([{"prune": {"plan": {"ratios": 0.2}}}], ConfigError, r"step 1 \(prune\).*did you mean 'ratio'"),
        ([{"prune": {"plan": {"ratio": 2}}}], ConfigError, "expected a share"),
        ([{"quantize": {"model": {"base": "emoji-unet"}}}], ConfigError, "'base' is set by the run"),
        ([{"tokens": {"keep": 0.5, "out": "x"}}], ConfigError, "'out' is set by the run"),
        ([{"recover": {}}], ConfigError, "none is before"),
        ([{"cache": {"method": "measured"}}], ConfigError, "measured needs prompts"),
        ([{"compose": {"adapters": ["style"], "methods": ["merge", "switch"]}}], ConfigError, "2 methods"),
        ([{"compose": {"adapters": ["style", "other"]}}], AdapterError, "no adapter file 'style'"),
    ],
)
def test_steps_that_are_wrong_are_named_before_any_work(steps, error, message, tmp_path):
    with pytest.raises(error, match=message):
        Run(RunConfig(steps=steps, out=str(tmp_path / "out"), data=vislr.data.DataConfig("zoo:noto")))
    assert not (tmp_path / "out").exists()


def test_the_config_that_comes_with_vislr_says_what_it_takes(capsys):
    assert find_config("recipes/small-fast.yaml").is_file()
    assert main(["recipe", "run", "recipes/small-fast.yaml", "--dry_run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:10]] == NAMES
    assert "smaller" in printed[6]


def test_the_four_bit_config_prunes_recovers_and_quantises(capsys):
    assert main(["recipe", "run", "recipes/small-4bit.yaml", "--dry_run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:4]] == ["01-prune", "02-recover", "03-quantize"]
