"""`vislr prune` from end to end, its configs, and what it refuses."""

import dataclasses
import json

import pytest
import tiny
import torch
import yaml

import vislr
from vislr import zoo
from vislr.cli import main
from vislr.core.arguments import find_config, parse_config, plain_data
from vislr.pipelines.prune import PruneConfig

CONFIGS = sorted(path.name for path in find_config("prune/emoji-unet-laptop.yaml").parent.glob("*.yaml"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "captioned"
    zoo.export(folder, zoo.images(style="noto", category="Smileys & Emotion")[:24])
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    tiny.tiny_sd_pipeline().save_pretrained(root / "sd")
    pipe = tiny.tiny_sd3_pipeline()
    torch.manual_seed(0)
    pipe.register_modules(transformer=tiny.tiny_sd3_transformer(num_layers=4))
    pipe.save_pretrained(root / "sd3")
    return root


def keys(value, prefix=""):
    if not isinstance(value, dict):
        return {prefix}
    return {key for name, inner in value.items() for key in (keys(inner, f"{prefix}{name}.") or {f"{prefix}{name}."})}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_fits_and_names_every_field(name):
    path = find_config(f"prune/{name}")
    config = parse_config(PruneConfig, ["--config", str(path)], prog="vislr prune", description="")
    written = yaml.safe_load(path.read_text())
    assert keys(written) == keys(plain_data(config))
    commented = [line for line in path.read_text().splitlines() if line.strip().startswith("#")]
    assert len(commented) >= len(keys(written))


def command(pipelines, pictures, out, *more, model="sd"):
    return [
        "prune", "--model.base", str(pipelines / model), "--data.folder", str(pictures), "--output.folder", str(out),
        "--plan.samples", "4", "--plan.batch", "4", "--recovery.steps", "2", "--recovery.optim.batch", "2",
        "--recovery.sample.steps", "1", "--recovery.held_out.every", "0", "--recovery.held_out.repeats", "1",
        "--recovery.held_out.bands", "0", *more,
    ]  # fmt: skip


def test_laptop_from_end_to_end(pipelines, pictures, tmp_path, capsys):
    out = tmp_path / "run"
    args = command(pipelines, pictures, out, "--plan.ratio", "0.3", "--plan.additivity", "3")
    assert main([*args, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "12 units, 13 forwards" in said
    assert "12 at granularity 'block': 90.6% of the parameters" in said
    assert not out.exists()
    hybrid = [
        "--plan.criterion",
        "hierarchical",
        "--plan.cut",
        "hybrid",
        "--plan.prompts",
        "5",
        "--plan.additivity",
        "0",
    ]
    assert main([*args, *hybrid, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "scoring  blocks: 12 units, 260 forwards" in said, "2 batches of pictures, 10 steps, 13 times"
    assert "scoring  parts: " in said
    assert main(args) == 0
    assert {path.name for path in out.iterdir()} == {
        "plan.json", "plan.png", "additivity.json", "additivity.png", "scores", "recovery", "pipeline", "config.yaml",
        "report.json",
    }  # fmt: skip
    plan = json.loads((out / "plan.json").read_text())
    assert plan["saved"] / plan["total"] >= 0.3
    pipe = vislr.load(out / "pipeline")
    (step,) = vislr.recipe_of(pipe)
    assert step["change"]["plan"] == plan
    count = sum(p.numel() for p in pipe.unet.parameters())
    assert step["report"]["parameters"] == (plan["total"], count) == (plan["total"], plan["total"] - plan["saved"])
    record = json.loads((out / "pipeline" / "vislr.json").read_text())
    assert set(record["measurements"]["held-out loss"]) == {"before", "after"}
    whole = vislr.load(pipelines / "sd").unet.state_dict()
    assert any(not torch.equal(value, whole[name]) for name, value in pipe.unet.state_dict().items())
    capsys.readouterr()
    assert main(args) == 3
    assert "holds a pruning run" in capsys.readouterr().err
    # The same plan again from its file, without recovery: nothing is scored.
    again = command(
        pipelines, pictures, tmp_path / "again", "--plan.file", str(out / "plan.json"), "--recovery.train", "none"
    )
    assert main(again) == 0
    assert "scoring" not in capsys.readouterr().err
    pruned = vislr.load(tmp_path / "again" / "pipeline")
    assert all(torch.equal(value, whole[name]) for name, value in pruned.unet.state_dict().items())


def test_hierarchical_with_an_adapter_alone(pipelines, pictures, tmp_path):
    out = tmp_path / "run"
    args = command(
        pipelines, pictures, out, "--plan.criterion", "hierarchical", "--plan.prompts", "2", "--plan.steps", "1",
        "--plan.ratio", "0.2", "--recovery.train", "lora", "--recovery.rank", "2", model="sd3",
    )  # fmt: skip
    assert main(args) == 0
    pipe = vislr.load(out / "pipeline")
    assert [step["report"]["kind"] for step in vislr.recipe_of(pipe)] == ["layers", "peft"]
    plan = json.loads((out / "plan.json").read_text())
    assert plan["criterion"] == "hierarchical"
    assert set(plan["settings"]["drops"]) == {f"transformer_blocks.{i}" for i in range(4)}


@pytest.mark.parametrize("criterion", ["magnitude", "random", "uniform", "bk-sdm", "ssd"])
def test_baselines_and_other_budgets(criterion, pipelines, pictures, tmp_path):
    out = tmp_path / "run"
    budget = {"magnitude": "flops", "random": "latency"}.get(criterion, "parameters")
    args = command(
        pipelines, pictures, out, "--plan.criterion", criterion, "--plan.ratio", "0.15", "--plan.budget", budget,
        "--recovery.train", "none",
    )  # fmt: skip
    assert main(args) == 0
    plan = json.loads((out / "plan.json").read_text())
    assert plan["budget"] == budget
    assert plan["saved"] >= 0.15 * plan["total"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--plan.ratio", "0.95"], 2, "beyond what can be removed: all 12 units at granularity 'block' are 0.90"),
        (["--plan.ratio", "1.5"], 2, "plan.ratio is 1.5; expected a share"),
        (["--plan.criterion", "lapto"], 2, "expected one of laptop"),
        (["--plan.rato", "0.5"], 2, "unknown key 'plan.rato'; did you mean 'plan.ratio'"),
        (["--plan.file", "missing.json"], 2, "plan.file 'missing.json' cannot be read"),
        (["--plan.criterion", "ssd-1b"], 2, "SSD-1B's list is for the UNet of SDXL"),
        (["--data.folder", "", "--plan.criterion", "laptop"], 2, "data.folder is not given"),
    ],
)
def test_bad_input_is_named(flags, code, message, pipelines, pictures, tmp_path, capsys):
    args = command(pipelines, pictures, tmp_path / "run", "--recovery.train", "none")
    assert main([*args, *flags]) == code
    assert message in capsys.readouterr().err
    if "ratio" in flags[0]:
        assert not (tmp_path / "run").exists()


def test_a_plan_for_another_model_is_refused(pipelines, pictures, tmp_path, capsys):
    pipe = tiny.tiny_sd_pipeline()
    from vislr.prune import Random, plan_layers

    plan = plan_layers(pipe, Random(), 0.2)
    other = dataclasses.replace(plan, architecture="SD3Transformer2DModel")
    (tmp_path / "plan.json").write_text(json.dumps(other.to_dict()))
    args = command(
        pipelines, pictures, tmp_path / "run", "--plan.file", str(tmp_path / "plan.json"), "--recovery.train", "none"
    )
    assert main(args) == 2
    assert "the plan is for a SD3Transformer2DModel" in capsys.readouterr().err
