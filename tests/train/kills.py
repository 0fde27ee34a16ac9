"""Runs that are killed with SIGKILL, and what is left of them: used by `test_kills.py`, or by hand.

python tests/train/kills.py PICTURES OUT random COUNT     one run, killed COUNT times at random moments
python tests/train/kills.py PICTURES OUT inside COUNT     COUNT runs, each killed at another point inside a save

Prints JSON: what was killed where, and that the end of each run equals, bit for bit, one that was never killed.
Children are forked after the imports, so that a start costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file

import vislr
from vislr.core.files import write_tensors
from vislr.data import DataConfig
from vislr.pipelines import training_setup as setup
from vislr.train import AdapterSection, HeldOutConfig, OptimConfig, OutputConfig, SampleConfig, TrainConfig, fit
from vislr.train.checkpoints import checkpoints_in

STEPS, EVERY = 12, 2
# Whether a child has ended, without taking its status away.
PEEK = os.WEXITED | os.WNOHANG | os.WNOWAIT


def train(pictures: Path, folder: Path) -> None:
    """The whole run, or what is left of it; writes the trained values at its end."""
    torch.set_num_threads(1)
    config = TrainConfig(
        data=DataConfig(folder=str(pictures), size=32), steps=STEPS,
        sample=SampleConfig(steps=1, prompts=["a cat face"]),
        output=OutputConfig(folder=str(folder), checkpoint_every=EVERY, keep=2, resume=True, log_every=1),
        optim=OptimConfig(batch=4, warmup=2, lr=5e-3, ema=0.9), held_out=HeldOutConfig(every=3, repeats=1),
        adapter=AdapterSection(kind="lora", r=2, dropout=0.2),
    )  # fmt: skip
    pipe = tiny.tiny_sd_pipeline()
    torch.manual_seed(0)
    parts = setup.open_data(config)
    setup.attach(config, pipe)
    fit(pipe, "default", config, *parts, save_adapter=lambda path: vislr.save_adapter(pipe, path))
    values = {name: value for name, value in pipe.unet.named_parameters() if value.requires_grad}
    write_tensors(folder / "end.safetensors", values)


def start(pictures: Path, folder: Path, point: int | None = None) -> int:
    """Fork a child that trains; with `point` it kills itself at that event inside its third save."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    code = 1
    try:
        if point is not None:
            inject(point)
        train(pictures, folder)
        code = 0
    finally:
        os._exit(code)


def inject(point: int) -> None:
    """Write down what the third save does to the disk, and die at event number `point` (-1: at none)."""
    from vislr.core import files
    from vislr.train import checkpoints, progress

    state = {"saves": 0, "inside": False, "events": 0}

    def event(what: str) -> None:
        if state["inside"]:
            with Path(os.environ["KILLED_AT"]).open("a") as file:
                file.write(f"{what}\n")
            if state["events"] == point:
                os.kill(os.getpid(), signal.SIGKILL)
            state["events"] += 1

    def around(owner, name, what):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            kind = f"{what} a {'folder' if Path(args[0]).is_dir() else 'file'}"
            event(f"before {kind}")
            if what == "removing" and state["inside"] and Path(args[0]).is_dir():
                some = next(path for path in sorted(Path(args[0]).rglob("*")) if path.is_file())
                some.unlink()
                event("in the middle of removing a folder")
            result = original(*args, **kwargs)
            event(f"after {kind}")
            return result

        setattr(owner, name, wrapped)

    original = checkpoints.write_tensors

    def half_written(path, tensors, metadata=None):
        event(f"before writing {path.name}")
        if state["inside"]:
            whole = Path(os.environ["KILLED_AT"] + ".half")
            original(whole, tensors, metadata)
            path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
            event(f"in the middle of {path.name}")
            path.unlink()
        original(path, tensors, metadata)

    checkpoints.write_tensors = half_written
    around(files.os, "rename", "renaming")
    around(files.os, "replace", "replacing")
    around(checkpoints.shutil, "rmtree", "removing")
    save = progress.save_checkpoint

    def counted(*args, **kwargs):
        state["saves"] += 1
        # By the third save there is an old checkpoint to remove.
        state["inside"] = state["saves"] == 3
        event("before the save")
        result = save(*args, **kwargs)
        event("after the save")
        state["inside"] = False
        return result

    progress.save_checkpoint = counted


def last_name(folder: Path) -> int:
    """Of the newest whole checkpoint."""
    found = checkpoints_in(folder)
    return int(found[-1].name) if found else 0


def last_step(folder: Path) -> int:
    """Of the newest whole checkpoint; every one that counts as whole can be read."""
    found = checkpoints_in(folder)
    for path in found:
        json.loads((path / "state.json").read_text())
        for name in ("trainable", "optimizer", "average", "adapter"):
            load_file(path / f"{name}.safetensors")
    return int(found[-1].name) if found else 0


def same_end(folder: Path, reference: Path) -> bool:
    """Whether both runs ended in the same bits, with nothing half-written left."""
    one, other = load_file(folder / "end.safetensors"), load_file(reference / "end.safetensors")
    left = list(folder.rglob(".*tmp-*"))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one) and not left


def killed(child: int) -> bool:
    """Wait for a child; True if it died of SIGKILL, an error if it failed by itself."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGKILL
    if os.WEXITSTATUS(status):
        sys.exit(f"a child failed with exit code {os.WEXITSTATUS(status)}")
    return False


def main(pictures: Path, out: Path, mode: str, count: int) -> dict:
    """Do it; returns what is printed."""
    reference = out / "reference"
    began, first = time.monotonic(), 0.0
    os.environ["KILLED_AT"] = str(out / "events")
    child = start(pictures, reference, -1 if mode == "inside" else None)
    done = status = 0
    while not done:
        done, status = os.waitpid(child, os.WNOHANG)
        first = first or (time.monotonic() - began if checkpoints_in(reference) else 0.0)
        time.sleep(0.02)
    if status:
        sys.exit("the run that is not killed failed")
    # From one save to the next.
    pace = (time.monotonic() - began - first) / (STEPS / EVERY)
    if mode == "random":
        rng, folder, kills, steps = random.Random(0), out / "killed", 0, [0]
        while kills < count:
            child = start(pictures, folder)
            # Some time after it has got on by 0, 1 or 2 checkpoints: however busy the machine is.
            saves = rng.randint(0, 2)
            while last_name(folder) < steps[-1] + saves * EVERY and not os.waitid(os.P_PID, child, PEEK):
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, pace))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            if not killed(child):
                # It was done before: another run, whose kills count, too.
                assert same_end(folder, reference)
                shutil.rmtree(folder)
                steps.append(0)
                continue
            kills += 1
            now = last_step(folder)
            assert now >= steps[-1], f"step {steps[-1]} was saved, and {now} is left"
            steps.append(now)
        killed(start(pictures, folder))
        return {"kills": kills, "steps": steps, "same": same_end(folder, reference)}
    events = (out / "events").read_text().splitlines()
    points = []
    for number, point in enumerate(chosen(events, count)):
        folder, log = out / f"inside-{number}", out / f"killed-at-{number}"
        os.environ["KILLED_AT"] = str(log)
        assert killed(start(pictures, folder, point)), f"point {point} was not reached"
        assert log.read_text().splitlines()[-1] == events[point]
        left = last_step(folder)
        assert left in (2 * EVERY, 3 * EVERY), f"after a kill inside the save of step {3 * EVERY} {left} is left"
        assert not killed(start(pictures, folder))
        assert same_end(folder, reference), events[point]
        points.append((events[point], left))
        shutil.rmtree(folder)
    return {"points": points, "same": True}


def chosen(events: list[str], count: int) -> list[int]:
    """Numbers of `count` events: one of each sort, evenly if there are more sorts, then others."""
    sorts = list({what: number for number, what in reversed(list(enumerate(events)))}.values())[::-1]
    if count <= len(sorts):
        return [sorts[i * len(sorts) // count] for i in range(count)]
    others = [number for number in range(len(events)) if number not in sorts]
    more = count - len(sorts)
    return sorted(sorts + [others[i * len(others) // more] for i in range(more)])


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
