"""Tiny pipelines and models of the real classes, random weights from a fixed seed, built in well under a second.

All diffusion pipelines read 16 tokens of the embedded vocabulary and make 32 x 32 pictures from
4 x 8 x 8 latents (a FLUX picture: 16 packed tokens).
"""

from __future__ import annotations

import functools

import torch

LATENT = 8
PIXELS = 32
HIDDEN = 16  # of every text encoder


@functools.cache
def tiny_tokenizer():
    """The embedded vocabulary (one token a word of the embedded captions)."""
    from vislr.zoo import images
    from vislr.zoo.vocabulary import build_tokenizer

    return build_tokenizer(picture.caption for picture in images())


def _text_config():
    from transformers import CLIPTextConfig

    tokenizer = tiny_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=HIDDEN,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def tiny_text_encoder(projection: bool = False):
    """CLIPTextModel, or CLIPTextModelWithProjection, of hidden size 16."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(_text_config()).eval()


def tiny_vae(shift: float | None = None):
    """AutoencoderKL, f = 4, 4 latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=PIXELS, block_out_channels=(8, 16, 16),
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4, mid_block_add_attention=False, scaling_factor=1.5, shift_factor=shift,
    ).eval()  # fmt: skip


def tiny_unet(**changes):
    """UNet2DConditionModel with SD's topology: 4 x 8 x 8 in and out, cross attention to 16 channels, 0.15 M."""
    from diffusers import UNet2DConditionModel

    build = functools.partial(
        UNet2DConditionModel,
        sample_size=LATENT, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=HIDDEN, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    return build(**changes).eval()


def tiny_sd_pipeline(seed: int = 0, prediction_type: str = "v_prediction"):
    """StableDiffusionPipeline, DDIM with zero terminal SNR, as the embedded one."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(seed)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
        rescale_betas_zero_snr=prediction_type == "v_prediction",
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=tiny_text_encoder(), tokenizer=tiny_tokenizer(), unet=tiny_unet(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl_pipeline(seed: int = 0):
    """StableDiffusionXLPipeline: two text encoders, time ids."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(seed)
    unet = tiny_unet(
        cross_attention_dim=2 * HIDDEN, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + HIDDEN, transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(), text_encoder=tiny_text_encoder(), text_encoder_2=tiny_text_encoder(projection=True),
        tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer(), unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3_transformer(**changes):
    """SD3Transformer2DModel, 2 joint blocks at hidden 16, 4 x 8 x 8 latents in patches of 2."""
    from diffusers import SD3Transformer2DModel

    build = functools.partial(
        SD3Transformer2DModel,
        sample_size=LATENT, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=2 * HIDDEN, caption_projection_dim=16,
        pooled_projection_dim=2 * HIDDEN, pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    return build(**changes).eval()


def tiny_sd3_pipeline(seed: int = 0):
    """StableDiffusion3Pipeline without T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    pipe = StableDiffusion3Pipeline(
        transformer=tiny_sd3_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift=0.1), text_encoder=tiny_text_encoder(True), tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_text_encoder(True), tokenizer_2=tiny_tokenizer(), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux_transformer(**changes):
    """FluxTransformer2DModel: 1 double and 1 single block at hidden 16; 16 channels = 4 packed 2 x 2."""
    from diffusers import FluxTransformer2DModel

    build = functools.partial(
        FluxTransformer2DModel,
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=HIDDEN, pooled_projection_dim=HIDDEN, guidance_embeds=False, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return build(**changes).eval()


def tiny_flux_pipeline(seed: int = 0):
    """FluxPipeline with CLIP and a T5 encoder of hidden size 16."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=HIDDEN, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()
    pipe = FluxPipeline(
        transformer=tiny_flux_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_vae(shift=0.1),
        text_encoder=tiny_text_encoder(), tokenizer=tokenizer, text_encoder_2=t5, tokenizer_2=tokenizer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pixart_pipeline(seed: int = 0, sizes: bool = False):
    """PixArtAlphaPipeline, 2 blocks at hidden 24, T5 of hidden size 16. `sizes`: it is told size and aspect."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        sample_size=128 if sizes else LATENT, patch_size=2, in_channels=4, out_channels=8, num_layers=2,
        attention_head_dim=12, num_attention_heads=2, caption_channels=HIDDEN, cross_attention_dim=24,
        interpolation_scale=1,
    ).eval()  # fmt: skip
    t5 = T5Config(vocab_size=len(tiny_tokenizer()), d_model=HIDDEN, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipe = PixArtAlphaPipeline(
        tokenizer=tiny_tokenizer(), text_encoder=T5EncoderModel(t5).eval(), vae=tiny_vae(), transformer=transformer,
        scheduler=DDIMScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_dit_pipeline(seed: int = 0):
    """DiTPipeline, 2 blocks at hidden 16, 1,000 classes of which two have names."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        sample_size=LATENT, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    names = {0: "colour", 1: "grey, gray"}
    pipe = DiTPipeline(transformer=transformer, vae=tiny_vae(), scheduler=DDIMScheduler(), id2label=names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_vit(classes: int = 3, seed: int = 0):
    """timm VisionTransformer, 32 x 32 in patches of 8, 2 blocks at width 32."""
    args = {"img_size": PIXELS, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return _classifier("vit_tiny_patch16_224", args, classes, seed)


def tiny_conv_net(classes: int = 3, seed: int = 0):
    """timm ResNet with BatchNorm: basic blocks, widths 8 to 32."""
    return _classifier("resnet10t", {"stem_width": 8, "channels": [8, 16, 24, 32]}, classes, seed)


def _classifier(name: str, args: dict, classes: int, seed: int):
    import timm

    from vislr.core.made_with import note_made_with

    torch.manual_seed(seed)
    # A folder of it needs to know what it was made with.
    return note_made_with(timm.create_model(name, num_classes=classes, **args).eval(), name, args)
