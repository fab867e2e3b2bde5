import re

import pytest
import torch

from liger_aot.ops.relu_squared import forward_reference

from harness import DTYPES
from harness import check
from harness import check_operator

relu_squared = torch.ops.liger.relu_squared.default
relu_squared_fwd = torch.ops.liger.relu_squared_fwd.default
# One number, less than a program's, a ragged tail, whole programs, many programs of a narrow width, no dimension at all.
SHAPES = [(1,), (3, 341), (2, 5, 1024), (4, 2048), (1000, 3), ()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(path, shape, dtype):
    check(relu_squared, forward_reference, 3 * torch.randn(shape).to(dtype))


def test_reference_is_torchs():
    x = torch.randn(7, 300, dtype=torch.float64)
    torch.testing.assert_close(forward_reference(x), torch.nn.functional.relu(x).square())


def test_chunks_are_read_where_they_lie(interpreted, monkeypatch):
    copies = []
    original = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: copies.append(t.shape) or original(t))
    for x in torch.randn(2, 3, 2200).chunk(2, -1):
        check(relu_squared, forward_reference, x)
        assert relu_squared(x).is_contiguous()
    assert not copies
    assert interpreted.launched.count("relu_squared_bwd") == 2


def test_views_and_offsets(path):
    base = 2 * torch.randn(2, 9, 77)
    for x in (base[:, 1:, 3:60], base[..., ::2], base.transpose(0, 2), base[:1, :, 5:70].expand(4, 9, 65), base[:, 2, 0]):
        check(relu_squared, forward_reference, x)


def test_gradient_of_any_layout(path):
    x = torch.randn(4, 6, 50, requires_grad=True)
    dense = torch.randn(4, 6, 50)
    for dy in (torch.ones(()).expand(4, 6, 50), dense.mT.contiguous().mT, dense[:1].expand(4, 6, 50)):
        (got,) = torch.autograd.grad(relu_squared(x), x, dy)
        (want,) = torch.autograd.grad(relu_squared(x), x, dy.contiguous())
        assert torch.equal(got, want)


def test_far_out_values(path):
    x = torch.tensor([-torch.inf, -3e38, -0.0, 0.0, 1e15, torch.inf, torch.nan], requires_grad=True)
    y = relu_squared(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), x.detach().relu().square(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.grad, 2 * x.detach().relu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    x = torch.ones(shape, requires_grad=True)
    y = relu_squared(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_is_an_operator():
    x = torch.randn(3, 4, 24)
    check_operator(relu_squared, (relu_squared_fwd, (x,)), x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool], ids=str)
def test_rejects(dtype):
    with pytest.raises(ValueError, match=re.escape(f"relu_squared: x must be float32, float16 or bfloat16, got {dtype}")):
        relu_squared(torch.ones(2, 8).to(dtype))
