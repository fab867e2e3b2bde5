"""What holds for kl_div, jsd and tvd alike."""

import re

import pytest
import torch

from liger_aot.ops import jsd
from liger_aot.ops import kl_div
from liger_aot.ops import tvd

from divergences import REDUCTIONS
from divergences import labels
from divergences import logs

OPERATORS = {"kl_div": (kl_div.kl_div, False, True), "jsd": (jsd.jsd, True, True), "tvd": (tvd.tvd, False, False)}
divergence_reduce = torch.ops.liger.divergence_reduce.default
EACH = pytest.mark.parametrize("name", OPERATORS)


def make(name, *shape, dtype=torch.float32):
    """The operator, and an input and a target for it."""
    function, log_target, log_input = OPERATORS[name]
    x, y = logs(*shape), logs(*shape)
    return function, (x if log_input else x.exp()).to(dtype), (y if log_target else y.exp()).to(dtype)


@EACH
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 2, 3, 7)], ids=str)
def test_any_number_of_dimensions(path, name, shape, reduction):
    function, x, y = make(name, *shape)
    given = labels(*shape[:-1], ignored=int(len(shape) > 1)).tensor
    flat = function(x.view(-1, 7), y.view(-1, 7), given.view(-1), reduction=reduction)
    assert torch.equal(function(x, y, given, reduction=reduction), flat.view(shape) if reduction == "none" else flat)


@EACH
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_views_and_offsets(path, name, reduction):
    function, x, y = make(name, 4, 13)
    for view in (lambda t: t[:, 3:11], lambda t: t[:, ::2], torch.t, lambda t: t[:1].expand(4, 13), lambda t: t[::2]):
        leaves = [view(t).detach().requires_grad_() for t in (x, y)]
        plain = [view(t).clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, y)]
        loss, expected = (function(*pair, reduction=reduction) for pair in (leaves, plain))
        assert torch.equal(loss, expected)
        rows_apart = torch.randn(*loss.shape[:1], 2, *loss.shape[1:]).select(min(1, loss.dim()), 0)
        for upstream in (torch.randn(loss.t().shape).t(), rows_apart):
            calls = (loss, leaves, upstream), (expected, plain, upstream.contiguous())
            for got, want in zip(*(torch.autograd.grad(*call, retain_graph=True) for call in calls), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize(("batch", "width"), [(0, 1), (0, 7), (3, 1), (1, 1)])
@pytest.mark.parametrize("labelled", [False, True])
def test_reduction_of_many_rows(path, batch, width, labelled):
    """More than are summed at once."""
    losses, given = torch.rand(5000), labels(5000, ignored=1700).tensor if labelled else None
    result, factor = divergence_reduce(losses, given, -100, batch, width, torch.float32)
    divisor = (batch or (3300 if labelled else 5000)) * width
    torch.testing.assert_close(result.double(), losses.double().sum() / divisor, rtol=1e-6, atol=0)
    torch.testing.assert_close(factor.double(), torch.tensor(1 / divisor).double(), rtol=1e-6, atol=0)


@EACH
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_may_hold_anything(path, name, reduction):
    function, x, y = make(name, 5, 30)
    given = labels(5, ignored=2).tensor
    x[0], x[1], y[0] = torch.nan, torch.inf, -torch.inf
    leaves = [t.requires_grad_() for t in (x, y)]
    rows = [t[2:].detach().requires_grad_() for t in leaves]
    loss, expected = function(*leaves, given, reduction=reduction), function(*rows, reduction=reduction)
    torch.testing.assert_close(loss[2:] if reduction == "none" else loss, expected)
    for got, want in zip(torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(expected.sum(), rows), strict=True):
        torch.testing.assert_close(got[2:], want)
        assert torch.equal(got[:2], torch.zeros(2, 30))


@EACH
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_compare(path, name, reduction):
    """The mean over nothing is NaN, and has no gradient, as that of cross_entropy."""
    for shape, given in (((3, 8), torch.full((3,), -100)), ((0, 8), None), ((3, 0), None), ((0, 0), None)):
        function, x, y = make(name, *shape)
        x.requires_grad_()
        loss = function(x, y, given, reduction=reduction)
        rows = 0 if given is not None else shape[0]
        divisor = {"batchmean": rows, "mean": rows * shape[1]}.get(reduction, 1)
        torch.testing.assert_close(loss, torch.full_like(loss, 0.0 if divisor else torch.nan), equal_nan=True)
        loss.sum().backward()
        assert torch.equal(x.grad, torch.zeros(shape))


@EACH
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dtypes(path, name, reduction):
    """The wider of the two, or loss_dtype; a loss that is not rounded to the inputs' dtype comes from fp32."""
    function, x, y = make(name, 4, 20, dtype=torch.bfloat16)
    exact = function(x.float(), y.float(), reduction=reduction)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        leaves = [t.detach().requires_grad_() for t in (x, y)]
        loss = function(*leaves, reduction=reduction, loss_dtype=dtype)
        assert torch.equal(loss, exact.to(dtype))
        assert [g.dtype for g in torch.autograd.grad(loss.sum(), leaves)] == [torch.bfloat16] * 2
    assert function(x, y, reduction=reduction).dtype == torch.bfloat16
    for pair in ((x, y.float()), (x.float(), y), (x, y.half())):
        wide = function(*pair, reduction=reduction)
        assert wide.dtype == torch.float32
        assert torch.equal(wide, function(*(t.float() for t in pair), reduction=reduction))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(x, y, reduction=reduction), exact)


@EACH
def test_backward_twice(path, name):
    function, x, y = make(name, 4, 30)
    loss = function(x.requires_grad_(), y)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@EACH
def test_labels_in_bytes(path, name):
    function, x, y = make(name, 4, 30)
    given = torch.tensor([1, 255, 3, 4])
    assert torch.equal(function(x, y, given.byte(), ignore_index=255), function(x, y, given, ignore_index=255))


@EACH
def test_only_the_gradients_that_are_needed_are_launched(interpreted, name):
    function, x, y = make(name, 4, 30)
    for needed in ((True, False), (False, True), (True, True)):
        leaves = [t.detach().requires_grad_(n) for t, n in zip((x, y), needed, strict=True)]
        interpreted.launched.clear()
        function(*leaves).backward()
        assert interpreted.launched.count("divergence_bwd") == sum(needed)


BAD = [
    (lambda f, x, y: f(x.double(), y), "input must be float32, float16 or bfloat16, got torch.float64"),
    (lambda f, x, y: f(x, y.double()), "target must be float32, float16 or bfloat16, got torch.float64"),
    (lambda f, x, y: f(x[0, 0], y[0, 0]), "input must have shape (..., C), got ()"),
    (lambda f, x, y: f(x, y[:, 1:]), "target must have shape (2, 8), got (2, 7)"),
    (lambda f, x, y: f(x, y.to("meta")), "target must be on cpu like the input, got meta; move it with .to()"),
    (lambda f, x, y: f(x, y, torch.ones(3).long()), "shift_labels must have shape (2,), got (3,)"),
    (lambda f, x, y: f(x, y, x[:, 0]), "shift_labels must be class indices in int64, got torch.float32"),
    (lambda f, x, y: f(x, y, torch.ones(2).long().to("meta")), "shift_labels must be on cpu like the input, got meta"),
    (lambda f, x, y: f(x, y, reduction="avg"), "reduction must be one of none, mean, sum, batchmean, got 'avg'"),
]


@EACH
@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][:50] for b in BAD])
def test_rejects(name, call, text):
    function, x, y = make(name, 2, 8)
    with pytest.raises(ValueError, match=re.escape(f"{name}: {text}")):
        call(function, x, y)
    with pytest.raises(ValueError, match="loss_dtype must be float32, float16 or bfloat16, or None"):
        function(x, y, loss_dtype=torch.int64)
