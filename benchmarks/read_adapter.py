"""How long an SDXL-sized LoRA takes to read, against safetensors reading the same bytes.

    python benchmarks/read_adapter.py

SDXL's own key list, rank 32, half precision, kohya's names: 986 layers, 218 MB. safetensors maps a file and reads it
when a tensor is touched, so its side touches every one (a clone); ours checks every value for NaN besides. Writes a
record. A minute.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from vislr import measure
from vislr.formats import CanonicalAdapter, Entry, families, read_canonical, write_canonical


def sdxl_lora(path: Path, rank: int) -> int:
    """Write the file; the number of layers."""
    entries = {}
    for component, shapes in families.golden("sdxl").items():
        for name, shape in shapes.items():
            if len(shape) == 2 and any(part in name for part in ("attentions", "self_attn", "mlp")):
                down, up = torch.randn(rank, shape[1]), torch.randn(shape[0], rank)
                entries[f"{component}.{name}"] = Entry("lora", {"lora_down.weight": down, "lora_up.weight": up}, shape)
    write_canonical(CanonicalAdapter(entries, "sdxl"), path, "kohya", dtype=torch.float16)
    return len(entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=32)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.safetensors"
        layers = sdxl_lora(path, a.rank)
        size = path.stat().st_size / 1e6
        figures = measure.interleaved(
            {
                "safetensors": lambda: {k: v.clone() for k, v in load_file(path).items()},
                "vislr": lambda: read_canonical(path),
            },
            rounds=a.rounds,
        )
    log = (
        f"{layers} layers, {size:.0f} MB\n" + "\n".join(f"{name}: {figure}" for name, figure in figures.items()) + "\n"
    )
    print(log, end="")
    print(measure.write_record("read-sdxl-lora", figures, log=log, command="python benchmarks/read_adapter.py", seed=0))


if __name__ == "__main__":
    main()
