"""Two processes share the scoring and get the scores of one."""

import json
import os
import subprocess
import sys

import pytest
import tiny

from vislr.prune import OutputLoss, units_of

SCORE = """
import json, os, sys, time
import torch
sys.path.insert(0, sys.argv[1])
import tiny
from vislr.anatomy import sample_inputs
from vislr.prune import OutputLoss, units_of
from vislr.prune.scoring import processes
torch.manual_seed(0)
unet = tiny.tiny_unet()
data = [sample_inputs(unet, {"tokens": 16, "batch": 2}, device="cpu")]
# One that comes late must not take the values of the other for an earlier run's: shares would no longer fit.
time.sleep(3 * int(os.environ["RANK"]))
scores = OutputLoss(data, folder=sys.argv[2], progress=False).score(unet, units_of(unet))
rank, world = processes()
with open(f"{sys.argv[2]}-{rank}.json", "w") as file:
    json.dump({"rank": rank, "world": world, "scores": scores}, file)
"""


@pytest.mark.slow
def test_scores_do_not_depend_on_the_number_of_processes(tmp_path):
    import torch

    from vislr.anatomy import sample_inputs

    script = tmp_path / "score.py"
    script.write_text(SCORE)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
               os.path.dirname(tiny.__file__), str(tmp_path / "scores")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads((tmp_path / f"scores-{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["rank"] for one in found] == [0, 1]
    assert {one["world"] for one in found} == {2}
    torch.manual_seed(0)
    unet = tiny.tiny_unet()
    data = [sample_inputs(unet, {"tokens": 16, "batch": 2}, device="cpu")]
    alone = OutputLoss(data, progress=False).score(unet, units_of(unet))
    for one in found:
        assert list(one["scores"]) == list(alone)
        assert one["scores"] == pytest.approx(alone, rel=1e-5)
    kept = [json.loads(path.read_text())["values"] for path in sorted((tmp_path / "scores").glob("scores-*.json"))]
    assert len(kept) == 2
    assert not set(kept[0]) & set(kept[1]), "each process measured its own share"
    # One process takes up what two had kept.
    again = OutputLoss(data, folder=tmp_path / "scores", progress=False).score(unet, units_of(unet))
    assert again == found[0]["scores"]
