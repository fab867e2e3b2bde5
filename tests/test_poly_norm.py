import functools
import re

import pytest
import torch

import formulas
from harness import DTYPES
from harness import check
from harness import check_operator
from harness import fixed

poly_norm = torch.ops.liger.poly_norm.default
poly_norm_fwd = torch.ops.liger.poly_norm_fwd.default
poly_norm_bwd = torch.ops.liger.poly_norm_bwd.default
# One number, a ragged tail, more rows than programs, whole blocks, rows of several blocks.
SHAPES = [(1,), (3, 37), (2, 5, 100), (2, 2048), (3, 4500)]


def make(shape, dtype, parameters):
    return torch.randn(shape).to(dtype), torch.randn(3).to(parameters), torch.randn(()).to(parameters)


def hold(x, weight, bias, eps=1e-6):
    """The gradients of weight and bias are sums of as many numbers as x has, which round as what is summed on the way does."""
    function, formula = functools.partial(poly_norm, eps=eps), formulas.poly_norm(eps)
    check(function, formula, x, fixed(weight), fixed(bias))
    return check(function, formula, x, weight, bias, carries=x.numel() ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_its_formula(path, shape, dtype):
    hold(*make(shape, dtype, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
def test_mixed_dtypes(path, dtype, parameters):
    results = hold(*make((9, 100), dtype, parameters))
    assert results["output 0"].dtype == results["gradient 0"].dtype == dtype
    assert results["gradient 1"].dtype == results["gradient 2"].dtype == parameters


@pytest.mark.parametrize("wide", [1, 2])
def test_one_parameter_in_fp32(path, wide):
    inputs = make((3, 100), torch.bfloat16, torch.bfloat16)
    inputs = [t.float() if n == wide else t for n, t in enumerate(inputs)]
    results = hold(*inputs)
    assert [results[f"gradient {n}"].dtype for n in range(3)] == [t.dtype for t in inputs]


def test_by_hand(path):
    """Of 1 and -1 every power has a root mean square of one; where eps is large, it is what divides."""
    x, weight, bias = torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.tensor([1.0, 10.0, 100.0]), torch.tensor([1000.0])
    torch.testing.assert_close(poly_norm(x, weight, bias, 0.0), torch.tensor([[1111.0, 909.0, 1111.0, 909.0]]))
    torch.testing.assert_close(poly_norm(x, weight, bias, 3.0), torch.tensor([[1055.5, 954.5, 1055.5, 954.5]]))
    powers = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(poly_norm(powers, weight, bias, 0.0), torch.tensor([[1222.0, 1000.0, 1000.0, 1000.0]]))


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1e2, 1e4, 1e5])
def test_small_and_large_numbers(path, size):
    """Cubes of 16 bits overflow where fp32's do not; of small numbers eps is more than the mean of squares."""
    for dtype in (torch.float32, torch.float16):
        x, weight, bias = make((5, 100), torch.float32, dtype)
        if (size * x).abs().max() < torch.finfo(dtype).max:
            hold((size * x).to(dtype), weight, bias)


def test_the_largest_numbers(path):
    """Whose sixth powers have a sum in fp32; beyond, their cubes are left out."""
    _, weight, bias = make((1,), torch.float32, torch.float32)
    want = torch.full((1, 16384), weight.sum() + bias)
    torch.testing.assert_close(poly_norm(torch.full((1, 16384), 5e5), weight, bias), want)
    torch.testing.assert_close(poly_norm(torch.full((1, 16384), 2.7e6), weight, bias), want - weight[0])


def test_more_rows_than_programs(interpreted):
    interpreted.count = 1
    hold(*make((11, 100), torch.float32, torch.float32))
    assert "poly_norm_bwd" in interpreted.launched


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some(path, wanted):
    inputs, dy = make((9, 100), torch.float32, torch.float32), torch.randn(9, 100)
    leaves = [i.clone().requires_grad_() for i in inputs]
    some = [i.clone().requires_grad_(n in wanted) for n, i in enumerate(inputs)]
    for each in (leaves, some):
        poly_norm(*each).backward(dy)
    for n, (got, want) in enumerate(zip(some, leaves, strict=True)):
        assert torch.equal(got.grad, want.grad) if n in wanted else got.grad is None


def test_bias_of_any_shape(path):
    x, weight, bias = make((3, 37), torch.float32, torch.float32)
    want = poly_norm(x, weight, bias)
    for shape in ((1,), (1, 1, 1)):
        one = bias.view(shape).clone().requires_grad_()
        y = poly_norm(x, weight, one)
        assert torch.equal(y, want)
        y.sum().backward()
        assert one.grad.shape == shape
        assert one.grad == x.numel()


def test_views_and_offsets(path):
    base, weight, bias = torch.randn(2, 5, 77), torch.randn(6)[::2], torch.randn(2)[1:]
    for x in (
        base[0, :, 3:60],
        base[..., ::2],
        base[..., :6].transpose(0, 2),
        base[:1, :, 5:70].expand(2, 5, 65),
        base[:, 2, 0],
    ):
        hold(x, weight, bias, 1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    x, weight, bias = (t.requires_grad_() for t in make(shape, torch.float32, torch.float32))
    y = poly_norm(x, weight, bias)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(3))
    assert torch.equal(bias.grad, torch.zeros(()))


def test_is_an_operator():
    x, weight, bias = make((3, 4, 24), torch.float32, torch.float32)
    check_operator(poly_norm, (poly_norm_fwd, (x, weight, bias, 1e-6)), x, weight, bias)
    _, rstd = poly_norm_fwd(x, weight, bias, 1e-6)
    torch.library.opcheck(poly_norm_bwd, (torch.randn_like(x), x, weight, rstd))


BAD = [
    (lambda x, w, b: (x.long(), w, b), "poly_norm: x must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x, w, b: (x.double(), w, b), "poly_norm: x must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, w, b: (x[0, 0], w, b), "poly_norm: x must have a last dimension to normalise over, got a scalar"),
    (lambda x, w, b: (x, w[:2], b), "poly_norm: weight must have shape (3,), got (2,)"),
    (lambda x, w, b: (x, w.double(), b), "poly_norm: weight must be float32, float16 or bfloat16, got torch.float64"),
    (
        lambda x, w, b: (x, w.to("meta"), b),
        "poly_norm: weight must be on cpu like the input, got meta; move it with .to()",
    ),
    (lambda x, w, b: (x, w, w), "poly_norm: bias must be one number, got shape (3,)"),
    (lambda x, w, b: (x, w, b.int()), "poly_norm: bias must be float32, float16 or bfloat16, got torch.int32"),
    (lambda x, w, b: (x, w, b.to("meta")), "poly_norm: bias must be on cpu like the input, got meta; move it with .to()"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[11:52] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        poly_norm(*bad(*make((2, 8), torch.float32, torch.float32)))
