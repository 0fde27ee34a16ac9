"""What a step minimises, as functions: denoising, flow matching, classification. One value a sample.

Random numbers come in as arguments: `u` in (0, 1) places a sample on the time axis, `noise` is
standard normal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from vislr.core.errors import ModelError, hint

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Weighting = Literal["none", "min-snr", "debiased"]


@dataclass(frozen=True)
class Parts:
    """What a prediction is compared with.

    Attributes:
        prediction, target: (B, C, H, W), float32.
        weight: (B,), of each sample's timestep.
    """

    prediction: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None = None

    def loss(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B,): the weighted mean of squares; `mask` (B, 1, H, W) weighs positions, of mean 1 afterwards."""
        error = self.prediction - self.target
        if mask is not None:
            error = error * (mask / mask.mean((1, 2, 3), keepdim=True).clamp(min=1e-6)).sqrt()
        value = per_sample(error)
        return value if self.weight is None else value * self.weight


def per_sample(error: torch.Tensor) -> torch.Tensor:
    """Mean of the squares over all axes but the first: (B, ...) -> (B,), in float32."""
    return error.float().pow(2).flatten(1).mean(1)


def timesteps(u: torch.Tensor, count: int) -> torch.Tensor:
    """(B,) in (0, 1) -> integer timesteps 0 to count - 1, uniform."""
    return (u * count).long().clamp(0, count - 1)


def denoise_target(scheduler: Any, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the model should predict, by the scheduler's `prediction_type`.

    With x_t = a_t x + s_t noise: "epsilon" -> noise; "sample" -> x; "v_prediction" -> a_t noise - s_t x
    (Salimans and Ho 2022, section 4, eq. 9).

    Raises:
        ModelError: another prediction type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x
    if kind == "v_prediction":
        return scheduler.get_velocity(x, noise, t)
    known = ("epsilon", "sample", "v_prediction")
    raise ModelError(f"cannot train a model whose scheduler predicts '{kind}'{hint(kind, known)}")


def snr_weight(snr: torch.Tensor, prediction_type: str, weighting: Weighting, gamma: float = 5.0) -> torch.Tensor:
    """Weight of the squared error of a prediction at a signal to noise ratio.

    Defined on the error of the image: "min-snr" weighs it by min(snr, gamma) (Hang et al. 2023, eq. 7),
    "debiased" by sqrt(snr) (Yu et al. 2023: 1 / sqrt(snr) on the error of the noise). The error of the noise
    is snr times that of the image, the error of v (snr + 1) times.

    Args:
        snr: (B,), a_t^2 / s_t^2. prediction_type: of the scheduler.
    """
    if weighting == "none":
        return torch.ones_like(snr)
    # Pure noise has snr 0: what is divided by it tends to 1 (min-snr) or grows without end (debiased).
    snr = snr.clamp(min=1e-6)
    weight = snr.clamp(max=gamma) if weighting == "min-snr" else snr.sqrt()
    if prediction_type == "epsilon":
        return (weight / snr).clamp(max=1e3)
    return weight / (snr + 1) if prediction_type == "v_prediction" else weight


def denoise(
    predict: Predict, scheduler: Any, x: torch.Tensor, noise: torch.Tensor, u: torch.Tensor, *,
    weighting: Weighting = "none", gamma: float = 5.0, perturbation: torch.Tensor | None = None,
) -> Parts:  # fmt: skip
    """Prediction from x_t and its target (Ho et al. 2020, eq. 14, for any prediction type).

    Args:
        predict: (x_t, t) -> prediction, both (B, C, H, W).
        scheduler: a DDPMScheduler with the model's betas.
        x: clean latents (B, C, H, W), float32. noise: the same shape. u: (B,).
        weighting, gamma: see `snr_weight`.
        perturbation: noise that is in x_t but not in the target (Ning et al. 2023, algorithm 1).
    """
    t = timesteps(u, scheduler.config.num_train_timesteps)
    seen = noise if perturbation is None else noise + perturbation
    prediction = predict(scheduler.add_noise(x, seen, t), t)
    weight = None
    if weighting != "none":
        alphas = scheduler.alphas_cumprod.to(x.device)[t]
        weight = snr_weight(alphas / (1 - alphas), scheduler.config.prediction_type, weighting, gamma)
    # Models with a learned variance return it in further channels.
    return Parts(prediction[:, : x.shape[1]].float(), denoise_target(scheduler, x, noise, t), weight)


def sigmas(u: torch.Tensor, shift: float = 1.0, times: str = "logit-normal") -> torch.Tensor:
    """(B,) in (0, 1) -> noise levels, shifted to the resolution.

    "logit-normal": sigma = sigmoid(n) with n standard normal (Esser et al. 2024, section 3.1, m = 0, s = 1);
    "uniform": sigma = u. Then shift sigma / (1 + (shift - 1) sigma) (eq. 23).
    """
    # u next to 0 or 1 would give an infinite n.
    u = u.clamp(1e-6, 1 - 1e-6)
    sigma = torch.sigmoid(torch.special.ndtri(u)) if times == "logit-normal" else u
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow(
    predict: Predict, x: torch.Tensor, noise: torch.Tensor, u: torch.Tensor, shift: float = 1.0, *,
    times: str = "logit-normal", perturbation: torch.Tensor | None = None,
) -> Parts:  # fmt: skip
    """Predicted velocity and its target: x_s = (1 - s) x + s noise, target noise - x (Esser et al. 2024, eq. 13).

    Args:
        predict: (x_s, s) -> velocity; s (B,) in (0, 1).
        x: clean latents (B, C, H, W), float32. noise: the same shape. u: (B,).
        shift, times: see `sigmas`.
        perturbation: noise that is in x_s but not in the target.
    """
    sigma = sigmas(u, shift, times).to(x.device)
    s = sigma.view(-1, 1, 1, 1)
    seen = noise if perturbation is None else noise + perturbation
    return Parts(predict((1 - s) * x + s * seen, sigma).float(), noise - x)


def classify(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and hit: (B, classes), (B,) -> (B,), (B,) of 0 and 1."""
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    return loss, (logits.argmax(1) == labels).float()
