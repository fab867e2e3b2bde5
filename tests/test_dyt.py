import re

import pytest
import torch

from liger_aot.ops.dyt import forward_reference

from harness import DTYPES
from harness import check
from harness import check_operator
from harness import run

dyt = torch.ops.liger.dyt.default
dyt_fwd = torch.ops.liger.dyt_fwd.default
dyt_bwd = torch.ops.liger.dyt_bwd.default
# One row, a ragged tail, more rows than programs, whole blocks, rows of several blocks.
SHAPES = [(3,), (1, 3), (40, 100), (2, 5, 129), (3, 1024), (5, 2500)]


def make(shape, dtype, parameters, alpha=0.7):
    width = shape[-1]
    return (2 * torch.randn(shape)).to(dtype), *(
        t.to(parameters) for t in (torch.tensor([alpha]), torch.randn(width), torch.randn(width))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(path, shape, dtype):
    check(dyt, forward_reference, *make(shape, dtype, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
def test_mixed_dtypes(path, dtype, parameters):
    results = check(dyt, forward_reference, *make((40, 100), dtype, parameters))
    assert results["output 0"].dtype == results["gradient 0"].dtype == dtype
    assert all(results[f"gradient {n}"].dtype == parameters for n in (1, 2, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_beta(path, dtype):
    x, alpha, gamma, _ = make((7, 100), dtype, dtype)
    check(lambda x, alpha, gamma: dyt(x, alpha, gamma), lambda *t: forward_reference(*t, None), x, alpha, gamma)


def test_is_the_papers_module(path):
    x, alpha, gamma, beta = make((7, 100), torch.float32, torch.float32)
    torch.testing.assert_close(dyt(x, alpha, gamma, beta), torch.tanh(alpha * x) * gamma + beta)
    torch.testing.assert_close(dyt(x, alpha.view(()), gamma), torch.tanh(alpha * x) * gamma)


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (3,), (0, 3), (1, 2)], ids=str)
def test_gradients_of_some(path, wanted):
    inputs = make((27, 100), torch.float32, torch.float32)
    leaves = [i.clone().requires_grad_() for i in inputs]
    some = [i.clone().requires_grad_(n in wanted) for n, i in enumerate(inputs)]
    dy = torch.randn(27, 100)
    dyt(*leaves).backward(dy)
    y = dyt(*some)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(dy)
    for n, (got, want) in enumerate(zip(some, leaves, strict=True)):
        assert torch.equal(got.grad, want.grad) if n in wanted else got.grad is None


def test_views_and_offsets(interpreted):
    base = torch.randn(9, 77)
    for x in (base[1:, 3:60], base[:, ::2], base.t(), base[0].expand(9, 77), base[None, :, 5:70].expand(2, 9, 65)):
        width = x.shape[-1]
        inputs = x, torch.tensor([0.3]), torch.randn(2 * width)[::2], torch.randn(width + 1)[1:]
        torch.testing.assert_close(run(dyt, inputs), run(dyt, [i.contiguous() for i in inputs]))
    assert "dyt_bwd" in interpreted.launched


def test_far_out_values(path):
    x = torch.tensor([-torch.inf, -1e30, 0.0, 1e30, torch.inf], requires_grad=True)
    y = dyt(x, torch.ones(1), torch.ones(5))
    y.sum().backward()
    assert torch.equal(y.detach(), torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]))
    assert torch.equal(x.grad, torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    inputs = [torch.ones(s, requires_grad=True) for s in (shape, (1,), shape[-1:], shape[-1:])]
    y = dyt(*inputs)
    y.sum().backward()
    assert y.shape == inputs[0].grad.shape == shape
    assert all(torch.equal(i.grad, torch.zeros(i.shape)) for i in inputs[1:])


@pytest.mark.parametrize("beta", [True, False])
def test_is_an_operator(beta):
    x, alpha, gamma, shift = make((3, 4, 24), torch.float32, torch.float32)
    shift = shift if beta else None
    check_operator(dyt, (dyt_fwd, (x, alpha, gamma, shift)), x, alpha, gamma, shift)
    torch.library.opcheck(dyt_bwd, (torch.randn_like(x), x, alpha, gamma))


BAD = [
    (lambda x, a, g, b: (x, a, g[1:], b), "dyt: gamma must have shape (8,), got (7,)"),
    (lambda x, a, g, b: (x, a, g, b[None]), "dyt: beta must have shape (8,), got (1, 8)"),
    (lambda x, a, g, b: (x, g, g, b), "dyt: alpha must be one number, got shape (8,)"),
    (lambda x, a, g, b: (x, a.int(), g, b), "dyt: alpha must be float32, float16 or bfloat16, got torch.int32"),
    (lambda x, a, g, b: (x, a, g, b.double()), "dyt: beta must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, a, g, b: (x, a.to("meta"), g), "dyt: alpha must be on cpu like the input, got meta; move it with .to()"),
    (lambda x, a, g, b: (x, a, g.to("meta")), "dyt: gamma must be on cpu like the input, got meta; move it with .to()"),
    (lambda x, a, g, b: (x.long(), a, g), "dyt: x must be float32, float16 or bfloat16 with a last dimension, got torch.int64"),
    (lambda x, a, g, b: (x[0, 0], a, g), "dyt: x must be float32, float16 or bfloat16 with a last dimension, got a scalar"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[5:50] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        dyt(*bad(torch.randn(2, 8), torch.ones(1), torch.randn(8), torch.randn(8)))
