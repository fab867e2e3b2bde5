import re
import weakref

import pytest
import torch
from torch.nn.functional import linear

from liger_aot.ops import _linear

from divergences import REDUCTIONS
from divergences import labels
from formulas import linear_jsd as formula
from harness import DTYPES
from harness import check as harness_check
from harness import check_operator

linear_jsd = torch.ops.liger.linear_jsd.default
linear_jsd_fwd = torch.ops.liger.linear_jsd_fwd.default
softmax_jsd_fwd = torch.ops.liger.softmax_jsd_fwd.default
softmax_jsd_bwd = torch.ops.liger.softmax_jsd_bwd.default


def ours(**options):
    # fp32, so that what is measured is not the last rounding, of one number.
    def call(x, w, y, v, b=None, c=None, given=None):
        return linear_jsd(x, w, y, v, given, student_bias=b, teacher_bias=c, loss_dtype=torch.float32, **options)

    return call


def make(rows, classes, dtype=torch.float32, bias=False):
    """Two heads of different widths, with weights as heads have them."""
    heads = []
    for width in (24, 16):
        heads += [torch.randn(rows, width).to(dtype), (torch.randn(classes, width) / width**0.5).to(dtype)]
    return heads + [torch.randn(classes).to(dtype) for _ in range(2)] if bias else heads


def check(function, reference, *inputs, temperature=1.0):
    # A logarithm of p / q is a difference of two of softmax, each z - lse: they carry the rounding of both lse, the gradients
    # 1 / temperature times. dlogits are rounded to 16 bits before the matmuls, as tensor cores want them, and the gradients
    # after them and once more when backward divides by what the mean is over.
    logits = [linear(x.float(), w.float()) / temperature for x, w in (inputs[:2], inputs[2:4])]
    carries = sum(z.logsumexp(-1).abs().max().item() for z in logits) * max(1, 1 / temperature)
    slack = 2.0 if inputs[0].dtype == torch.float32 else 6.0
    return harness_check(function, reference, *inputs, carries=carries, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "classes"), [(1, 3), (5, 1000), (3, 4097)])
def test_matches_formula(path, rows, classes, beta, dtype):
    check(ours(beta=beta), formula(beta), *make(rows, classes, dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("labelled", [False, True])
def test_options(path, reduction, labelled):
    for beta, temperature, bias in ((0.0, 2.0, False), (0.1, 0.5, True), (0.9, 2.0, False), (1.0, 0.5, True)):
        options = {"beta": beta, "temperature": temperature, "reduction": reduction, "ignore_index": 3}
        inputs = make(6, 50, bias=bias)
        inputs += [None] * (not bias) * 2 + ([labels(6, ignored=2, ignore_index=3)] if labelled else [])
        check(ours(**options), formula(**options), *inputs, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_options_in_16_bits(path, reduction, dtype):
    options = {"beta": 0.3, "temperature": 2.0, "reduction": reduction}
    check(ours(**options), formula(**options), *make(6, 50, dtype, bias=True), labels(6), temperature=2.0)


def test_a_teacher_of_another_dtype(path):
    x, w, y, v = make(4, 30)
    leaves = [x.requires_grad_(), w.requires_grad_(), y.bfloat16().requires_grad_(), v.bfloat16().requires_grad_()]
    loss = linear_jsd(*leaves)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, formula()(x, w, *(t.float() for t in leaves[2:])))
    assert [g.dtype for g in torch.autograd.grad(loss, leaves)] == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_more_dimensions(path, shape, reduction):
    x, w, y, v = make(6, 50)
    given = labels(6, ignored=2).tensor
    rows = 6 if shape else 1
    flat = linear_jsd(x[-rows:], w, y[-rows:], v, given[-rows:], reduction=reduction)
    got = linear_jsd(
        x[-rows:].view(*shape, 24), w, y[-rows:].view(*shape, 16), v, given[-rows:].view(shape), reduction=reduction
    )
    assert torch.equal(got, flat.view(shape) if reduction == "none" else flat)


@pytest.mark.parametrize("needed", [(1, 1, 1, 0, 0, 0), (0, 1, 0, 0, 0, 0), (0, 0, 1, 1, 0, 0), (0, 0, 0, 0, 1, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_gradients_of_just_what_needs_them(path, needed, reduction, monkeypatch):
    def grad(tensors):
        x, w, y, v, b, c = tensors
        loss = linear_jsd(x, w, y, v, student_bias=b, teacher_bias=c, beta=0.3, reduction=reduction)
        return torch.autograd.grad(loss.sum(), [t for t in tensors if t.requires_grad])

    inputs = make(6, 50, bias=True)
    order = [needed[0], needed[1], needed[3], needed[4], needed[2], needed[5]]
    expected = grad([t.clone().requires_grad_() for t in inputs])
    made, original = [], _linear.Gradients
    monkeypatch.setattr("liger_aot.ops.linear_jsd.Gradients", lambda *a: made.append(a[3:]) or original(*a))
    got = grad([t.clone().requires_grad_(bool(n)) for t, n in zip(inputs, order, strict=True)])
    for g, e in zip(got, [e for e, n in zip(expected, order, strict=True) if n], strict=True):
        assert torch.equal(g, e)
    assert (*made[-2], *made[-1]) == tuple(map(bool, needed))


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_chunks_join(path, monkeypatch, rows, reduction):
    monkeypatch.setattr(_linear, "CHUNK", 4)
    options = {"beta": 0.3, "reduction": reduction}
    check(ours(**options), formula(**options), *make(rows, 50, bias=True), labels(rows, ignored=rows > 1))


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_logits_are_never_whole(monkeypatch, reduction):
    """A chunk's two tensors of logits are gone when those of the next are made."""
    monkeypatch.setattr(_linear, "CHUNK", 16)
    original, seen, shapes = _linear.logits_of, [], set()

    def watched(*args):
        assert len(seen) % 2 or all(logits() is None for logits in seen)
        logits = original(*args)
        shapes.add(tuple(logits.shape))
        seen.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr("liger_aot.ops.linear_jsd.logits_of", watched)
    x, w, y, v = make(64, 500)
    linear_jsd(x.requires_grad_(), w, y, v, reduction=reduction).sum().backward()
    assert shapes == {(16, 500)}
    assert len(seen) == (8 if reduction == "batchmean" else 16)


def test_weight_gradient_is_accumulated_in_fp32(monkeypatch):
    """256 chunks whose shares of dW are each too small to show beside the sum in bf16."""
    monkeypatch.setattr(_linear, "LEAST", 1)
    monkeypatch.setattr(_linear, "TILE", 1)
    monkeypatch.setattr(_linear, "CHUNK", 1)
    ones, weight = torch.ones(512, 4).bfloat16(), torch.zeros(2, 4).bfloat16().requires_grad_()
    teacher = torch.tensor([[20.0] * 4, [0.0] * 4]).bfloat16()
    linear_jsd(ones, weight, ones, teacher, beta=0.0, reduction="sum").backward()
    assert weight.grad[0].tolist() == [-256.0] * 4


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_compare(path, reduction, rows):
    """The mean over nothing is NaN, and has no gradient, as that of cross_entropy."""
    x, w, y, v = (t.requires_grad_() for t in make(rows, 50))
    loss = linear_jsd(x, w, y, v, torch.full((rows,), -100), reduction=reduction)
    torch.testing.assert_close(loss, torch.full_like(loss, torch.nan if "mean" in reduction else 0.0), equal_nan=True)
    for gradient in torch.autograd.grad(loss.sum(), (x, w, y, v)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_ignored_rows_may_hold_anything(path):
    x, w, y, v = make(5, 30)
    given = labels(5, ignored=2).tensor
    with torch.no_grad():
        x[0], y[1] = torch.nan, torch.inf
    loss = linear_jsd(x.requires_grad_(), w, y, v, given)
    torch.testing.assert_close(loss, formula()(x[2:], w, y[2:], v))
    (dx,) = torch.autograd.grad(loss, x)
    assert torch.equal(dx[:2], torch.zeros(2, 24))
    assert not dx.isnan().any()


def test_masked_classes(path):
    """A class of logit -inf in both heads is as if it were not there."""
    x, w, y, v, b, c = make(4, 50, bias=True)
    b[10:20] = c[10:20] = -torch.inf
    keep = [*range(10), *range(20, 50)]
    x.requires_grad_()
    loss = linear_jsd(x, w, y, v, student_bias=b, teacher_bias=c, beta=0.3)
    want = formula(0.3)(x, w[keep], y, v[keep], b[keep], c[keep])
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(o, x)[0] for o in (loss, want)))


def test_far_apart_logits(path):
    """Of each, the other's likeliest class is beyond what exp tells from 0."""
    x, y = torch.tensor([[200.0]]), torch.tensor([[-200.0]])
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    for beta, want in ((0.5, torch.tensor(2.0).log()), (0.0, torch.tensor(400.0)), (1.0, torch.tensor(400.0))):
        torch.testing.assert_close(linear_jsd(x, weight, y, weight, beta=beta), want)


def test_is_an_operator():
    x, w, y, v = make(6, 50)
    given = labels(6).tensor
    options = -100, 0.3, 0.7, *(False,) * 6
    check_operator(linear_jsd, (linear_jsd_fwd, (x, w, y, v, given, None, None, *options)), x, w, y, v, given, beta=0.3)
    check_operator(linear_jsd, (linear_jsd_fwd, (x, w, y, v, None, None, None, *options)), x, w, y, v, reduction="none")
    logits = torch.randn(6, 50), torch.randn(6, 50)
    torch.library.opcheck(softmax_jsd_fwd, (*logits, given, -100, 0.3, 0.7))
    rows = softmax_jsd_fwd(*logits, given, -100, 0.3, 0.7)
    arguments = *logits, given, rows[1], rows[2], rows[3], -100, 0.3, 0.7, 0.5, torch.bfloat16
    for dloss in (torch.randn(6), torch.randn(())):
        torch.library.opcheck(softmax_jsd_bwd, (dloss, *arguments))


BAD = [
    (
        lambda x, w, y, v: linear_jsd(x, w[:, 1:], y, v),
        "student_input (..., H) and student_weight (V, H) must agree, got (6, 24), (50, 23)",
    ),
    (
        lambda x, w, y, v: linear_jsd(x, w, y, v[:, 1:]),
        "teacher_input (..., H) and teacher_weight (V, H) must agree, got (6, 16), (50, 15)",
    ),
    (
        lambda x, w, y, v: linear_jsd(x, w.half(), y, v),
        "student_weight must be torch.float32 like student_input, got torch.float16",
    ),
    (
        lambda x, w, y, v: linear_jsd(x, w, y.double(), v),
        "teacher_input must be float32, float16 or bfloat16, got torch.float64",
    ),
    (lambda x, w, y, v: linear_jsd(x, w, y, v, teacher_bias=x[0]), "teacher_bias must have shape (50,), got (24,)"),
    (
        lambda x, w, y, v: linear_jsd(x, w, y[1:], v),
        "teacher_input and teacher_weight must have the student's rows (6,) and its 50 classes, got (5, 16) and (50, 16)",
    ),
    (
        lambda x, w, y, v: linear_jsd(x, w, y, v[1:]),
        "teacher_input and teacher_weight must have the student's rows (6,) and its 50 classes, got (6, 16) and (49, 16)",
    ),
    (
        lambda x, w, y, v: linear_jsd(x, w, y.to("meta"), v.to("meta")),
        "teacher_input must be on cpu like student_input, got meta; move it with .to()",
    ),
    (lambda x, w, y, v: linear_jsd(x, w, y, v, torch.ones(5).long()), "shift_labels must have shape (6,), got (5,)"),
    (lambda x, w, y, v: linear_jsd(x, w, y, v, beta=-1.0), "beta must be between 0 and 1, got -1.0"),
    (lambda x, w, y, v: linear_jsd(x, w, y, v, temperature=0.0), "temperature must be positive, got 0.0"),
    (
        lambda x, w, y, v: linear_jsd(x, w, y, v, reduction="avg"),
        "reduction must be one of none, mean, sum, batchmean, got 'avg'",
    ),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][:50] for b in BAD])
def test_rejects(call, text):
    with pytest.raises(ValueError, match=re.escape(f"linear_jsd: {text}")):
        call(*make(6, 50))
