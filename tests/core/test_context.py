"""One hook owns the step state."""

import torch
from diffusers import UNet2DConditionModel

from vislr.core.context import Phase, remove_step_context, step_context


def tiny_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def test_context_follows_each_call_and_leaves_the_output_alone():
    unet = tiny_unet()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)
    forward = unet.forward
    with torch.no_grad():
        before = unet(x, 7, text).sample
        context = step_context(unet)
        assert step_context(unet) is context
        context.schedule = lambda timestep: Phase.REDUCED if timestep < 5 else Phase.FULL
        assert torch.equal(unet(x, 7, text).sample, before)
        assert context.timestep.item() == 7
        assert context.phase is Phase.FULL
        unet(x, timestep=torch.tensor([3]), encoder_hidden_states=text)
        assert context.timestep.tolist() == [3]
        assert context.phase is Phase.REDUCED
        remove_step_context(unet)
        assert not hasattr(unet, "_diffusers_hook")
        assert unet.forward == forward
        assert torch.equal(unet(x, 7, text).sample, before)
    assert context.timestep.tolist() == [3], "the hook is off: nothing writes the context any more"
