"""Imports run one way: every import of every file is read and compared with the floors of the house."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "vislr"

# A room may import the rooms of earlier floors and itself; never a room of its own floor or a later one.
FLOORS = (
    ("core", "kernels"),
    ("anatomy",),
    ("data", "zoo", "measure"),
    ("adapters", "prune", "tokens", "quantize", "cache"),
    ("formats", "compose", "train"),
    ("models",),
    ("record", "classifier_folders"),
    ("recipe",),
    ("folders",),
    ("exporting", "replaying"),
    ("pipelines",),
    ("cli", "demos", "configs"),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# `kernels` stands on torch and triton alone.
ALONE = ("kernels",)
# Scripts and demos are users of the package: they may use its face.
MAY_USE_FACE = ("pipelines", "demos", "cli", "__main__")
FACE = "the face"


def rooms_imported(tree: ast.AST, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, room) of every import of vislr, also inside functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(tree):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = base + tuple((node.module or "").split(".") if node.module else ())
            # `from vislr import zoo` imports a room, `from vislr import apply` the face.
            names = [(*source, alias.name) for alias in node.names] if source == ("vislr",) else [source]
        for name in names:
            if name[0] == "vislr":
                found.append((node.lineno, name[1] if len(name) > 1 and name[1] in FLOOR else FACE))
    return found


def violations(root: Path) -> list[str]:
    """ "file:line: room imports room" for every import that runs up or sideways."""
    wrong = []
    for room in sorted(FLOOR):
        files = sorted((root / room).rglob("*.py")) + [root / f"{room}.py"] * (root / f"{room}.py").is_file()
        for file in files:
            # Folders behind the links are walked by their name inside the package.
            package = ("vislr", *file.relative_to(root).parts[:-1])
            for line, other in rooms_imported(ast.parse(file.read_text(encoding="utf-8")), package):
                if other == room:
                    continue
                if other == FACE:
                    allowed = room in MAY_USE_FACE
                else:
                    allowed = FLOOR[other] < FLOOR[room] and room not in ALONE
                if not allowed:
                    wrong.append(f"{file.relative_to(root)}:{line}: {room} imports {other}")
    return wrong


def test_every_import_runs_down():
    assert violations(ROOT) == []


def test_every_room_has_a_floor():
    rooms = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert rooms - {"__init__", "__pycache__"} <= set(FLOOR)


def test_the_linked_rooms_are_read():
    """The folders behind the links are part of the walk, or violations in them would pass."""
    assert any((ROOT / "pipelines").rglob("*.py"))
    tree = ast.parse((ROOT / "pipelines" / "describe.py").read_text(encoding="utf-8"))
    assert {room for _, room in rooms_imported(tree, ("vislr", "pipelines"))} >= {"core", "anatomy", "zoo"}


PLANTED = {
    "up": ("core/a.py", "from vislr.adapters.inject import attach", "core/a.py:1: core imports adapters"),
    "sideways": ("adapters/a.py", "import vislr.quantize.steps", "adapters/a.py:1: adapters imports quantize"),
    "lazy": ("zoo/a.py", "def f():\n    from vislr import measure", "zoo/a.py:2: zoo imports measure"),
    "relative": ("train/a/b.py", "from ...recipe import apply", "train/a/b.py:1: train imports recipe"),
    "relative room": ("data/a.py", "from .. import train", "data/a.py:1: data imports train"),
    "typing": (
        "formats/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vislr.compose",
        "formats/a.py:3: formats imports compose",
    ),
    "face": ("measure/a.py", "import vislr", "measure/a.py:1: measure imports the face"),
    "name of the face": ("train/a.py", "from vislr import apply", "train/a.py:1: train imports the face"),
    "kernels alone": ("kernels/a.py", "from vislr.core import errors", "kernels/a.py:1: kernels imports core"),
    "a module": ("recipe.py", "import vislr.pipelines", "recipe.py:1: recipe imports pipelines"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_violation_is_caught(tmp_path, planted):
    file, code, message = PLANTED[planted]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code + "\n")
    assert violations(tmp_path) == [message]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("adapters/a.py", "from vislr.core import errors\nfrom vislr.anatomy import describe\nfrom . import b"),
        ("pipelines/a.py", "import vislr\nfrom vislr import apply, zoo\nfrom vislr.recipe import save"),
        ("data/a.py", "import torch\nfrom vislr.anatomy.cost import flops\nfrom .b import c"),
        ("recipe.py", "from vislr import formats\nfrom .formats import fill"),
    ],
)
def test_imports_that_run_down_pass(tmp_path, file, code):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code + "\n")
    assert violations(tmp_path) == []
