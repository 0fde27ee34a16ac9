"""`vislr adapt-domain` as a command: real files in, everything out, and every bad input by name."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import vislr
from vislr import zoo
from vislr.core.arguments import parse_config, plain_data
from vislr.core.cli_guard import run
from vislr.core.errors import ConfigError, DataError, ModelError, OutputError
from vislr.pipelines import adapt_domain
from vislr.train.self_training_config import AdaptConfig, DomainConfig, NetConfig, ShiftOutputConfig, SliceConfig
from vislr.train.self_training_data import read_pictures, read_slices
from vislr.train.self_training_models import build_net

CONFIGS = Path(__file__).parents[2] / "configs" / "adapt-domain"
SHORT = ["--training.epochs", "1", "--early_head.epochs", "1", "--adaptation.epochs", "1", "--statistics.examples", "4"]


def volume(path, *, gain=1.0, offset=0.0, mask=True, slices=6, seed=0):
    """An npz file: a ball in noise, and its mask."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(20)] * 2, np.linspace(-5, 5, slices), indexing="ij"))
    inside = (grid[0] - 10) ** 2 + (grid[1] - 9) ** 2 + grid[2] ** 2 < 40
    image = offset + gain * inside + 0.3 * rng.random(inside.shape)
    arrays = {"image": image.astype(np.float32)} | ({"mask": inside} if mask else {})
    np.savez(path, **arrays)
    return inside


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    for name, options in (("s1", {}), ("s2", {"seed": 1}), ("t1", {"gain": 0.3, "offset": 0.5, "seed": 2})):
        volume(folder / f"{name}.npz", **options)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of faces in two styles; the target once more without labels."""
    root = tmp_path_factory.mktemp("pictures")
    for style in ("noto", "twemoji"):
        for number, picture in enumerate(zoo.images(style=style, category="Smileys & Emotion")[:20]):
            image = picture.image() if number % 2 else picture.image().convert("L")
            for path in (root / style / ("colour" if number % 2 else "grey"), root / f"{style}-flat"):
                path.mkdir(parents=True, exist_ok=True)
                image.save(path / f"{number}.png")
    return root


def segmentation(volumes, out, *more):
    return [
        "--task", "segmentation", "--model.base", "unet", "--model.size", "16", "--batch", "4",
        "--output.folder", str(out),
        "--source.data", str(volumes / "s1.npz"), str(volumes / "s2.npz"), "--target.data", str(volumes / "t1.npz"),
        *SHORT, *more,
    ]  # fmt: skip


def classification(pictures, out, *more, target="twemoji"):
    return [
        "--model.base", "timm/resnet10t", "--model.pretrained", "false", "--model.size", "32", "--batch", "8",
        "--source.data", str(pictures / "noto"), "--target.data", str(pictures / target), "--output.folder", str(out),
        *SHORT, *more,
    ]  # fmt: skip


def test_a_run_on_volumes_leaves_everything(volumes, tmp_path, capsys):
    out = tmp_path / "out"
    command = segmentation(volumes, out, "--adaptation.variants", "source", "adabn")
    assert adapt_domain.main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"12 slices of 2 volumes \(labelled\)", shown)
    assert "reads 'down3'" in shown
    assert not out.exists()
    assert adapt_domain.main(command) == 0
    shown = capsys.readouterr().out
    assert re.search(r"adabn: (better|no clear difference|WORSE THAN THE SOURCE MODEL): dice", shown)
    assert "figures of the target are taken on the examples that were adapted to" in shown
    names = {path.name for path in out.iterdir()}
    assert names == {"config.yaml", "report.json", "README.md", "overview.png", "slices.png", "model.safetensors",
                     "adabn.safetensors"}  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["target_figures_on_the_examples_adapted_to"] is True
    assert report["source"]["taken_on_training_examples"] is False
    assert report["trials"]["adabn"]["sites"] == 52
    with Image.open(out / "slices.png") as grid:
        assert grid.height > 3 * 128
    # The card's lines load what is there.
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    scope: dict = {}
    exec(
        compile(
            code.replace('"model.saf', f'"{out}/model.saf').replace('"adabn.saf', f'"{out}/adabn.saf'), "card", "exec"
        ),
        scope,
    )
    assert scope["model"](torch.rand(1, 1, 16, 16)).shape == (1, 1, 16, 16)
    # A finished run is left alone.
    assert run(adapt_domain.main, command) == OutputError.exit_code
    assert "holds a finished run" in capsys.readouterr().err
    before = (out / "report.json").read_text()
    assert adapt_domain.main([*command, "--output.resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert (out / "report.json").read_text() == before
    with pytest.raises(ConfigError, match="cannot resume: seed was 0 and is 1"):
        adapt_domain.main([*command, "--output.resume", "--seed", "1"])
    (out / "mine.txt").write_text("kept")
    # Weights of an earlier run: the source is not trained again.
    again = tmp_path / "again"
    more = ["--model.weights", str(out / "model.safetensors"), "--adaptation.variants", "source"]
    assert adapt_domain.main([*command[:-3], *more, "--output.folder", str(again)]) == 0
    assert json.loads((again / "report.json").read_text())["model"] == report["model"]
    assert adapt_domain.main([*command[:-3], "--adaptation.variants", "source", "--output.overwrite"]) == 0
    assert (out / "mine.txt").read_text() == "kept"
    assert not (out / "adabn.safetensors").exists()


def test_a_run_on_pictures_without_labels(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    command = classification(pictures, out, "--adaptation.variants", "source", "both", target="twemoji-flat")
    assert adapt_domain.main(command) == 0
    assert "both: no labels to tell" in capsys.readouterr().out.replace(
        "WORSE AGREEMENT than the source model: ", "no labels to tell"
    )
    report = json.loads((out / "report.json").read_text())
    assert report["classes"] == ["colour", "grey"]
    assert report["trials"]["both"]["target"] == {}
    assert report["trials"]["both"]["verdict"] == "unknown"
    torch.manual_seed(1)
    model = build_net(NetConfig("timm/resnet10t", False, size=32), 2, 3).model.eval()
    model.load_state_dict(load_file(out / "model.safetensors"))
    x = torch.rand(2, 3, 32, 32)
    before = model(x)
    vislr.load_adapter(model, out / "both.safetensors")
    assert not torch.allclose(model(x), before, atol=1e-4)


def test_embedded_styles_are_domains():
    source = read_pictures(DomainConfig(["zoo:noto"]), 16)
    target = read_pictures(DomainConfig(["zoo:fluent3d"]), 16, source.classes)
    assert source.inputs.shape == (len(zoo.images(style="noto")), 3, 16, 16)
    assert source.inputs.dtype == torch.uint8
    assert "Food & Drink" in source.classes
    assert torch.equal(source.truth, target.truth)
    # The same concepts are held out of both.
    assert set(source.split(0.3)[1].keys) == set(target.split(0.3)[1].keys)
    x = source.batch([0, 5], torch.device("cpu"))
    assert torch.allclose(x, source.inputs[[0, 5]].float() / 255)


def test_slices_keep_volumes_masks_and_distances(tmp_path):
    mask = volume(tmp_path / "a.npz", slices=8)
    domain = read_slices(DomainConfig([str(tmp_path / "a.npz")]), SliceConfig(), 20, labelled=True)
    assert domain.inputs.shape == (8, 1, 20, 20)
    assert (domain.inputs.min(), domain.inputs.max()) == (0, 1)
    assert np.array_equal(domain.truth.numpy(), np.moveaxis(mask, 2, 0))
    assert dict(domain.spacing) == {"a.npz": (1.0, 1.0, 1.0)}
    # Across another axis, slices are 20 x 8 and padded to a square; 10 pixels of 2 for 20.
    other = read_slices(DomainConfig([str(tmp_path / "a.npz")]), SliceConfig(axis=0, foreground=0.0), 10, labelled=True)
    assert other.inputs.shape == (20, 1, 10, 10)
    assert dict(other.spacing) == {"a.npz": (1.0, 2.0, 2.0)}
    # Dark slices are left out by their brightness, not by the mask.
    image = np.concatenate([np.load(tmp_path / "a.npz")["image"], np.zeros((20, 20, 4))], 2)
    np.save(tmp_path / "b.npy", image)
    np.save(tmp_path / "b_mask.npy", np.concatenate([mask, np.zeros((20, 20, 4))], 2))
    config = DomainConfig([str(tmp_path / "b.npy")], [str(tmp_path / "b_mask.npy")])
    assert torch.equal(read_slices(config, SliceConfig(), 20, labelled=True).truth, domain.truth)
    assert read_slices(DomainConfig([str(tmp_path / "b.npy")]), SliceConfig(), 20, labelled=False).truth is None


def test_nifti_is_turned_to_one_orientation(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="the extra mri (nibabel) is not installed")
    rng = np.random.default_rng(0)
    image = rng.random((12, 10, 8)).astype(np.float32) + 0.2
    straight = np.diag([2.0, 3.0, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(image, straight), tmp_path / "a.nii.gz")
    # The same head, stored from left to right reversed and with axes swapped.
    turned = np.array([[0, -2.0, 0, 22.0], [3.0, 0, 0, 0], [0, 0, 4.0, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(image.swapaxes(0, 1)[:, ::-1]), turned), tmp_path / "b.nii")
    one, other = (
        read_slices(DomainConfig([str(tmp_path / name)]), SliceConfig(), 12, labelled=False)
        for name in ("a.nii.gz", "b.nii")
    )
    assert torch.equal(one.inputs, other.inputs)
    assert dict(one.spacing)["a.nii.gz"] == dict(other.spacing)["b.nii"] == (4.0, 2.0, 3.0)
    (tmp_path / "c.nii").write_bytes(b"no header")
    with pytest.raises(DataError, match=r"c\.nii"):
        read_slices(DomainConfig([str(tmp_path / "c.nii")]), SliceConfig(), 12, labelled=False)


def test_bad_volumes_are_named(tmp_path):
    volume(tmp_path / "plain.npz", mask=False)
    inside = volume(tmp_path / "good.npz")
    np.savez(tmp_path / "other.npz", picture=inside)
    np.savez(tmp_path / "flat.npz", image=np.zeros((9, 9, 9)), mask=np.ones((9, 9, 9)))
    np.savez(tmp_path / "nan.npz", image=np.full((9, 9, 9), np.nan), mask=np.ones((9, 9, 9)))
    np.savez(tmp_path / "four.npz", image=np.zeros((9, 9, 9, 2)), mask=np.ones((9, 9, 9, 2)))
    np.savez(tmp_path / "empty-mask.npz", image=np.load(tmp_path / "good.npz")["image"], mask=np.zeros(inside.shape))
    np.savez(tmp_path / "small-mask.npz", image=np.load(tmp_path / "good.npz")["image"], mask=inside[:-1])
    np.savez(tmp_path / "objects.npz", image=np.array([{"code": 1}], dtype=object))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:100])
    for name, message in (
        ("plain.npz", "has no mask; expected one in masks, or an array 'mask'"),
        ("other.npz", "holds picture; expected an array 'image'"),
        ("flat.npz", "has one value everywhere"),
        ("nan.npz", "has NaN or infinite values"),
        ("four.npz", r"has shape \(9, 9, 9, 2\); expected a volume of 3 axes"),
        ("empty-mask.npz", "has nothing above 0"),
        ("small-mask.npz", r"has shape \(19, 20, 6\); the volume's is \(20, 20, 6\)"),
        ("objects.npz", "cannot be read"),
        ("cut.npz", "cannot be read"),
        ("missing.npz", "is no file, no folder of volumes and matches nothing"),
    ):
        with pytest.raises(DataError, match=message):
            read_slices(DomainConfig([str(tmp_path / name)]), SliceConfig(), 16, labelled=True)
    good = str(tmp_path / "good.npz")
    with pytest.raises(DataError, match="1 volumes and 2 masks"):
        read_slices(DomainConfig([good], [good, good]), SliceConfig(), 16, labelled=True)
    with pytest.raises(DataError, match=r"some volumes of .* have masks and some have none"):
        read_slices(DomainConfig([good, str(tmp_path / "plain.npz")]), SliceConfig(), 16, labelled=False)
    with pytest.raises(DataError, match="no slice of which 99% is bright"):
        read_slices(DomainConfig([good]), SliceConfig(foreground=0.99), 16, labelled=True)


def test_bad_pictures_are_named(pictures, tmp_path):
    classes = ("colour", "grey")
    with pytest.raises(DataError, match="is no folder"):
        read_pictures(DomainConfig([str(tmp_path / "none")]), 16)
    with pytest.raises(DataError, match="holds no pictures"):
        read_pictures(DomainConfig([str(tmp_path)]), 16, classes)
    with pytest.raises(DataError, match="one folder for each class"):
        read_pictures(DomainConfig([str(pictures / "noto-flat")]), 16)
    with pytest.raises(DataError, match="class 'grey' that training has not"):
        read_pictures(DomainConfig([str(pictures / "noto")]), 16, ("colour", "black"))
    with pytest.raises(DataError, match="the source has colour, grey"):
        read_pictures(DomainConfig(["zoo:noto"]), 16, classes)
    with pytest.raises(ConfigError, match=r"'notto'.*did you mean 'noto'"):
        read_pictures(DomainConfig(["zoo:notto"]), 16)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png' is no picture"):
        read_pictures(DomainConfig([str(tmp_path / "x")]), 16, classes)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.base", "unett"], "model.base is 'unett' and task is segmentation; expected unet"),
        (["--model.size", "20"], "model.size is 20; expected a multiple of 8"),
        (["--training.train", "head"], "a segmentation model has none"),
        (["--batch", "1"], "batch is 1; expected 2 or more"),
        (["--adaptation.variants", "convlora"], "lacks 'source'"),
        (["--adaptation.variants", "source", "source"], "names one twice"),
        (["--adaptation.variants", "source", "adabnn"], "adabnn"),
        (["--adaptation.epochs", "0"], "adaptation.epochs is 0"),
        (["--adaptation.lr", "0"], "adaptation.lr is 0"),
        (["--adapter.r", "0"], "adapter.r is 0"),
        (["--slices.axis", "3"], "slices.axis is 3; expected 0, 1 or 2"),
        (["--source.held_out", "1"], "held_out is 1"),
        (["--statistics.mode", "exactly"], "statistics.mode is 'exactly'; expected one of exact, ema"),
        (["--adaptations.lr", "1"], "unknown key 'adaptations.lr'.*did you mean 'adaptation.lr'"),
        (["--output.resume", "--output.overwrite"], "exclude each other"),
    ],
)
def test_impossible_configs(flags, message, volumes, tmp_path):
    with pytest.raises(ConfigError, match=message):
        adapt_domain.main(segmentation(volumes, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


def test_configs_without_what_must_be_given(tmp_path):
    given = {"source": DomainConfig(["a"]), "target": DomainConfig(["b"]), "output": ShiftOutputConfig("c")}
    for change, message in (
        ({"source": DomainConfig()}, r"source\.data is not given"),
        ({"target": DomainConfig()}, r"target\.data is not given"),
        ({"output": ShiftOutputConfig()}, r"output\.folder is not given"),
        ({"source": DomainConfig(["a", "b"])}, "source: classification takes one folder"),
        ({"target": DomainConfig(["a"], ["m"])}, "target: classification takes one folder in data, and no masks"),
        ({"model": NetConfig("unet")}, r"model\.base is 'unet' and task is classification; expected lite0"),
    ):
        with pytest.raises(ConfigError, match=message):
            AdaptConfig(**(given | change))


def test_weights_of_another_model(volumes, tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "w.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"1234567890")
    for name, message in (("w", "is of another model"), ("broken", "cannot be read"), ("none", "cannot be read")):
        with pytest.raises(ModelError, match=message):
            adapt_domain.main(
                segmentation(volumes, tmp_path / "out", "--model.weights", str(tmp_path / f"{name}.safetensors"))
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_says_every_key_with_a_comment(file):
    config = parse_config(AdaptConfig, ["--config", str(file)], prog="x", description="x")
    text = file.read_text(encoding="utf-8")
    assert plain_data(config) == yaml.safe_load(text)

    def keys(value):
        return (
            {f.name: keys(getattr(value, f.name)) for f in dataclasses.fields(value)}
            if dataclasses.is_dataclass(value)
            else None
        )

    def of(value):
        return {key: of(item) for key, item in value.items()} if isinstance(value, dict) else None

    assert of(yaml.safe_load(text)) == keys(config)
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s*\w+: \S", line):
            assert lines[number - 1].lstrip().startswith("#"), line


def test_the_pages_example_runs(tmp_path, monkeypatch):
    page = CONFIGS.parents[1] / "docs" / "adapt-domain.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(examples[0], str(page), "exec"), {})
    assert (tmp_path / "adapted" / "both.safetensors").stat().st_size > 0
