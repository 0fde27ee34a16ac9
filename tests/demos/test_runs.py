"""A run: lines, failures, stop and skip, and what stands in the pictures."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

import vislr
from vislr import compose
from vislr.adapters.inject import active_adapters
from vislr.cli import main
from vislr.core.errors import AdapterError, ConfigError, DataError, FormatError
from vislr.core.files import read_picture, write_picture
from vislr.core.hashing import content_hash
from vislr.demos import saving, view
from vislr.demos.runs import BASE, MOST_COUNT, Wanted, drawing, methods, profiling
from vislr.demos.uploads import Taken
from vislr.train.sampling import sample_images


@pytest.fixture
def session(opened, files):
    """A user with two adapters; what a test adds goes, what it removes comes back."""
    made = opened.ready("one")
    for label in [label for label in made.adapters if label not in WEIGHTS]:
        made.remove(label)
    for name in WEIGHTS:
        if name not in made.adapters:
            made.add(Taken(name, files[name], False))
    made.pictures.clear()
    made.profiles.clear()
    return made


WEIGHTS = {"style": 0.8, "subject": 1.0}


def wanted(**changes):
    given = {"methods": ("merge",), "weights": WEIGHTS, "prompt": "a red car", "steps": 2, **changes}
    return Wanted(**given)


def pixels(line):
    return np.stack([np.asarray(Image.open(picture.path)) for picture in line.pictures])


def unet_of(session):
    return session.pipeline.pipe.unet


def test_every_method_makes_its_pictures_and_leaves_the_pipeline_alone(session, files):
    before = content_hash(dict(unet_of(session).state_dict()))
    hooks = len(unet_of(session)._forward_pre_hooks)
    triggers = {"style": "red", "subject": "car"}
    run = drawing(session, wanted(methods=tuple(methods()), triggers=triggers, count=2, seed=5, steps=3))
    run.execute()
    assert {line.method: (line.state, line.message) for line in run.lines} == dict.fromkeys(methods(), ("done", ""))
    assert all(line.step == 3 for line in run.lines)
    found = {line.method: pixels(line) for line in run.lines}
    assert active_adapters(unet_of(session)) == {}
    assert content_hash(dict(unet_of(session).state_dict())) == before
    assert len(unet_of(session)._forward_pre_hooks) == hooks
    # What the page makes is what the library makes.
    pipe = vislr.load(files["pipeline"])
    options = {"steps": 3, "guidance": 4.0}
    for name in ("style", "subject"):
        vislr.load_adapter(pipe, files[name], name=name)
    vislr.set_adapters(pipe, list(WEIGHTS), list(WEIGHTS.values()))
    images = sample_images(pipe, ["a red car"] * 2, [5, 6], **options)
    assert np.abs(np.stack(images).astype(int) - found["merge"]).max() <= 1
    vislr.set_adapters(pipe, [])
    np.testing.assert_array_equal(np.stack(sample_images(pipe, ["a red car"] * 2, [5, 6], **options)), found[BASE])
    assert not np.array_equal(found["merge"], found["switch"])
    assert not np.array_equal(found["composite"], found["switch"])


def test_a_picture_says_how_it_was_made(session):
    run = drawing(session, wanted(methods=("switch", BASE), every=1, negative="a cat"))
    run.execute()
    switch, base = (read_picture(line.pictures[0].path) for line in run.lines)
    plan = compose.ComposePlan.from_dict(switch.pop("plan"))
    assert (plan.method, plan.adapters, plan.weights) == ("switch", ("style", "subject"), (0.8, 1.0))
    assert plan.switching.every == 1
    assert switch.pop("version") == vislr.__version__
    assert switch.pop("beside") == {"prompts": ["a red car"], "seeds": [0], "negatives": ["a cat"], "place": 0}
    assert len(switch.pop("hashes")["adapter"]) == 2
    assert "torch" in switch.pop("machine")
    assert switch == {
        "model": session.pipeline.name, "adapter": ["style:0.8", "subject:1"], "prompts": ["a red car"],
        "negative": "a cat", "seeds": [0], "steps": 2, "guidance": 4.0, "size": None, "method": "switch",
        "device": "cpu", "dtype": "float32", "any_base": True,
    }  # fmt: skip
    assert (base["adapter"], base["plan"]) == ([], None)
    path = saving.save_grid(session, [line.pictures[0] for line in run.lines])
    assert [made["method"] for made in read_picture(path)["pictures"]] == ["switch", BASE]


def test_the_command_line_makes_a_picture_of_the_studio_again(session, files, tmp_path):
    run = drawing(session, wanted(methods=("switch", BASE), every=1, count=2))
    run.execute()
    for line, adapters in zip(run.lines, (["--adapter", str(files["style"]), str(files["subject"])], []), strict=True):
        path = line.pictures[1].path
        again = ["generate", "--again", str(path), *adapters, "--model", str(files["pipeline"])]
        assert main([*again, "--out", str(tmp_path)]) == 0
        with Image.open(path) as first, Image.open(tmp_path / path.name) as second:
            assert first.tobytes() == second.tobytes()


def test_what_fails_says_so_and_the_next_goes_on(session):
    run = drawing(session, wanted(methods=("w_switch", "merge"), triggers={"style": "red"}))
    run.execute()
    failed, done = run.lines
    assert (failed.state, done.state) == ("failed", "done")
    assert failed.message == "'w_switch' needs the words in the prompt that mean 'subject': its trigger"
    assert active_adapters(unet_of(session)) == {}


@pytest.mark.parametrize(
    ("way", "method"), [("stop", "merge"), ("stop", "switch"), ("skip", "composite"), ("stop", "cmlora")]
)
def test_skip_and_stop_end_at_the_next_step_and_leave_no_trace(session, way, method):
    before = content_hash(dict(unet_of(session).state_dict()))
    run = drawing(session, wanted(methods=(method, BASE), steps=50))
    held = run.work

    def work(pipe, line, on_step):
        def noticed():
            on_step()
            if line.method == method:
                assert line.step == 1
                (run.skip if way == "skip" else session.stop)()
            elif line.step == 2:
                run.skip()

        held(pipe, line, noticed)

    run.work = work
    run.execute()
    assert [(line.state, line.step) for line in run.lines] == [("skipped", 2), ("skipped", 3 if way == "skip" else 0)]
    assert session.pictures == []
    assert active_adapters(unet_of(session)) == {}
    assert content_hash(dict(unet_of(session).state_dict())) == before
    again = drawing(session, wanted(methods=(method,)))
    again.execute()
    assert again.lines[0].state == "done"


def test_one_who_waits_for_another_can_leave(session):
    run = drawing(session, wanted())
    with session.pipeline.held():
        thread = threading.Thread(target=run.execute)
        thread.start()
        while run.lines[0].state != "queued":
            pass
        with pytest.raises(ConfigError, match="something is running already"):
            drawing(session, wanted()).execute()
        session.stop()
        thread.join()
    assert run.lines[0].state == "skipped"
    assert not session.pipeline.lock.locked()


WRONG = {
    "no method": ({"methods": ()}, ConfigError, "choose at least one"),
    "a method": ({"methods": ("compsite",)}, ConfigError, "did you mean 'composite'"),
    "no prompt": ({"prompt": "  "}, ConfigError, "prompt is empty"),
    "a long prompt": ({"prompt": "car " * 999}, ConfigError, "at most 1,000"),
    "steps": ({"steps": 0}, ConfigError, "expected 1 to 200"),
    "count": ({"count": MOST_COUNT + 1}, ConfigError, f"expected 1 to {MOST_COUNT}"),
    "a seed": ({"seed": -1}, ConfigError, "expected 0 to"),
    "a size": ({"size": 33}, ConfigError, "multiple of 8"),
    "NaN": ({"weights": {"style": float("nan")}}, ConfigError, "no finite number"),
    "guidance": ({"guidance": float("nan")}, ConfigError, "guidance is nan"),
    "a word": ({"prompt": "a zzyzx"}, DataError, "zzyzx"),
    "an adapter": ({"weights": {"gone": 1.0}}, AdapterError, "'gone' is not loaded any more"),
    "no weight": ({"weights": {"style": 0.0}}, ConfigError, "no adapter is on"),
}


def test_wrong_settings_are_refused_before_work(session):
    for what, (changes, kind, said) in WRONG.items():
        with pytest.raises(kind) as error:
            drawing(session, wanted(**changes))
        assert said in str(error.value), what


def test_a_merged_adapter_makes_the_pictures_of_the_merge(session, files):
    run = drawing(session, wanted())
    run.execute()
    asked = pixels(run.lines[0])[0].astype(int)
    for format in ("vislr", "kohya"):
        path, notes = saving.save_merged_adapter(session, WEIGHTS, name="../both <", format=format)
        assert path.name == "both.safetensors"
        assert session.folder in path.parents
        assert notes == []
        pipe = vislr.load(files["pipeline"])
        vislr.load_adapter(pipe, path, name="both")
        (image,) = sample_images(pipe, ["a red car"], [0], steps=2, guidance=4.0)
        assert np.abs(np.asarray(image).astype(int) - asked).max() <= 1
    path, _ = saving.save_merged_adapter(session, WEIGHTS, name="both", format="peft", way="ties", rank=2)
    assert path.suffix == ".zip"
    with pytest.raises(ConfigError, match="rank is -1"):
        saving.save_merged_adapter(session, WEIGHTS, name="x", rank=-1)
    with pytest.raises(AdapterError, match="no adapter is on"):
        saving.save_merged_adapter(session, {"style": 0.0}, name="x")


def test_a_merged_pipeline_has_the_adapters_in_its_weights_and_nobody_elses(opened, session, files, tmp_path):
    import zipfile

    opened.ready("two").add(Taken("secret", files["kohya"], False))
    session.add(Taken("sara", files["sara"], False))
    weights = WEIGHTS | {"sara": 1.0}
    run = drawing(session, wanted(weights=weights))
    run.execute()
    path, _ = saving.save_merged_pipeline(opened, session, weights, name="both")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    assert not list((tmp_path / "both").rglob("*secret*"))
    assert not (tmp_path / "both" / "adapters").exists()
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "both", local_files_only=True)
    (image,) = sample_images(pipe, ["a red car"], [0], steps=2, guidance=4.0)
    assert np.abs(np.asarray(image).astype(int) - pixels(run.lines[0])[0].astype(int)).max() <= 1


def test_what_comes_from_outside_is_text_on_the_page(session, files):
    session.add(Taken("<img src=x onerror=alert(1)>", files["style"], False))
    run = drawing(session, wanted(prompt="a red car", methods=(BASE,)))
    run.execute()
    run.lines[0].message, run.lines[0].state = "<script>", "failed"
    made = view.made_lines(run.lines[0].pictures[0])
    shown = [view.adapter_lines(session), view.progress_lines(run.lines, 2), view.note("<i>", "<u>"), made]
    for text in shown:
        assert "&lt;" in text or "prompts" in text
        assert not any(tag in text for tag in ("<img", "<script", "<i>", "<u>"))


def test_profiles_are_kept_and_lead_cmlora(session, files, tmp_path):
    run = profiling(session, wanted(steps=4))
    run.execute()
    assert [(line.method, line.state, line.step) for line in run.lines] == [
        ("style", "done", 4),
        ("subject", "done", 4),
    ]
    assert {label: len(profile.curve) for label, profile in session.profiles.items()} == {"style": 4, "subject": 4}
    high, low = compose.split_profiles(list(session.profiles.values()))
    drawn = drawing(session, wanted(methods=("cmlora",), steps=3))
    drawn.execute()
    plan = drawn.lines[0].pictures[0].made["plan"]
    names = session.labelled(json.dumps([high, low]))
    assert [list(plan["dominance"]["high"]), list(plan["dominance"]["low"])] == json.loads(names)
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(files["style"].read_bytes())
    compose.write_profile(session.profiles["style"], copied)
    session.remove("style")
    assert list(session.profiles) == ["subject"]
    loaded = session.add(Taken("copied", copied, False))
    assert session.profiles["copied"].adapter == loaded.name


def test_notes_in_pictures_are_read_with_care(tmp_path):
    path = tmp_path / "a.png"
    write_picture(path, Image.new("RGB", (4, 4)), {"prompts": ["é <b>"], "seeds": [1]})
    assert read_picture(path) == {"version": vislr.__version__, "prompts": ["é <b>"], "seeds": [1]}
    Image.new("RGB", (4, 4)).save(path)
    assert read_picture(path) == {}
    path.write_bytes(b"GIF89a")
    with pytest.raises(FormatError, match="no PNG"):
        read_picture(path)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "pixart", "dit"])
def test_every_pipeline_says_its_steps(family):
    import tiny

    pipe = getattr(tiny, f"tiny_{family}_pipeline")()
    steps = []
    words = "grey" if family == "dit" else "a red car"
    size = None if family == "dit" else 32
    sample_images(pipe, [words], [0], steps=3, guidance=1.0, size=size, on_step=lambda: steps.append(1))
    assert len(steps) == 3
    assert "progress_bar" not in vars(pipe)
    if family == "dit":
        with pytest.raises(ConfigError, match="takes no negative prompt"):
            sample_images(pipe, [words], [0], steps=1, guidance=1.0, negative="a cat")
