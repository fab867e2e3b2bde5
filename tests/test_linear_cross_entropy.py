import inspect
import itertools
import re

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.functional import linear

from liger_aot.ops import _linear

from formulas import linear_cross_entropy as formula
from harness import DTYPES
from harness import check
from harness import check_operator
from harness import fixed

linear_cross_entropy = torch.ops.liger.linear_cross_entropy.default
linear_cross_entropy_stats = torch.ops.liger.linear_cross_entropy_stats.default
linear_cross_entropy_fwd = torch.ops.liger.linear_cross_entropy_fwd.default


def ours(**options):
    # fp32, so that what is measured is not the last rounding, of one number.
    return lambda h, w, t, b=None, cw=None: linear_cross_entropy(
        h, w, t, linear_bias=b, weight=cw, loss_dtype=torch.float32, **options
    )


def make(rows, width, classes, dtype, bias=False, class_weight=False, ignored=True):
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(classes, width) / width**0.5).to(dtype)
    target = torch.randint(classes, (rows,))
    if ignored and rows > 1:
        target[::3] = -100
    extras = [torch.randn(classes).to(dtype) if bias else None, fixed(torch.rand(classes)) if class_weight else None]
    return [hidden, weight, fixed(target), *extras]


# dlogits are rounded to 16 bits before the matmuls, as tensor cores want them, and the gradients after them and once more when
# backward divides by what the mean is over.
SLACK = 4.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "width", "classes"), [(1, 8, 3), (5, 24, 1000), (3, 8, 5000)])
def test_matches_formula(path, rows, width, classes, reduction, dtype):
    check(ours(reduction=reduction), formula(reduction=reduction), *make(rows, width, classes, dtype), slack=SLACK)


OPTIONS = [
    {"scale": 0.25},
    {"softcap": 2.0},
    {"lse_square_scale": 0.01},
    {"label_smoothing": 0.1},
    {"ignore_index": 7},
    {"scale": 3.0, "softcap": 5.0, "lse_square_scale": 1e-3, "label_smoothing": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("class_weight", [False, True])
def test_options(path, options, reduction, class_weight):
    inputs = make(7, 24, 50, torch.float32, bias=True, class_weight=class_weight, ignored="ignore_index" not in options)
    inputs[2].tensor[1] = options.get("ignore_index", 7)
    # A loss is a difference of logits and their logsumexp, here of up to 6 or so, and carries the rounding of those.
    check(ours(reduction=reduction, **options), formula(reduction=reduction, **options), *inputs, slack=SLACK, carries=6.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_options_in_16_bits(path, dtype):
    inputs = make(7, 24, 50, dtype, bias=True, class_weight=True)
    check(ours(**OPTIONS[-1]), formula(**OPTIONS[-1]), *inputs, slack=SLACK)


def test_is_torchs(path):
    hidden, weight, target, bias, class_weight = make(6, 24, 50, torch.float32, bias=True, class_weight=True)
    options = {"linear_bias": bias, "weight": class_weight.tensor, "label_smoothing": 0.1}
    got = linear_cross_entropy(hidden, weight, target.tensor, **options)
    torch.testing.assert_close(got, torch.nn.functional.linear_cross_entropy(hidden, weight, target.tensor, **options))


def test_has_torchs_arguments():
    """torch's names, in torch's order, before ours; `options` picks torch's chunking and has no meaning here."""
    names = [a.name for a in linear_cross_entropy._schema.arguments]
    theirs = [name for name in inspect.signature(torch.nn.functional.linear_cross_entropy).parameters if name != "options"]
    assert names[: len(theirs)] == theirs


@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_just_what_needs_them(path, needed, reduction, monkeypatch):
    hidden, weight, target, bias, _ = make(6, 24, 50, torch.float32, bias=True)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    loss = linear_cross_entropy(*leaves[:2], target.tensor, linear_bias=leaves[2], reduction=reduction)
    expected = torch.autograd.grad(loss.sum(), leaves)
    made, original = [], _linear.Gradients
    monkeypatch.setattr("liger_aot.ops.linear_cross_entropy.Gradients", lambda *a: made.append(a[3:]) or original(*a))
    some = [t.clone().requires_grad_(n) for t, n in zip((hidden, weight, bias), needed, strict=True)]
    loss = linear_cross_entropy(*some[:2], target.tensor, linear_bias=some[2], reduction=reduction)
    got = torch.autograd.grad(loss.sum(), [t for t in some if t.requires_grad])
    for g, e in zip(got, [e for e, n in zip(expected, needed, strict=True) if n], strict=True):
        assert torch.equal(g, e)
    assert made[-1] == needed


def test_no_buffer_for_what_needs_no_gradient():
    hidden, weight, target, *_ = make(6, 24, 50, torch.float32)
    arguments = hidden, weight, target.tensor, None, None, -100, 0.0, None, 0.0, 1.0, False, True
    *_, dhidden, dweight, dbias = linear_cross_entropy_fwd(*arguments, True, False, False)
    assert (dhidden.shape, dweight.numel(), dbias.numel()) == (hidden.shape, 0, 0)
    *_, dhidden, dweight, dbias = linear_cross_entropy_fwd(*arguments, False, True, False)
    assert (dhidden.numel(), dweight.shape, dweight.dtype) == (0, weight.shape, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [1, 4, 5, 9])
def test_chunks_join(path, monkeypatch, rows, reduction):
    monkeypatch.setattr(_linear, "CHUNK", 4)
    options = {"reduction": reduction, "lse_square_scale": 0.01}
    inputs = make(rows, 24, 50, torch.float32, bias=True, class_weight=True)
    check(ours(**options), formula(**options), *inputs, slack=SLACK)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_are_never_whole(monkeypatch, reduction):
    monkeypatch.setattr(_linear, "CHUNK", 16)
    original, seen = _linear.logits_of, []
    monkeypatch.setattr("liger_aot.ops.linear_cross_entropy.logits_of", lambda *a: seen.append(original(*a)) or seen[-1])
    hidden, weight, target, *_ = make(64, 8, 500, torch.float32)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, target.tensor, reduction=reduction).sum().backward()
    assert [tuple(s.shape) for s in seen] == [(16, 500)] * (4 if reduction == "mean" else 8)


def test_weight_gradient_is_accumulated_in_fp32(monkeypatch):
    """256 chunks whose shares of dW are each too small to show beside the sum in bf16."""
    monkeypatch.setattr(_linear, "LEAST", 1)
    monkeypatch.setattr(_linear, "CHUNK", 1)
    hidden, weight = torch.ones(512, 4, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(512, dtype=torch.int64), reduction="sum").backward()
    assert weight.grad[0].tolist() == [-256.0] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_mean_is_divided_in_fp32(path, dtype):
    """1/3 in 16 bits is off by up to one part in 256, which would be an error of every number in one direction."""
    hidden, weight, target, *_ = make(3, 24, 500, dtype, ignored=False)
    hidden.requires_grad_()
    total, mean = (linear_cross_entropy(hidden, weight, target.tensor, reduction=r) for r in ("sum", "mean"))
    (total,), (mean,) = (torch.autograd.grad(x, hidden) for x in (total, mean))
    assert torch.equal(mean, (total.float() / 3).to(dtype))


def test_small_gradients_survive_fp16(path):
    """The mean over many rows of a share of many classes is below what fp16 holds; the gradient is not lost on the way."""
    rows, classes = 64, 4096
    hidden, weight = torch.zeros(rows, 8).half(), torch.randn(classes, 8).half().requires_grad_()
    hidden[:, 0] = 1.0
    loss = linear_cross_entropy(hidden, weight, torch.arange(rows), loss_dtype=torch.float32)
    (got,) = torch.autograd.grad(loss * 65536, weight)
    exact = weight.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(cross_entropy(hidden.double() @ exact.t(), torch.arange(rows)) * 65536, exact)
    torch.testing.assert_close(got[100:, 0].double(), want[100:, 0], rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_everything_ignored(path, reduction):
    """The mean over nothing is NaN, and has no gradient, as in torch: one rank without targets must not spoil the others."""
    hidden, weight, target, bias, _ = make(4, 24, 50, torch.float32, bias=True)
    target.tensor[:] = -100
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = linear_cross_entropy(hidden, weight, target.tensor, linear_bias=bias, reduction=reduction)
    assert torch.equal(loss.isnan(), torch.full_like(loss, reduction == "mean", dtype=torch.bool))
    for gradient in torch.autograd.grad(loss.sum(), leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_stats(path):
    hidden, weight, target, *_ = make(9, 24, 50, torch.float32)
    target = target.tensor
    logits = hidden @ weight.t()
    target[1] = logits[1].argmax()
    hidden.requires_grad_()
    loss, z_loss, accuracy, predicted = linear_cross_entropy_stats(hidden, weight, target, lse_square_scale=0.01)
    valid = target != -100
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, target, lse_square_scale=0.01))
    torch.testing.assert_close(z_loss, 0.01 * logits.logsumexp(-1)[valid].square().mean())
    torch.testing.assert_close(accuracy, (logits.argmax(-1) == target)[valid].float().mean())
    assert torch.equal(predicted, torch.where(valid, logits.argmax(-1), -1))
    assert loss.requires_grad
    assert not any(t.requires_grad for t in (z_loss, accuracy, predicted))


def test_reference_path_is_torchs():
    """Probabilities, and a weight of more than two dimensions."""
    hidden, weight = torch.randn(6, 24, requires_grad=True), torch.randn(50, 24)
    target = torch.rand(6, 50).softmax(-1)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, target), cross_entropy(linear(hidden, weight), target))
    deep, target = torch.randn(5, 3, 2, 24), torch.randint(5, (6, 3, 2))
    expected = torch.nn.functional.linear_cross_entropy(hidden, deep, target)
    torch.testing.assert_close(linear_cross_entropy(hidden, deep, target), expected)
    assert hidden.grad_fn is None


def test_one_row_without_batch(path):
    hidden, weight = torch.randn(24, requires_grad=True), torch.randn(50, 24)
    loss = linear_cross_entropy(hidden, weight, torch.tensor(3))
    torch.testing.assert_close(loss, cross_entropy(weight @ hidden, torch.tensor(3)))
    loss.backward()
    assert hidden.grad.shape == (24,)


def test_loss_dtype():
    hidden, weight, target, *_ = make(6, 24, 50, torch.bfloat16)
    assert linear_cross_entropy(hidden, weight, target.tensor).dtype == torch.bfloat16
    assert linear_cross_entropy(hidden, weight, target.tensor, loss_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_is_an_operator(reduction):
    hidden, weight, target, *_ = make(6, 24, 50, torch.float32)
    arguments = hidden, weight, target.tensor
    fwd = *arguments, None, None, -100, 0.0, None, 0.0, 1.0, False, None, False, False, False
    check_operator(linear_cross_entropy, (linear_cross_entropy_fwd, fwd), *arguments, reduction=reduction)


BAD = [
    (
        lambda h, w, t: linear_cross_entropy(h, w[:, 1:], t),
        "input (..., H) and linear_weight (V, H) must agree, got (6, 24), (50, 23)",
    ),
    (lambda h, w, t: linear_cross_entropy(h.long(), w, t), "input must be float32, float16 or bfloat16, got torch.int64"),
    (lambda h, w, t: linear_cross_entropy(h, w.half(), t), "linear_weight must be torch.float32 like input, got torch.float16"),
    (lambda h, w, t: linear_cross_entropy(h, w, t, linear_bias=w[0]), "linear_bias must have shape (50,), got (24,)"),
    (lambda h, w, t: linear_cross_entropy(h, w, t, weight=w[0]), "weight must have shape (50,), got (24,)"),
    (lambda h, w, t: linear_cross_entropy(h, w, t[1:]), "target must have shape (6,), got (5,)"),
    (lambda h, w, t: linear_cross_entropy(h, w, t, reduction="avg"), "reduction must be one of none, mean, sum, got 'avg'"),
    (lambda h, w, t: linear_cross_entropy(h, w, t, label_smoothing=2.0), "label_smoothing must be between 0 and 1, got 2.0"),
    (lambda h, w, t: linear_cross_entropy(h, w, t, scale=torch.nan), "scale must be a finite number, got nan"),
    (
        lambda h, w, t: linear_cross_entropy(h, w, t, softcap=0.0),
        "softcap must be positive and finite, or None for none, got 0.0",
    ),
    (lambda h, w, t: linear_cross_entropy(h, w, t.abs() + 50), "target must be in [0, 50) or ignore_index -100, got "),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][:50] for b in BAD])
def test_rejects(call, text):
    hidden, weight, target, *_ = make(6, 24, 50, torch.float32)
    with pytest.raises(ValueError, match=re.escape(f"linear_cross_entropy: {text}")):
        call(hidden, weight, target.tensor)


def test_target_out_of_range_on_a_device_is_nan(interpreted):
    hidden, weight, target, *_ = make(3, 24, 50, torch.float32, ignored=False)
    target.tensor[1] = 50
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target.tensor, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert hidden.grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("size", [1e5, 1e-6])
def test_a_mean_does_not_depend_on_the_size_of_class_weights(path, size):
    """Weights cancel in a mean: their size must not push gradients out of what fp16 holds."""
    hidden, weight, target, *_ = make(16, 24, 50, torch.float16)
    hidden.requires_grad_()
    class_weight = torch.rand(50) + 0.5
    grads = []
    for factor in (1.0, size):
        loss = linear_cross_entropy(hidden, weight, target.tensor, weight=class_weight * factor, loss_dtype=torch.float32)
        grads.append(torch.autograd.grad(loss, hidden)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=4e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("reduction", "class_weight", "options"),
    [
        ("sum", 1e5, {"label_smoothing": 0.1}),
        ("sum", 1e5, {"lse_square_scale": 1e6}),
        ("sum", 1.0, {"lse_square_scale": 1e5}),
        ("mean", None, {"lse_square_scale": 1e5}),
        ("mean", 1e5, {"scale": -1e5}),
        ("sum", None, {"scale": 1e5}),
    ],
    ids=str,
)
def test_fp16_holds_what_backward_makes_small(path, reduction, class_weight, options):
    """A loss that is divided by the size of its weights afterwards, as by their sum, has gradients that fp16 holds."""
    scale = abs(options.get("scale", 1.0))
    size = max(class_weight or 1.0, scale, options.get("lse_square_scale", 1.0))
    hidden, weight, target, *_ = make(7, 24, 50, torch.float16)
    class_weights = None if class_weight is None else fixed(class_weight * torch.rand(50))
    every = {"reduction": reduction, **options}

    def smaller(loss):
        return lambda *inputs: loss(*inputs) / size

    check(smaller(ours(**every)), smaller(formula(**every)), hidden / scale, weight, target, None, class_weights, slack=SLACK)


@pytest.mark.parametrize("largest", [1e3, 1e4])
def test_fp16_holds_what_is_small_beside_a_large_class_weight(path, largest):
    """Of a class that is no target: the others' gradients are what they are without it."""
    hidden, weight, _, *_ = make(7, 24, 50, torch.float16)
    target = torch.arange(1, 8)
    gradients = []
    for first in (1.0, largest):
        class_weights = torch.ones(50)
        class_weights[0] = first
        leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
        linear_cross_entropy(*leaves, target, weight=class_weights, reduction="sum").backward()
        gradients.append(leaves[1].grad[8:].float())  # of classes that are no target, whose probabilities are small
    got, want = gradients
    # Both round the logits' gradients and their products to eleven bits.
    assert (got - want).norm() <= 4 * 2**-11 * want.norm()


REFUSED = [
    (
        lambda h, w, t: linear_cross_entropy(h[0], torch.randn(7, 3, 24), torch.zeros(7, dtype=torch.int64)),
        "input must be (N, H) where linear_weight has more than two dimensions, got (24,); add a batch of one, input[None]",
    ),
    (
        lambda h, w, t: linear_cross_entropy(h[0], torch.randn(7, 3, 24), torch.rand(7, 3)),
        "input must be (N, H) where linear_weight has more than two dimensions, got (24,); add a batch of one, input[None]",
    ),
    (lambda h, w, t: linear_cross_entropy(h.view(2, 3, 24), w, torch.rand(2, 3, 50)), "input must be (H,) or (N, H) where"),
    (lambda h, w, t: linear_cross_entropy(h, w, t, loss_dtype=torch.int64), "loss_dtype must be float32, float16 or bfloat16"),
    (
        lambda h, w, t: linear_cross_entropy(h, w, torch.rand(6, 50), ignore_index=2),
        "ignore_index must be negative, unused, where",
    ),
    (lambda h, w, t: linear_cross_entropy(h, torch.randn(5, 3, 23), t), "linear_weight (V, H) must agree"),
]


@pytest.mark.parametrize(("call", "text"), REFUSED, ids=[r[1][:30] for r in REFUSED])
def test_refuses(call, text):
    hidden, weight, target, *_ = make(6, 24, 50, torch.float32)
    with pytest.raises(ValueError, match=re.escape(text)):
        call(hidden, weight, target.tensor)


def test_autocast_casts_no_integers():
    hidden, weight, target, *_ = make(6, 24, 50, torch.float32)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=re.escape("linear_weight must be float32, float16 or bfloat16, got torch.int64")),
    ):
        linear_cross_entropy(hidden, weight.long(), target.tensor)
