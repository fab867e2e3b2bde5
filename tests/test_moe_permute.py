import re

import pytest
import torch

from liger_aot.functional import moe_route
from liger_aot.ops import _check
from liger_aot.ops import _moe

import formulas
from examples import routing
from harness import DTYPES
from harness import check
from harness import check_operator
from harness import fixed

moe_permute = torch.ops.liger.moe_permute.default
moe_permute_fwd = torch.ops.liger.moe_permute_fwd.default
moe_permute_bwd = torch.ops.liger.moe_permute_bwd.default


def permute(x, order, position):
    """Of the rows of experts: the others' are nobody's."""
    return moe_permute(x, order, position)[: (position >= 0).sum()]


def formula(x, order, position):
    return formulas.moe_permute(x, order, position)[: (position >= 0).sum()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "k", "n"), [(1, 1, 1), (7, 2, 33), (5, 4, 1024), (4, 3, 2064)])
def test_matches_indexing(path, tokens, k, n, dtype):
    check(permute, formula, torch.randn(tokens, n).to(dtype), *map(fixed, routing(tokens, k)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_is_summed_in_fp32_in_the_order_of_slots(path, dtype):
    """To the bit, however the rows lie: the order of the experts is not that of a token's slots."""
    index = torch.rand(9, 8).argsort(-1)
    order, position, _ = moe_route(index, 8)
    x = torch.randn(9, 40).to(dtype).requires_grad_()
    dy = torch.randn(72, 40).to(dtype)
    (got,) = torch.autograd.grad(moe_permute(x, order, position), x, dy)
    want = torch.zeros(9, 40)
    for slot in range(8):
        want += dy[position[:, slot]].float()
    assert torch.equal(got, want.to(dtype))


def test_the_row_of_no_expert_has_no_gradient(path):
    order, position, _ = moe_route(torch.tensor([[0, 2], [-1, 1], [2, 7]]), 2)
    x = torch.randn(3, 12, requires_grad=True)
    dy = torch.ones(6, 12)
    dy[2:] = torch.nan
    (got,) = torch.autograd.grad(moe_permute(x, order, position), x, dy)
    assert torch.equal(got, torch.tensor([1.0, 1.0, 0.0])[:, None].expand(3, 12))


def test_views_and_offsets(path):
    base = torch.randn(9, 77)
    for x in (base[1:, 3:60], base[:, ::2], base.mT, base[:1, 5:70].expand(4, 65)):
        check(permute, formula, x, *map(fixed, routing(len(x), 2)))
    order, position = routing(9, 2)
    far = torch.stack([order, order], -1)[:, 0], position.repeat(1, 2)[:, :2].mT.contiguous().mT
    assert torch.equal(moe_permute(base, *far), moe_permute(base, order, position))


@pytest.mark.parametrize(("tokens", "n"), [(0, 8), (3, 0), (0, 0)])
def test_nothing_in_nothing_out(path, tokens, n):
    x = torch.ones(tokens, n, requires_grad=True)
    y = moe_permute(x, torch.arange(2 * tokens), torch.arange(2 * tokens).view(tokens, 2))
    y.sum().backward()
    assert y.shape == (2 * tokens, n)
    assert x.grad.shape == (tokens, n)


EVERY = "order must have every slot once, in the row that position says, as functional.moe_route makes them, got slot"
# What routing made amiss of six tokens with two experts each; and what is said.
ROUTINGS = {
    "beyond": (
        lambda o, p: (o.index_fill(0, torch.tensor(3), 12), p),
        r"order must be in \[0, 12\), the slots of position, got 12",
    ),
    "negative": (lambda o, p: (o.index_fill(0, torch.tensor(3), -1), p), r"order must be in \[0, 12\), .*, got -1"),
    "twice": (lambda o, p: (torch.arange(12).clamp(max=10), torch.full((6, 2), -1)), f"{EVERY} 11 in row -1 and position -1"),
    "far": (lambda o, p: (o, p + 99 * (p == 4)), f"{EVERY} \\d+ in row 4 and position 103"),
    "of another": (lambda o, p: (o, p.flip(0)), f"{EVERY} "),
    "backwards": (lambda o, p: (o.flip(0), p), f"{EVERY} "),
}


@pytest.mark.parametrize("fault", ROUTINGS)
def test_a_routing_that_is_none_is_an_error_where_that_costs_nothing(path, fault, monkeypatch):
    """On CUDA a kernel would read elsewhere: CHECK says so instead."""
    monkeypatch.setattr(_check, "CHECK", path is not None)
    change, text = ROUTINGS[fault]
    wrong = change(*routing(6, 2))
    with pytest.raises(ValueError, match=f"^moe_permute: {text}"):
        moe_permute(torch.randn(6, 24), *wrong)
    with pytest.raises(ValueError, match=f"^moe_unpermute: {text}"):
        torch.ops.liger.moe_unpermute(torch.randn(12, 24), torch.rand(6, 2), *wrong)


@pytest.mark.parametrize("asked", [False, True])
def test_numbers_on_a_device_are_looked_at_where_that_is_asked_for(interpreted, asked, monkeypatch):
    monkeypatch.setattr(_check, "CHECK", asked)
    order, position = routing(6, 2)
    looked = []
    monkeypatch.setattr(_moe, "check_indices", lambda *_: looked.append(_))
    moe_permute(torch.randn(6, 24), order, position)
    torch.ops.liger.moe_unpermute(torch.randn(12, 24), torch.rand(6, 2), order, position)
    assert len(looked) == 2 * asked


def test_is_an_operator():
    x, (order, position) = torch.randn(6, 24), routing(6, 2)
    check_operator(moe_permute, (moe_permute_fwd, (x, order, position)), x, order, position)
    torch.library.opcheck(moe_permute_bwd, (torch.randn(12, 24), position))


BAD = [
    (lambda x, o, p: (x.long(), o, p), "moe_permute: x must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x, o, p: (x.double(), o, p), "moe_permute: x must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, o, p: (x[1:], o, p), "moe_permute: x must have shape (6, H), got (5, 24)"),
    (lambda x, o, p: (x[0], o, p), "moe_permute: x must have shape (6, H), got (24,)"),
    (lambda x, o, p: (x, o[1:], p), "moe_permute: order must have one number for each of position's, (6, 2), got (11,)"),
    (lambda x, o, p: (x, o.view(6, 2), p), "moe_permute: order must have 1 dimensions and be int64, got 2 and torch.int64"),
    (lambda x, o, p: (x, o.int(), p), "moe_permute: order must have 1 dimensions and be int64, got 1 and torch.int32"),
    (lambda x, o, p: (x, o, p.int()), "moe_permute: position must have 2 dimensions and be int64, got 2 and torch.int32"),
    (lambda x, o, p: (x, o, p.to("meta")), "moe_permute: position must be on cpu like x, got meta; move it with .to()"),
    (lambda x, o, p: (x, o.to("meta"), p), "moe_permute: order must be on cpu like x, got meta; move it with .to()"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[13:70] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        moe_permute(*bad(torch.randn(6, 24), *routing(6, 2)))
