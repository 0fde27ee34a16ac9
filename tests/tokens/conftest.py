"""Tiny models of every family that token plans work on."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import tiny_flux_transformer, tiny_sd3_transformer, tiny_unet

SIZES: dict[str, Any] = {
    "num_layers": 4, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2, "sample_size": 16,
}  # fmt: skip


@dataclass
class Family:
    """One tiny backbone, the inputs it is run on, and what its plans look like."""

    name: str
    model: Any
    sample: dict[str, int]
    other: dict[str, int]  # another size, not square where the class itself can do that
    whole: tuple[str, ...] = ()  # blocks after which no token leaves in early steps
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> bool:
        """Whether it denoises."""
        return self.name != "vit"

    def inputs(self, sample: dict[str, int] | None = None, timestep: float | None = None) -> dict[str, Any]:
        from vislr.anatomy import sample_inputs

        inputs = sample_inputs(self.model, sample or self.sample, device="cpu")
        if timestep is not None and self.steps:
            unit = 1e-3 if self.name == "flux" else 1
            inputs["timestep"] = torch.full_like(inputs["timestep"].float(), timestep * unit)
        return inputs

    def run(self, sample: dict[str, int] | None = None, timestep: float | None = None) -> torch.Tensor:
        with torch.no_grad():
            out = self.model(**self.inputs(sample, timestep))
        return out if torch.is_tensor(out) else out[0]


def _pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        **SIZES, in_channels=4, out_channels=8, cross_attention_dim=16, caption_channels=16,
        use_additional_conditions=False,
    )  # fmt: skip


def _dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(**SIZES, in_channels=4, out_channels=8, num_embeds_ada_norm=10)


def _vit() -> Any:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=3,
        dynamic_img_size=True,
    )  # fmt: skip


def make_family(name: str) -> Family:
    torch.manual_seed(0)
    tall = {"height": 20, "width": 12, "batch": 3}
    text = {"tokens": 8}
    if name == "unet":
        # One transformer of one block (pruned inside) and transformers of two, as in SDXL.
        model = tiny_unet(
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
            transformer_layers_per_block=(1, 2),
        )  # fmt: skip
        first = [f"down_blocks.{i}.attentions.0.transformer_blocks.0" for i in (0, 1)]
        last = [f"up_blocks.{i}.attentions.1.transformer_blocks.0" for i in (0, 1)]
        return Family(name, model, {"height": 16, "width": 16, "batch": 2, **text}, tall | text, (*first, *last))
    if name == "sd3":
        model = tiny_sd3_transformer(num_layers=4, sample_size=16, pos_embed_max_size=16)
        return Family(name, model, {"height": 16, "width": 16, "batch": 2, **text}, tall | text)
    if name == "flux":
        model = tiny_flux_transformer(num_layers=2, num_single_layers=2)
        return Family(name, model, {"height": 16, "width": 16, "batch": 2, **text}, tall | text)
    if name == "pixart":
        return Family(name, _pixart(), {"height": 16, "width": 16, "batch": 2, **text}, tall | text)
    if name == "dit":
        # The class itself takes square pictures only.
        return Family(name, _dit(), {"height": 16, "width": 16, "batch": 2}, {"height": 12, "width": 12, "batch": 3})
    return Family(name, _vit(), {"height": 64, "width": 64, "batch": 2}, {"height": 80, "width": 48, "batch": 3})


FAMILIES = ("unet", "sd3", "flux", "pixart", "dit", "vit")


@pytest.fixture
def build() -> Any:
    """Name -> a family's tiny model."""
    return make_family


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    made = make_family(request.param)
    made.model.eval().requires_grad_(False)
    return made
