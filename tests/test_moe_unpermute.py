import re

import pytest
import torch

from liger_aot.functional import moe_route

import formulas
from examples import routing
from harness import DTYPES
from harness import check
from harness import check_operator
from harness import fixed

moe_unpermute = torch.ops.liger.moe_unpermute.default
moe_unpermute_fwd = torch.ops.liger.moe_unpermute_fwd.default
moe_unpermute_bwd = torch.ops.liger.moe_unpermute_bwd.default


@pytest.mark.parametrize("weights", ["rows'", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "n"), [(1, 1, 1), (7, 2, 33), (5, 4, 1024), (4, 3, 2064)])
def test_matches_the_sum_by_slots(path, tokens, k, n, dtype, weights):
    weight = torch.rand(tokens, k).to(dtype if weights == "rows'" else torch.float32)
    check(moe_unpermute, formulas.moe_unpermute, torch.randn(tokens * k, n).to(dtype), weight, *map(fixed, routing(tokens, k)))


def test_of_no_slot_nothing(path):
    """Neither what its row holds nor its weight comes out, or into a gradient."""
    order, position, _ = moe_route(torch.tensor([[0, 2], [-1, 1], [2, 7]]), 2)
    x, weight = torch.randn(6, 12), torch.rand(3, 2)
    x[2:], weight[0, 1], weight[1, 0], weight[2] = torch.nan, torch.nan, torch.inf, torch.nan
    x.requires_grad_()
    weight.requires_grad_()
    y = moe_unpermute(x, weight, order, position)
    y.sum().backward()
    assert torch.equal(y.detach()[:2], torch.stack([weight[0, 0] * x[0], weight[1, 1] * x[1]]).detach())
    assert not y[2].any()
    assert not x.grad[2:].any()
    torch.testing.assert_close(weight.grad, torch.stack([x[0].sum(), *torch.zeros(2), x[1].sum(), *torch.zeros(2)]).view(3, 2))


def test_of_no_slot_no_gradient_of_what_is_infinite(path):
    order, position, _ = moe_route(torch.tensor([[0, -1]]), 1)
    x, weight = torch.ones(2, 8, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    moe_unpermute(x, weight, order, position).backward(torch.full((1, 8), torch.inf))
    assert x.grad.tolist() == [[torch.inf] * 8, [0.0] * 8]
    assert weight.grad.tolist() == [[torch.inf, 0.0]]


def test_a_third_dtype_of_weights(path):
    order, position = routing(5, 2)
    x, weight = torch.randn(10, 12).half(), torch.rand(5, 2).bfloat16().requires_grad_()
    y = moe_unpermute(x, weight, order, position)
    assert y.dtype == torch.float16
    assert torch.equal(y, moe_unpermute(x, weight.float(), order, position))
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert grad.dtype == torch.bfloat16


def test_views_and_offsets(path):
    base = torch.randn(10, 78)
    for x in (base[2:, 3:60], base[:, ::2], base.mT, base[:1, 5:70].expand(4, 65)):
        given = torch.rand(2, len(x) // 2).mT, *map(fixed, routing(len(x) // 2, 2))
        check(moe_unpermute, formulas.moe_unpermute, x, *given)


def test_gradient_of_any_layout(path):
    order, position = routing(6, 2)
    x, weight = torch.randn(12, 50, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    y = moe_unpermute(x, weight, order, position)
    for dy in (torch.ones(()).expand(6, 50), torch.randn(50, 6).mT, torch.randn(50).expand(6, 50)):
        got = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
        want = torch.autograd.grad(y, (x, weight), dy.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("tokens", "n"), [(0, 8), (3, 0), (0, 0)])
def test_nothing_in_nothing_out(path, tokens, n):
    x, weight = torch.ones(2 * tokens, n, requires_grad=True), torch.ones(tokens, 2, requires_grad=True)
    y = moe_unpermute(x, weight, torch.arange(2 * tokens), torch.arange(2 * tokens).view(tokens, 2))
    y.sum().backward()
    assert y.shape == (tokens, n)
    assert not weight.grad.any()
    assert x.grad.shape == (2 * tokens, n)


def test_is_an_operator():
    x, weight, (order, position) = torch.randn(12, 24), torch.rand(6, 2), routing(6, 2)
    check_operator(moe_unpermute, (moe_unpermute_fwd, (x, weight, order, position)), x, weight, order, position)
    torch.library.opcheck(moe_unpermute_bwd, (torch.randn(6, 24), x, weight, order, position))


BAD = [
    (lambda x, w, o, p: (x.long(), w, o, p), "moe_unpermute: x must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x, w, o, p: (x[1:], w, o, p), "moe_unpermute: x must have shape (12, H), got (11, 24)"),
    (lambda x, w, o, p: (x, w[1:], o, p), "moe_unpermute: weight must have shape (6, 2), got (5, 2)"),
    (lambda x, w, o, p: (x, w.double(), o, p), "moe_unpermute: weight must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, w, o, p: (x, w.to("meta"), o, p), "moe_unpermute: weight must be on cpu like the input, got meta; move it"),
    (
        lambda x, w, o, p: (x, w, o[1:], p),
        "moe_unpermute: order must have one number for each of position's, (6, 2), got (11,)",
    ),
    (lambda x, w, o, p: (x, w, o, p[0]), "moe_unpermute: position must have 2 dimensions and be int64, got 1 and torch.int64"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[15:70] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        moe_unpermute(*bad(torch.randn(12, 24), torch.rand(6, 2), *routing(6, 2)))
