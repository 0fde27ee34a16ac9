"""Every random draw of training is a function of (seed, what it is for, where it is), never of a stream.

So the number of worker threads or processes, and a stop in between, change nothing.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def key_seed(*key: int | str) -> int:
    """A 63-bit number that depends on every part of `key`, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key`, for example `generator(seed, "noise", position)`."""
    import torch

    return torch.Generator().manual_seed(key_seed(*key))


@functools.lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """The order of `count` samples in this epoch: a permutation."""
    import torch

    return tuple(torch.randperm(count, generator=generator(seed, "order", epoch)).tolist())


def sample_at(seed: int, position: int, count: int) -> int:
    """Which of `count` samples stands at `position`, the running number of samples drawn since step 0.

    Positions `e * count` to `(e + 1) * count - 1` hold every sample once, for every epoch e.
    """
    return epoch_order(seed, position // count, count)[position % count]
