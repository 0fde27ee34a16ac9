"""One of the processes of `test_processes.py`: trains, and writes what it saw.

torchrun --nproc_per_node 2 two_processes.py PICTURES OUT BATCH [STOP | resume | shard | apart | reselect]

PICTURES: a folder of pictures, or of shards. STOP: the step after which this process, and so all, is asked to stop.
shard: the base is divided. apart: as resume, but the second process looks for checkpoints elsewhere.
reselect: SaRA, on fewer entries from the third step on.
"""

import sys
from pathlib import Path

import tiny
import torch

import vislr
from vislr.core.errors import Interrupted
from vislr.core.files import write_json, write_tensors
from vislr.data import ImageFolder, open_pool
from vislr.formats import remember_adapters_base
from vislr.train import (
    AdapterSection,
    DataConfig,
    HeldOutConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    SampleConfig,
    TrainConfig,
    fit,
    make_accelerator,
)
from vislr.train.examples import Examples

STEPS = 6


def main(pictures: str, out: str, batch: int, how: str = "") -> None:
    accelerator = make_accelerator()
    # One process is asked; the other has to leave at the same step.
    if how == "apart" and accelerator.process_index == 1:
        out = f"{out}-1"
    stop = (lambda step: accelerator.process_index == 1 and step == int(how)) if how.isdigit() else None
    adapter = AdapterSection(r=2)
    if how == "reselect":
        adapter = AdapterSection(kind="sara", threshold=5e-3, rank_weight=0.0, reselect_after=2)
    config = TrainConfig(
        data=DataConfig(folder=pictures), steps=STEPS,
        output=OutputConfig(folder=out, checkpoint_every=0, resume=how in ("resume", "apart")),
        optim=OptimConfig(batch=batch, lr=1e-3, warmup=0, ema=0.9), sample=SampleConfig(steps=1),
        held_out=HeldOutConfig(fraction=0.25, repeats=1), adapter=adapter,
        model=ModelConfig(shard=how == "shard"),
    )  # fmt: skip
    seen, gradients = [], {}
    read, clip = Examples.__getitem__, accelerator.clip_grad_norm_

    def noted(self, items):
        given = read(self, items)
        seen.append(given["index"].tolist())
        return given

    def kept(parameters, norm):
        if not gradients:
            gradients.update({str(i): p.grad.clone() for i, p in enumerate(parameters)})
        return clip(parameters, norm)

    Examples.__getitem__ = noted
    accelerator.clip_grad_norm_ = kept
    pipe = tiny.tiny_sd_pipeline()
    torch.manual_seed(0)
    vislr.apply(pipe, config.adapter.to_change())
    remember_adapters_base(pipe.unet, "default")
    shards = any(Path(pictures).glob("*.tar"))
    whole = open_pool(config.data) if shards else ImageFolder.with_captions(pictures)
    train, held_out = whole.split(0.25)
    try:
        result = fit(pipe, "default", config, train, held_out, accelerator=accelerator, stop=stop)
    except Interrupted as error:
        write_json(Path(out) / f"stopped-{accelerator.process_index}.json", str(error))
        return
    finally:
        Examples.__getitem__ = read
    rank = accelerator.process_index
    if how == "shard":
        parts = [p.to_local().numel() for p in pipe.unet.parameters() if hasattr(p, "full_tensor")]
        write_json(Path(out) / f"parts-{rank}.json", parts)
        vislr.save_adapter(pipe, Path(out) / f"adapter-{rank}.safetensors")
    weights = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
    write_tensors(Path(out) / f"weights-{rank}.safetensors", weights)
    write_tensors(Path(out) / f"gradients-{rank}.safetensors", gradients)
    write_json(Path(out) / f"seen-{rank}.json", {"seen": seen, "held_out": result.history.held_out})
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
