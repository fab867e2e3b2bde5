import re

import pytest
import torch

from liger_aot.ops.layer_norm import forward_reference

from harness import DTYPES
from harness import check
from harness import check_operator
from harness import run

layer_norm = torch.ops.liger.layer_norm.default
layer_norm_fwd = torch.ops.liger.layer_norm_fwd.default
layer_norm_bwd = torch.ops.liger.layer_norm_bwd.default
# One row, a ragged tail, more row groups than programs, two rows a program, every BLOCK, and rows that are walked in a loop.
SHAPES = [(3,), (1, 3), (27, 100), (2, 5, 129), (13, 2000), (7, 4096), (4, 5000), (15, 8200), (2, 12300)]


def formula(x, weight, bias, eps=1e-5):
    return forward_reference(x, weight, bias, eps)[0]


def make(shape, dtype, weight_dtype, bias_dtype):
    x = torch.randn(shape).to(dtype)
    return x, *(None if t is None else torch.randn(shape[-1]).to(t) for t in (weight_dtype, bias_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(path, shape, dtype):
    check(layer_norm, formula, *make(shape, dtype, dtype, dtype))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16, None], ids=str)
def test_mixed_dtypes(path, weight_dtype, bias_dtype):
    x, weight, bias = make((27, 100), torch.bfloat16, weight_dtype, bias_dtype)
    results = check(layer_norm, formula, x, weight, bias)
    assert results["output 0"].dtype == results["gradient 0"].dtype == torch.bfloat16
    for gradient, t in (("gradient 1", weight_dtype), ("gradient 2", bias_dtype)):
        assert t is None or results[gradient].dtype == t


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)], ids=str)
def test_parts_of_a_row_that_is_walked(interpreted, given):
    check(layer_norm, formula, *make((15, 8200), torch.bfloat16, *(torch.float32 if g else None for g in given)))


@pytest.mark.parametrize("n", [100, 5000, 8200, 12300])
def test_a_mean_far_from_zero(path, n):
    """E[x²] - mean² would lose every digit. All there is to lose is two units in the last place of the mean."""
    x = torch.randint(-3, 4, (3, n)) + 30000.0
    x[:, n // 2 :] += 4.0  # what is summed in parts must be joined rightly
    exact = formula(x.double(), None, None)
    assert ((layer_norm(x).double() - exact).abs() <= 2 * 2.0**-9 / x.double().std(-1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_torchs(path, dtype):
    x, weight, bias = make((9, 300), dtype, dtype, dtype)
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
        torch.testing.assert_close(layer_norm(x, w, b), torch.nn.functional.layer_norm(x, (300,), w, b))
        torch.testing.assert_close(layer_norm(x, w, b, 0.5), torch.nn.functional.layer_norm(x, (300,), w, b, 0.5))


def test_a_constant_row_is_its_bias(path):
    """Whole numbers, whose mean is exact: what is left is 0 · rstd, with eps alone under the root."""
    bias = torch.randn(300)
    x = torch.full((2, 300), 7.0, requires_grad=True)
    y = layer_norm(x, None, bias)
    assert torch.equal(y, bias.expand(2, 300))
    y.backward(torch.ones(2, 300))
    assert torch.equal(x.grad, torch.zeros(2, 300))


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(27, 100), (15, 8200)], ids=str)
def test_gradients_of_some(interpreted, shape, wanted):
    """The wanted gradients are those that come when all are wanted, and no sum is launched for the others."""
    inputs = make(shape, torch.float32, torch.float32, torch.float32)
    leaves = [i.clone().requires_grad_() for i in inputs]
    some = [i.clone().requires_grad_(n in wanted) for n, i in enumerate(inputs)]
    dy = torch.randn(shape)
    layer_norm(*leaves).backward(dy)
    interpreted.launched.clear()
    y = layer_norm(*some)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(dy)
    for n, (got, want) in enumerate(zip(some, leaves, strict=True)):
        assert torch.equal(got.grad, want.grad) if n in wanted else got.grad is None
    backward = ["layer_norm_bwd", "column_sum"][: len(wanted) and 1 + (wanted != (0,))]
    assert interpreted.launched == ["layer_norm_fwd", *backward]


def test_views_and_offsets(interpreted):
    base, walked = torch.randn(9, 77), torch.randn(3, 8300)[:, 50:8250]
    views = base[1:, 3:60], base[:, ::2], base.t(), base[0].expand(9, 77), base[None, :, 5:70].expand(2, 9, 65), walked
    for x in views:
        weight, bias = torch.randn(2 * x.shape[-1])[::2], torch.randn(x.shape[-1] + 1)[1:]
        for inputs in ((x, weight, bias), (x, bias, weight), (x, None, weight)):
            plain = [i if i is None else i.contiguous() for i in inputs]
            torch.testing.assert_close(run(layer_norm, inputs), run(layer_norm, plain))
    assert "layer_norm_bwd" in interpreted.launched


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    x, weight, bias = (torch.ones(s, requires_grad=True) for s in (shape, shape[-1:], shape[-1:]))
    y = layer_norm(x, weight, bias)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(shape[-1]))
    assert torch.equal(bias.grad, torch.zeros(shape[-1]))


@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, None], ids=str)
def test_is_an_operator(weight_dtype, bias_dtype):
    x, weight, bias = make((3, 4, 24), torch.float32, weight_dtype, bias_dtype)
    check_operator(layer_norm, (layer_norm_fwd, (x, weight, bias, 1e-5)), x, weight, bias)
    _, mean, rstd = layer_norm_fwd(x, weight, bias, 1e-5)
    for need_dw, need_db in {(weight is not None, bias is not None), (False, bias is not None), (False, False)}:
        torch.library.opcheck(layer_norm_bwd, (torch.randn_like(x), x, weight, bias, mean, rstd, need_dw, need_db))


BAD = [
    (lambda x, w, b: (x, w[1:], b), "layer_norm: weight must have shape (8,), got (7,)"),
    (lambda x, w, b: (x, w, b[1:]), "layer_norm: bias must have shape (8,), got (7,)"),
    (lambda x, w, b: (x, w.int(), b), "layer_norm: weight must be float32, float16 or bfloat16, got torch.int32"),
    (lambda x, w, b: (x, w, b.double()), "layer_norm: bias must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, w, b: (x, w.to("meta"), b), "layer_norm: weight must be on cpu like the input, got meta; move it with .to()"),
    (lambda x, w, b: (x, None, b.to("meta")), "layer_norm: bias must be on cpu like the input, got meta; move it with .to()"),
    (lambda x, w, b: (x.long(), w, b), "layer_norm: x must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x, w, b: (x.double(),), "layer_norm: x must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, w, b: (x[0, 0],), "layer_norm: x must have a last dimension to normalise over, got a scalar"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[12:50] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        layer_norm(*bad(torch.randn(2, 8), torch.randn(8), torch.randn(8)))
