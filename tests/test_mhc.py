"""Hyper-connections: mhc_coeffs, mhc_pre and mhc_post_res, and a layer between them."""

import re

import pytest
import torch

import liger_aot

import formulas
from harness import DTYPES
from harness import check
from harness import check_operator
from harness import fixed
from harness import run

mhc_coeffs = torch.ops.liger.mhc_coeffs.default
mhc_pre = torch.ops.liger.mhc_pre.default
mhc_post_res = torch.ops.liger.mhc_post_res.default
# Each number of streams that there are kernels for; one token, tokens that fill no tile, and more than a tile holds.
SHAPES = [(1, 2, 1), (3, 2, 37), (2, 9, 4, 6), (5, 8, 5), (16, 3)]
# One stream of one token, lanes left over in a small tile and in a large one, and full ones.
ANY = [(1, 1), (3, 2, 37), (2, 5, 16), (16, 3)]
WIDE = [(3, 1024), (2, 4, 2100)]  # blocks of columns, whole and ragged
FEW = {"tmax": 3, "rms_eps": 1e-2, "pre_eps": 0.1, "sinkhorn_eps": 1e-3, "post_mult": 1.5}


def of_few(*tensors):
    return mhc_coeffs(*tensors, **FEW)


def slack(dtype):
    """The gradient of phi is a matmul of gradients rounded to 16 bits."""
    return 3.0 if dtype == torch.float32 else 6.0


def coeffs(shape, dtype, others=None):
    """With logits of about one."""
    *_, hc, n = shape
    heads = hc * (hc + 2)
    phi = torch.randn(hc * n, heads) / (hc * n) ** 0.5
    return torch.randn(shape).to(dtype), phi.to(others or dtype), torch.randn(heads), *torch.tensor([0.8, 1.2, 1.5]).unbind()


def streams(shape, dtype, layer=None):
    """x, the layer's output, h_post and h_res."""
    *rest, hc, n = shape
    x, f_out = torch.randn(shape).to(dtype), torch.randn(*rest, n).to(layer or dtype)
    return x, f_out, torch.randn(*rest, hc), torch.randn(*rest, hc, hc)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_coefficients_match_their_formula(path, shape, dtype):
    check(of_few, formulas.mhc_coeffs(**FEW), *coeffs(shape, dtype), slack=slack(dtype))


@pytest.mark.parametrize("tmax", [1, 2, 20])
def test_iterations(path, tmax):
    """Twenty of them make the columns sum to 1, and the rows nearly."""
    inputs = coeffs((3, 4, 16), torch.float32)
    check(lambda *t: mhc_coeffs(*t, tmax=tmax), formulas.mhc_coeffs(tmax), *inputs, slack=slack(torch.float32))
    h_res = mhc_coeffs(*inputs, tmax=tmax)[2]
    torch.testing.assert_close(h_res.sum(-2), torch.ones(3, 4))
    assert (tmax < 20) == bool(((h_res.sum(-1) - 1).abs() > 1e-3).any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("others", DTYPES, ids=str)
def test_coefficients_of_mixed_dtypes(path, dtype, others):
    results = check(of_few, formulas.mhc_coeffs(**FEW), *coeffs((3, 4, 24), dtype, others), slack=slack(dtype))
    assert [results[f"output {n}"].dtype for n in range(3)] == [torch.float32] * 3
    assert [results[f"gradient {n}"].dtype for n in range(3)] == [dtype, others, torch.float32]


@pytest.mark.parametrize(("size", "upstream"), [(300.0, 1e-4), (0.01, 1e4)])
def test_fp16_at_any_scale(path, size, upstream):
    """1 / rms(x), a factor of the products' gradients, takes them out of fp16's range."""
    x, *others = coeffs((64, 4, 8), torch.float16)

    def scaled(function):
        return lambda *tensors: tuple(upstream * y for y in function(*tensors))

    check(scaled(of_few), scaled(formulas.mhc_coeffs(**FEW)), fixed(x * size), *others, slack=slack(torch.float16))


def test_without_eps(path):
    """Where tokens fill no tile, nothing of what is beyond them."""
    check(
        lambda *t: mhc_coeffs(*t, tmax=2, rms_eps=0.0),
        formulas.mhc_coeffs(2, 0.0),
        *coeffs((3, 4, 8), torch.float32),
        slack=3.0,
    )


def test_wide_streams(path):
    check(of_few, formulas.mhc_coeffs(**FEW), *coeffs((9, 2, 540), torch.float32), slack=slack(torch.float32))


def test_more_tokens_than_programs(interpreted):
    interpreted.count = 1
    check(of_few, formulas.mhc_coeffs(**FEW), *coeffs((10, 16, 1), torch.float32), slack=slack(torch.float32))
    assert "mhc_heads_bwd" in interpreted.launched


def test_by_hand(path):
    """Without phi, b alone says what the coefficients are; logits far from zero do not overflow."""
    x, phi, one = torch.randn(2, 2, 3), torch.zeros(6, 8), torch.ones(())
    b = torch.tensor([0.0, 200.0, -200.0, 0.0, 300.0, 0.0, 0.0, 300.0])
    h_pre, h_post, h_res = mhc_coeffs(x, phi, b, one, one, one, pre_eps=0.25, sinkhorn_eps=0.0)
    torch.testing.assert_close(h_pre, torch.tensor([[0.75, 1.25]] * 2))
    torch.testing.assert_close(h_post, torch.tensor([[0.0, 1.0]] * 2))
    torch.testing.assert_close(h_res, torch.eye(2).expand(2, 2, 2))
    phi[0, 2] = 1.0  # the first number of the first stream, to the first of h_post
    x = torch.tensor([[[3.0, 0.0, 0.0], [4.0, 0.0, 0.0]]])
    h_post = mhc_coeffs(x, phi, torch.zeros(8), one, 2 * one, one, rms_eps=0.0)[1]
    rms = (25 / 6) ** 0.5
    torch.testing.assert_close(h_post, 2 * torch.sigmoid(torch.tensor([[2 * 3 / rms, 0.0]])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ANY + WIDE, ids=str)
def test_a_layers_input_matches_its_formula(path, shape, dtype):
    x, _, h_pre, _ = streams(shape, dtype)
    check(mhc_pre, formulas.mhc_pre, x, h_pre)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ANY + WIDE, ids=str)
def test_streams_after_a_layer_match_their_formula(path, shape, dtype):
    check(mhc_post_res, formulas.mhc_post_res, *streams(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", DTYPES, ids=str)
def test_layers_of_another_dtype(path, dtype, layer):
    results = check(mhc_post_res, formulas.mhc_post_res, *streams((3, 4, 24), dtype, layer))
    assert [results[name].dtype for name in ("output 0", "gradient 0", "gradient 1")] == [dtype, dtype, layer]


def test_coefficients_of_16_bits(path):
    x, f_out, *coefficients = streams((3, 4, 24), torch.bfloat16)
    results = run(mhc_post_res, [x, f_out, *(c.bfloat16() for c in coefficients)])
    assert {r.dtype for r in results.values()} == {torch.bfloat16}
    same = run(mhc_post_res, [x, f_out, *(c.bfloat16().float() for c in coefficients)])
    assert torch.equal(results["output 0"], same["output 0"])
    h_pre = coefficients[0].bfloat16()
    of_16, of_32 = (run(mhc_pre, [x, h])["gradient 1"] for h in (h_pre, h_pre.float()))
    assert torch.equal(of_16, of_32.bfloat16())


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3, 5), (4,)], ids=str)
def test_gradients_of_some(path, wanted):
    inputs = coeffs((7, 4, 8), torch.float32)
    leaves = [i.clone().requires_grad_() for i in inputs]
    some = [i.clone().requires_grad_(n in wanted) for n, i in enumerate(inputs)]
    for each in (leaves, some):
        sum(o.square().sum() for o in of_few(*each)).backward()
    for n, (got, want) in enumerate(zip(some, leaves, strict=True)):
        assert torch.equal(got.grad, want.grad) if n in wanted else got.grad is None


def test_products_for_what_needs_no_gradient_are_left_out(interpreted):
    x, phi, b, *alphas = coeffs((7, 4, 8), torch.float32)
    of_few(x, phi, b.requires_grad_(), *alphas)[0].sum().backward()
    assert "mhc_heads_bwd" in interpreted.launched
    assert "mhc_coeffs_dx" not in interpreted.launched


def test_views_and_offsets(path):
    x, f_out, h_post, h_res = streams((2, 3, 2, 7), torch.float32)
    _, phi, *rest = coeffs((2, 7), torch.float32)
    wider = torch.randn(2, 3, 2, 10)
    for view in (x.transpose(0, 1), wider[..., 3:], x[:, :1].expand(2, 3, 2, 7)):
        lead = (t.transpose(0, 1) if len(view) == 3 else t for t in (f_out, h_post, h_res))
        for function, inputs in (
            (mhc_pre, (view, torch.randn(*view.shape[:-2], 4)[..., ::2])),
            (mhc_post_res, (view, *lead)),
            (of_few, (view, phi.t().contiguous().t(), *rest)),
        ):
            torch.testing.assert_close(run(function, inputs), run(function, [t.contiguous() for t in inputs]))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 2, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    inputs = [t.requires_grad_() for t in coeffs(shape, torch.float32)]
    results = of_few(*inputs)
    sum(r.sum() for r in results).backward()
    assert [r.shape for r in results] == [shape[:-1], shape[:-1], (*shape[:-1], shape[-2])]
    assert inputs[0].grad.shape == shape
    assert all(torch.equal(i.grad, torch.zeros_like(i)) for i in inputs[1:])
    x, f_out, h_post, h_res = streams(shape, torch.float32)
    for results in (run(mhc_pre, [x, h_post]), run(mhc_post_res, [x, f_out, h_post, h_res])):
        assert not any(r.numel() for r in results.values())


def test_are_operators():
    ops = torch.ops.liger
    inputs = coeffs((3, 2, 4, 8), torch.float32)
    options = 3, 1e-6, 0.0, 1e-6, 2.0
    check_operator(mhc_coeffs, (ops.mhc_coeffs_fwd.default, (*inputs, *options)), *inputs, tmax=3)
    *upstream, dots, norm = ops.mhc_coeffs_fwd(*inputs, *options)
    for needed in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(ops.mhc_coeffs_bwd.default, (*upstream, *inputs, dots, norm, 3, 1e-6, 1e-6, 2.0, *needed))
    x, f_out, h_post, h_res = streams((3, 2, 4, 8), torch.float32)
    check_operator(mhc_pre, (ops.mhc_pre_fwd.default, (x, h_post)), x, h_post)
    torch.library.opcheck(ops.mhc_pre_bwd.default, (f_out, x, h_post))
    check_operator(mhc_post_res, (ops.mhc_post_res_fwd.default, (x, f_out, h_post, h_res)), x, f_out, h_post, h_res)
    torch.library.opcheck(ops.mhc_post_res_bwd.default, (x, x, f_out, h_post, h_res))


C, P, R = "mhc_coeffs", "mhc_pre", "mhc_post_res"
STREAMS = "x must have shape (..., hc, n), 1 to 16 streams hc, got"
BAD = [
    (C, 0, lambda x: x.long(), "x must be float32, float16 or bfloat16, got torch.int64"),
    (C, 0, lambda x: x[0, 0], f"{STREAMS} (8,)"),
    (C, 0, lambda x: x[:, :0], f"{STREAMS} (3, 0, 8)"),
    (C, 0, lambda x: x.repeat(1, 5, 1), f"{STREAMS} (3, 20, 8)"),
    (C, 0, lambda x: x[:, :3], "x must have 2, 4, 8 or 16 streams, got 3"),
    (C, 1, lambda phi: phi[:, 1:], "phi must have shape (32, 24), got (32, 23)"),
    (C, 1, lambda phi: phi.double(), "phi must be float32, float16 or bfloat16, got torch.float64"),
    (C, 2, lambda b: b[None], "b must have shape (24,), got (1, 24)"),
    (C, 3, lambda a: a[None], "alpha_pre must have shape (), got (1,)"),
    (C, 4, lambda a: a.to("meta"), "alpha_post must be on cpu like the input, got meta; move it with .to()"),
    (C, 5, lambda a: a.long(), "alpha_res must be float32, float16 or bfloat16, got torch.int64"),
    (P, 0, lambda x: x.double(), "x must be float32, float16 or bfloat16, got torch.float64"),
    (P, 1, lambda h: h[0], "h_pre must have shape (3, 4), got (4,)"),
    (R, 0, lambda x: x.repeat(1, 5, 1), f"{STREAMS} (3, 20, 8)"),
    (R, 1, lambda f: f[:, :4], "f_out must have shape (3, 8), got (3, 4)"),
    (R, 2, lambda h: h[:2], "h_post must have shape (3, 4), got (2, 4)"),
    (R, 3, lambda h: h[..., :2], "h_res must have shape (3, 4, 4), got (3, 4, 2)"),
    (R, 3, lambda h: h.to("meta"), "h_res must be on cpu like the input, got meta; move it with .to()"),
]


@pytest.mark.parametrize(("name", "place", "bad", "text"), BAD, ids=[f"{name}-{text[:40]}" for name, *_, text in BAD])
def test_rejects(name, place, bad, text):
    x, f_out, h_post, h_res = streams((3, 4, 8), torch.float32)
    inputs = {C: list(coeffs((3, 4, 8), torch.float32)), P: [x, h_post], R: [x, f_out, h_post, h_res]}[name]
    inputs[place] = bad(inputs[place])
    with pytest.raises(ValueError, match=re.escape(f"{name}: {text}")):
        getattr(liger_aot, name)(*inputs)


def test_rejects_no_iteration():
    with pytest.raises(ValueError, match="mhc_coeffs: tmax must be 1 or more, got 0"):
        liger_aot.mhc_coeffs(*coeffs((3, 4, 8), torch.float32), tmax=0)
