"""The public face: cheap to import, every name a thing and never a module."""

import subprocess
import sys
import types

import pytest

import vislr


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_and_help_load_nothing_heavy():
    heavy = ("torch", "numpy", "PIL", "diffusers", "transformers", "peft", "timm", "yaml", "jsonargparse")
    code = f"import sys, vislr; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"
    code = f"import sys, vislr.cli as c; c.main(['--help']); print([m for m in {heavy} if m in sys.modules])"
    assert python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", sorted(vislr._NAMES))
def test_a_public_name_reached_twice_stays_itself(name):
    first, second = getattr(vislr, name), getattr(vislr, name)
    assert first is second
    assert callable(first)
    assert not isinstance(first, types.ModuleType)


def test_public_names_survive_importing_every_room():
    names = sorted(vislr._NAMES)
    code = (
        "import types, vislr\n"
        f"for room in {vislr._ROOMS!r}: getattr(vislr, room)\n"
        f"for name in {names!r} * 2: assert not isinstance(getattr(vislr, name), types.ModuleType), name\n"
        f"for room in {vislr._ROOMS!r}: assert isinstance(getattr(vislr, room), types.ModuleType), room\n"
    )
    python(code)


def test_all_is_what_can_be_reached():
    assert sorted(vislr.__all__) == sorted(vislr._NAMES)
    assert set(vislr.__all__) <= set(dir(vislr))
    with pytest.raises(AttributeError, match="nothing"):
        vislr.nothing  # noqa: B018
