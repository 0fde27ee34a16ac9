"""How far a changed model's outputs are from its teacher's, on the same inputs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vislr.core.errors import ConfigError, DataError, ModelError
from vislr.core.hashing import content_hash
from vislr.measure.measurement import Measurement, bootstrap_interval

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn


def teacher_distance(
    student: nn.Module,
    teacher: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    *,
    bands: Sequence[float] | None = None,
    seed: int = 0,
) -> Measurement:
    """Relative L2 distance of a student's outputs from its teacher's.

    sqrt(sum_i |s_i - t_i|^2 / sum_i |t_i|^2) over samples i; 0 for equal models, 1 for a student
    that answers 0. Both run in eval mode without gradients, on the very same inputs: same noise,
    same timesteps. Modes are put back.

    Args:
        student: any module that takes `teacher`'s inputs; its own device and dtype may differ.
        teacher: the reference.
        inputs: keyword arguments of one forward each, batch first, as `vislr.anatomy.sample_inputs`
            makes them (with values, not on meta). Read once, one at a time.
        bands: edges of timestep bands, ascending; default 0, 250, 500, 750, 1000, or a thousandth of
            these when all timesteps are in [0, 1]. Read only if the inputs have a `timestep`.
        seed: of the bootstrap over samples that makes the intervals.

    Returns:
        one part a band that has samples, named by its edges: "0-250" holds 0 <= t < 250, the last
        band its upper edge too.

    Raises:
        ConfigError: the edges do not ascend, or a timestep is outside of them.
        DataError: no inputs, or a teacher that answers 0 everywhere.
        ModelError: outputs of different shapes.
    """
    import torch

    if bands is not None and (len(bands) < 2 or any(a >= b for a, b in itertools.pairwise(bands))):
        raise ConfigError(f"timestep bands {list(bands)}; expected two or more ascending edges")
    errors: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []
    times: list[torch.Tensor] = []
    with _eval_mode(student), _eval_mode(teacher), torch.no_grad():
        for kwargs in inputs:
            ours, theirs = _answer(student, kwargs), _answer(teacher, kwargs)
            if ours.shape != theirs.shape:
                raise ModelError(f"the student gives {tuple(ours.shape)} where its teacher gives {tuple(theirs.shape)}")
            errors.append((ours - theirs).flatten(1).square().sum(1))
            norms.append(theirs.flatten(1).square().sum(1))
            if kwargs.get("timestep") is not None:
                t = torch.as_tensor(kwargs["timestep"]).double().cpu().flatten()
                times.append(t.expand(len(ours)) if len(t) == 1 else t)
    if not errors:
        raise DataError("no inputs to compare a student with its teacher on")
    error, norm = torch.cat(errors).numpy(), torch.cat(norms).numpy()
    if not norm.sum() > 0:
        raise DataError("the teacher answers 0 everywhere, so a relative distance from it has no meaning")
    net_hash = content_hash(teacher.state_dict())
    parts = {}
    if len(times) == len(errors):
        at = torch.cat(times).numpy()
        edges = (
            tuple(bands) if bands is not None else tuple(q * (1 if at.max() > 1 else 1e-3) for q in range(0, 1001, 250))
        )
        if at.min() < edges[0] or at.max() > edges[-1]:
            raise ConfigError(f"timesteps {at.min():g} to {at.max():g} leave the bands {edges[0]:g} to {edges[-1]:g}")
        for low, high in itertools.pairwise(edges):
            inside = (at >= low) & ((at < high) | ((high == edges[-1]) & (at == high)))
            if norm[inside].sum() > 0:
                parts[f"{low:g}-{high:g}"] = _distance(error[inside], norm[inside], seed, net_hash, {})
    return _distance(error, norm, seed, net_hash, parts)


def _distance(
    error: np.ndarray, norm: np.ndarray, seed: int, net_hash: str, parts: Mapping[str, Measurement]
) -> Measurement:
    import numpy as np

    def statistic(counts: np.ndarray) -> np.ndarray:
        return np.sqrt(counts @ error / np.maximum(counts @ norm, np.finfo(float).tiny))

    value = float(statistic(np.ones((1, len(error))))[0])
    how = "|student - teacher| / |teacher| over all samples; interval: bootstrap over samples, 95 %"
    interval = bootstrap_interval(statistic, len(error), seed) if len(error) > 1 else None
    return Measurement(value, interval, len(error), seed, "ratio", how, net_hash, parts=parts)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _answer(model: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The output tensor in float64 on the CPU, for inputs brought to the model's device and dtype."""
    import torch

    weights = [t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    if not weights:
        raise ModelError(f"a {type(model).__name__} without floating-point tensors has no dtype to run in")

    def fit(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: fit(key, item) for key, item in value.items()}
        if not torch.is_tensor(value):
            return value
        # bf16 cannot hold timesteps of three digits.
        keep = name == "timestep" or not value.is_floating_point()
        return value.to(weights[0].device, None if keep else weights[0].dtype)

    output = model(**{name: fit(name, value) for name, value in kwargs.items()})
    output = output if torch.is_tensor(output) else output[0]
    return output.double().cpu()
