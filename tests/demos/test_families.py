"""The studio on every family of pipelines: methods, profiles, saving, and nothing left on the pipeline."""

import zipfile

import numpy as np
import pytest
import tiny
from demo_files import draw, random_adapter

import vislr
from vislr.adapters.inject import adapter_names
from vislr.anatomy import denoiser_of
from vislr.core.hashing import content_hash
from vislr.demos.runs import BASE, Wanted, profiling
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


def test_methods_profiles_and_saving(opened):
    studio, files = opened
    session = studio.ready("one")
    denoiser = denoiser_of(session.pipeline.pipe)[1]
    before = content_hash(dict(denoiser.state_dict()))
    for path in files:
        session.add(Taken(path.stem, path, False))
    pictures = {name: made[0] for name, made in draw(session, {"style": 1.0, "subject": 0.7}, METHODS).items()}
    # Sums agree; everything else makes a picture of its own.
    assert np.abs(pictures["cat"].astype(int) - pictures["merge"]).max() <= 1
    different = [pictures[name] for name in METHODS if name != "cat"]
    assert len({picture.tobytes() for picture in different}) == len(different)
    # One adapter alone is the same by every method.
    alone = draw(session, {"style": 1.0}, METHODS[1:])
    assert len({picture.tobytes() for (picture,) in alone.values()}) == 1
    run = profiling(session, Wanted(methods=(BASE,), weights={}, prompt="a red car", steps=3))
    run.execute()
    assert [line.state for line in run.lines] == ["done", "done"]
    assert all(np.isfinite(profile.curve).all() for profile in session.profiles.values())
    # What is taken home makes the same picture.
    path, _ = save_merged_adapter(session, {"style": 1.0, "subject": 0.7}, name="both")
    session.add(Taken("both", path, False))
    both = draw(session, {"both": 1.0})["merge"][0]
    assert np.abs(both.astype(int) - pictures["merge"]).max() <= 2
    archive, _ = save_merged_pipeline(studio, session, {"style": 1.0, "subject": 0.7}, name="merged")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(session.folder)
    other = studio.choose("two", str(session.folder / "merged"))
    baked = draw(other, {}, [BASE])[BASE][0]
    assert np.abs(baked.astype(int) - pictures["merge"]).max() <= 2
    for key in ("one", "two"):
        studio.close(key)
    assert adapter_names(denoiser) == []
    assert content_hash(dict(denoiser.state_dict())) == before
