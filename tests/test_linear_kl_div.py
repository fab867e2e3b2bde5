import re
import weakref

import pytest
import torch
from torch.nn.functional import linear

from liger_aot.ops import _linear

from divergences import REDUCTIONS
from divergences import labels
from formulas import linear_kl_div as formula
from harness import DTYPES
from harness import check as harness_check
from harness import check_operator
from harness import fixed

linear_kl_div = torch.ops.liger.linear_kl_div.default
linear_kl_div_fwd = torch.ops.liger.linear_kl_div_fwd.default
softmax_kl_div_fwd = torch.ops.liger.softmax_kl_div_fwd.default
softmax_kl_div_bwd = torch.ops.liger.softmax_kl_div_bwd.default


def ours(**options):
    # fp32, so that what is measured is not the last rounding, of one number.
    def call(x, w, target, b=None, given=None):
        return linear_kl_div(x, w, target, given, student_bias=b, loss_dtype=torch.float32, **options)

    return call


def make(rows, classes, dtype=torch.float32, bias=False):
    """A head, with weights as heads have them, probabilities and a bias or None."""
    x, w = torch.randn(rows, 24).to(dtype), (torch.randn(classes, 24) / 24**0.5).to(dtype)
    return [x, w, (2 * torch.randn(rows, classes)).softmax(-1), torch.randn(classes).to(dtype) if bias else None]


def check(function, reference, x, w, target, *more, temperature=1.0):
    # A logarithm of softmax is z - lse, and p in a gradient exp(z - lse): both carry the rounding of lse, the gradients
    # 1 / temperature times, and as many times as the target sums to. dlogits are rounded to 16 bits before the matmuls, as
    # tensor cores want them, and the gradients after them and once more when backward divides by what the mean is over.
    lse = (linear(x.float(), w.float()) / temperature).logsumexp(-1).abs().max().item()
    carries = lse * max(1, 1 / temperature) * max(1, target.sum(-1).max().item())
    slack = 2.0 if x.dtype == torch.float32 else 6.0
    return harness_check(function, reference, x, w, fixed(target), *more, carries=carries, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1, 3), (3, 4097)])
def test_matches_formula(path, rows, classes, target_dtype, dtype):
    x, w, target, _ = make(rows, classes, dtype)
    check(ours(), formula(), x, w, target.to(target_dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("labelled", [False, True])
def test_options(path, reduction, labelled):
    for temperature, bias in ((2.0, False), (0.5, True)):
        options = {"temperature": temperature, "reduction": reduction, "ignore_index": 3}
        inputs = make(6, 50, bias=bias) + ([labels(6, ignored=2, ignore_index=3)] if labelled else [])
        check(ours(**options), formula(**options), *inputs, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_options_in_16_bits(path, reduction, dtype):
    options = {"temperature": 2.0, "reduction": reduction}
    check(ours(**options), formula(**options), *make(6, 50, dtype, bias=True), labels(6), temperature=2.0)


def test_zeros_eps_and_numbers_that_are_no_probabilities(path):
    """A target of 0 adds 0, one below eps its part of log(eps); one that sums to 3 has three times the gradient of softmax."""
    x, w, target, _ = make(4, 50)
    target[0, :25], target[1], target[2] = 0.0, 0.0, 3 * target[2]
    for eps in (0.0, 0.02):
        check(ours(eps=eps), formula(eps=eps), x, w, target)
        check(ours(eps=eps, reduction="none"), formula(eps=eps, reduction="none"), x, w, target)
    assert linear_kl_div(x, w, target, reduction="none")[1] == 0


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_more_dimensions(path, shape, reduction):
    x, w, target, _ = make(6, 50)
    given, rows = labels(6, ignored=2).tensor, 6 if shape else 1
    flat = linear_kl_div(x[-rows:], w, target[-rows:], given[-rows:], reduction=reduction)
    views = x[-rows:].view(*shape, 24), w, target[-rows:].view(*shape, 50), given[-rows:].view(shape)
    assert torch.equal(linear_kl_div(*views, reduction=reduction), flat.view(shape) if reduction == "none" else flat)


def test_views(path):
    """Rows of the target that lie apart, and labels with a step."""
    x, w, target, _ = make(6, 50)
    wide, step = torch.randn(6, 60), labels(12, ignored=5).tensor
    wide[:, 3:53] = target
    x.requires_grad_()
    got, want = linear_kl_div(x, w, wide[:, 3:53], step[::2]), linear_kl_div(x, w, target, step[::2].contiguous())
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(loss, x)[0] for loss in (got, want)))


@pytest.mark.parametrize("needed", [(1, 1, 1), (0, 1, 0), (0, 0, 1), (1, 0, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_gradients_of_just_what_needs_them(path, needed, reduction, monkeypatch):
    x, w, target, b = make(6, 50, bias=True)

    def grad(tensors):
        loss = linear_kl_div(tensors[0], tensors[1], target, student_bias=tensors[2], reduction=reduction)
        return torch.autograd.grad(loss.sum(), [t for t in tensors if t.requires_grad])

    expected = grad([t.clone().requires_grad_() for t in (x, w, b)])
    made, original = [], _linear.Gradients
    monkeypatch.setattr("liger_aot.ops.linear_kl_div.Gradients", lambda *a: made.append(a[3:]) or original(*a))
    got = grad([t.clone().requires_grad_(bool(n)) for t, n in zip((x, w, b), needed, strict=True)])
    for g, e in zip(got, [e for e, n in zip(expected, needed, strict=True) if n], strict=True):
        assert torch.equal(g, e)
    assert made[-1] == tuple(map(bool, needed))


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_chunks_join(path, monkeypatch, rows, reduction):
    monkeypatch.setattr(_linear, "CHUNK", 4)
    check(ours(reduction=reduction), formula(reduction=reduction), *make(rows, 50, bias=True), labels(rows, ignored=rows > 1))


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_logits_are_never_whole(monkeypatch, reduction):
    """A chunk's are gone when those of the next are made."""
    monkeypatch.setattr(_linear, "CHUNK", 16)
    original, seen, shapes = _linear.logits_of, [], set()

    def watched(*args):
        assert all(logits() is None for logits in seen)
        logits = original(*args)
        shapes.add(tuple(logits.shape))
        seen.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr("liger_aot.ops.linear_kl_div.logits_of", watched)
    x, w, target, _ = make(64, 500)
    linear_kl_div(x.requires_grad_(), w, target, reduction=reduction).sum().backward()
    assert shapes == {(16, 500)}
    assert len(seen) == (4 if reduction == "batchmean" else 8)


def test_weight_gradient_is_accumulated_in_fp32(monkeypatch):
    """512 chunks whose shares of dW are each too small to show beside the sum in bf16."""
    monkeypatch.setattr(_linear, "LEAST", 1)
    monkeypatch.setattr(_linear, "TILE", 1)
    monkeypatch.setattr(_linear, "CHUNK", 1)
    ones, weight = torch.ones(512, 4).bfloat16(), torch.zeros(2, 4).bfloat16().requires_grad_()
    linear_kl_div(ones, weight, torch.tensor([[1.0, 0.0]]).expand(512, 2), reduction="sum").backward()
    assert weight.grad[0].tolist() == [-256.0] * 4


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_compare(path, reduction, rows):
    """The mean over nothing is NaN, and has no gradient, as that of cross_entropy."""
    x, w, target, _ = make(rows, 50)
    loss = linear_kl_div(x.requires_grad_(), w.requires_grad_(), target, torch.full((rows,), -100), reduction=reduction)
    torch.testing.assert_close(loss, torch.full_like(loss, torch.nan if "mean" in reduction else 0.0), equal_nan=True)
    for gradient in torch.autograd.grad(loss.sum(), (x, w)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_ignored_rows_may_hold_anything(path):
    x, w, target, _ = make(5, 30)
    given = labels(5, ignored=2).tensor
    x[0], target[1] = torch.nan, torch.inf
    loss = linear_kl_div(x.requires_grad_(), w, target, given)
    torch.testing.assert_close(loss, formula()(x[2:], w, target[2:]))
    (dx,) = torch.autograd.grad(loss, x)
    assert torch.equal(dx[:2], torch.zeros(2, 24))
    assert not dx.isnan().any()
    upstream = torch.tensor([torch.nan, torch.inf, 1.0, 1.0, 1.0])
    (alone,) = torch.autograd.grad(linear_kl_div(x, w, target, given, reduction="none"), x, upstream)
    torch.testing.assert_close(alone, 3 * dx)


def test_masked_classes(path):
    """A class of logit -inf that the target has not is as if it were not there; one that it has costs infinity."""
    x, w, target, b = make(4, 50, bias=True)
    b[10:20], target[:, 10:20] = -torch.inf, 0.0
    keep = [*range(10), *range(20, 50)]
    loss = linear_kl_div(x.requires_grad_(), w, target, student_bias=b)
    want = formula()(x, w[keep], target[:, keep], b[keep])
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(o, x)[0] for o in (loss, want)))
    target[2, 12] = 0.5
    assert linear_kl_div(x, w, target, student_bias=b, reduction="none").isinf().tolist() == [False, False, True, False]


def test_is_an_operator():
    x, w, target, _ = make(6, 50)
    given = labels(6).tensor
    options = -100, 1e-3, 0.7, False, False, False
    some = {"target": target, "shift_labels": given, "eps": 1e-3}
    check_operator(linear_kl_div, (linear_kl_div_fwd, (x, w, target, given, None, *options)), x, w, **some)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    torch.library.opcheck(linear_kl_div, (*leaves, target), {"reduction": "none"})
    logits = torch.randn(6, 50)
    torch.library.opcheck(softmax_kl_div_fwd, (logits, target, given, -100, 1e-3, 0.7))
    _, lse, mass = softmax_kl_div_fwd(logits, target, given, -100, 1e-3, 0.7)
    for dloss in (torch.randn(6), torch.randn(())):
        torch.library.opcheck(softmax_kl_div_bwd, (dloss, logits, target, given, lse, mass, -100, 0.7, torch.bfloat16))


BAD = [
    (
        lambda x, w, t: linear_kl_div(x, w[:, 1:], t),
        "student_input (..., H) and student_weight (V, H) must agree, got (6, 24), (50, 23)",
    ),
    (
        lambda x, w, t: linear_kl_div(x, w.half(), t),
        "student_weight must be torch.float32 like student_input, got torch.float16",
    ),
    (lambda x, w, t: linear_kl_div(x, w, t, student_bias=x[0]), "student_bias must have shape (50,), got (24,)"),
    (lambda x, w, t: linear_kl_div(x, w, t[1:]), "target must have shape (6, 50), got (5, 50)"),
    (lambda x, w, t: linear_kl_div(x, w, t[:, 1:]), "target must have shape (6, 50), got (6, 49)"),
    (lambda x, w, t: linear_kl_div(x, w, t.double()), "target must be float32, float16 or bfloat16, got torch.float64"),
    (
        lambda x, w, t: linear_kl_div(x, w, t.to("meta")),
        "target must be on cpu like the input, got meta; move it with .to()",
    ),
    (
        lambda x, w, t: linear_kl_div(x, w, t.requires_grad_()),
        "target must not require a gradient, it gets none; pass target.detach()",
    ),
    (lambda x, w, t: linear_kl_div(x, w, t, torch.ones(5).long()), "shift_labels must have shape (6,), got (5,)"),
    (lambda x, w, t: linear_kl_div(x, w, t, temperature=0.0), "temperature must be positive, got 0.0"),
    (lambda x, w, t: linear_kl_div(x, w, t, eps=1.0), "eps must be at least 0 and below 1, got 1.0"),
    (
        lambda x, w, t: linear_kl_div(x, w, t, reduction="avg"),
        "reduction must be one of none, mean, sum, batchmean, got 'avg'",
    ),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][:50] for b in BAD])
def test_rejects(call, text):
    with pytest.raises(ValueError, match=re.escape(f"linear_kl_div: {text}")):
        call(*make(6, 50)[:3])
