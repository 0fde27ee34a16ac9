"""The embedded models' architectures: what `vislr zoo retrain` trains and the folders hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vislr.zoo.vocabulary import MAX_TOKENS

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

TEXT_WIDTH = 64
LATENT_SIZE = 16


def make_vae() -> Any:
    """AutoencoderKL, 64 px to 4 x 16 x 16, .78 M parameters.

    No attention, so that crops of 32 px train the same function.
    """
    from diffusers import AutoencoderKL

    levels = 3
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=64, block_out_channels=(24, 48, 64),
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, norm_num_groups=8, mid_block_add_attention=False,
        shift_factor=0.0,
    )  # fmt: skip


def make_unet() -> Any:
    """UNet2DConditionModel, 3.9 M parameters: three levels, two transformer blocks a transformer at two of them."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE, in_channels=4, out_channels=4, block_out_channels=(48, 64, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=TEXT_WIDTH,
        transformer_layers_per_block=(1, 2, 2), attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def make_mmdit() -> Any:
    """SD3Transformer2DModel: thirteen joint blocks of width 80 on 64 image tokens, 3.0 M parameters.

    Both CLIP slots of the pipeline hold the same text model, so a text token is twice `TEXT_WIDTH` wide.
    """
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE, patch_size=2, in_channels=4, out_channels=4, num_layers=13, attention_head_dim=16,
        num_attention_heads=5, joint_attention_dim=2 * TEXT_WIDTH, caption_projection_dim=80,
        pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=LATENT_SIZE // 2, qk_norm="rms_norm",
    )  # fmt: skip


def make_text_model(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Two layers of width 64. The projection, which only the MMDiT's pipeline reads, is the identity."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    torch.nn.init.eye_(model.text_projection.weight)
    return model


def unet_scheduler() -> Any:
    """v-prediction with zero terminal SNR, 1000 steps, trailing spacing."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )  # fmt: skip


def mmdit_scheduler() -> Any:
    """Flow matching without a shift: at 64 px there is no resolution to correct for."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
