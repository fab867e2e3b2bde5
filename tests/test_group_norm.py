import re

import pytest
import torch

from liger_aot.ops.group_norm import forward_reference

from harness import DTYPES
from harness import check
from harness import check_operator
from harness import run

group_norm = torch.ops.liger.group_norm.default
group_norm_fwd = torch.ops.liger.group_norm_fwd.default
group_norm_bwd = torch.ops.liger.group_norm_bwd.default
# No further dimension, one channel a group, one group, channels of several blocks, more channels in a group than a block.
CASES = [((3, 6), 2), ((2, 4, 5), 4), ((2, 6, 3, 7), 1), ((2, 4, 1100), 2), ((1, 6, 2500), 3), ((1, 2100, 2), 1)]


def formula(x, weight, bias, groups=2, eps=1e-5):
    return forward_reference(x, groups, weight, bias, eps)[0]


def make(shape, dtype, weight_dtype, bias_dtype):
    x = torch.randn(shape).to(dtype)
    return x, *(None if t is None else torch.randn(shape[1]).to(t) for t in (weight_dtype, bias_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_matches_reference(path, shape, groups, dtype):
    check(lambda x, w, b: group_norm(x, groups, w, b), lambda *t: formula(*t, groups), *make(shape, dtype, dtype, dtype))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16, None], ids=str)
def test_mixed_dtypes(path, weight_dtype, bias_dtype):
    x, weight, bias = make((2, 6, 50), torch.bfloat16, weight_dtype, bias_dtype)
    results = check(lambda x, w, b: group_norm(x, 2, w, b), formula, x, weight, bias)
    assert results["output 0"].dtype == results["gradient 0"].dtype == torch.bfloat16
    for gradient, t in (("gradient 1", weight_dtype), ("gradient 2", bias_dtype)):
        assert t is None or results[gradient].dtype == t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_torchs(path, dtype):
    x, weight, bias = make((3, 6, 5, 7), dtype, dtype, dtype)
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
        torch.testing.assert_close(group_norm(x, 3, w, b, 0.5), torch.nn.functional.group_norm(x, 3, w, b, 0.5))


@pytest.mark.parametrize("size", [50, 2500])
def test_a_mean_far_from_zero(path, size):
    """E[x²] - mean² would lose every digit. All there is to lose is two units in the last place of the mean."""
    x = torch.randint(-3, 4, (2, 2, size)) + 30000.0
    x[..., size // 2 :] += 4.0  # what is summed in parts must be joined rightly
    exact = formula(x.double(), None, None, 1)
    assert ((group_norm(x, 1).double() - exact).abs() <= 2 * 2.0**-9 / x.double().std((1, 2), keepdim=True)).all()


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_gradients_of_some(path, wanted):
    inputs = make((3, 6, 20), torch.float32, torch.float32, torch.float32)
    leaves = [i.clone().requires_grad_() for i in inputs]
    some = [i.clone().requires_grad_(n in wanted) for n, i in enumerate(inputs)]
    dy = torch.randn(3, 6, 20)
    group_norm(leaves[0], 2, *leaves[1:]).backward(dy)
    y = group_norm(some[0], 2, *some[1:])
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(dy)
    for n, (got, want) in enumerate(zip(some, leaves, strict=True)):
        assert torch.equal(got.grad, want.grad) if n in wanted else got.grad is None


def test_views_and_offsets(interpreted):
    base = torch.randn(3, 8, 20)
    for x in (base[1:, 2:6, 3:17], base[:, ::2], base.transpose(0, 2)[:, :6], base[:1].expand(3, 8, 20)):
        weight, bias = torch.randn(2 * x.shape[1])[::2], torch.randn(x.shape[1] + 1)[1:]
        inputs = x, weight, bias
        plain = [i.contiguous() for i in inputs]

        def call(x, w, b):
            return group_norm(x, 2, w, b)

        torch.testing.assert_close(run(call, inputs), run(call, plain))
    assert "group_norm_bwd" in interpreted.launched


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 4, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    x, weight, bias = (torch.ones(s, requires_grad=True) for s in (shape, shape[1:2], shape[1:2]))
    y = group_norm(x, 2, weight, bias)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(shape[1]))
    assert torch.equal(bias.grad, torch.zeros(shape[1]))


@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, None], ids=str)
def test_is_an_operator(weight_dtype, bias_dtype):
    x, weight, bias = make((3, 4, 24), torch.float32, weight_dtype, bias_dtype)
    check_operator(group_norm, (group_norm_fwd, (x, 2, weight, bias, 1e-5)), x, 2, weight, bias)
    _, mean, rstd = group_norm_fwd(x, 2, weight, bias, 1e-5)
    torch.library.opcheck(group_norm_bwd, (torch.randn_like(x), x, 2, weight, mean, rstd))


BAD = [
    (lambda x, w, b: (x, 3, w, b), "group_norm: num_groups must divide the 8 channels of x, got 3"),
    (lambda x, w, b: (x, 0, w, b), "group_norm: num_groups must divide the 8 channels of x, got 0"),
    (lambda x, w, b: (x, 2, w[1:], b), "group_norm: weight must have shape (8,), got (7,)"),
    (lambda x, w, b: (x, 2, w, b[1:]), "group_norm: bias must have shape (8,), got (7,)"),
    (lambda x, w, b: (x, 2, w.int(), b), "group_norm: weight must be float32, float16 or bfloat16, got torch.int32"),
    (lambda x, w, b: (x, 2, w, b.double()), "group_norm: bias must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, w, b: (x, 2, w.to("meta")), "group_norm: weight must be on cpu like the input, got meta; move it with .to()"),
    (lambda x, w, b: (x.long(), 2), "group_norm: x must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x, w, b: (x[0], 2), "group_norm: x must have shape (N, C, ...), got (8,)"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[12:50] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        group_norm(*bad(torch.randn(2, 8), torch.randn(8), torch.randn(8)))
