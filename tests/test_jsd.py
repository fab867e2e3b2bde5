import itertools
import re

import pytest
import torch

from liger_aot.ops import jsd as registered  # noqa: F401

from divergences import REDUCTIONS
from divergences import SHAPES
from divergences import labels
from divergences import logs
from formulas import jsd as formula
from harness import DTYPES
from harness import check
from harness import check_operator

jsd = torch.ops.liger.jsd.default
jsd_fwd = torch.ops.liger.jsd_fwd.default
jsd_bwd = torch.ops.liger.jsd_bwd.default


def ours(**options):
    # fp32, so that what is measured is not the last rounding, of one number.
    options = {"loss_dtype": torch.float32} | options if options.get("reduction") != "none" else options
    return lambda x, y, labels=None: jsd(x, y, labels, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_formula(path, shape, beta, dtype):
    check(ours(beta=beta), formula(beta), logs(*shape, dtype=dtype), logs(*shape, dtype=dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination_of_options(path, reduction, dtype):
    for beta, labelled, ignore_index in itertools.product((0.0, 0.1, 0.9, 1.0), (False, True), (-100, 3)):
        x, y = logs(4, 50, dtype=dtype), logs(4, 50, dtype=dtype)
        given = [labels(4, ignore_index=ignore_index)] if labelled else []
        options = {"beta": beta, "reduction": reduction, "ignore_index": ignore_index}
        check(ours(**options), formula(**options), x, y, *given)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_over_several_blocks(path, reduction, dtype):
    options = {"beta": 0.3, "reduction": reduction}
    check(ours(**options), formula(**options), logs(3, 4100, dtype=dtype), logs(3, 4100, dtype=dtype), labels(3))


def test_vocabulary_of_gpt2(path):
    check(ours(), formula(), logs(2, 50257, dtype=torch.bfloat16), logs(2, 50257, dtype=torch.bfloat16))


def test_digits_of_what_is_nearly_equal(path):
    """The gradient is q times a difference of logarithms; taken of x and log m themselves it would carry their rounding."""
    x = torch.full((2, 4096), -20.0)
    y = (x + 1e-3 * torch.randn(2, 4096)).requires_grad_()
    (got,) = torch.autograd.grad(jsd(x, y, reduction="sum"), y)
    wide = y.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(formula(reduction="sum")(x.double(), wide), wide)
    # Half of p times a difference near 1e-3 / 2, off by an ulp of 1, the logarithm's argument: 2e-4 of it.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=x.exp().max().item() * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_classes_that_are_far_apart(path, beta):
    """At either end of beta the difference of the logarithms counts as it is, also where exp of it is no number."""
    x = torch.tensor([[-200.0, 0.0]]).requires_grad_()
    y = torch.tensor([[0.0, -200.0]]).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    loss, want = jsd(x, y, beta=beta, reduction="sum"), formula(beta=beta, reduction="sum")(*wide)
    torch.testing.assert_close(loss.double(), want)
    for got, expected in zip(torch.autograd.grad(loss, (x, y)), torch.autograd.grad(want, wide), strict=True):
        torch.testing.assert_close(got.double(), expected)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_classes_that_neither_has(path, beta):
    """A class of probability 0 in both adds nothing, and changes no other's gradient."""
    x, y = logs(4, 30), logs(4, 30)
    wide = [torch.cat([t, torch.full((4, 7), -torch.inf)], 1).requires_grad_() for t in (x, y)]
    near = [t.requires_grad_() for t in (x, y)]
    loss, expected = jsd(*wide, beta=beta), jsd(*near, beta=beta)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(loss, wide), torch.autograd.grad(expected, near), strict=True):
        torch.testing.assert_close(got[:, :30], want)
        assert torch.equal(got[:, 30:], torch.zeros(4, 7))


@pytest.mark.parametrize(("beta", "infinite"), [(0.0, False), (0.5, False), (1.0, True)])
def test_classes_that_one_does_not_have(path, beta, infinite):
    """Bounded between the two, and infinite where the student gives to a class what the teacher says is impossible."""
    x, y = logs(2, 8), logs(2, 8)
    y[:, 3] = -torch.inf
    losses = jsd(x, y, beta=beta, reduction="none")
    want = formula(beta, "none")(x.double(), y.double())
    want[:, 3] = torch.inf if infinite else (1 - beta) * x[:, 3].double().exp() * -torch.log(torch.tensor(1 - beta))
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(jsd(y, x, beta=1 - beta, reduction="none"), losses)


def test_with_a_half_it_is_symmetric(path):
    x, y = logs(3, 70), logs(3, 70)
    torch.testing.assert_close(jsd(x, y), jsd(y, x))
    assert jsd(x, x).abs() < 1e-6


def test_is_an_operator():
    x, y, given = logs(6, 24), logs(6, 24), labels(6).tensor
    check_operator(jsd, (jsd_fwd, (x, y, given, -100, 0.3, False)), x, y, given, beta=0.3)
    check_operator(jsd, (jsd_fwd, (x, y, None, -100, 1.0, True)), x, y, reduction="none", beta=1.0)
    torch.library.opcheck(jsd_bwd, (torch.randn(()), x, y, given, torch.rand(()), -100, 0.3, True, True))
    torch.library.opcheck(jsd_bwd, (torch.randn(6, 24), x, y, None, None, -100, 0.3, False, True))


@pytest.mark.parametrize("beta", [-0.1, 1.5, torch.nan])
def test_rejects_beta(beta):
    text = f"jsd: beta must be between 0 and 1, got {beta}"
    with pytest.raises(ValueError, match=re.escape(text)):
        jsd(logs(2, 8), logs(2, 8), beta=beta)
