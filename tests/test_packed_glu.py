import re

import pytest
import torch
from torch._dynamo import compiled_autograd

from liger_aot.ops.packed_glu import packed_glu_in_place

import formulas
from harness import DTYPES
from harness import check
from harness import check_operator

packed_glu = torch.ops.liger.packed_glu.default
packed_glu_fwd = torch.ops.liger.packed_glu_fwd.default
packed_glu_bwd = torch.ops.liger.packed_glu_bwd.default
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2,), (3, 682), (2, 5, 64), (3, 4096)], ids=str)
def test_matches_torchs_parts(path, shape, activation, dtype):
    check(lambda x: packed_glu(x, activation), formulas.packed_glu(activation), 2 * torch.randn(shape).to(dtype))


def test_views_and_offsets(path):
    base = torch.randn(2, 9, 78)
    for x in (base[1, :, 3:61], base[:, 1:, 3:61], base[..., ::3], base.transpose(0, 1), base[:1, :, 5:71].expand(4, 9, 66)):
        check(packed_glu, formulas.packed_glu(), x)


def test_gradient_of_any_layout(path):
    x = torch.randn(4, 6, 100, requires_grad=True)
    y = packed_glu(x)
    for dy in (torch.ones(()).expand(4, 6, 50), torch.randn(4, 50, 6).mT, torch.randn(6, 50).expand(4, 6, 50)):
        (got,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (want,) = torch.autograd.grad(y, x, dy.contiguous(), retain_graph=True)
        assert torch.equal(got, want)


def test_one_launch_each_way(interpreted):
    packed_glu(torch.randn(3, 20, requires_grad=True)).sum().backward()
    packed_glu(torch.randn(3, 20, requires_grad=True), "gelu").sum().backward()
    assert interpreted.launched == ["swiglu_fwd", "swiglu_bwd", "geglu_fwd", "geglu_bwd"]


def gradient(x, activation, **options):
    """Of a leaf, through x which is made of it, and x afterwards."""
    leaf = x.clone().requires_grad_()
    x = leaf * 1
    (got,) = torch.autograd.grad(packed_glu_in_place(x, activation).square().sum(), leaf, **options)
    return got, x.detach()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_takes_the_place_of_what_nobody_else_reads(interpreted, activation):
    x = torch.randn(3, 7, 1100)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(packed_glu(leaf, activation).square().sum(), leaf)
    got, place = gradient(x, activation)
    assert torch.equal(got, want)
    assert torch.equal(place, want)


def test_gradient_of_a_kept_graph_is_elsewhere(interpreted):
    x = torch.randn(3, 14)
    got, place = gradient(x, "silu", retain_graph=True)
    assert torch.equal(place, x)
    assert torch.equal(got, gradient(x, "silu")[0])


def test_who_else_needs_what_was_overwritten_is_told(interpreted):
    leaf = torch.randn(3, 14, requires_grad=True)
    x = leaf * 1
    sooner = x.square().sum()  # whose gradient is computed later
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (packed_glu_in_place(x).sum() + sooner).backward()


@pytest.mark.parametrize("given", ["leaf", "view of a leaf", "part", "subclass"])
def test_gradient_of_what_is_not_its_own_is_elsewhere(interpreted, given):
    leaf = torch.randn(4, 14, requires_grad=True)
    made = {
        "leaf": lambda: leaf,
        "view of a leaf": lambda: leaf.view(2, 2, 14),
        "part": lambda: (leaf * 1)[:, 2:12],
        "subclass": lambda: (leaf * 1).as_subclass(type("Named", (torch.Tensor,), {})),
    }
    x = made[given]()
    before = x.detach().clone()
    packed_glu_in_place(x).sum().backward()
    assert torch.equal(x.detach(), before)
    want = torch.autograd.grad(packed_glu(x := made[given]()).sum(), leaf)[0]
    assert torch.equal(leaf.grad, want)


def test_what_is_saved_for_others_is_not_overwritten(interpreted):
    """Where hooks save tensors, torch does not know that one has changed."""
    leaf = torch.randn(3, 14, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        x = leaf * 1
        loss = x.square().sum() + packed_glu_in_place(x).sum()
    (want,) = torch.autograd.grad(leaf.square().sum() + packed_glu(leaf).sum(), leaf)
    torch.testing.assert_close(*torch.autograd.grad(loss, leaf), want)


def test_what_is_traced_is_the_operator(interpreted):
    leaf = torch.randn(3, 14, requires_grad=True)
    traced = torch.jit.trace(lambda x: packed_glu_in_place(x * 1), leaf)
    assert "liger::packed_glu" in str(traced.graph)


def test_a_compiled_backward_holds_the_operator(interpreted):
    leaf = torch.randn(3, 14, requires_grad=True)
    (want,) = torch.autograd.grad(packed_glu(leaf).square().sum(), leaf)
    loss = packed_glu_in_place(leaf * 1).square().sum()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("asked", [True, False])
def test_whoever_asks_ligers_function_for_it_gets_it(interpreted, asked):
    from liger_aot.transformers._functions import LigerFusedGateUpSiLUMulFunction as Fused

    leaf = torch.randn(3, 14, requires_grad=True)
    x = leaf * 1
    Fused.apply(x, in_place=asked).sum().backward()
    assert torch.equal(x.detach(), leaf.grad if asked else leaf.detach())


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    x = torch.ones(shape, requires_grad=True)
    y = packed_glu(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    assert x.grad.shape == shape


@pytest.mark.parametrize("activation", ["silu", "gelu"])  # of each kernel
def test_is_an_operator(activation):
    x = torch.randn(3, 4, 24)
    check_operator(packed_glu, (packed_glu_fwd, (x, activation)), x, activation=activation)
    torch.library.opcheck(packed_glu_bwd, (torch.randn(3, 4, 12), x, activation))


BAD = [
    (lambda x: (x.long(),), "packed_glu: x must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x: (x.double(),), "packed_glu: x must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x: (x[:, 1:],), "packed_glu: the last dimension of x must be even, gate and up, got shape (2, 7)"),
    (lambda x: (x[0, 0],), "packed_glu: the last dimension of x must be even, gate and up, got shape ()"),
    (lambda x: (x, "relu"), "packed_glu: activation must be one of silu, gelu, gelu_tanh, got 'relu'"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[12:60] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        packed_glu(*bad(torch.randn(2, 8)))
