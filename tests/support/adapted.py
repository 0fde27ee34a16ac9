"""A tiny pipeline of every family with adapters of several kinds and random values on it."""

from typing import Any

import torch
from peft import LoraConfig
from tiny import tiny_flux_pipeline, tiny_pixart_pipeline, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline

import vislr
from vislr.adapters.inject import adapter_parameters, attach, detach, set_adapters
from vislr.anatomy import denoiser_of

SHORT = {"max_sequence_length": 8}
FAMILIES: dict[str, Any] = {
    "sd": (tiny_sd_pipeline, {}),
    "sdxl": (tiny_sdxl_pipeline, {}),
    "sd3": (tiny_sd3_pipeline, SHORT),
    "flux": (tiny_flux_pipeline, SHORT),
    "pixart": (tiny_pixart_pipeline, {"use_resolution_binning": False, "clean_caption": False}),
}
NAMES = ("a", "b", "c")


def fill(module: Any, name: str, seed: int, scale: float = 0.1) -> None:
    """Random values in place of an adapter's zeros."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in adapter_parameters(module, name).items():
        noise = scale * torch.randn(parameter.shape, generator=generator)
        # A sparse adapter's vector holds values of the weight itself.
        parameter.data = parameter.data + noise if "sara" in key else noise


class Tiny:
    """A pipeline, the arguments that it is called with, and its adapters."""

    def __init__(self, family: str, names: tuple[str, ...] = NAMES):
        build, self.call = FAMILIES[family]
        self.family, self.pipe = family, build()
        self.component, self.model = denoiser_of(self.pipe)
        if family in ("sd", "sdxl"):
            layers = [["to_q", "to_v", "conv1"], ["to_k", "conv2"], ["to_q", "to_out.0"]]
        else:
            layers = [["to_q", "to_v"], ["to_k", "to_out.0"], ["to_q"]]
        for place, (name, r, own) in enumerate(zip(NAMES, (2, 3, 4), layers, strict=True)):
            if name in names:
                # Not through vislr.apply: counting FLOPs takes longer than all else here.
                attach(self.model, LoraConfig(r=r, lora_alpha=r + 1, target_modules=own), name)
                fill(self.model, name, place)
        set_adapters(self.model, [])

    def put(self, name: str, config: Any, seed: int) -> Any:
        """Put on a further adapter with random values, off; `take` takes it off."""
        attached = attach(self.model, config, name)
        fill(self.model, name, seed)
        set_adapters(self.model, [])
        return attached

    def take(self, *attached: Any) -> None:
        for one in attached:
            detach(self.model, one)
        set_adapters(self.model, [])

    def draw(self, steps: int = 3, guidance: float = 3.0, prompt: str = "a cat face", **call: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            return self.pipe(
                [prompt], num_inference_steps=steps, guidance_scale=guidance, generator=generator, height=32, width=32,
                output_type="latent", **(self.call | call),
            ).images  # fmt: skip

    def alone(self, name: str, weight: float, **call: Any) -> torch.Tensor:
        """Plain sampling with one adapter."""
        vislr.set_adapters(self.pipe, [name], [weight])
        try:
            return self.draw(**call)
        finally:
            vislr.set_adapters(self.pipe, [])
