"""The studio on every family of pipelines: methods, profiles, saving, and nothing left on the pipeline."""

import zipfile

import numpy as np
import pytest
import tiny
import torch
from demo_files import random_adapter
from PIL import Image

import vislr
from vislr.adapters.inject import adapter_names
from vislr.anatomy import denoiser_of
from vislr.core.hashing import content_hash
from vislr.demos.runs import BASE, Wanted, drawing, profiling
from vislr.demos.saving import save_merged_adapter, save_merged_pipeline
from vislr.demos.studio import Studio
from vislr.demos.uploads import Taken

FAMILIES = {
    "sdxl": tiny.tiny_sdxl_pipeline,
    "sd3": tiny.tiny_sd3_pipeline,
    "flux": tiny.tiny_flux_pipeline,
    "pixart": tiny.tiny_pixart_pipeline,
}
METHODS = (BASE, "merge", "cat", "switch", "composite", "cmlora")


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request, tmp_path_factory):
    """(studio with one user, adapter files): a LoRA of inputs of attention, a FLoRA of its outputs."""
    from peft import LoraConfig

    root = tmp_path_factory.mktemp(request.param)
    pipe = FAMILIES[request.param]()
    files = [
        random_adapter(pipe, root / "style.safetensors", LoraConfig(r=2, target_modules=["to_q", "to_v"]), 1),
        random_adapter(pipe, root / "subject.safetensors", vislr.FloraConfig(ranks=2, target_modules=["to_out.0"]), 2),
    ]
    vislr.save(pipe, root / "pipeline")
    studio = Studio(model=str(root / "pipeline"))
    studio.open()
    yield studio, files
    studio.close_all()


def drawn(session, methods, weights, **more):
    wanted = Wanted(methods=methods, weights=weights, prompt="a red car", steps=3, **more)
    run = drawing(session, wanted)
    run.execute()
    assert [(line.state, line.message) for line in run.lines] == [("done", "")] * len(methods)
    return {line.method: np.asarray(Image.open(line.pictures[0].path)) for line in run.lines}


def test_methods_profiles_and_saving(opened):
    studio, files = opened
    session = studio.ready("one")
    denoiser = denoiser_of(session.pipeline.pipe)[1]
    before = content_hash(dict(denoiser.state_dict()))
    for path in files:
        session.add(Taken(path.stem, path, False))
    pictures = drawn(session, METHODS, {"style": 1.0, "subject": 0.7})
    # Sums agree; everything else makes a picture of its own.
    assert np.abs(pictures["cat"].astype(int) - pictures["merge"]).max() <= 1
    different = [pictures[name] for name in METHODS if name != "cat"]
    assert len({picture.tobytes() for picture in different}) == len(different)
    # One adapter alone is the same by every method.
    alone = drawn(session, METHODS[1:], {"style": 1.0})
    assert len({picture.tobytes() for picture in alone.values()}) == 1
    wanted = Wanted(methods=(BASE,), weights={}, prompt="a red car", steps=3)
    run = profiling(session, wanted)
    run.execute()
    assert [line.state for line in run.lines] == ["done", "done"]
    assert all(np.isfinite(profile.curve).all() for profile in session.profiles.values())
    # What is taken home makes the same picture.
    path, _ = save_merged_adapter(session, {"style": 1.0, "subject": 0.7}, name="both")
    session.add(Taken("both", path, False))
    both = drawn(session, ("merge",), {"both": 1.0})["merge"]
    assert np.abs(both.astype(int) - pictures["merge"]).max() <= 2
    archive, _ = save_merged_pipeline(studio, session, {"style": 1.0, "subject": 0.7}, name="merged")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(session.folder)
    other = studio.choose("two", str(session.folder / "merged"))
    baked = drawn(other, (BASE,), {})[BASE]
    assert np.abs(baked.astype(int) - pictures["merge"]).max() <= 2
    for key in ("one", "two"):
        studio.close(key)
    assert adapter_names(denoiser) == []
    state = dict(denoiser.state_dict())
    assert content_hash(state) == before
    assert all(torch.isfinite(value).all() for value in state.values())
