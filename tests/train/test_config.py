"""Every config fits its dataclass and says everything; wrong keys and values fail by name."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from pathlib import Path

import pytest
import yaml

import vislr
from vislr.core.arguments import dump_config, find_config, parse_config
from vislr.core.errors import ConfigError
from vislr.train import AdapterSection, TrainConfig

CONFIGS = sorted((Path(vislr.__file__).parent / "configs" / "train").glob("*.yaml"))
GIVEN = ["--data.folder", "in", "--output.folder", "out"]


def parse(*argv):
    return parse_config(TrainConfig, argv, prog="train", description="")


def keys(config, prefix=""):
    found = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found |= keys(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else {prefix + field.name}
    return found


def flat(values, prefix=""):
    found = set()
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found


def words(section, prefix=""):
    """Field -> the text below it, of a dataclass and all that is in it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body
    found, types = {}, typing.get_type_hints(section)
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            name = field.target.id
            found[prefix + name] = " ".join(ast.literal_eval(text.value).split())
            if dataclasses.is_dataclass(types[name]):
                found |= words(types[name], f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_fits_and_names_every_field_with_a_comment(path):
    config = parse("--config", str(path))
    assert flat(yaml.safe_load(path.read_text())) == keys(config)
    config.adapter.to_change()
    lines, stack, said = path.read_text().splitlines(), [], words(TrainConfig)
    for number, line in enumerate(lines):
        found = re.match(r"( *)([a-z_0-9]+):(.*)", line)
        if not found or line.lstrip().startswith("-"):
            continue
        stack = [*stack[: len(found[1]) // 2], found[2]]
        above = list(itertools.takewhile(lambda text: text.lstrip().startswith("#"), reversed(lines[:number])))
        comment = " ".join(text.lstrip(" #") for text in reversed(above))
        # What a field does is said once, below it; the files repeat it.
        assert comment == said.get(".".join(stack), comment), f"{path.name}: the comment above '{line}' is another"
        assert comment, f"{path.name}: no comment above '{line}'"


def test_there_is_a_config_for_each_method():
    kinds = {yaml.safe_load(path.read_text())["adapter"]["kind"] for path in CONFIGS}
    assert kinds == set(typing.get_args(typing.get_type_hints(AdapterSection)["kind"]))
    assert len(CONFIGS) >= 15


def test_dump_is_read_back(tmp_path):
    config = parse(*GIVEN, "--sample.prompts", "a cat", "no", "12", "--adapter.alpha", "3", "--precision", "bf16")
    dump_config(config, tmp_path / "c.yaml")
    assert parse("--config", str(tmp_path / "c.yaml")) == config


def test_shipped_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train/emoji-unet-lora.yaml", "train/emoji-unet-lora", "configs/train/emoji-unet-lora.yaml"):
        assert find_config(name).name == "emoji-unet-lora.yaml"
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "emoji-unet-lora.yaml").write_text("steps: 3\n")
    assert find_config("train/emoji-unet-lora.yaml") == Path("train/emoji-unet-lora.yaml")
    with pytest.raises(ConfigError, match=r"no config file 'train/emoji-unet-lorra.yaml'; did you mean 'train/emoji-"):
        find_config("train/emoji-unet-lorra.yaml")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--dry-run"], "dry_run", True),
        (["--output.resume", "--steps", "3"], "output.resume", True),
        (["--data.flip=true"], "data.flip", True),
        (["--sample.prompts", "a cat", "a dog", "--seed", "1", "--sample.prompts", "x"], "sample.prompts",
         ["a cat", "a dog", "x"]),
        (["--sample.seeds", "1", "2"], "sample.seeds", [1, 2]),
        (["--sample.seeds", "[3, 4]"], "sample.seeds", [3, 4]),
        (["--optim.betas", "0.8", "0.9"], "optim.betas", (0.8, 0.9)),
        (["--adapter.target-modules", "to_q", "to_k"], "adapter.target_modules", ["to_q", "to_k"]),
        (["--adapter.kind", "flora", "--adapter.ranks", "4", "0.5"], "adapter.ranks", [4, 0.5]),
        (["--adapter.target_modules", "null"], "adapter.target_modules", None),
    ],
)  # fmt: skip
def test_flags_as_people_type_them(argv, field, value):
    found = parse(*GIVEN, *argv)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim.lrr", "1"], "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        (["--stepps", "1"], "unknown key 'stepps'; did you mean 'steps'"),
        (["--adapter.kind", "loraa"], "adapter.kind is 'loraa'; expected one of convlora, flora, lora, dora"),
        (["--optim.lr", "fast"], "optim.lr is 'fast'; expected float"),
        (["--optim.lr", "-1"], "optim.lr is -1.0; expected more than 0"),
        (["--adapter.r", "0"], "adapter.r is 0; expected 1 or more"),
        (["--steps", "0"], "steps is 0; expected 1 or more"),
        (["--optim.batch", "0"], "optim.batch is 0; expected 1 or more"),
        (["--held_out.fraction", "1"], "held_out.fraction is 1.0; expected 0 or more and less than 1"),
        (["--adapter.ranks", "4"], "adapter.ranks belongs to flora"),
        (
            ["--adapter.kind", "sara"],
            "sara needs one of adapter.fraction, adapter.threshold, adapter.count; given none",
        ),
        (["--adapter.fraction", "0.1"], "adapter.fraction belongs to sara"),
        (["--adapter.kind", "sara", "--adapter.count", "9", "--adapter.alpha", "1"], "adapter.alpha is a scale"),
        (["--adapter.text_encoders", "text"], "names 'text'; expected text_encoder"),
        (["--optim.optimizer", "adan"], "optim.optimizer is 'adan'; expected one of adamw, adamw8bit, adafactor"),
        (["--optim.block_lr", "up=fast"], "optim.block_lr holds 'up=fast'; expected \"PATTERN=FACTOR\""),
        (["--optim.optimizer", "prodigy", "--optim.text_lr", "1"], "prodigy finds one rate"),
        (["--held_out.patience", "2", "--held_out.every", "0"], "need held-out pictures and held_out.every"),
        (["--held_out.keep", "best", "--held_out.fraction", "0"], "need held-out pictures"),
        (["--model.storage", "nf4", "--adapter.kind", "sara", "--adapter.count", "9"], "model.storage must be plain"),
        (["--model.base", "timm/x", "--model.storage", "fp8"], "model.storage fp8 is for pipelines"),
        (["--objective.snr_gamma", "0"], "objective.snr_gamma is 0.0; expected more than 0"),
        (["--adapter.dropout", "0.1"], "adapter.dropout is for flora, lora and dora; convlora has none"),
        (["--adapter.kind", "oft", "--adapter.alpha", "1"], "oft rotates the weights and has none"),
        (["--adapter.kind", "oft", "--adapter.text_encoders", "text_encoder"], "several components cannot hold oft"),
        (["--adapter.kind", "dora", "--model.storage", "fp8"], "dora takes norms of the weights"),
        (["--adapter.kind", "loha", "--model.storage", "nf4"], "loha does not go with packed weights"),
        (["--model.compile", "--model.offload_activations"], "exclude each other"),
        (["--adapter.target_modules", "[]"], "adapter.target_modules is an empty list"),
        (["--adapter.target_modules", "re:a", "b"], "'re:a' stands alone"),
        (["--output.resume", "--output.overwrite"], "exclude each other"),
        (["--sample.seeds", "[]"], "sample.seeds is empty"),
        (["--output.folder", ""], "output.folder is not given"),
        (["--model.base", "timm/x", "--model.dtype", "bfloat16"], "a classifier in bfloat16 needs precision"),
        (["extra"], "unrecognized arguments: extra"),
    ],
)
def test_wrong_flags_fail_by_name(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse(*GIVEN, *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:\n  foldr: x\n", "unknown key 'foldr' in 'data'; did you mean 'folder'"),
        ("dat:\n  folder: x\n", "unknown key 'dat.folder'; did you mean 'data.folder'"),
        ("output: {kepp: 3}\n", "unknown key 'kepp' in 'output'; did you mean 'keep'"),
        ("setps: 3\n", "unknown key 'setps'; did you mean 'steps'"),
    ],
)
def test_wrong_keys_in_yaml_fail_by_name(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse("--config", str(tmp_path / "c.yaml"), *GIVEN)


def test_help_says_what_each_field_is(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in keys(parse(*GIVEN)):
        assert f"--{key}" in text
    assert "Share of data.folder that is held out" in text


def test_adapter_section_becomes_the_config_of_each_method():
    convlora = AdapterSection(r=3, alpha=6, target_modules=["conv1"]).to_change()
    assert (type(convlora).__name__, convlora.r, convlora.alpha) == ("ConvLoraConfig", 3, 6)
    assert convlora.target_modules == ["conv1"]
    flora = AdapterSection(kind="flora", r=5, alpha=2.0, dropout=0.1).to_change()
    assert (type(flora).__name__, flora.ranks, flora.scale, flora.dropout) == ("FloraConfig", 5, 2.0, 0.1)
    assert AdapterSection(kind="flora", ranks=[4, 4, 2, 2]).to_change().ranks == [4, 4, 2, 2]
    lora = AdapterSection(kind="lora", r=4, target_modules=["re:.*to_q"], exclude_modules=["to_k"]).to_change()
    assert (type(lora).__name__, lora.r, lora.lora_alpha) == ("LoraConfig", 4, 4)
    assert (lora.target_modules, lora.exclude_modules) == (".*to_q", {"to_k"})
    dora = AdapterSection(kind="dora", r=3, dropout=0.2).to_change()
    assert (dora.use_dora, dora.r, dora.lora_alpha, dora.lora_dropout) == (True, 3, 3, 0.2)
    for kind in ("loha", "lokr"):
        change = AdapterSection(kind=kind, r=3, alpha=1.5).to_change()
        assert (type(change).__name__.lower(), change.r, change.alpha) == (f"{kind}config", 3, 1.5)
    oft = AdapterSection(kind="oft", r=4).to_change()
    assert (oft.r, oft.oft_block_size) == (0, 4)
