"""Sessions: whose adapter is whose, what a hostile file does, what is left afterwards."""

import pickle
import threading

import numpy as np
import pytest
from demo_files import draw

from vislr.adapters.inject import active_adapters, adapter_names
from vislr.core.errors import AdapterError, ConfigError, FormatError, VislrError
from vislr.core.hashing import content_hash
from vislr.demos.runs import BASE
from vislr.demos.session import MOST_ADAPTERS, MOST_PICTURES, Picture
from vislr.demos.uploads import MOST_LISTED, Taken, label_of, list_adapters, take


def taken(path):
    return Taken(label_of(path), path, False)


def state_of(studio):
    return content_hash(dict(studio.ready("looker").pipeline.pipe.unet.state_dict()))


def test_adapters_of_every_format_go_on_and_off_and_leave_no_trace(studio, files):
    before = state_of(studio)
    session = studio.ready("one")
    library = studio.library()
    assert sorted(library) == ["diffusers.safetensors", "kohya.safetensors", "peft", "sara.safetensors",
                               "style.safetensors", "subject.safetensors"]  # fmt: skip
    for path in library.values():
        session.add(taken(path))
    kinds = {label: loaded.kind for label, loaded in session.adapters.items()}
    assert kinds == {"diffusers": "lora", "kohya": "lora", "peft": "lora", "sara": "sara", "style": "lora",
                     "subject": "convlora"}  # fmt: skip
    unet = session.pipeline.pipe.unet
    assert active_adapters(unet) == {}
    assert [loaded.place for loaded in session.adapters.values()] == [0, 1, 2, 3, 4, 5]
    session.remove("kohya")
    assert session.add(taken(files["kohya"])).place == 1
    base = draw(session, {}, [BASE])[BASE][0]
    changed = draw(session, {"style": 1.0, "sara": 0, "subject": 0.5})["merge"][0]
    assert not np.array_equal(base, changed)
    studio.close("one")
    assert adapter_names(unet) == []
    assert not session.folder.exists()
    assert state_of(studio) == before


def test_users_who_work_at_once_get_what_they_get_alone(studio, files):
    """One pipeline, the same labels, different files and weights: each picture is the one of a user alone."""
    chosen = {"one": ("style", 1.0), "two": ("subject", 0.7), "three": ("kohya", -0.5)}
    alone = {}
    for key, (name, weight) in chosen.items():
        session = studio.ready(key)
        session.add(Taken("mine", files[name], False))
        alone[key] = draw(session, {"mine": weight}, ("merge", BASE), count=2, seed=3)
        studio.close(key)
    together = {}
    sessions = {key: studio.ready(key) for key in chosen}
    for key, (name, _) in chosen.items():
        sessions[key].add(Taken("mine", files[name], False))
    assert len({session.pipeline.pipe for session in sessions.values()}) == 1

    def work(key):
        together[key] = draw(sessions[key], {"mine": chosen[key][1]}, ("merge", BASE), count=2, seed=3)

    threads = [threading.Thread(target=work, args=(key,)) for key in chosen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in chosen:
        for method in ("merge", BASE):
            for one, other in zip(alone[key][method], together[key][method], strict=True):
                np.testing.assert_array_equal(one, other)
    assert not np.array_equal(alone["one"]["merge"][0], alone["two"]["merge"][0])
    studio.close("one")
    assert sorted(
        session.chosen({"mine": 1})[0][0].name for key, session in sessions.items() if key != "one"
    ) == sorted(adapter_names(sessions["two"].pipeline.pipe.unet))


def half(path):
    return path.read_bytes()[: path.stat().st_size // 2]


HOSTILE = {
    "a zip with a pickle in it": (lambda files: b"PK\x03\x04" + b"x" * 50, "pickles can run code"),
    "a pickle": (lambda files: pickle.dumps({"a": 1}), "pickles can run code"),
    "a cut file": (lambda files: half(files["style"]), "style"),
    "a web page": (lambda files: b"<html>404</html>" * 3, "a web page; the download failed"),
    "nothing": (lambda files: b"", "no safetensors file"),
    "a header of 10 GB": (lambda files: (10 * 2**30).to_bytes(8, "little") + b"{}" * 30, "no safetensors file"),
    "a model, no adapter": (
        lambda files: (files["pipeline"] / "vae" / "diffusion_pytorch_model.safetensors").read_bytes(),
        "",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_one_readable_line_and_changes_nothing(studio, files, tmp_path, what):
    content, said = HOSTILE[what]
    place = tmp_path / "upload" / "style <b>.safetensors"
    place.parent.mkdir()
    place.write_bytes(content(files))
    session = studio.ready("one")
    before = state_of(studio)
    (arrived,) = take([place], session.folder, session.upload_bytes)
    with pytest.raises(AdapterError) as error:
        session.add(arrived)
    message = str(error.value)
    assert said in message
    assert "\n" not in message
    assert str(session.folder) not in message
    assert session.adapters == {}
    assert adapter_names(session.pipeline.pipe.unet) == []
    assert state_of(studio) == before


def test_sizes_and_counts_have_limits(studio, files, tmp_path):
    session = studio.ready("one")
    with pytest.raises(FormatError, match=r"'style.safetensors' has .* MiB; at most 0.0 MiB"):
        take([files["style"]], session.folder, 100)
    link = tmp_path / "link.safetensors"
    link.symlink_to(files["style"])
    with pytest.raises(FormatError, match="did not arrive"):
        take([link], session.folder, 10**9)
    with pytest.raises(FormatError, match="alone is no adapter"):
        take([files["peft"] / "unet" / "adapter_config.json"], session.folder, 10**9)
    assert list(session.folder.iterdir()) == []
    for _ in range(2):
        session.add(taken(files["style"]))
    assert list(session.adapters) == ["style", "style 2"]
    others = {str(number): session.adapters["style"] for number in range(MOST_ADAPTERS - 2)}
    session.adapters.update(others)
    with pytest.raises(AdapterError, match="remove one first"):
        session.add(taken(files["style"]))
    for label in others:
        del session.adapters[label]
    with pytest.raises(AdapterError, match="did you mean 'style'"):
        session.remove("stile")


def test_two_files_of_peft_are_one_adapter(studio, files):
    session = studio.ready("one")
    both = [files["peft"] / "unet" / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    peft, style = session.take([*both, files["style"]])
    assert (peft.label, style.label) == ("peft", "style")
    assert session.add(peft).summary() == session.add(taken(files["kohya"])).summary()


def test_a_listing_stays_inside_its_folder(tmp_path, files):
    (tmp_path / "a" / "b").mkdir(parents=True)
    outside = files["style"]
    (tmp_path / "a" / "out.safetensors").symlink_to(outside)
    (tmp_path / "a" / "b" / "adapter.safetensors").write_bytes(b"x")
    (tmp_path / "note.txt").write_text("no")
    found = list_adapters(tmp_path)
    assert list(found) == ["a/b/adapter.safetensors"]
    assert label_of(found["a/b/adapter.safetensors"]) == "b"
    for number in range(MOST_LISTED + 5):
        (tmp_path / "a" / f"{number}.safetensors").touch()
    assert len(list_adapters(tmp_path)) == MOST_LISTED
    with pytest.raises(FormatError, match="there is no folder"):
        list_adapters(tmp_path / "nowhere")


def test_pipelines_come_and_go_with_their_users(studio, files, tmp_path):
    session = studio.ready("one")
    session.add(taken(files["style"]))
    first = session.pipeline
    with pytest.raises(VislrError, match="no embedded pipeline of that name; did you mean 'emoji-unet'"):
        studio.choose("one", "emoji-unit")
    assert session.pipeline is first
    assert list(session.adapters) == ["style"]
    second = tmp_path / "second"
    second.symlink_to(files["pipeline"])
    assert studio.choose("one", str(second)).pipeline is not first
    assert session.adapters == {}
    assert adapter_names(first.pipe.unet) == []
    assert studio.choose("two", str(second)).pipeline is session.pipeline
    other = session.pipeline
    studio.close("one")
    assert studio.choose("three", str(second)).pipeline is other
    for key in ("two", "three"):
        studio.close(key)
    assert studio.choose("four", str(second)).pipeline is not other
    assert studio.ready("five").pipeline is first
    studio.typed_paths = False
    with pytest.raises(ConfigError, match="is not offered here"):
        studio.choose("six", str(second))
    assert studio.library("/") == studio.library()


def test_a_session_that_fell_asleep_is_forgotten(studio, files):
    session = studio.ready("one")
    session.add(taken(files["style"]))
    studio.idle_seconds = -1
    studio.ready("two")
    assert not session.folder.exists()
    assert adapter_names(studio.ready("two").pipeline.pipe.unet) == []
    with pytest.raises(AdapterError, match="'style' is not loaded any more; load it again"):
        studio.ready("one").chosen({"style": 1.0})


def test_the_history_has_an_end_and_files_beyond_it_go(studio):
    session = studio.ready("one")
    pictures = [Picture(session.folder / f"{n}.png", "", {}) for n in range(MOST_PICTURES + 3)]
    for picture in pictures:
        picture.path.touch()
        session.remember(picture)
    assert session.pictures == pictures[:2:-1]
    assert [picture.path.exists() for picture in pictures] == [False] * 3 + [True] * MOST_PICTURES
