import pytest
import torch

from liger_aot.ops import tvd as registered  # noqa: F401

from divergences import REDUCTIONS
from divergences import SHAPES
from divergences import labels
from divergences import logs
from formulas import tvd as formula
from harness import DTYPES
from harness import check
from harness import check_operator

tvd = torch.ops.liger.tvd.default
tvd_fwd = torch.ops.liger.tvd_fwd.default
tvd_bwd = torch.ops.liger.tvd_bwd.default


def ours(**options):
    # fp32, so that what is measured is not the last rounding, of one number.
    options = {"loss_dtype": torch.float32} | options if options.get("reduction") != "none" else options
    return lambda p, q, labels=None: tvd(p, q, labels, **options)


def make(*shape, dtype):
    return logs(*shape).exp().to(dtype), logs(*shape).exp().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_formula(path, shape, reduction, dtype):
    check(ours(reduction=reduction), formula(reduction), *make(*shape, dtype=dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_labels(path, reduction, ignore_index):
    options = {"reduction": reduction, "ignore_index": ignore_index}
    given = labels(5, ignored=2, ignore_index=ignore_index)
    check(ours(**options), formula(**options), *make(5, 50, dtype=torch.float32), given)


def test_no_gradient_where_they_are_equal(path):
    p, q = (t.requires_grad_() for t in make(2, 9, dtype=torch.float32))
    with torch.no_grad():
        q[:, 4] = p[:, 4]
    dp, dq = torch.autograd.grad(tvd(p, q, reduction="sum"), (p, q))
    assert torch.equal(dp, (p - q).detach().sign() / 2)
    assert torch.equal(dq, -dp)


def test_is_an_operator():
    (p, q), given = make(6, 24, dtype=torch.float32), labels(6).tensor
    check_operator(tvd, (tvd_fwd, (p, q, given, -100, False)), p, q, given)
    check_operator(tvd, (tvd_fwd, (p, q, None, -100, True)), p, q, reduction="none")
    torch.library.opcheck(tvd_bwd, (torch.randn(()), p, q, given, torch.rand(()), -100, True, True))
    torch.library.opcheck(tvd_bwd, (torch.randn(6, 24), p, q, None, None, -100, True, False))
