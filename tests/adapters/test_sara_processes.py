"""SaRA under accelerate on two processes: the same vectors and weights as one process with both batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from vislr.adapters import SaraConfig, adapter_parameters, attach
from vislr.core.errors import AdapterError

STEPS = 3


def main(folder: str, share: bool) -> None:
    """Train on this process's half of each batch, or on all of it; write the weights."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    batches = torch.randn(STEPS, 8, 6)
    attach(net, SaraConfig(fraction=0.5, rank_weight=0.1), "a")
    optimizer = torch.optim.AdamW(adapter_parameters(net, "a").values(), lr=0.05)
    wrapped, optimizer = accelerator.prepare(net, optimizer)
    for batch in batches:
        part = batch.chunk(2)[accelerator.process_index] if share else batch
        accelerator.backward((wrapped(part) - 1).square().mean())
        accelerator.clip_grad_norm_(adapter_parameters(net, "a").values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    save_file(state, f"{folder}/{accelerator.num_processes}-{accelerator.process_index}.safetensors")
    if share:
        # Vectors that become shorter do not fit the buckets in which gradients travel.
        other = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 4))
        attach(other, SaraConfig(fraction=0.5, reselect_after=2), "a")
        wrapped, optimizer = accelerator.prepare(
            other, torch.optim.AdamW(adapter_parameters(other, "a").values(), lr=0.05)
        )
        accelerator.backward(wrapped(batches[0]).square().mean())
        with pytest.raises(AdapterError, match="expected one process, or `vislr train`"):
            optimizer.step()
    accelerator.end_training()


def test_two_processes_give_what_one_does(tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, str(Path(__file__)), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    main(str(tmp_path), share=False)
    first, second, alone = (load_file(tmp_path / f"{name}.safetensors") for name in ("2-0", "2-1", "1-0"))
    assert first.keys() == alone.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key])
        torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    assert not torch.allclose(first["0.base_layer.weight"], nn.Linear(6, 16).weight, atol=1e-2)


if __name__ == "__main__":
    main(sys.argv[1], share=True)
