import re

import pytest
import torch

from liger_aot.ops.geglu import forward_reference

from harness import DTYPES
from harness import check
from harness import check_operator

geglu = torch.ops.liger.geglu.default
geglu_fwd = torch.ops.liger.geglu_fwd.default
APPROXIMATE = ["tanh", "none"]
# One number, less than a program's, a ragged tail, whole programs, many programs of a narrow width, no dimension at all.
SHAPES = [(1,), (3, 341), (2, 5, 1024), (4, 2048), (1000, 3), ()]


def function(approximate):
    return lambda gate, up: geglu(gate, up, approximate=approximate)


def reference(approximate):
    return lambda gate, up: forward_reference(gate, up, approximate == "tanh")


def make(shape, dtype):
    return 2 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(path, shape, dtype, approximate):
    check(function(approximate), reference(approximate), *make(shape, dtype))


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_reference_is_torchs(approximate):
    gate, up = make((7, 300), torch.float64)
    torch.testing.assert_close(reference(approximate)(gate, up), torch.nn.functional.gelu(gate, approximate=approximate) * up)


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 1100)], ids=str)
def test_chunks_are_read_where_they_lie(interpreted, shape, approximate):
    gate, up = torch.randn(*shape[:-1], 2 * shape[-1]).chunk(2, -1)
    check(function(approximate), reference(approximate), gate, up)
    check(function(approximate), reference(approximate), gate.contiguous(), up)
    assert geglu(gate, up).is_contiguous()
    assert interpreted.launched.count("geglu_bwd") == 2


def test_views_and_offsets(path):
    base = torch.randn(2, 9, 77)
    for x in (base[:, 1:, 3:60], base[..., ::2], base.transpose(0, 2), base[:1, :, 5:70].expand(4, 9, 65)):
        check(geglu, reference("tanh"), x, x.flip(0))


def test_gradient_of_any_layout(path):
    gate, up = (t.requires_grad_() for t in make((4, 6, 50), torch.float32))
    y = geglu(gate, up)
    for dy in (torch.ones(()).expand(4, 6, 50), torch.randn(4, 50, 6).mT, torch.randn(6, 50).expand(4, 6, 50)):
        got = torch.autograd.grad(y, (gate, up), dy, retain_graph=True)
        want = torch.autograd.grad(y, (gate, up), dy.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_far_out_values_stay_finite(path, approximate):
    gate = torch.tensor([-3e38, -1e20, -90.0, 0.0, 90.0, 1e20, 3e38], requires_grad=True)
    y = geglu(gate, torch.ones(7), approximate=approximate)
    y.sum().backward()
    assert torch.equal(y.detach(), gate.detach().clamp(min=0))
    assert torch.equal(gate.grad, torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]))


def test_small_results_keep_their_digits(path):
    """0.5 · x · (1 + tanh(z)) loses half of them at -5; torch's gelu does."""
    gate = torch.linspace(-6, -2, 100)
    got, truth = geglu(gate, torch.ones(100)), forward_reference(gate.double(), torch.ones(100).double(), True)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    gate, up = torch.ones(shape, requires_grad=True), torch.ones(shape, requires_grad=True)
    y = geglu(gate, up)
    y.sum().backward()
    assert y.shape == gate.grad.shape == up.grad.shape == shape


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_is_an_operator(approximate):
    gate, up = make((3, 4, 24), torch.float32)
    check_operator(geglu, (geglu_fwd, (gate, up, approximate == "tanh")), gate, up, approximate=approximate)


BAD = [
    (lambda g, u: geglu(g, u[:, 1:]), "geglu: up must have shape (2, 8), got (2, 7)"),
    (lambda g, u: geglu(g.long(), u), "geglu: gate must be float32, float16 or bfloat16, got torch.int64"),
    (lambda g, u: geglu(g, u.bool()), "geglu: up must be float32, float16 or bfloat16, got torch.bool"),
    (
        lambda g, u: geglu(g, u.half()),
        "geglu: gate and up must have one dtype, got torch.float32 and torch.float16; cast one with .to()",
    ),
    (lambda g, u: geglu(g, u.to("meta")), "geglu: up must be on cpu like the input, got meta; move it with .to()"),
    (lambda g, u: geglu(g, u, approximate="erf"), "geglu: approximate must be one of tanh, none, got 'erf'"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][:60] for b in BAD])
def test_rejects(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call(torch.randn(2, 8), torch.randn(2, 8))
