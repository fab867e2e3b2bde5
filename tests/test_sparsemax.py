import re

import pytest
import torch

import formulas
from harness import DTYPES
from harness import check
from harness import check_operator

sparsemax = torch.ops.liger.sparsemax.default
sparsemax_fwd = torch.ops.liger.sparsemax_fwd.default
sparsemax_bwd = torch.ops.liger.sparsemax_bwd.default
# One number, a ragged tail, whole blocks, and rows that are walked in a loop.
SHAPES = [(1,), (5, 3), (2, 3, 1000), (2, 1024), (2, 1025), (2, 4096), (3, 8195)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.1, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_paper(path, shape, size, dtype):
    check(sparsemax, formulas.sparsemax, (size * torch.randn(shape)).to(dtype))


def test_by_hand(path):
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 1.5, 0.0, -9.0], [1.0, 0.6, 0.2, -1.0], [5.0, 5.0, 1.0, 4.0]])
    y = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.75, 0.25, 0.0, 0.0], [0.7, 0.3, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(sparsemax(x), y)
    assert (sparsemax(x) > 0).sum(-1).tolist() == [4, 2, 2, 2]


@pytest.mark.parametrize("dim", [0, 1, -1, -3, 2])
def test_any_dimension(path, dim):
    x = torch.randn(3, 5, 40)
    leaf, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    dy = torch.randn(3, 5, 40)
    got, want = sparsemax(leaf, dim), formulas.sparsemax(theirs.movedim(dim, -1)).movedim(-1, dim)
    torch.testing.assert_close(got, want.float())
    got.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(leaf.grad, theirs.grad.float())


@pytest.mark.parametrize("n", [7, 1500, 9000])
def test_is_a_distribution(path, n):
    """Also of numbers far from zero, where fp32 counts in large steps, and of equal ones."""
    for x in (torch.randn(3, n), torch.randn(3, n) + 1e4, torch.full((2, n), -3e38), torch.randn(3, n).mul(100).round()):
        y = sparsemax(x)
        assert (y >= 0).all()
        torch.testing.assert_close(y.sum(-1), torch.ones(len(x)))


@pytest.mark.parametrize("n", [7, 1500, 9000])
def test_what_is_not_finite(path, n):
    """What is masked gets nothing; a row with a NaN or +inf, or of -inf alone, is NaN."""
    x = torch.randn(6, n)
    x[0, : n // 2] = x[1, n // 2 :] = x[2, 1:] = x[3] = -torch.inf
    x[4, n // 2], x[5, n - 1] = torch.inf, torch.nan
    y = sparsemax(x)
    assert y[3:].isnan().all()
    torch.testing.assert_close(y[:3].sum(-1), torch.ones(3))
    assert not y[0, : n // 2].any()
    assert not y[1, n // 2 :].any()
    torch.testing.assert_close(y[0, n // 2 :], sparsemax(x[0, n // 2 :]))


def test_views_and_offsets(path):
    base = torch.randn(2, 9, 77)
    for x in (base[:, 1:, 3:60], base[..., ::2], base.transpose(0, 2), base[:1, :, 5:70].expand(4, 9, 65), base[:, 2, 0]):
        check(sparsemax, formulas.sparsemax, x)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    x = torch.ones(shape, requires_grad=True)
    y = sparsemax(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_is_an_operator():
    x = torch.randn(3, 4, 24)
    check_operator(sparsemax, (sparsemax_fwd, (x,)), x)
    check_operator(sparsemax, (sparsemax_fwd, (x,)), x, dim=1)
    torch.library.opcheck(sparsemax_bwd, (torch.randn_like(x), sparsemax(x)))


BAD = [
    (lambda x: (x.long(),), "sparsemax: x must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x: (x.double(),), "sparsemax: x must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x: (x, 2), "sparsemax: dim must be a dimension of x, of shape (2, 8), got 2"),
    (lambda x: (x, -3), "sparsemax: dim must be a dimension of x, of shape (2, 8), got -3"),
    (lambda x: (x[0, 0],), "sparsemax: dim must be a dimension of x, of shape (), got -1"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[11:52] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        sparsemax(*bad(torch.randn(2, 8)))
