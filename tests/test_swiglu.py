import re

import pytest
import torch

from liger_aot.ops.swiglu import forward_reference

from harness import DTYPES
from harness import check
from harness import check_operator

swiglu = torch.ops.liger.swiglu.default
swiglu_fwd = torch.ops.liger.swiglu_fwd.default
# One number, less than a program's, a ragged tail, whole programs, many programs of a narrow width, no dimension at all.
SHAPES = [(1,), (3, 341), (2, 5, 1024), (4, 2048), (1000, 3), ()]


def reference(gate_multiplier=1.0, down_multiplier=1.0):
    return lambda gate, up: forward_reference(gate, up, gate_multiplier, down_multiplier)


def make(shape, dtype):
    return 3 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(path, shape, dtype):
    check(swiglu, reference(), *make(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multipliers(path, dtype):
    check(
        lambda gate, up: swiglu(gate, up, gate_multiplier=0.625, down_multiplier=-3.0),
        reference(0.625, -3.0),
        *make((5, 300), dtype),
    )


def test_reference_is_torchs():
    gate, up = make((7, 300), torch.float64)
    torch.testing.assert_close(reference()(gate, up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 1100), (2, 1, 7, 1024)], ids=str)
def test_chunks_are_read_where_they_lie(interpreted, shape, monkeypatch):
    copies = []
    original = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: copies.append(t.shape) or original(t))
    gate, up = torch.randn(*shape[:-1], 2 * shape[-1]).chunk(2, -1)
    check(swiglu, reference(), gate, up)
    check(swiglu, reference(), gate, original(up))
    assert not copies
    assert swiglu(gate, up).is_contiguous()
    assert interpreted.launched.count("swiglu_bwd") == 2


def test_views_and_offsets(path):
    base = 2 * torch.randn(2, 9, 77)
    for x in (base[:, 1:, 3:60], base[..., ::2], base.transpose(0, 2), base[:1, :, 5:70].expand(4, 9, 65), base[:, 2, 0]):
        check(swiglu, reference(), x, x.flip(0))


def test_gradient_of_any_layout(path):
    gate, up = (t.requires_grad_() for t in make((4, 6, 50), torch.float32))
    y = swiglu(gate, up)
    dense = torch.randn(4, 6, 50)
    for dy in (
        torch.ones(()).expand(4, 6, 50),
        torch.randn(4, 6, 1).expand(4, 6, 50),
        dense.mT.contiguous().mT,
        dense[:1].expand(4, 6, 50),
    ):
        got = torch.autograd.grad(y, (gate, up), dy, retain_graph=True)
        want = torch.autograd.grad(y, (gate, up), dy.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_far_out_values_stay_finite(path):
    gate = torch.tensor([-3e38, -1e4, -90.0, 0.0, 90.0, 1e4, 3e38], requires_grad=True)
    y = swiglu(gate, torch.ones(7))
    y.sum().backward()
    assert torch.equal(y.detach(), gate.detach().clamp(min=0))
    assert torch.equal(gate.grad, torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    gate, up = torch.ones(shape, requires_grad=True), torch.ones(shape, requires_grad=True)
    y = swiglu(gate, up)
    y.sum().backward()
    assert y.shape == gate.grad.shape == up.grad.shape == shape


def test_is_an_operator():
    gate, up = make((3, 4, 24), torch.float32)
    options = {"gate_multiplier": 0.5, "down_multiplier": 2.0}
    check_operator(swiglu, (swiglu_fwd, (gate, up, 0.5, 2.0)), gate, up, **options)
    check_operator(swiglu, (swiglu_fwd, (*torch.randn(3, 4, 48).chunk(2, -1), 1.0, 1.0)), *torch.randn(3, 4, 48).chunk(2, -1))


BAD = [
    (lambda g, u: swiglu(g, u[:, 1:]), "swiglu: up must have shape (2, 8), got (2, 7)"),
    (lambda g, u: swiglu(g, u[0]), "swiglu: up must have shape (2, 8), got (8,)"),
    (lambda g, u: swiglu(g.long(), u), "swiglu: gate must be float32, float16 or bfloat16, got torch.int64"),
    (lambda g, u: swiglu(g.double(), u), "swiglu: gate must be float32, float16 or bfloat16, got torch.float64"),
    (lambda g, u: swiglu(g, u.bool()), "swiglu: up must be float32, float16 or bfloat16, got torch.bool"),
    (
        lambda g, u: swiglu(g, u.bfloat16()),
        "swiglu: gate and up must have one dtype, got torch.float32 and torch.bfloat16; cast one with .to()",
    ),
    (lambda g, u: swiglu(g, u.to("meta")), "swiglu: up must be on cpu like the input, got meta; move it with .to()"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][:60] for b in BAD])
def test_rejects(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call(torch.randn(2, 8), torch.randn(2, 8))
