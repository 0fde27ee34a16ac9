"""Recovery of a pruned model: it learns to answer, and to feel inside, like the model that it was cut from.

L = task + lambda_o E|eps_T - eps_S|^2 + lambda_f sum_l alpha_l E|f_T^l - f_S^l|^2

LAPTOP-Diff (arXiv 2404.11098) weighs stages by the size of the teacher's features, since a few large
ones dominate otherwise; alpha_l = 1 / mean(f_T^l)^2 makes every term a relative error. BK-SDM taps the
ends of stages; HierarchicalPrune (arXiv 2508.04663) taps both streams of the kept blocks, unweighted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from vislr.anatomy.wrapping import unwrapped
from vislr.core.errors import ConfigError, ModelError, TargetError, hint
from vislr.train.checks import at_least
from vislr.train.families import family_of
from vislr.train.tasks import Draw

Normalise = Literal["relative", "first", "none"]


@dataclass
class DistillConfig:
    """What a pruned model learns from the model that it was cut from."""

    task: float = 1.0
    """Weight of the task's own loss (noise, v, velocity, classes)."""
    output: float = 1.0
    """Weight of the distance from the teacher's output."""
    features: float = 1.0
    """Weight of the distance from the teacher's features; 0: they are not computed."""
    normalise: Normalise = "relative"
    """How the features of several places are weighed: relative (each term a relative error), first (by the norm of
    the first place's features over its own), none."""

    def __post_init__(self) -> None:
        at_least(0, distill__task=self.task, distill__output=self.output, distill__features=self.features)
        if not self.task + self.output + self.features:
            raise ConfigError("distill.task, output and features are all 0; expected one above 0")


class Distillation:
    """The objective, for `fit(..., extra=Distillation(...))`. Use it as a context, or call `close`.

    Args:
        target: the pruned pipeline, or classifier, that is trained.
        teacher: the model before pruning, of the same inputs and outputs; see `make_teacher`.
        config: weights.
        taps: module names whose outputs are compared, in both models; None: `taps_of(student)`.

    Raises:
        TargetError: a tap is missing in one of the models.
    """

    def __init__(
        self, target: Any, teacher: nn.Module, config: DistillConfig | None = None, taps: Sequence[str] | None = None
    ) -> None:
        self.config = config or DistillConfig()
        self.family = None if isinstance(target, nn.Module) else family_of(target)
        student = target if isinstance(target, nn.Module) else getattr(target, "unet", None) or target.transformer
        self.student, self.teacher = unwrapped(student), teacher
        if self.student is self.teacher:
            raise ModelError("the teacher is the student itself; expected the model before pruning")
        self.teacher.eval().requires_grad_(False)
        self.taps = list(taps_of(self.student) if taps is None else taps) if self.config.features else []
        self._own: dict[str, list[torch.Tensor]] = {}
        self._theirs: dict[str, list[torch.Tensor]] = {}
        self._handles: list[Any] = []
        for module, kept, who in ((self.student, self._own, "student"), (self.teacher, self._theirs, "teacher")):
            modules = dict(module.named_modules())
            for name in self.taps:
                if name not in modules:
                    raise TargetError(f"the {who} has no '{name}' to compare features at{hint(name, modules)}")
                self._handles.append(modules[name].register_forward_hook(_keep(name, kept, who == "student")))

    def __enter__(self) -> Distillation:
        return self

    def __exit__(self, *reason: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off both models."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __call__(self, draw: Draw) -> Mapping[str, torch.Tensor]:
        """ "objective", and "output" and "features" where they have a weight; (B,) each."""
        config = self.config
        own = {name: self._own[name] for name in self.taps}
        parts: dict[str, torch.Tensor] = {}
        objective = config.task * draw.loss
        if config.output or config.features:
            answer = self._answer(draw)
            parts["output"] = self._output_loss(draw, answer)
            objective = objective + config.output * parts["output"]
        if self.taps:
            parts["features"] = feature_loss(own, self._theirs, config.normalise)
            objective = objective + config.features * parts["features"]
        self._own.clear()
        self._theirs.clear()
        return parts | {"objective": objective}

    @torch.no_grad()
    def _answer(self, draw: Draw) -> torch.Tensor:
        first = next(p for p in self.teacher.parameters() if p.is_floating_point())
        if self.family is None:
            return self.teacher(draw.noisy.to(first.dtype)).float()
        conditions = {
            key: value.to(first.dtype) if value.is_floating_point() else value for key, value in draw.conditions.items()
        }
        answer = self.family.forward(self.teacher, draw.noisy.to(first.dtype), draw.time, conditions)
        return answer[:, : draw.prediction.shape[1]].float()

    def _output_loss(self, draw: Draw, answer: torch.Tensor) -> torch.Tensor:
        if self.family is None:
            # Of classifiers: Kullback-Leibler divergence of the student's classes from the teacher's.
            return F.kl_div(
                draw.prediction.log_softmax(1), answer.log_softmax(1), reduction="none", log_target=True
            ).sum(1)
        return per_sample(draw.prediction.float() - answer)


def feature_loss(
    own: Mapping[str, Sequence[torch.Tensor]], theirs: Mapping[str, Sequence[torch.Tensor]], normalise: Normalise
) -> torch.Tensor:
    """sum_l alpha_l mean (f_T^l - f_S^l)^2, (B,).

    Args:
        own, theirs: tap -> its tensors (streams), each (B, ...).
        normalise: "relative": alpha_l = 1 / mean(f_T^l ^2), over batch and all axes. "first":
            alpha_l = |f_T^1| / |f_T^l|, root mean squares. "none": 1. No gradient flows into alpha.
    """
    total: torch.Tensor | float = 0.0
    first: torch.Tensor | None = None
    for name in own:
        for mine, other in zip(own[name], theirs[name], strict=True):
            other = other.detach().float()
            size = other.square().mean()
            first = size if first is None else first
            # A feature that is 0 everywhere has no relative error; both are then equal or both wrong.
            floor = torch.finfo(torch.float32).tiny
            alpha = torch.ones_like(size)
            if normalise == "relative":
                alpha = 1 / size.clamp_min(floor)
            elif normalise == "first":
                alpha = (first / size.clamp_min(floor)).sqrt()
            total = total + alpha * per_sample(mine.float() - other)
    assert torch.is_tensor(total)
    return total


def per_sample(error: torch.Tensor) -> torch.Tensor:
    """Mean of the squares over all axes but the first: (B, ...) -> (B,), in float32."""
    return error.float().square().flatten(1).mean(1)


def _keep(name: str, kept: dict[str, list[torch.Tensor]], training: bool) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        # Of the student only training forwards count, not those that sample or evaluate.
        if torch.is_grad_enabled() or not training:
            kept[name] = streams(output)

    return hook


def streams(output: Any) -> list[torch.Tensor]:
    """The tensors of a block's output: both streams of a joint block, the feature map of a UNet's stage."""
    if torch.is_tensor(output):
        return [output]
    if hasattr(output, "sample"):
        return [output.sample]
    # A UNet's down stage gives its last feature map, then a tuple of all.
    return [part for part in output if torch.is_tensor(part)]


def taps_of(model: nn.Module) -> list[str]:
    """Where features are compared by default: ends of a UNet's stages, the blocks of a transformer that are left.

    The last joint block of SD3 drops its context, so it is compared on the image alone.
    """
    if hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
        names = [f"down_blocks.{i}" for i in range(len(model.down_blocks))]  # type: ignore[arg-type]
        return names + [f"up_blocks.{i}" for i in range(len(model.up_blocks))]  # type: ignore[arg-type]
    found = []
    for stage in ("transformer_blocks", "single_transformer_blocks", "blocks"):
        for i, block in enumerate(getattr(model, stage, ())):
            if getattr(block, "removed_unit", None) is None:
                found.append(f"{stage}.{i}")
    if not found:
        found = [name for name, module in model.named_children() if any(module.children())]
    if not found:
        raise TargetError(f"a {type(model).__name__} has no stages to compare features at; name taps")
    return found


def make_teacher(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    offload: bool = False,
) -> nn.Module:
    """A model as a teacher: frozen, in low precision, or kept in main memory while it is not needed.

    Args:
        model: the model before pruning, changed in place.
        dtype: of its weights; bfloat16 halves it. None: as it is.
        device: where it computes.
        offload: weights stay in main memory and visit the device layer by layer (accelerate's cpu_offload).
    """
    model.eval().requires_grad_(False)
    if dtype is not None:
        model.to(dtype)
    if offload:
        from accelerate import cpu_offload

        cpu_offload(model, torch.device(device or "cpu"))
    elif device is not None:
        model.to(device)
    return model
