import re

import pytest
import torch

import formulas
from harness import DTYPES
from harness import check
from harness import check_operator

softmax = torch.ops.liger.softmax.default
softmax_fwd = torch.ops.liger.softmax_fwd.default
softmax_bwd = torch.ops.liger.softmax_bwd.default
# One number, a ragged tail, whole blocks of either width, and rows that are walked in a loop.
SHAPES = [(1,), (5, 3), (2, 3, 1000), (2, 1024), (2, 4096), (2, 5000), (3, 8195)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(path, shape, dtype):
    check(softmax, formulas.softmax(dtype), (3 * torch.randn(shape)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1, -3, 2])
def test_is_torchs(path, dtype, dim):
    x = torch.randn(3, 5, 40).to(dtype)
    torch.testing.assert_close(softmax(x, dim), torch.softmax(x, dim))
    leaf, theirs = x.clone().float().requires_grad_(), x.double().requires_grad_()
    dy = torch.randn(3, 5, 40)
    softmax(leaf, dim).backward(dy)
    torch.softmax(theirs, dim).backward(dy)
    torch.testing.assert_close(leaf.grad, theirs.grad.float())


@pytest.mark.parametrize("n", [7, 1500, 5000, 9000])
def test_infinities(path, n):
    """What is masked weighs nothing, wherever it lies in a row that is walked; a row of nothing else is NaN, as one of +inf."""
    x = torch.randn(5, n)
    x[0, : n // 2] = x[1, n // 2 :] = x[2, 1:] = x[3] = -torch.inf
    x[4, n // 2] = torch.inf
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1), equal_nan=True)


def test_far_apart_numbers(path):
    x = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38], [1e4, 1e4 - 1, 0.0]])
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1))


def test_views_and_offsets(path):
    base = torch.randn(2, 9, 77)
    for x in (base[:, 1:, 3:60], base[..., ::2], base.transpose(0, 2), base[:1, :, 5:70].expand(4, 9, 65), base[:, 2, 0]):
        check(softmax, formulas.softmax(x.dtype), x)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    x = torch.ones(shape, requires_grad=True)
    y = softmax(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_is_an_operator():
    x = torch.randn(3, 4, 24)
    check_operator(softmax, (softmax_fwd, (x,)), x)
    check_operator(softmax, (softmax_fwd, (x,)), x, dim=1)
    torch.library.opcheck(softmax_bwd, (torch.randn_like(x), softmax(x)))


BAD = [
    (lambda x: (x.long(),), "softmax: x must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x: (x.double(),), "softmax: x must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x: (x, 2), "softmax: dim must be a dimension of x, of shape (2, 8), got 2"),
    (lambda x: (x, -3), "softmax: dim must be a dimension of x, of shape (2, 8), got -3"),
    (lambda x: (x[0, 0],), "softmax: dim must be a dimension of x, of shape (), got -1"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[9:50] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        softmax(*bad(torch.randn(2, 8)))
