"""Targets of the objectives against formulas written out by hand."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from vislr.core.errors import ModelError
from vislr.train import objectives
from vislr.train.diffusion import latent_shape, scheduler_shift, training_scheduler
from vislr.train.families import family_of
from vislr.train.sampling import sample_images


def draws(count=6):
    rng = torch.Generator().manual_seed(0)
    shape = (count, 4, 8, 8)
    return torch.randn(shape, generator=rng), torch.randn(shape, generator=rng), torch.rand(count, generator=rng)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_denoising_target_and_noisy_input(kind):
    from diffusers import DDPMScheduler

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDPMScheduler(prediction_type=kind, **betas)
    x, noise, u = draws()
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    t = (u * 1000).long()
    a = torch.cumprod(1 - beta, 0)[t].view(-1, 1, 1, 1).sqrt()
    s = (1 - a**2).sqrt()
    target = {"epsilon": noise, "v_prediction": a * noise - s * x, "sample": x}[kind]
    seen = {}

    def predict(noisy, time):
        seen.update(noisy=noisy, time=time)
        # A learned variance comes in further channels and is not trained.
        return torch.cat([torch.full_like(noisy, 0.5), torch.full_like(noisy, 99.0)], 1)

    loss = objectives.denoise(predict, scheduler, x, noise, u).loss()
    assert torch.equal(seen["time"], t)
    torch.testing.assert_close(seen["noisy"], a * x + s * noise)
    torch.testing.assert_close(loss, ((0.5 - target) ** 2).mean((1, 2, 3)))


def test_unknown_prediction_type_is_refused():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type="epsilon")
    scheduler.register_to_config(prediction_type="epsilom")
    with pytest.raises(ModelError, match="'epsilom'; did you mean 'epsilon'"):
        objectives.denoise_target(scheduler, *draws()[:2], torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_target_and_noise_levels(shift):
    x, noise, u = draws()
    seen = {}

    def predict(noisy, sigma):
        seen.update(noisy=noisy, sigma=sigma)
        return torch.zeros_like(noisy)

    loss = objectives.flow(predict, x, noise, u, shift).loss()
    for i in range(6):
        normal = math.sqrt(2) * torch.erfinv(2 * u[i].double() - 1).item()
        sigma = 1 / (1 + math.exp(-normal))
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        assert seen["sigma"][i].item() == pytest.approx(sigma, rel=1e-5)
        torch.testing.assert_close(seen["noisy"][i], (1 - sigma) * x[i] + sigma * noise[i], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, ((noise - x) ** 2).mean((1, 2, 3)))
    ends = objectives.sigmas(torch.tensor([0.0, 0.5, 1.0]), shift)
    assert 0 < ends[0] < 0.03
    assert ends[1].item() == pytest.approx(shift / (1 + shift))
    assert 0.98 < ends[2] < 1


def test_classification():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    loss, hit = objectives.classify(logits, torch.tensor([0, 1, 1]))
    expected = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), 3 + math.log(1 + math.exp(-3))]
    torch.testing.assert_close(loss, torch.tensor(expected))
    assert hit.tolist() == [1.0, 1.0, 0.0]


def test_training_scheduler_keeps_betas_and_prediction():
    pipe = tiny.tiny_sd_pipeline()
    made = training_scheduler(pipe.scheduler)
    assert made.config.prediction_type == "v_prediction"
    assert torch.equal(made.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    assert made.alphas_cumprod[-1] == 0  # zero terminal SNR
    # Euler's own add_noise does not preserve the variance; the training scheduler does.
    euler = training_scheduler(tiny.tiny_sdxl_pipeline().scheduler)
    x, noise, _ = draws(1)
    assert euler.add_noise(x, noise, torch.tensor([999])).std() < 1.2


def test_zero_terminal_snr_rescales_the_betas_and_needs_v_or_the_image():
    from diffusers import DDPMScheduler

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    plain = DDPMScheduler(prediction_type="v_prediction", **betas)
    made = training_scheduler(plain, zero_terminal_snr=True)
    assert made.alphas_cumprod[-1] < 1e-9 < plain.alphas_cumprod[-1]
    # Lin et al. 2023, algorithm 1: sqrt(alpha_bar) is shifted to end at 0 and scaled to start where it did.
    root = plain.alphas_cumprod.double().sqrt()
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    torch.testing.assert_close(made.alphas_cumprod.double().sqrt(), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ModelError, match="zero_terminal_snr needs a model that predicts v or the image"):
        training_scheduler(DDPMScheduler(prediction_type="epsilon", **betas), zero_terminal_snr=True)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_weights_mean_the_same_for_every_prediction_type(kind):
    """The weighted error, written as one of the image: the published min(snr, 5) and sqrt(snr)."""
    snr = torch.tensor([0.01, 0.5, 5.0, 40.0])
    to_image = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(4)}[kind]
    weights = objectives.snr_weight(snr, kind, "min-snr", 5.0)
    torch.testing.assert_close(weights * to_image, torch.tensor([0.01, 0.5, 5.0, 5.0]))
    weights = objectives.snr_weight(snr, kind, "debiased")
    torch.testing.assert_close(weights * to_image, snr.sqrt())
    assert torch.equal(objectives.snr_weight(snr, kind, "none"), torch.ones(4))
    ends = objectives.snr_weight(torch.tensor([0.0, 1e9]), kind, "debiased")
    assert torch.isfinite(ends).all()


def test_weights_and_perturbation_reach_the_loss():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x, noise, u = draws()
    seen = {}

    def predict(noisy, time):
        seen.update(noisy=noisy, time=time)
        return torch.zeros_like(noisy)

    parts = objectives.denoise(
        predict, scheduler, x, noise, u, weighting="min-snr", gamma=5.0, perturbation=0.5 * x.flip(0)
    )
    a2 = scheduler.alphas_cumprod[seen["time"]]
    weight = (a2 / (1 - a2)).clamp(max=5.0) / (a2 / (1 - a2))
    torch.testing.assert_close(parts.loss(), weight * noise.square().mean((1, 2, 3)))
    expected = a2.sqrt().view(-1, 1, 1, 1) * x + (1 - a2).sqrt().view(-1, 1, 1, 1) * (noise + 0.5 * x.flip(0))
    torch.testing.assert_close(seen["noisy"], expected)
    parts = objectives.flow(predict, x, noise, u, times="uniform", perturbation=0.5 * x.flip(0))
    torch.testing.assert_close(seen["time"], u)
    s = u.view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["noisy"], (1 - s) * x + s * (noise + 0.5 * x.flip(0)))
    torch.testing.assert_close(parts.target, noise - x)


def test_masks_weigh_positions_and_keep_the_mean():
    x, noise, _ = draws(2)
    parts = objectives.Parts(x, noise)
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :4] = 1.0
    torch.testing.assert_close(parts.loss(mask), (x - noise)[:, :, :4].square().mean((1, 2, 3)))
    torch.testing.assert_close(parts.loss(torch.full((2, 1, 8, 8), 0.3)), parts.loss())
    assert torch.equal(parts.loss(torch.zeros(2, 1, 8, 8)), torch.zeros(2))


def test_the_shift_of_flux_grows_with_the_picture():
    pipe = tiny.tiny_flux_pipeline()
    assert scheduler_shift(pipe, (4, 8, 8)) == 1.0
    pipe.scheduler.register_to_config(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    assert scheduler_shift(pipe, (16, 32, 32)) == pytest.approx(math.exp(0.5))
    assert scheduler_shift(pipe, (16, 128, 128)) == pytest.approx(math.exp(1.15))
    assert scheduler_shift(tiny.tiny_sd3_pipeline(), (4, 8, 8)) == 3.0


PIPELINES = [
    tiny.tiny_sd_pipeline, tiny.tiny_sdxl_pipeline, tiny.tiny_sd3_pipeline, tiny.tiny_pixart_pipeline,
    lambda: tiny.tiny_pixart_pipeline(sizes=True), tiny.tiny_dit_pipeline,
]  # fmt: skip


@pytest.mark.parametrize("build", PIPELINES)
def test_the_pipeline_and_training_call_the_denoiser_alike(build):
    """What a pipeline's own call hands to its denoiser is what training hands to it."""
    pipe = build()
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    calls = []
    denoiser.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    size, shape = latent_shape(pipe, 32)
    family = family_of(pipe)
    text = "3" if family.labelled else "a cat face"
    sample_images(pipe, [text], [0], steps=1, guidance=1.0, size=size)
    args, kwargs = calls.pop()
    noisy = args[0] if args else kwargs["hidden_states"]
    time = kwargs["timestep"] if "timestep" in kwargs else args[1]
    assert tuple(noisy.shape[1:]) == shape
    asked = time / 1000 if "SD3" in type(denoiser).__name__ else time
    with torch.no_grad():
        sizes = torch.tensor([[float(size)] * 2])
        told = family.encode([text]) | family.frame(sizes, torch.zeros(1, 2), sizes)
        family.forward(denoiser, noisy, torch.as_tensor(asked).reshape(-1), told)
    args_, kwargs_ = calls.pop()
    first, second = inputs(args, kwargs), inputs(args_, kwargs_)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key].reshape(first[key].shape), msg=key)


def inputs(args, kwargs):
    names = ("noisy", "time")
    found = {**dict(zip(names, args, strict=False)), **kwargs}
    found["noisy"], found["time"] = (
        found.pop("hidden_states", found.get("noisy")),
        found.pop("timestep", found.get("time")),
    )
    found.update(found.pop("added_cond_kwargs", None) or {})
    found["time"] = torch.as_tensor(found["time"])
    return {key: value.float() for key, value in found.items() if torch.is_tensor(value)}


def test_flux_packs_and_labels_positions_as_its_pipeline_does():
    from diffusers import FluxPipeline

    pipe = tiny.tiny_flux_pipeline()
    seen = {}

    def model(**kwargs):
        seen.update(kwargs)
        return (kwargs["hidden_states"],)

    x, _, u = draws(2)
    family = family_of(pipe)
    out = family.forward(model, x, u[:2], family.encode(["a cat face", "a dog face"]))
    assert torch.equal(out, x)  # unpacking undoes packing
    assert torch.equal(seen["hidden_states"], FluxPipeline._pack_latents(x, 2, 4, 8, 8))
    assert torch.equal(seen["img_ids"], FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32))
    assert seen["txt_ids"].shape == (16, 3)
    assert torch.equal(seen["timestep"], u[:2])
    assert seen["guidance"] is None


def test_sizes_that_the_model_cannot_halve_are_refused():
    pipe = tiny.tiny_sd_pipeline()
    assert latent_shape(pipe, 64) == (64, (4, 16, 16))
    with pytest.raises(ModelError, match=r"data.size is 36; expected a multiple of 8"):
        latent_shape(pipe, 36)


def test_other_pipelines_are_refused_by_name():
    class Other:
        transformer = torch.nn.Linear(1, 1)

    with pytest.raises(ModelError, match="cannot train a Other with a Linear; expected the UNet"):
        family_of(Other())
