"""What a step minimises, as functions: denoising, flow matching, classification. One value a sample.

Random numbers come in as arguments: `u` in (0, 1) places a sample on the time axis, `noise` is
standard normal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vislr.core.errors import ModelError, hint

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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


def denoise(predict: Predict, scheduler: Any, x: torch.Tensor, noise: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Squared error of the prediction from x_t (Ho et al. 2020, eq. 14, for any prediction type).

    Args:
        predict: (x_t, t) -> prediction, both (B, C, H, W).
        scheduler: a DDPMScheduler with the model's betas.
        x: clean latents (B, C, H, W), float32. noise: the same shape. u: (B,).

    Returns:
        (B,)
    """
    t = timesteps(u, scheduler.config.num_train_timesteps)
    prediction = predict(scheduler.add_noise(x, noise, t), t)
    # Models with a learned variance return it in further channels.
    return per_sample(prediction[:, : x.shape[1]].float() - denoise_target(scheduler, x, noise, t))


def sigmas(u: torch.Tensor, shift: float = 1.0) -> torch.Tensor:
    """(B,) in (0, 1) -> noise levels: logit-normal, then shifted to the resolution.

    sigma = sigmoid(n) with n standard normal (Esser et al. 2024, section 3.1, m = 0, s = 1), then
    shift sigma / (1 + (shift - 1) sigma) (eq. 23).
    """
    # u next to 0 or 1 would give an infinite n.
    sigma = torch.sigmoid(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow(predict: Predict, x: torch.Tensor, noise: torch.Tensor, u: torch.Tensor, shift: float = 1.0) -> torch.Tensor:
    """Squared error of the predicted velocity: x_s = (1 - s) x + s noise, target noise - x (Esser et al. 2024, eq. 13).

    Args:
        predict: (x_s, s) -> velocity; s (B,) in (0, 1).
        x: clean latents (B, C, H, W), float32. noise: the same shape. u: (B,).
        shift: of the scheduler.

    Returns:
        (B,)
    """
    sigma = sigmas(u, shift).to(x.device)
    s = sigma.view(-1, 1, 1, 1)
    return per_sample(predict((1 - s) * x + s * noise, sigma).float() - (noise - x))


def classify(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and hit: (B, classes), (B,) -> (B,), (B,) of 0 and 1."""
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    return loss, (logits.argmax(1) == labels).float()
