"""A studio on a tiny pipeline, and adapter files for it."""

import pytest
import tiny
import torch

import vislr
from vislr.adapters.inject import adapter_parameters
from vislr.demos.studio import Studio


def adapter(pipe, path, change, seed, format="vislr", strength=0.3):
    """A file of this config with random values; the pipeline is as before."""
    report = vislr.apply(pipe, change, name=path.stem)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(pipe.unet, path.stem).values():
        parameter.data = strength * torch.randn(parameter.shape, generator=generator)
    vislr.save_adapter(pipe, path, name=path.stem, format=format)
    vislr.remove(pipe, report)
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Name -> file: an adapter of every origin that the page takes, and the pipeline they are for."""
    from peft import LoraConfig

    root = tmp_path_factory.mktemp("studio")
    pipe = tiny.tiny_sd_pipeline()
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"])
    library = root / "library"
    library.mkdir()
    found = {
        "style": adapter(pipe, library / "style.safetensors", lora, 1),
        "subject": adapter(pipe, library / "subject.safetensors", vislr.ConvLoraConfig(r=1), 2),
        "kohya": adapter(pipe, library / "kohya.safetensors", lora, 3, format="kohya"),
        "diffusers": adapter(pipe, library / "diffusers.safetensors", lora, 4, format="diffusers"),
        "peft": adapter(pipe, library / "peft", lora, 5, format="peft"),
        "sara": adapter(pipe, library / "sara.safetensors", vislr.SaraConfig(fraction=0.05), 6, strength=0.02),
        "library": library,
        "pipeline": root / "pipeline",
    }
    vislr.save(pipe, found["pipeline"])
    return found


@pytest.fixture
def studio(files):
    made = Studio(model=str(files["pipeline"]), folder=files["library"], idle_seconds=3600)
    made.open()
    yield made
    made.close_all()
    assert not made.root.exists()
