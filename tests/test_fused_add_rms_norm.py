import re

import pytest
import torch

from liger_aot.ops.fused_add_rms_norm import forward_reference

from harness import DTYPES
from harness import check
from harness import check_operator
from harness import run

fused_add_rms_norm = torch.ops.liger.fused_add_rms_norm.default
fused_add_rms_norm_fwd = torch.ops.liger.fused_add_rms_norm_fwd.default
rms_norm = torch.ops.liger.rms_norm.default
rms_norm_bwd = torch.ops.liger.rms_norm_bwd.default
# One row, a ragged tail, more row groups than programs, two rows a program, every BLOCK, and a row that is walked in a loop.
SHAPES = [(3,), (1, 3), (27, 100), (2, 5, 129), (13, 2000), (7, 4096), (4, 5000), (15, 8200)]


def formula(x, residual, weight, offset=0.0):
    return forward_reference(x, residual, weight, 1e-6, offset, False)[:2]


def make(shape, dtype, weight_dtype):
    """x and residual in sixteenths, whose sum every dtype holds: rounding it is the definition's, not the kernel's, error."""
    x, residual = ((torch.randn(shape) * 16).clamp(-63, 63).round().div(16).to(dtype) for _ in range(2))
    return x, residual, None if weight_dtype is None else torch.randn(shape[-1]).to(weight_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(path, shape, dtype):
    check(lambda x, r, w: fused_add_rms_norm(x, r, w, 1e-6), formula, *make(shape, dtype, dtype))


@pytest.mark.parametrize("casting", ["none", "gemma", "llama"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16, None], ids=str)
def test_casting_and_mixed_dtypes(path, casting, weight_dtype):
    results = check(
        lambda x, r, w: fused_add_rms_norm(x, r, w, 1e-6, offset=1.0, casting=casting),
        lambda x, r, w: formula(x, r, w, 1.0),
        *make((9, 300), torch.bfloat16, weight_dtype),
        slack=4.0 if casting == "llama" else 2.0,  # llama rounds twice, as its models do
        through=torch.bfloat16 if casting == "llama" else None,
    )
    other = weight_dtype not in (torch.bfloat16, None)  # any other weight is taken in fp32
    assert results["output 0"].dtype == (torch.float32 if other and casting == "llama" else torch.bfloat16)
    assert results["output 1"].dtype == results["gradient 0"].dtype == results["gradient 1"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("casting", ["none", "llama"])
@pytest.mark.parametrize("shape", [(27, 300), (3, 8200)], ids=str)
def test_is_bit_equal_to_the_sum_and_then_rms_norm(path, shape, casting, dtype):
    x, residual, weight = (torch.randn(s).to(dtype).requires_grad_() for s in (shape, shape, shape[-1:]))
    y, s = fused_add_rms_norm(x, residual, weight, casting=casting)
    two_steps = rms_norm(x + residual, weight, casting=casting)
    assert torch.equal(s, x + residual)
    assert torch.equal(y, two_steps)
    dy = torch.randn(shape).to(dtype)
    got, want = (torch.autograd.grad(out, [x, residual, weight], dy) for out in (y, two_steps))
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_is_bit_equal_to_transformers(path, dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(300, eps=1e-5).to(dtype)
    theirs.weight.data = torch.randn(300).to(dtype)
    x, residual = torch.randn(9, 300).to(dtype), torch.randn(9, 300).to(dtype)
    y, s = fused_add_rms_norm(x, residual, theirs.weight, 1e-5, casting="llama")
    assert torch.equal(s, x + residual)
    assert torch.equal(y, theirs(x + residual))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
def test_outputs_used_alone_and_together(path, used):
    """What is not used costs nothing, and the residual's gradient is not the same memory as x's."""
    x, residual, weight = (i.requires_grad_() for i in make((9, 300), torch.float32, torch.float32))
    truth = [i.detach().double().requires_grad_() for i in (x, residual, weight)]
    ups = [torch.randn(9, 300) for _ in used]
    outs, wanted = fused_add_rms_norm(x, residual, weight, 1e-6), formula(*truth)
    before = len(path.launched) if path else 0
    torch.autograd.backward([outs[i] for i in used], ups)
    torch.autograd.backward([wanted[i] for i in used], [u.double() for u in ups])
    for got, want in zip((x, residual, weight), truth, strict=True):
        assert (got.grad is None) == (want.grad is None)
        if got.grad is not None:
            torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-5)
    if path:
        assert path.launched[before:] == ([] if used == (1,) else ["rms_norm_bwd", "column_sum"])
    x.grad.zero_()
    assert residual.grad.abs().sum() > 0


def test_a_frozen_weight_gets_no_work(interpreted):
    x, residual, weight = make((9, 300), torch.float32, torch.float32)
    y, _ = fused_add_rms_norm(x.requires_grad_(), residual, weight)
    y.sum().backward()
    assert interpreted.launched == ["fused_add_rms_norm_fwd", "rms_norm_bwd"]
    assert x.grad is not None
    assert residual.grad is None


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)], ids=str)
def test_the_sum_requires_a_gradient_where_x_or_residual_does(path, needed):
    x, residual, weight = (i.requires_grad_() for i in make((3, 100), torch.float32, torch.float32))
    y, s = fused_add_rms_norm(x.requires_grad_(needed[0]), residual.requires_grad_(needed[1]), weight)
    assert s.requires_grad is (x + residual).requires_grad
    (want,) = torch.autograd.grad(rms_norm(x + residual, weight).sum(), weight)
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], want)


def test_x_added_to_itself(path):
    x, _, weight = make((9, 300), torch.float32, torch.float32)
    check(lambda x, w: fused_add_rms_norm(x, x, w, 1e-6), lambda x, w: formula(x, x, w), x, weight)


def test_views_and_offsets(interpreted):
    views = [
        lambda t: t[1:10, 3:60],
        lambda t: t[:9, :77:2],
        lambda t: t[:9, :77].t(),
        lambda t: t[0, :77].expand(9, 77),
        lambda t: t[None, :9, 5:70].expand(2, 9, 65),
        lambda t: t[:3, 50:8250],
    ]
    for view in views:
        x, residual = (view(t) for t in torch.randn(2, 10, 8300))
        weight = torch.randn(2 * x.shape[-1])[::2]
        plain = x.contiguous(), residual.contiguous(), weight.contiguous()
        want = run(fused_add_rms_norm, plain)
        for inputs in ((x, residual, weight), (plain[0], residual, weight), (x, *plain[1:])):
            torch.testing.assert_close(run(fused_add_rms_norm, inputs), want)
    assert "rms_norm_bwd" in interpreted.launched


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    x, residual = torch.ones(shape, requires_grad=True), torch.ones(shape, requires_grad=True)
    weight = torch.ones(shape[-1], requires_grad=True)
    y, s = fused_add_rms_norm(x, residual, weight, 1e-6)
    (y.sum() + s.sum()).backward()
    assert y.shape == s.shape == x.grad.shape == residual.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(shape[-1]))


def test_is_an_operator():
    x, residual, weight = make((3, 4, 24), torch.float32, torch.float32)
    fwd = fused_add_rms_norm_fwd, (x, residual, weight, 1e-6, 0.0, False)
    check_operator(fused_add_rms_norm, fwd, x, residual, weight, 1e-6)
    _, s, rstd = fused_add_rms_norm_fwd(*fwd[1])
    for ds, need_dw in ((None, True), (x, True), (x, False)):
        torch.library.opcheck(rms_norm_bwd, (residual, s, weight, rstd, 0.0, False, ds, need_dw))


@pytest.mark.parametrize("used", [0, 1])
def test_compiles_where_one_output_is_used(used):
    inputs = [i.requires_grad_() for i in make((3, 4, 24), torch.float32, torch.float32)]
    compiled = torch.compile(lambda *i: fused_add_rms_norm(*i, 1e-6)[used] * 2, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs).sum(), inputs[:2])
    want = torch.autograd.grad((fused_add_rms_norm(*inputs, 1e-6)[used] * 2).sum(), inputs[:2])
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


OP = "fused_add_rms_norm"
BAD = [
    (lambda x, r, w: (x, r[1:], w), f"{OP}: residual must have shape (2, 8), got (1, 8)"),
    (lambda x, r, w: (x, r[0], w), f"{OP}: residual must have shape (2, 8), got (8,)"),
    (lambda x, r, w: (x, r.half(), w), f"{OP}: residual must be torch.float32 like x, got torch.float16; cast one with .to()"),
    (lambda x, r, w: (x.half(), r.bfloat16(), w), f"{OP}: residual must be torch.float16 like x, got torch.bfloat16"),
    (lambda x, r, w: (x, r.double(), w), f"{OP}: residual must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, r, w: (x, r.to("meta"), w), f"{OP}: residual must be on cpu like the input, got meta"),
    (lambda x, r, w: (x, r, w[1:]), f"{OP}: weight must have shape (8,), got (7,)"),
    (lambda x, r, w: (x, r, w.int()), f"{OP}: weight must be float32, float16 or bfloat16, got torch.int32"),
    (lambda x, r, w: (x.double(), r, w), f"{OP}: x must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, r, w: (x[0, 0], r[0, 0], None), f"{OP}: x must have a last dimension to normalise over, got a scalar"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[20:60] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        fused_add_rms_norm(*bad(torch.randn(2, 8), torch.randn(2, 8), torch.randn(8)))


def test_rejects_an_unknown_casting():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=re.escape("casting must be one of none, gemma, llama, got 'llma'")):
        fused_add_rms_norm(x, x, casting="llma")
