"""A studio on a tiny pipeline, and adapter files for it."""

import pytest
import tiny
from demo_files import random_adapter

import vislr
from vislr.demos.studio import Studio


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
        "style": random_adapter(pipe, library / "style.safetensors", lora, 1),
        "subject": random_adapter(pipe, library / "subject.safetensors", vislr.ConvLoraConfig(r=1), 2),
        "kohya": random_adapter(pipe, library / "kohya.safetensors", lora, 3, format="kohya"),
        "diffusers": random_adapter(pipe, library / "diffusers.safetensors", lora, 4, format="diffusers"),
        "peft": random_adapter(pipe, library / "peft", lora, 5, format="peft"),
        "sara": random_adapter(pipe, library / "sara.safetensors", vislr.SaraConfig(fraction=0.05), 6, strength=0.02),
        "library": library,
        "pipeline": root / "pipeline",
    }
    vislr.save(pipe, found["pipeline"])
    return found


@pytest.fixture(scope="module")
def opened(files):
    """The studio of a module: the pipeline is loaded once."""
    made = Studio(model=str(files["pipeline"]), folder=files["library"])
    made.open()
    yield made
    made.close_all()
    assert not made.root.exists()


@pytest.fixture
def studio(opened):
    """A studio without users."""
    yield opened
    opened.typed_paths, opened.idle_seconds = True, 3600.0
    for key in opened.visitors():
        opened.close(key)
