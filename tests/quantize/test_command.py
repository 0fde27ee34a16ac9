"""`vislr quantize`, end to end on a tiny pipeline; its configs and its page."""

import json
from pathlib import Path

import diffusers
import pytest
import tiny
import torch

from vislr.cli import main
from vislr.core.arguments import parse_config
from vislr.quantize import quant_layers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.tiny_sd_pipeline().save_pretrained(folder)
    return folder


def test_a_run_writes_a_folder_that_diffusers_loads(base, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "quantize", f"--model.base={base}", "--plan.weights=4", "--plan.activations=4", "--tune.steps=3",
        "--tune.trajectories=2", "--tune.batch=2", "--tune.rank=2", "--calibration.trajectories=2",
        '--calibration.prompts=["a cat face"]', f"--output.folder={out}", "--keep_adapter=true", "--pictures", "a bus",
    ]  # fmt: skip
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "fine-tuned: 3 updates" in told
    assert "distance from the teacher, not trained" in told
    for name in ("plan.json", "report.json", "report.txt", "layers.png", "before_after.png", "ways.txt",
                 "qalora.safetensors", "config.yaml"):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    report = json.loads((out / "report.json").read_text())
    assert report["fine-tuning"]["updates"] == 3
    pipe = diffusers.DiffusionPipeline.from_pretrained(out / "pipeline")
    layers = quant_layers(pipe.unet)
    assert set(layers) == set(report["weight errors"])
    assert not any("qalora" in name for name, _ in pipe.unet.named_parameters())
    # A second run on the same folder has to say what it means.
    assert main(arguments) == 3
    assert "expected output.resume or output.overwrite" in capsys.readouterr().err


def test_mixed_precision_meets_its_size(base, tmp_path):
    out = tmp_path / "out"
    flags = ["quantize", f"--model.base={base}", "--plan.method=weights", "--plan.group=null", "--plan.budget_mb=0.06",
             '--calibration.prompts=["a cat face"]', "--calibration.steps=2", "--ways=false",
             f"--output.folder={out}", '--plan.bits={"*": null, "up_blocks.*": [4, 16]}']  # fmt: skip
    assert main(flags) == 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(out / "pipeline")
    layers = quant_layers(pipe.unet)
    size = sum(v.numel() * v.element_size() for one in layers.values() for v in one._buffers.values() if v is not None)
    assert size <= 60_000
    assert len({one.spec.bits for one in layers.values()}) > 1
    assert torch.isfinite(layers["up_blocks.0.resnets.0.conv1"].dequantized()).all()


def test_a_dry_run_reads_no_weights(capsys):
    assert main(["quantize", "--dry_run", "--model.base=dit-xl-2", "--plan.method=weights", "--plan.format=nf4"]) == 0
    out = capsys.readouterr().out
    assert "nf4 weight-only for DiTTransformer2DModel: " in out
    assert float(out.split("(")[1].split("x smaller")[0]) > 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "output.folder is not given"),
        (["--plan.wieghts=4"], "did you mean 'plan.weights'"),
        (["--plan.weights=9", "--dry_run"], "weight of .* is 9; expected a whole number from 2 to 8"),
        (["--plan.method=weights", "--plan.format=nf4", "--plan.weights=3", "--dry_run"], "nf4 has 4 bits"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    import re

    assert main(["quantize", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_configs_fit():
    from vislr.pipelines.quantize import QuantizeConfig

    files = sorted((ROOT / "configs" / "quantize").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        parse_config(QuantizeConfig, ["--config", str(file)], prog="vislr quantize", description="")


def test_the_page_names_what_there_is():
    page = (ROOT / "docs" / "quantize.md").read_text(encoding="utf-8")
    for file in (ROOT / "configs" / "quantize").glob("*.yaml"):
        assert f"quantize/{file.name}" in page
    assert (ROOT / "docs" / "images" / "quantize.png").is_file()
