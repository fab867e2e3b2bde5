import re

import pytest
import torch
from torch.nn import functional

from liger_aot.ops import kl_div as registered  # noqa: F401

from divergences import REDUCTIONS
from divergences import SHAPES
from divergences import labels
from divergences import logs
from formulas import kl_div as formula
from harness import DTYPES
from harness import check
from harness import check_operator

kl_div = torch.ops.liger.kl_div.default
kl_div_fwd = torch.ops.liger.kl_div_fwd.default
kl_div_bwd = torch.ops.liger.kl_div_bwd.default


def ours(**options):
    # fp32, so that what is measured is not the last rounding, of one number.
    options = {"loss_dtype": torch.float32} | options if options.get("reduction") != "none" else options
    return lambda x, target, labels=None: kl_div(x, target, labels, **options)


def make(*shape, dtype=torch.float32, log_target=False):
    target = logs(*shape)
    return logs(*shape, dtype=dtype), (target if log_target else target.exp()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(path, shape, log_target, dtype):
    check(ours(log_target=log_target), formula(log_target=log_target), *make(*shape, dtype=dtype, log_target=log_target))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("labelled", [False, True])
def test_options(path, reduction, log_target, labelled, dtype):
    options = {"reduction": reduction, "log_target": log_target, "ignore_index": 3}
    given = [labels(5, ignored=2, ignore_index=3)] if labelled else []
    check(ours(**options), formula(**options), *make(5, 2100, dtype=dtype, log_target=log_target), *given)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_is_torchs(path, reduction):
    """Of three dimensions, of which batchmean counts the first."""
    x, target = make(3, 4, 10)
    got = kl_div(x, target, reduction=reduction)
    torch.testing.assert_close(got, functional.kl_div(x, target, reduction=reduction))


def test_eps(path):
    x, target = make(3, 50)
    target[:, ::3] *= 1e-4
    check(ours(eps=1e-3), formula(eps=1e-3), x, target)


def test_a_target_of_zero(path):
    """torch's loss is 0 there too, and NaN where the input is -inf."""
    x, target = make(3, 20)
    target[:, 3:6], x[:, 3] = 0.0, -torch.inf
    x.requires_grad_()
    losses = kl_div(x, target, reduction="none")
    want = functional.kl_div(x, target, reduction="none")
    assert want[:, 3].isnan().all()
    torch.testing.assert_close(losses, want.nan_to_num(0.0))
    (dx,) = torch.autograd.grad(losses.sum(), x)
    assert torch.equal(dx, -target)
    losses = kl_div(x, target.log(), reduction="none", log_target=True)
    torch.testing.assert_close(losses, want.nan_to_num(0.0), rtol=1e-5, atol=1e-7)


def test_is_an_operator():
    (x, target), given = make(6, 24), labels(6).tensor
    check_operator(kl_div, (kl_div_fwd, (x, target, given, -100, False, 1e-10, False)), x, target, given, reduction="batchmean")
    check_operator(kl_div, (kl_div_fwd, (x, x, None, -100, True, 0.0, True)), x, x, reduction="none", log_target=True)
    for log_target in (False, True):
        options = -100, log_target, 1e-10
        torch.library.opcheck(kl_div_bwd, (torch.randn(()), x, target, given, torch.rand(()), *options, True, True))
        torch.library.opcheck(kl_div_bwd, (torch.randn(6, 24), x, target, None, None, *options, True, False))


@pytest.mark.parametrize("eps", [-1e-3, 1.0, torch.nan])
def test_rejects_eps(eps):
    with pytest.raises(ValueError, match=re.escape(f"kl_div: eps must be at least 0 and below 1, got {eps}")):
        kl_div(logs(2, 8), logs(2, 8).exp(), eps=eps)
