"""A chain of `vislr recipe run` that is killed inside of its steps: used by `test_recipe_run.py`, or by hand.

python tests/recipe_kills.py OUT

Prints JSON: where each process was killed, and which of the steps' files are not those of an undisturbed run, byte for
byte. Children are forked after the imports, so that a start costs a fraction of a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import tiny
import torch
from safetensors import safe_open

import vislr
from vislr.data import DataConfig
from vislr.folders import save
from vislr.pipelines import recipe_run
from vislr.pipelines.recipe_run import JudgeSection, Run, RunConfig
from vislr.train.progress import Progress

PROMPT = "noto style, a cat face"
SHORT = {"optim": {"batch": 2}, "sample": {"steps": 1}, "held_out": {"fraction": 0.25}}
STEPS = [
    {"train": {"adapter": {"kind": "lora", "name": "style", "r": 2}, "data": {"folder": "zoo:outline:8"}, "steps": 4,
               "output": {"checkpoint_every": 2}, **SHORT}},
    {"prune": {"plan": {"criterion": "magnitude", "ratio": 0.1}, "recovery": {"train": "none"}}},
    {"recover": {"recovery": {"train": "lora", "rank": 2, "steps": 6, "checkpoint_every": 2, **SHORT}}},
    {"fuse": {}},
    {"compose": {"adapters": ["style:0.8"], "methods": ["merge"], "steps": 2}},
]  # fmt: skip
# What each process dies of, one after another on the same folder: the how manieth event of which sort in it.
# The third makes the adapter's last two updates and dies in the first of the recovery, before a checkpoint.
KILLS = (("update", 1), ("update", 3), ("update", 3), ("update", 5), ("done", 1), ("save", 2))
NEVER = ("update", 0)


def chain(base: Path, out: Path) -> None:
    """The whole run, or what is left of it."""
    judge = JudgeSection(prompts=[PROMPT], steps=2, pictures=0, rounds=0)
    data = DataConfig("zoo:noto:8")
    Run(RunConfig(str(base), data, STEPS, judge, device="cpu", out=str(out))).go()


def start(base: Path, out: Path, kill: tuple[str, int]) -> int:
    """Fork a child that runs the chain and kills itself at that event; waits, and gives its status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        quiet = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        torch.set_num_threads(1)
        watch(*kill)
        chain(base, out)
        code = 0
    finally:
        os._exit(code)


def watch(wanted: str, count: int) -> None:
    """Die of the event number `count` of this sort: an update of weights, a saved pipeline, a finished step."""
    seen = {"update": 0, "save": 0, "done": 0}

    def around(owner, name, what):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            seen[what] += 1
            if (what, seen[what]) == (wanted, count):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    around(Progress, "advance", "update")
    around(vislr.folders, "save", "save")
    # A step's folder gets its name when all of it is there.
    around(recipe_run.os, "rename", "done")


def contents(out: Path) -> dict[str, object]:
    """What the steps left: pipelines, adapters and pictures, every file of them."""
    kept = [*out.glob("*/pipeline/**/*"), *out.glob("*/*.safetensors"), *out.glob("*/pictures/*.png")]
    return {str(path.relative_to(out)): read(path) for path in kept if path.is_file()}


def read(path: Path) -> object:
    """A file's bytes; of tensors their bits and what is noted beside them, whose order in the file is chance."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).reshape(-1) for name in file.keys()}  # noqa: SIM118
        bits = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
        return sorted((file.metadata() or {}).items()), bits


def main(out: Path) -> dict:
    """Do it; returns what is printed."""
    save(tiny.tiny_sd_pipeline(), out / "base")
    run = out / "run"  # both: folders are named in what they hold
    if start(out / "base", run, NEVER):
        sys.exit((out / "run.log").read_text()[-3000:])
    run.rename(out / "whole")
    where = []
    for kill in (*KILLS, NEVER):
        status = start(out / "base", run, kill)
        if os.WIFSIGNALED(status) != (kill is not NEVER):
            sys.exit(f"{kill}: {status}\n{(out / 'run.log').read_text()[-3000:]}")
        where.append([*kill, *(path.name for path in run.glob(".*.part"))])
    one, other = contents(out / "whole"), contents(run)
    different = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return {"killed": where[:-1], "files": len(one), "different": different}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
