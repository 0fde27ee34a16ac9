"""The trained entries of a weight gradient."""

import pytest
import torch

from vislr import kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 9, 60, 221])
def test_entries_of_the_whole_gradient(count, dtype):
    torch.manual_seed(count)
    grad, x = torch.randn(2, 15, 13).to(dtype), torch.randn(2, 15, 17).to(dtype)
    index = torch.randperm(13 * 17)[:count].sort().values.int()
    found = kernels.sparse_weight_gradient(grad, x, index)
    weight = torch.zeros(13, 17, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.linear(x.double(), weight).backward(grad.double())
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), weight.grad.flatten()[index.long()], rtol=2e-2, atol=2e-5 if count < 9 else 5e-2
    )
    if dtype != torch.bfloat16:
        torch.testing.assert_close(found.double(), weight.grad.flatten()[index.long()], rtol=1e-5, atol=1e-5)


def test_no_rows():
    index = torch.tensor([0, 3])
    assert torch.equal(kernels.sparse_weight_gradient(torch.ones(0, 2), torch.ones(0, 2), index), torch.zeros(2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.ones(3, 2), torch.ones(4, 2), torch.zeros(1).long()), "of one dtype"),
        ((torch.ones(3, 2), torch.ones(3, 2), torch.zeros(1)), "expected int32 or int64"),
    ],
)
def test_wrong_arguments(given, message):
    with pytest.raises(kernels.KernelError, match=message):
        kernels.sparse_weight_gradient(*given)
