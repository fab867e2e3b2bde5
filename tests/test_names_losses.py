"""Liger's names of losses: the numbers that Liger-Kernel documents, and its dtypes."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
import triton.language as tl
from triton.runtime import interpreter

import liger_aot
import liger_aot.transformers as names
import liger_aot.transformers.functional as L  # noqa: N812
from liger_aot.functional import CrossEntropyOutput

import formulas
from harness import check
from harness import run
from ligers import build


def test_divergences_by_position():
    """The formulas of Liger's docstrings."""
    x, y, labels = torch.randn(8, 6).log_softmax(-1), torch.randn(8, 6).log_softmax(-1), torch.randint(6, (8,))
    labels[3] = 2
    keep = (labels != 2)[:, None]
    p, q = y.exp(), x.exp()
    kl = (p * (y - x)).sum()
    torch.testing.assert_close(L.liger_kl_div(x, p), kl / 48)
    torch.testing.assert_close(L.liger_kl_div(x, y, True, True, "sum", True, 1e-3), kl)
    few = p.where(p > 0.1, 1e-4)
    want = (few * (few.clamp(min=1e-2).log() - x)).sum() / 8
    for got in (
        L.liger_kl_div(x, few, reduction="batchmean", eps=1e-2),
        names.LigerKLDIVLoss(1e-2, reduction="batchmean")(x, few),
        liger_aot.ops.LigerKLDivLossFunction.apply(x, few, "batchmean", False, 1e-2),
    ):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(names.LigerKLDIVLoss(1e-10, None, None, "sum", True)(x, y), kl)
    log_m = (0.1 * p + 0.9 * q).log()
    want = ((0.1 * p * (y - log_m) + 0.9 * q * (x - log_m)) * keep).sum() / keep.sum()
    for got in (
        L.liger_jsd(x, y, labels, 0.1, 2),
        names.LigerJSD(0.1, 2)(x, y, labels),
        liger_aot.ops.LigerJSDFunction.apply(x, y, labels, 0.1, 2),
    ):
        torch.testing.assert_close(got, want)
    want = (0.5 * (p - q).abs() * keep).sum() / keep.sum()
    for got in (
        L.liger_tvd(p, q, labels, "batchmean", 2),
        names.LigerTVDLoss("batchmean", 2)(p, q, labels),
        liger_aot.ops.LigerTVDLossFunction.apply(p, q, labels, "batchmean", 2),
    ):
        torch.testing.assert_close(got, want)
    a, b, v, w = torch.randn(8, 4), torch.randn(8, 3), torch.randn(6, 4), torch.randn(6, 3)
    want = L.liger_jsd((a @ v.t() / 2).log_softmax(-1), (b @ w.t() / 2).log_softmax(-1), labels, 0.1, 2)
    for got in (
        L.liger_fused_linear_jsd(a, v, b, w, labels, 0.1, 2, 2.0, torch.float32),
        names.LigerFusedLinearJSD(0.1, 2, 2.0, torch.float32)(a, v, b, w, labels),
        liger_aot.ops.LigerFusedLinearJSDFunction.apply(a, v, b, w, labels, 0.1, 2, 2.0, torch.float32),
    ):
        torch.testing.assert_close(got, want)
    given = torch.rand(8, 6).requires_grad_()  # which gets no gradient
    want = (given * (given.clamp(min=0.3).log() - (a @ v.t() / 2).log_softmax(-1)) * keep).sum() / (6 * keep.sum())
    options = "mean", 2, 2.0, 0.3, torch.float32
    for got in (
        L.liger_fused_linear_kl_div(a, v, given, labels, *options),
        names.LigerFusedLinearKLDivLoss(*options)(a, v, given, labels),
        liger_aot.ops.LigerFusedLinearKLDivFunction.apply(a, v, given, labels, *options),
    ):
        assert not got.requires_grad
        torch.testing.assert_close(got, want.detach())


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x, y, h, w, labels: m.liger_cross_entropy(x, labels),
        lambda m, x, y, h, w, labels: m.liger_fused_linear_cross_entropy(h, w, labels),
        lambda m, x, y, h, w, labels: m.liger_jsd(x.log_softmax(-1), y.log_softmax(-1), labels),
        lambda m, x, y, h, w, labels: m.liger_tvd(x.softmax(-1), y.softmax(-1), labels),
        lambda m, x, y, h, w, labels: m.liger_fused_linear_jsd(h, w, h, w, labels),
        lambda m, x, y, h, w, labels: m.liger_fused_linear_kl_div(h, w, y.softmax(-1), labels),
    ],
    ids=["cross_entropy", "fused_linear_cross_entropy", "jsd", "tvd", "fused_linear_jsd", "fused_linear_kl_div"],
)
def test_no_row_that_counts(call):
    """NaN, torch's mean over nothing, and gradients of 0: docs/names.md."""
    inputs = [torch.randn(shape).requires_grad_() for shape in ((5, 4), (5, 4), (5, 3), (4, 3))]
    loss = call(L, *inputs, torch.full((5,), -100))
    assert loss.isnan()
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert not any(g.any() for g in gradients if g is not None)


LABELS = torch.tensor([3, 1, -100, 0, 2])
FUNCTIONAL, SCALED = "transformers.functional", {"use_token_scaling": True}
LOSSES = [
    *(
        (FUNCTIONAL, "liger_cross_entropy", lambda f, o, x, y, h, w: f(x, LABELS, **o), {"reduction": r})
        for r in ("mean", "none")
    ),
    *(
        (FUNCTIONAL, "liger_fused_linear_cross_entropy", lambda f, o, x, y, h, w: f(h, w, LABELS, **o), options)
        for options in ({}, {"reduction": "none"}, SCALED, SCALED | {"reduction": "none"})
    ),
    ("ops", "LigerFusedLinearCrossEntropyFunction", lambda f, o, x, y, h, w: f.apply(h, w, LABELS), {}),
    ("transformers", "LigerFusedLinearCrossEntropyLoss", lambda f, o, x, y, h, w: f()(w, h, LABELS), {}),
    *(
        (FUNCTIONAL, name, lambda f, o, x, y, h, w: f(x.softmax(-1), y.softmax(-1), **o), {"reduction": r})
        for name in ("liger_kl_div", "liger_tvd")
        for r in ("mean", "none")
    ),
    (FUNCTIONAL, "liger_jsd", lambda f, o, x, y, h, w: f(x.log_softmax(-1), y.log_softmax(-1), LABELS), {}),
    (
        FUNCTIONAL,
        "liger_fused_linear_jsd",
        lambda f, o, x, y, h, w: f(h, w, y, w.detach() @ h[:4].detach().mT @ y[:4], LABELS),
        {},
    ),
    (FUNCTIONAL, "liger_fused_linear_kl_div", lambda f, o, x, y, h, w: f(h, w, y.softmax(-1), LABELS), {}),
    ("ops", "LigerFusedCETVDFunction", lambda f, o, x, y, h, w: f.apply(x, y, LABELS), {}),
    ("ops", "LigerFusedLinearScaledCrossEntropyFunction", lambda f, o, x, y, h, w: f.apply(h, w, LABELS), {}),
    ("transformers", "LigerVocabParallelCrossEntropy", lambda f, o, x, y, h, w: f()(x[:, None], LABELS[:, None]), {}),
]


@pytest.mark.parametrize(("module", "name", "call", "options"), LOSSES, ids=[f"{e[1]} {e[3]}" for e in LOSSES])
def test_losses_and_gradients_have_ligers_dtypes(module, name, call, options, monkeypatch):
    """In 16 bits; None where a target or a teacher gets no gradient."""
    theirs = pytest.importorskip(f"liger_kernel.{module}", reason="liger-kernel, to compare with, is not installed")
    widen = interpreter._implicit_cvt  # which leaves a Python float that a kernel takes without a method that it calls
    number = lambda x: tl.tensor(interpreter.TensorHandle(np.array([x], np.float32), tl.float32), tl.float32)  # noqa: E731
    monkeypatch.setattr(interpreter, "_implicit_cvt", lambda x: number(x) if type(x) is float else widen(x))
    inputs = [torch.randn(shape).half() for shape in ((5, 4), (5, 4), (5, 3), (4, 3))]

    def dtypes(function):
        given = [t.clone().requires_grad_() for t in inputs]
        out = call(function, options, *given)
        results = out if isinstance(out, tuple) else (out,)
        gradients = torch.autograd.grad(results[0].sum(), given, allow_unused=True)
        return [t if t is None else t.dtype for t in (*results, *gradients)]

    assert dtypes(getattr(importlib.import_module(f"liger_aot.{module}"), name)) == dtypes(getattr(theirs, name))


def test_cross_entropy_and_distance_by_position():
    x, teacher, target = torch.randn(8, 9), torch.randn(8, 9).requires_grad_(), torch.randint(9, (8,))
    target[3] = 2
    want = formulas.cross_entropy_tvd(2)(x, teacher.detach(), target)
    for got in (
        liger_aot.ops.LigerFusedCETVDFunction.apply(x, teacher, target, 2),
        names.LigerFusedCETVDLoss(2)(x, teacher, target),
    ):
        assert not any(out.requires_grad for out in got)  # the teacher gets no gradient
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", ["global", "partition"])
def test_vocabulary_parallel_by_position(mode):
    x, target = torch.randn(4, 2, 9), torch.randint(9, (4, 2))
    target[1, 1] = 2
    options = {"ignore_index": 2, "reduction": "none"}
    for formula, smoothing in (("pytorch", 0.2), ("megatron", 0.2 * 9 / 8)):
        want = F.cross_entropy(x.flatten(0, 1), target.flatten(), label_smoothing=smoothing, **options).view(4, 2)
        got = liger_aot.ops.LigerVocabParallelCEFunction.apply(x, target, None, 2, 0.2, formula, mode)
        torch.testing.assert_close(got, want)
        module = build("LigerVocabParallelCrossEntropy", 2, 0.2, "none", formula, mode)
        assert torch.equal(module(x, target), got)


def losses():
    x, w, b = torch.randn(8, 6), torch.randn(9, 6), torch.randn(9)
    target, ce_weight = torch.randint(9, (8,)), torch.rand(9)
    target[3] = 4
    return x, w, b, target, ce_weight


def test_cross_entropy_by_position():
    x, _, _, target, ce_weight = losses()
    x = torch.randn(8, 9)
    got = L.liger_cross_entropy(x, target, ce_weight, None, 4, None, "sum", 0.1, 1e-2, 5.0, True, True, True)
    z, keep = 5.0 * torch.tanh(x / 5.0), target != 4
    z_loss = 1e-2 * torch.logsumexp(z, 1).square()[keep].sum()
    want = F.cross_entropy(z, target, ce_weight, ignore_index=4, reduction="sum", label_smoothing=0.1) + z_loss
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(got.z_loss, z_loss)
    torch.testing.assert_close(got.token_accuracy, (z.argmax(1) == target)[keep].float().mean())
    assert torch.equal(got.predicted_tokens, z.argmax(1).where(keep, -1))
    module = names.LigerCrossEntropyLoss(ce_weight, 4, 1e-2, 0.1, "sum", 5.0, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(module(x, target), got, strict=True))
    four = liger_aot.ops.LigerCrossEntropyFunction.apply(x, target, ce_weight, 4, 1e-2, 0.1, "sum", 5.0)
    assert four[1:] == (None, None, None)
    assert torch.equal(four[0], got.loss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_fused_linear_cross_entropy_by_position(reduction):
    x, w, b, target, ce_weight = losses()
    options = ce_weight, 4, 0.0, 0.1, reduction, 5.0

    def reference(x, w, b):
        z = 5.0 * torch.tanh(F.linear(x, w, b) / 5.0)
        return F.cross_entropy(z, target, ce_weight, ignore_index=4, reduction=reduction, label_smoothing=0.1)

    module = names.LigerFusedLinearCrossEntropyLoss(*options, accum_dtype=torch.float32)
    want = run(reference, (x, w, b))
    torch.testing.assert_close(
        run(lambda x, w, b: L.liger_fused_linear_cross_entropy(x, w, target, b, *options), (x, w, b)), want
    )
    torch.testing.assert_close(run(lambda x, w, b: module(w, x, target, b), (x, w, b)), want)
    four = liger_aot.ops.LigerFusedLinearCrossEntropyFunction.apply(x, w, target, b, *options, False, None, False, True)
    torch.testing.assert_close(four[0], reference(x, w, b))
    assert four[1] is None
    assert four[2] is not None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_token_scaling(reduction, weighted):
    """Each token's loss times the probability of its target, which is a constant to the gradient."""
    x, w, b, target, ce_weight = losses()
    target[4:] = F.linear(x, w, b).argmax(1)[4:]
    ce_weight = ce_weight if weighted else None

    def reference(x, w, b):
        z = 5.0 * torch.tanh(F.linear(x, w, b) / 5.0)
        probability = z.softmax(1).gather(1, target[:, None])[:, 0].detach()
        loss = F.cross_entropy(z, target, ce_weight, ignore_index=4, reduction="none") * probability
        divisor = (torch.ones(9) if ce_weight is None else ce_weight)[target][target != 4].sum()
        return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / divisor}[reduction]

    options = {"ignore_index": 4, "softcap": 5.0, "reduction": reduction, "use_token_scaling": True}
    got = run(lambda x, w, b: L.liger_fused_linear_cross_entropy(x, w, target, b, ce_weight, **options), (x, w, b))
    torch.testing.assert_close(got, run(reference, (x, w, b)))
    if not weighted:
        flags = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
        out = L.liger_fused_linear_cross_entropy(x, w, target, b, lse_square_scale=0.1, **options, **flags)
        plain = {"reduction": reduction, "ignore_index": 4, "softcap": 5.0}
        stats = liger_aot.linear_cross_entropy(x, w, target, linear_bias=b, lse_square_scale=0.1, **plain, **flags)
        assert isinstance(out, CrossEntropyOutput)
        torch.testing.assert_close(out[2:], stats[2:])
        torch.testing.assert_close(out.loss, reference(x, w, b) + out.z_loss)


def test_token_scaling_of_16_bits():
    """The probability is that of the logits in fp32, not of a loss that was rounded."""
    x, w = torch.randn(64, 16).bfloat16(), torch.randn(99, 16).bfloat16()
    target = F.linear(x, w).argmax(1)

    def reference(x, w):
        loss = F.cross_entropy(F.linear(x, w), target, reduction="none")
        return loss * (-loss.detach()).exp()

    options = {"reduction": "none", "use_token_scaling": True}
    # A loss carries the rounding of its lse; dlogits are rounded to 16 bits before the matmuls, and the gradients after them.
    carries = F.linear(x.float(), w.float()).logsumexp(-1).max().item()
    check(lambda *t: L.liger_fused_linear_cross_entropy(*t, target, **options), reference, x, w, slack=4.0, carries=carries)


def test_refuses_what_it_does_not_compute():
    x, w, _, target, ce_weight = losses()
    with pytest.raises(
        NotImplementedError, match="use_token_scaling must have reduction sum or none with both ce_weight and lse"
    ):
        L.liger_fused_linear_cross_entropy(x, w, target, None, ce_weight, lse_square_scale=0.1, use_token_scaling=True)
