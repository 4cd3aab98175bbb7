from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.linear import packed_product, plain_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(96, 64), (576, 1536), (33, 7)])
def test_a_repacked_product_equals_the_plain_one(n, k, dtype):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((5, k), (n, k), (n,)))
    expected = x.double() @ weight.double().T + bias.double()
    for product in (packed_product(weight, bias), plain_product(weight, bias)):
        error = (product(x).double() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype is torch.float32 else 6e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_alone_is_rounded_as_in_a_batch_of_two(dtype):
    torch.manual_seed(0)
    x, product = torch.randn(400, 1536).to(dtype), packed_product((torch.randn(64, 1536) * 0.02).to(dtype), None)
    alone = torch.cat([product(x[i : i + 1]) for i in range(len(x))])
    pairs = torch.cat([product(x[i : i + 2]) for i in range(0, len(x), 2)])
    assert (alone != pairs).float().mean() < 1e-3, "two rows of their own may still be tiled apart, but not one by one"
    assert torch.equal(alone[:1], product(x[[0, 0]])[:1])
