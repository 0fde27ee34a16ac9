"""H_eta of known maps."""

import pytest
import torch

from vislr.compose.fourier import high_share, latent_share, radial_profile, unpacked


def test_a_constant_map_has_all_its_energy_at_radius_0():
    x = torch.full((3, 64, 64), 2.5)
    profile = radial_profile(x)
    assert torch.equal(profile[:, 0], torch.ones(3, dtype=torch.float64))
    assert profile[:, 1:].max() < 1e-12
    assert high_share(x).max() < 1e-12
    assert torch.equal(high_share(torch.zeros(8, 8)), torch.tensor(0.0, dtype=torch.float64))


def test_white_noise_is_flat():
    x = torch.randn(200, 64, 64, generator=torch.Generator().manual_seed(0))
    mean = radial_profile(x).mean(0)
    share = high_share(x).mean()
    assert (mean[10:-3] / mean[10:-3].mean() - 1).abs().max() < 0.03
    assert share > 0.6
    smooth = torch.nn.functional.avg_pool2d(x[:, None], 9, 1, 4)[:, 0]
    assert high_share(smooth).mean() < 0.5 * share


def test_scaling_changes_nothing_and_every_size_is_finite():
    generator = torch.Generator().manual_seed(0)
    for height in (8, 9, 12, 16, 33, 64, 128):
        for width in (8, 13, 64):
            x = torch.randn(height, width, generator=generator)
            for eta in (0.0, 0.2, 0.5, 1.0):
                found = high_share(x, eta)
                assert torch.isfinite(found)
                assert 0 <= found <= 1
                torch.testing.assert_close(high_share(1024 * x, eta), found, rtol=1e-12, atol=0)
    # The published constant, radius 80, is empty at 64 x 64: its largest radius is 45.
    assert radial_profile(torch.randn(64, 64)).shape[-1] == 46


def test_a_single_frequency_is_where_it_belongs():
    position = torch.arange(64) * 2 * torch.pi / 64
    for frequency in (3, 20, 30):
        x = torch.cos(frequency * position)[:, None].expand(64, 64)
        profile = radial_profile(x)
        assert profile.argmax() == frequency
        # eta R = 9: a wave of 3 is low, of 20 and 30 high.
        assert (high_share(x) > 0.01) == (frequency > 9)


def test_log_amplitudes_are_another_measure():
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    assert high_share(x, log_amplitude=True) != high_share(x)


def test_flux_tokens_are_unpacked_as_the_pipeline_packs_them():
    from diffusers import FluxPipeline

    latent = torch.randn(2, 16, 12, 20)
    tokens = FluxPipeline._pack_latents(latent, 2, 16, 12, 20)
    ids = FluxPipeline._prepare_latent_image_ids(2, 6, 10, "cpu", torch.float32)
    assert torch.equal(unpacked(tokens, ids), latent)
    packed = latent_share({"sample": tokens, "img_ids": ids}, 16, 0.2, False)
    assert packed == pytest.approx(float(high_share(latent.mean(1)).mean()))


def test_channels_behind_the_latent_do_not_count():
    latent = torch.randn(1, 4, 16, 16)
    with_mask = torch.cat([latent, torch.ones(1, 5, 16, 16)], 1)
    assert latent_share({"sample": with_mask}, 4, 0.2, False) == latent_share({"sample": latent}, 4, 0.2, False)
