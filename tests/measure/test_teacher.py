"""Distance from a teacher: against values worked out by hand, and on a real UNet."""

import copy
import math

import pytest
import torch
from torch import nn

from vislr.core.errors import ConfigError, DataError, ModelError
from vislr.measure import teacher_distance


class Scaled(nn.Module):
    """Answers `weight * sample` where t < 500 and `sample` from there on."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, sample, timestep=None):
        if timestep is None:
            return (self.weight * sample,)
        late = (timestep >= 500).view(-1, *[1] * (sample.ndim - 1))
        return (torch.where(late, sample, self.weight * sample),)


def batches(times, scale=1.0):
    x = torch.randn(len(times), 2, 3, generator=torch.Generator().manual_seed(0))
    return [{"sample": x * scale, "timestep": torch.tensor(times)}]


def test_equals_the_hand_computed_ratio():
    inputs = [{"sample": torch.tensor([[3.0, 4.0]])}, {"sample": torch.tensor([[0.0, 12.0]])}]
    # errors 1/2 of the samples: sqrt((2.5^2 + 6^2) / (5^2 + 12^2)) = 1/2.
    found = teacher_distance(Scaled(1.5), Scaled(1.0), inputs)
    assert found.value == pytest.approx(0.5, abs=1e-12)
    assert found.interval == pytest.approx((0.5, 0.5))
    assert (found.n, found.unit, found.parts) == (2, "ratio", {})
    mixed = [{"sample": torch.tensor([[3.0, 4.0], [0.0, 12.0]]), "timestep": torch.tensor([100, 700])}]
    found = teacher_distance(Scaled(1.5), Scaled(1.0), mixed)
    assert found.value == pytest.approx(math.sqrt(2.5**2 / (5**2 + 12**2)), abs=1e-12)
    assert found.interval[0] <= found.value <= found.interval[1]
    assert {name: part.value for name, part in found.parts.items()} == pytest.approx({"0-250": 0.5, "500-750": 0.0})


def test_bands_hold_their_lower_edge_and_the_last_its_upper():
    found = teacher_distance(Scaled(2.0), Scaled(1.0), batches([0, 249, 250, 499, 500, 999, 1000]))
    assert {name: part.n for name, part in found.parts.items()} == {
        "0-250": 2,
        "250-500": 2,
        "500-750": 1,
        "750-1000": 2,
    }
    assert [part.value for part in found.parts.values()] == pytest.approx([1.0, 1.0, 0.0, 0.0])
    found = teacher_distance(Scaled(2.0), Scaled(1.0), batches([0.1, 0.9]))
    assert set(found.parts) == {"0-0.25", "0.75-1"}
    found = teacher_distance(Scaled(2.0), Scaled(1.0), batches([10, 600]), bands=(0, 500, 1000))
    assert {name: part.value for name, part in found.parts.items()} == pytest.approx({"0-500": 1.0, "500-1000": 0.0})


def test_errors():
    with pytest.raises(ConfigError, match="ascending"):
        teacher_distance(Scaled(1.0), Scaled(1.0), batches([1]), bands=(500, 0))
    with pytest.raises(ConfigError, match="leave the bands"):
        teacher_distance(Scaled(1.0), Scaled(1.0), batches([900]), bands=(0, 500))
    with pytest.raises(DataError, match="no inputs"):
        teacher_distance(Scaled(1.0), Scaled(1.0), [])
    with pytest.raises(DataError, match="0 everywhere"):
        teacher_distance(Scaled(1.0), Scaled(0.0), [{"sample": torch.ones(1, 2)}])
    with pytest.raises(ModelError, match=r"\(2, 5\) where its teacher gives \(2, 4\)"):
        teacher_distance(nn.Linear(3, 5), nn.Linear(3, 4), [{"input": torch.ones(2, 3)}])


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8, dropout=0.5,
    )  # fmt: skip


def unet_inputs(times):
    rng = torch.Generator().manual_seed(1)
    for t in times:
        yield {
            "sample": torch.randn(2, 4, 8, 8, generator=rng),
            "timestep": torch.tensor(t),
            "encoder_hidden_states": torch.randn(2, 5, 16, generator=rng),
        }


def test_a_unet_is_its_own_teacher_and_modes_are_put_back(unet):
    unet.train()
    unet.conv_in.eval()
    found = teacher_distance(unet, unet, unet_inputs([10, 990]))
    assert (found.value, found.interval, found.n) == (0.0, (0.0, 0.0), 4)
    assert set(found.parts) == {"0-250", "750-1000"}
    assert unet.training
    assert unet.mid_block.training
    assert not unet.conv_in.training


def test_a_changed_unet_is_away_and_the_hash_is_the_teachers(unet):
    student = copy.deepcopy(unet)
    with torch.no_grad():
        student.conv_out.weight.mul_(1.1)
        student.conv_out.bias.mul_(1.1)
    found = teacher_distance(student, unet, unet_inputs([10, 500]))
    assert found.value == pytest.approx(0.1, rel=1e-4)
    same = teacher_distance(unet, unet, unet_inputs([10]))
    assert found.net_hash == same.net_hash != teacher_distance(unet, student, unet_inputs([10])).net_hash
    half = teacher_distance(copy.deepcopy(unet).to(torch.bfloat16), unet, unet_inputs([999]))
    assert 0 < half.value < 0.05
