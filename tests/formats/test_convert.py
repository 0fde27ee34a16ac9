"""`vislr convert`, the headers that it writes, and what must not be in them."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch
from entries import random_adapter
from safetensors.torch import load_file

from vislr.cli import main
from vislr.formats import headers, read_canonical, write_canonical
from vislr.formats.container import read_header


@pytest.fixture
def kohya(tmp_path):
    metadata = {
        "ss_sd_model_name": "/home/jane/models/base.safetensors",
        "ss_datasets": json.dumps([{"image_dir": "C:\\Users\\jane\\cats", "num_repeats": 3}]),
        "ss_username": "jane",
        "ss_tag_frequency": '{"cats": {"a/b": 2}}',
        "ss_learning_rate": "0.0001",
    }
    write_canonical(random_adapter("sdxl", "lora"), tmp_path / "in.safetensors", "kohya", metadata=metadata)
    return tmp_path / "in.safetensors"


def test_the_command_says_what_it_did(kohya, tmp_path, capsys):
    assert main(["convert", str(kohya), str(tmp_path / "out.safetensors"), "--format", "diffusers"]) == 0
    printed = capsys.readouterr().out
    assert "(kohya, sdxl) ->" in printed
    assert "8 layers, 16 tensors, format diffusers; exact" in printed
    assert main(["convert", str(kohya), str(tmp_path / "small"), "--format", "peft", "--rank", "1"]) == 0
    assert "were written by SVD; largest relative error" in capsys.readouterr().out
    parts = ["convert", str(kohya), str(tmp_path / "unet.safetensors"), "--format", "vislr", "--components", '["unet"]']
    assert main(parts) == 0
    assert read_canonical(tmp_path / "unet.safetensors").components() == ["unet"]


def test_impossible_conversions_end_with_a_line(kohya, tmp_path, capsys):
    assert main(["convert", str(kohya), str(tmp_path / "x"), "--format", "vislr", "--components", '["vae"]']) == 2
    assert "no layers for 'vae'" in capsys.readouterr().err
    assert main(["convert", str(kohya), str(tmp_path / "x"), "--format", "khya"]) == 2
    assert not (tmp_path / "x").exists()


def test_the_command_bakes_dora_with_a_base(tmp_path):
    import tiny

    from vislr.formats import CanonicalAdapter, Entry

    pipe = tiny.tiny_sd_pipeline()
    pipe.unet.save_pretrained(tmp_path / "base" / "unet")
    weight = pipe.unet.conv_in.weight.detach()
    tensors = {
        "lora_down.weight": torch.randn(2, 4, 3, 3),
        "lora_up.weight": torch.randn(16, 2, 1, 1),
        "dora_scale": torch.rand(1, 4, 1, 1) + 1,
    }
    adapter = CanonicalAdapter({"unet.conv_in": Entry("lora", tensors, (16, 4, 3, 3))}, "sd15")
    write_canonical(adapter, tmp_path / "dora.safetensors", "kohya")
    arguments = [
        "convert",
        str(tmp_path / "dora.safetensors"),
        str(tmp_path / "out.safetensors"),
        "--format",
        "diffusers",
    ]
    assert main(arguments) == 2
    assert main([*arguments, "--dora", "bake", "--base", str(tmp_path / "base")]) == 0
    baked = read_canonical(tmp_path / "out.safetensors").entries["unet.conv_in"]
    assert torch.allclose(baked.delta(), adapter.entries["unet.conv_in"].delta(weight), atol=1e-5)


def test_headers_have_what_tools_look_at_and_no_folders_or_people(kohya):
    metadata = read_header(kohya).metadata
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "1")
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_learning_rate"] == "0.0001"
    assert metadata["ss_sd_model_name"] == "base.safetensors"
    assert metadata["ss_tag_frequency"] == '{"cats": {"a/b": 2}}'
    assert json.loads(metadata["ss_datasets"]) == [{"image_dir": "cats", "num_repeats": 3}]
    assert not any("jane" in value for value in metadata.values())


@pytest.mark.parametrize("kind", ["lora", "sara", "lokr"])
def test_the_hash_is_that_of_the_bytes_in_the_file(kind, tmp_path):
    write_canonical(random_adapter("sd15", kind), tmp_path / "a.safetensors", "vislr", dtype=torch.float16)
    data = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    digest = hashlib.sha256(data[8 + length :]).hexdigest()
    metadata = read_header(tmp_path / "a.safetensors").metadata
    assert metadata["sshs_model_hash"] == digest
    assert metadata["modelspec.hash_sha256"] == f"0x{digest}"


SCRUBBED = {
    "/home/jane/a b/model.safetensors": "model.safetensors",
    "~/runs/x.safetensors": "x.safetensors",
    "D:\\models\\x.ckpt": "x.ckpt",
    '{"image_dir": "/data/people/jane"}': '{"image_dir": "jane"}',
    "https://github.com/huggingface/diffusers": "https://github.com/huggingface/diffusers",
    "1024/768 and 3/4": "1024/768 and 3/4",
}


@pytest.mark.parametrize("text", SCRUBBED)
def test_folders_go(text):
    assert headers.scrubbed({"ss_x": text}) == {"ss_x": SCRUBBED[text]}


def test_alpha_is_always_there_in_kohya_and_never_in_diffusers(tmp_path):
    adapter = random_adapter("sd15", "lora")
    for entry in adapter.entries.values():
        del entry.tensors["alpha"]
    for form, wanted in (("kohya", True), ("comfy", True), ("diffusers", False)):
        write_canonical(adapter, tmp_path / "a.safetensors", form)
        keys = load_file(tmp_path / "a.safetensors")
        assert any(key.endswith(".alpha") for key in keys) is wanted
        back = read_canonical(tmp_path / "a.safetensors")
        for name, entry in adapter.entries.items():
            assert torch.equal(back.entries[name].product(), entry.product())


MEMORY = """
import sys
from vislr.formats import read_canonical, write_canonical

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

small, large, out = sys.argv[1:4]
write_canonical(read_canonical(small), out, "diffusers")  # imports and name lists are no part of the figure
before = peak()
adapter = read_canonical(large)
read = peak() - before
write_canonical(adapter, out, "comfy")
print(read, peak() - before)
"""


@pytest.mark.slow
def test_an_sdxl_sized_file_is_converted_in_the_memory_of_two_copies(kohya, tmp_path):
    """The real key list at rank 32 in half precision, 218 MB: linears of attentions, feed-forwards, encoders."""
    import subprocess
    import sys

    from vislr.formats import CanonicalAdapter, Entry, families

    entries = {}
    for component, shapes in families.golden("sdxl").items():
        for path, shape in shapes.items():
            if len(shape) == 2 and any(part in path for part in ("attentions", "self_attn", "mlp")):
                tensors = {"lora_down.weight": torch.zeros(32, shape[1]), "lora_up.weight": torch.ones(shape[0], 32)}
                entries[f"{component}.{path}"] = Entry("lora", tensors, shape)
    large = tmp_path / "large.safetensors"
    write_canonical(CanonicalAdapter(entries, "sdxl"), large, "kohya", dtype=torch.float16)
    assert len(read_header(large).tensors) == 3 * len(entries) == 2958
    del entries
    command = [sys.executable, "-c", MEMORY, str(kohya), str(large), str(tmp_path / "out.safetensors")]
    read, converted = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    size = large.stat().st_size / 1024
    assert read < 1.2 * size
    assert converted < 2 * size


def test_the_commented_config_has_every_field():
    from dataclasses import asdict, fields

    from vislr.core.arguments import parse_config
    from vislr.pipelines.convert import ConvertConfig

    config = parse_config(ConvertConfig, ["--config", "convert.yaml"], prog="vislr convert", description="")
    assert config.format == "kohya"
    assert set(asdict(config)) == {field.name for field in fields(ConvertConfig)}
