import re

import pytest
import torch

from liger_aot.ops.rms_norm import forward_reference

from harness import DTYPES
from harness import check
from harness import check_operator
from harness import run

rms_norm = torch.ops.liger.rms_norm.default
rms_norm_fwd = torch.ops.liger.rms_norm_fwd.default
# One row, a ragged tail, more row groups than programs, several rows a program, every BLOCK, a row that is walked in a loop.
SHAPES = [(3,), (1, 3), (3, 100), (200, 128), (3, 9, 129), (13, 2000), (7, 4096), (4, 5000), (15, 8200)]


def reference(casting="none", offset=0.0):
    def formula(x, weight):
        return forward_reference(x, weight, 1e-6, offset, casting == "llama" and x.dtype != torch.float32)[0]

    return formula


def make(shape, dtype, weight_dtype):
    weight = None if weight_dtype is None else torch.randn(shape[-1]).to(weight_dtype)
    return torch.randn(shape).to(dtype), weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(path, shape, dtype):
    check(lambda x, w: rms_norm(x, w, 1e-6), reference(), *make(shape, dtype, dtype))


@pytest.mark.parametrize("casting", ["none", "gemma", "llama"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_casting_and_mixed_dtypes(path, casting, weight_dtype):
    x, weight = make((9, 300), torch.bfloat16, weight_dtype)
    results = check(
        lambda x, w: rms_norm(x, w, 1e-6, offset=1.0, casting=casting),
        reference(offset=1.0),
        x,
        weight,
        slack=4.0 if casting == "llama" else 2.0,  # llama rounds twice, as its models do
        through=torch.bfloat16 if casting == "llama" else None,
    )
    wider = torch.float32 if weight_dtype == torch.float32 and casting == "llama" else torch.bfloat16
    assert results["output 0"].dtype == wider
    assert results["gradient 0"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_llama_is_bit_equal_to_transformers(path, dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(300, eps=1e-5).to(dtype)
    theirs.weight.data = torch.randn(300).to(dtype)
    x = torch.randn(9, 300).to(dtype)
    assert torch.equal(rms_norm(x, theirs.weight, 1e-5, casting="llama"), theirs(x))


def test_offset_in_a_row_that_is_walked(path):
    check(lambda x, w: rms_norm(x, w, 1e-6, offset=1.0), reference(offset=1.0), *make((4, 8200), torch.float32, torch.float32))


def test_more_programs_than_are_summed_at_once(interpreted):
    interpreted.count = 40
    check(lambda x, w: rms_norm(x, w, 1e-6), reference(), *make((150, 1100), torch.float32, torch.float32))


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_is_torchs(size):
    x, weight = make((4, 65), torch.float32, torch.float32)
    x *= size  # where it is small, eps tells
    torch.testing.assert_close(rms_norm(x, weight), torch.nn.functional.rms_norm(x, (65,), weight))


def test_views_and_offsets(interpreted):
    base, walked = torch.randn(9, 77), torch.randn(3, 8300)[:, 50:8250]
    views = base[1:, 3:60], base[:, ::2], base.t(), base[0].expand(9, 77), base[None, :, 5:70].expand(2, 9, 65), walked
    for x in views:
        weight = torch.randn(2 * x.shape[-1])[::2]
        got, want = (run(rms_norm, i) for i in ((x, weight), (x.contiguous(), weight.contiguous())))
        torch.testing.assert_close(got, want)
    assert "rms_norm_bwd" in interpreted.launched


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    x, weight = torch.ones(shape, requires_grad=True), torch.ones(shape[-1], requires_grad=True)
    y = rms_norm(x, weight, 1e-6)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert rms_norm_fwd(x, weight, 1e-6, 0.0, False)[1].shape == shape[:-1]
    assert torch.equal(weight.grad, torch.zeros(shape[-1]))


@pytest.mark.parametrize("shape", [(9, 300), (15, 8200)], ids=str)
def test_a_frozen_weight_gets_no_work(interpreted, shape):
    x, weight = make(shape, torch.float32, torch.float32)
    y = rms_norm(x.requires_grad_(), weight, 1e-6)
    y.backward(dy := torch.randn(shape))
    assert interpreted.launched == ["rms_norm_fwd", "rms_norm_bwd"]
    (dx,) = torch.autograd.grad(rms_norm(x, weight.requires_grad_(), 1e-6), x, dy)
    assert torch.equal(x.grad, dx)


def test_is_an_operator():
    x, weight = make((3, 4, 24), torch.float32, torch.float32)
    check_operator(rms_norm, (rms_norm_fwd, (x, weight, 1e-6, 0.0, False)), x, weight, 1e-6)


BAD = [
    (lambda x, w: rms_norm(x, w[1:]), ValueError, "rms_norm: weight must have shape (8,), got (7,)"),
    (lambda x, w: rms_norm(x, w.int()), ValueError, "rms_norm: weight must be float32, float16 or bfloat16, got torch.int32"),
    (lambda x, w: rms_norm(x[0, 0], w), ValueError, "rms_norm: x must have a last dimension to normalise over, got a scalar"),
    (lambda x, w: rms_norm(x.double(), w), ValueError, "rms_norm: x must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, w: rms_norm(x.long(), None), ValueError, "rms_norm: x must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x, w: rms_norm(x, w.to("meta")), ValueError, "rms_norm: weight must be on cpu like the input, got meta"),
    (
        lambda x, w: rms_norm(x, w, casting="llma"),
        ValueError,
        "rms_norm: casting must be one of none, gemma, llama, got 'llma'",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD, ids=[b[2][:50] for b in BAD])
def test_rejects(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call(torch.randn(2, 8), torch.randn(8))
