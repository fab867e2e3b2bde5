import re

import pytest
import torch

import formulas
from harness import DTYPES
from harness import check
from harness import check_operator
from harness import run

attn_res = torch.ops.liger.attn_res.default
attn_res_fwd = torch.ops.liger.attn_res_fwd.default
attn_res_bwd = torch.ops.liger.attn_res_bwd.default
# One number, a depth of one, more tokens than programs, a block of either size, whole and ragged, and the loop.
SHAPES = [(1, 1), (1, 3, 37), (9, 2, 3, 100), (2, 2, 2048), (3, 2, 5000), (2, 8192), (3, 4, 8500)]


def make(shape, dtype, others=None):
    return [torch.randn(s).to(t) for s, t in zip((shape, shape[-1:], shape[-1:]), (dtype, *[others or dtype] * 2), strict=True)]


def scaled(shape, dtype, others=None):
    """With scores of about one, whatever the width."""
    v, query, weight = make(shape, dtype, others)
    return v, query / shape[-1] ** 0.5, weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_its_formula(path, shape, dtype):
    check(attn_res, formulas.attn_res(), *scaled(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("others", DTYPES, ids=str)
def test_mixed_dtypes(path, dtype, others):
    results = check(attn_res, formulas.attn_res(), *scaled((4, 7, 100), dtype, others))
    assert results["output 0"].dtype == results["gradient 0"].dtype == dtype
    assert results["gradient 1"].dtype == results["gradient 2"].dtype == others


def test_by_hand(path):
    """A query of zeros takes the mean; one along a row takes that row; eps counts where rows are small."""
    v = torch.stack([torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 3.0], [4.0, 0.0]])])
    ones, zeros = torch.ones(2), torch.zeros(2)
    torch.testing.assert_close(attn_res(v, zeros, ones), v.mean(0))
    torch.testing.assert_close(attn_res(v, ones, zeros), v.mean(0))
    torch.testing.assert_close(attn_res(v, torch.tensor([99.0, 0.0]), ones), torch.tensor([[1.0, 0.0], [4.0, 0.0]]))
    torch.testing.assert_close(
        attn_res(v, torch.tensor([0.0, 9.0]), torch.tensor([0.0, 11.0])), torch.tensor([[0.0, 3.0], [0.0, 2.0]])
    )
    torch.testing.assert_close(attn_res(v, torch.tensor([99.0, 0.0]), ones, 1e12), v.mean(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1e-3, 1e3])
@pytest.mark.parametrize("n", [100, 8500])
def test_scores_far_from_zero(path, n, size):
    """exp of a score overflows or underflows, of the difference to the largest it does not."""
    v, query, weight = scaled((5, 3, n), torch.float32)
    y = attn_res(v, size * query, weight)
    scores = (size * query.double() * weight * v / torch.sqrt(v.double().square().mean(-1, keepdim=True) + 1e-6)).sum(-1)
    torch.testing.assert_close(y, (scores.softmax(0)[..., None] * v).sum(0).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [100, 8500])
def test_more_tokens_than_programs(interpreted, n):
    interpreted.count = 1
    check(attn_res, formulas.attn_res(), *scaled((3, 9, n), torch.float32))
    assert "attn_res_bwd" in interpreted.launched


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some(path, wanted):
    inputs, dy = scaled((3, 7, 100), torch.float32), torch.randn(7, 100)
    leaves = [i.clone().requires_grad_() for i in inputs]
    some = [i.clone().requires_grad_(n in wanted) for n, i in enumerate(inputs)]
    for each in (leaves, some):
        attn_res(*each).backward(dy)
    for n, (got, want) in enumerate(zip(some, leaves, strict=True)):
        assert torch.equal(got.grad, want.grad) if n in wanted else got.grad is None


def test_views_and_offsets(path):
    base, query, weight = torch.randn(3, 9, 77), torch.randn(58)[1:] / 8, torch.randn(114)[::2]
    for v in (
        base[:, 1:, 3:60],
        base[..., :57].transpose(0, 1),
        torch.randn(57, 4, 3).transpose(0, 2),
        base[:1, :, 5:62].expand(4, 9, 57),
        base[:, 2, 20:],
        base.flatten()[::2][:684].view(3, 4, 57),
    ):
        inputs = v, query, weight
        torch.testing.assert_close(run(attn_res, inputs), run(attn_res, [t.contiguous() for t in inputs]))
    check(attn_res, formulas.attn_res(), v, query, weight)


@pytest.mark.parametrize("shape", [(2, 0, 8), (3, 0), (2, 3, 0)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    v, query, weight = (t.requires_grad_() for t in make(shape, torch.float32))
    y = attn_res(v, query, weight)
    y.sum().backward()
    assert y.shape == shape[1:]
    assert v.grad.shape == shape
    assert torch.equal(query.grad, torch.zeros(shape[-1:]))
    assert torch.equal(weight.grad, torch.zeros(shape[-1:]))


def test_is_an_operator():
    v, query, weight = scaled((3, 4, 24), torch.float32)
    check_operator(attn_res, (attn_res_fwd, (v, query * weight, 1e-6)), v, query, weight)
    y, *rest = attn_res_fwd(v, query * weight, 1e-6)
    torch.library.opcheck(attn_res_bwd, (torch.randn_like(y), v, query * weight, *rest))


BAD = [
    (lambda v, q, w: (v.long(), q, w), "attn_res: v must be float32, float16 or bfloat16, got torch.int64"),
    (lambda v, q, w: (v[0, 0], q, w), "attn_res: v must have shape (depth, ..., n), depth 1 or more, got (8,)"),
    (lambda v, q, w: (v[:0], q, w), "attn_res: v must have shape (depth, ..., n), depth 1 or more, got (0, 3, 8)"),
    (lambda v, q, w: (v, q[:4], w), "attn_res: query must have shape (8,), got (4,)"),
    (lambda v, q, w: (v, q, w[None]), "attn_res: weight must have shape (8,), got (1, 8)"),
    (lambda v, q, w: (v, q.double(), w), "attn_res: query must be float32, float16 or bfloat16, got torch.float64"),
    (lambda v, q, w: (v, q, w.to("meta")), "attn_res: weight must be on cpu like the input, got meta; move it with .to()"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[10:52] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        attn_res(*bad(torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)))
