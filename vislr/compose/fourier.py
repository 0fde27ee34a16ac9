"""How much of a latent lies in high frequencies: H_eta of CMLoRA (arXiv 2502.04923; section 1.2 of the method)."""

from __future__ import annotations

import math
from typing import Any

import torch


def radial_profile(x: torch.Tensor, log_amplitude: bool = False) -> torch.Tensor:
    """Mean amplitude of the Fourier transform by radius, over its maximum.

    Args:
        x: (..., h, w) real maps.
        log_amplitude: log(|F| + 1e-8) in place of |F|.

    Returns:
        (..., R + 1), R the largest whole radius of the shifted spectrum; of an all-zero map zeros.
    """
    height, width = x.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.double()), dim=(-2, -1)).abs()
    if log_amplitude:
        spectrum = (spectrum + 1e-8).log()
    rows = torch.arange(height, device=x.device) - height // 2
    columns = torch.arange(width, device=x.device) - width // 2
    radius = (rows[:, None] ** 2 + columns[None] ** 2).double().sqrt().floor().long().flatten()
    count = torch.bincount(radius).double()
    sums = torch.zeros(*x.shape[:-2], len(count), dtype=torch.float64, device=x.device)
    means = sums.index_add_(-1, radius, spectrum.flatten(-2)) / count.clamp(min=1)
    most = means.amax(-1, keepdim=True)
    return torch.where(most == 0, torch.zeros_like(means), means / most)


def high_share(x: torch.Tensor, eta: float = 0.2, log_amplitude: bool = False) -> torch.Tensor:
    """H_eta: the mean of the normalised radial profile from radius ceil(eta R) on.

    The boundary is a fraction, so every size has bins above it. It does not change where x is scaled.

    Args:
        x: (..., h, w). eta: share of the largest radius, 0 to 1.

    Returns:
        (...,) float64, near 0 for a constant map, near 1 for white noise of many draws.
    """
    profile = radial_profile(x, log_amplitude)
    start = math.ceil(eta * (profile.shape[-1] - 1))
    return profile[..., start:].mean(-1)


def latent_share(inputs: dict[str, Any], channels: int, eta: float, log_amplitude: bool) -> float:
    """H_eta of the latent that a denoiser got: of the channel mean, averaged over the batch.

    Args:
        inputs: of the denoiser, by name; "sample" is (B, C, h, w), or FLUX's packed (B, h w / 4, 4 C) with
            "img_ids".
        channels: of the latent itself; inpainting models get more behind them.
    """
    latent = inputs["sample"].detach().float()
    if latent.dim() == 3:
        latent = unpacked(latent, inputs["img_ids"])
    return float(high_share(latent[:, :channels].mean(1), eta, log_amplitude).mean())


def unpacked(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """FLUX's tokens (B, h w / 4, 4 C) as a latent (B, C, h, w); ids (tokens, 3) hold row and column."""
    ids = ids[0] if ids.dim() == 3 else ids
    rows, columns = (int(ids[:, axis].max() - ids[:, axis].min()) + 1 for axis in (1, 2))
    batch, _, depth = tokens.shape
    # Edited pictures come behind the latent, in the same sequence.
    grid = tokens[:, : rows * columns].reshape(batch, rows, columns, depth // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, depth // 4, 2 * rows, 2 * columns)
