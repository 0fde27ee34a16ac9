"""Optimisers by name, their parameter groups, and the learning rate of a step."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vislr.core.errors import ConfigError, LaunchError, TargetError, hint
from vislr.train.sections import OptimConfig

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerInfo:
    """An optimiser that a config can name.

    Attributes:
        build: (groups, config) -> optimiser; imports what it needs.
        state_bytes: bytes of state for each trained parameter, about.
        package: what must be installed beside torch, "" for nothing.
        description: one line.
    """

    build: Callable[[Groups, OptimConfig], torch.optim.Optimizer]
    state_bytes: float
    package: str
    description: str


def _adamw(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)


def _adamw8bit(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        from torchao.optim import AdamW8bit
    return AdamW8bit(groups, **options)


def _adafactor(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=optim.lr, weight_decay=optim.weight_decay)


def _prodigy(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(
        groups, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, use_bias_correction=True,
        safeguard_warmup=optim.warmup > 0,
    )  # fmt: skip


OPTIMIZERS = {
    "adamw": OptimizerInfo(_adamw, 8, "", "AdamW, fused"),
    "adamw8bit": OptimizerInfo(_adamw8bit, 2, "bitsandbytes or torchao", "AdamW with both moments in 8 bit"),
    "adafactor": OptimizerInfo(_adafactor, 0.1, "", "second moments as rows and columns"),
    "prodigy": OptimizerInfo(_prodigy, 16, "prodigyopt", "Adam that estimates its own learning rate"),
}


def parameter_groups(
    trainable: Mapping[str, torch.nn.Parameter], optim: OptimConfig, rates: Mapping[str, float] | None = None
) -> Groups:
    """Parameters by the factor of their learning rate, each group with "factor" and "names".

    Args:
        trainable: name -> parameter; those of text encoders begin with their component's name.
        optim: `text_lr` and `block_lr` are read. A parameter whose factor is 0 is in no group and is frozen.
        rates: name -> further factor.

    Raises:
        TargetError: a pattern of `block_lr` fits no parameter, or nothing is left to train.
    """
    factors, used = optim.factors(), set()
    found: dict[float, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in trainable.items():
        text = optim.text_lr is not None and name.startswith("text_encoder")
        factor = (rates or {}).get(name, 1.0)
        if text and optim.text_lr:
            factor *= optim.text_lr / optim.lr
        for pattern, value in factors.items():
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*"):
                factor *= value
                used.add(pattern)
                break
        parameter.requires_grad_(factor > 0)
        if factor > 0:
            found.setdefault(factor, {})[name] = parameter
    unused = [pattern for pattern in factors if pattern not in used]
    if unused:
        parts = dict.fromkeys(name.rpartition(".")[0] for name in trainable)
        raise TargetError(f"optim.block_lr '{unused[0]}' fits no trained parameter{hint(unused[0], parts)}")
    if not found:
        raise TargetError("optim.block_lr freezes everything; expected something to train")
    return [{"params": list(part.values()), "factor": factor, "names": list(part)} for factor, part in found.items()]


def build_optimizer(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of a config over groups of `parameter_groups`.

    Raises:
        LaunchError: its package is not installed.
        ConfigError: it refuses its options.
    """
    info = OPTIMIZERS[optim.optimizer]
    plain = [{"params": group["params"], "factor": group["factor"]} for group in groups]
    try:
        return info.build(plain, optim)
    except ImportError as error:
        raise LaunchError(f"optim.optimizer {optim.optimizer} needs {info.package}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"optim.optimizer {optim.optimizer} refuses its options: {error}") from error


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """The rate of update number `step` (from 0) of `steps`.

    Rises in a line over `warmup` steps; then falls from `lr` to `final_lr * lr` at the last step: by half a
    cosine, in a line, in `cycles` half cosines, or not at all.
    """
    rise = min(1.0, (step + 1) / optim.warmup) if optim.warmup else 1.0
    done = min(1.0, max(0.0, (step - optim.warmup) / max(1, steps - 1 - optim.warmup)))
    if optim.schedule == "constant":
        fallen = 0.0
    elif optim.schedule == "linear":
        fallen = done
    else:
        if optim.schedule == "restarts" and done < 1:
            done = done * optim.cycles % 1.0
        fallen = 0.5 * (1 - math.cos(math.pi * done))
    return optim.lr * rise * (optim.final_lr + (1 - optim.final_lr) * (1 - fallen))
