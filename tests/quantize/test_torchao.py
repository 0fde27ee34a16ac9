"""Eight-bit weights in torchao's own format: stock diffusers and torchao read them."""

import diffusers
import pytest
import tiny
import torch

import vislr
from vislr.anatomy import sample_inputs
from vislr.core.errors import FormatError
from vislr.quantize import export_torchao, weight_only_plan

pytest.importorskip("torchao")


def test_stock_diffusers_reads_the_codes(tmp_path):
    from torchao.quantization import Int8Tensor

    torch.manual_seed(0)
    model = tiny.tiny_sd3_transformer()
    vislr.apply(model, weight_only_plan(model, 8, group=None))
    left = export_torchao(model, tmp_path / "folder")
    assert left == ()
    loaded = diffusers.AutoModel.from_pretrained(str(tmp_path / "folder"), torch_dtype=torch.float32)
    own, other = model.transformer_blocks[0].attn.to_q, loaded.transformer_blocks[0].attn.to_q
    assert isinstance(other.weight, Int8Tensor)
    assert torch.equal(other.weight.qdata, own.codes)
    inputs = sample_inputs(model, {"tokens": 16}, device="cpu")
    with torch.no_grad():
        expected, found = model(**inputs)[0], loaded(**inputs)[0]
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_what_the_format_does_not_hold(tmp_path):
    model = tiny.tiny_unet()
    vislr.apply(model, weight_only_plan(model, 8, group=None))
    left = export_torchao(model, tmp_path / "unet")
    assert left
    assert all(isinstance(model.get_submodule(name), torch.nn.Conv2d) for name in left)
    other = tiny.tiny_unet()
    vislr.apply(other, weight_only_plan(other, 4))
    with pytest.raises(FormatError, match="no layer has 8-bit weights"):
        export_torchao(other, tmp_path / "four")
