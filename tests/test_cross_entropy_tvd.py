import re

import pytest
import torch

from formulas import cross_entropy_tvd as formula
from harness import DTYPES
from harness import check as harness_check
from harness import check_operator
from harness import fixed

op = torch.ops.liger.cross_entropy_tvd.default
fwd = torch.ops.liger.cross_entropy_tvd_fwd.default
bwd = torch.ops.liger.cross_entropy_tvd_bwd.default


def make(rows, classes, dtype=torch.float32, ignored=0):
    target = torch.randint(classes, (rows,))
    target[:ignored] = -100
    return (2 * torch.randn(rows, classes)).to(dtype), (2 * torch.randn(rows, classes)).to(dtype), target


def check(x, teacher, target, **options):
    # The loss is lse - z, and a probability exp(z - lse): both carry the rounding of lse.
    carries = max(t.float().logsumexp(-1).abs().max().item() for t in (x, teacher))
    inputs = x, fixed(teacher), fixed(target)
    return harness_check(lambda *a: op(*a, **options), formula(**options), *inputs, carries=carries)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1, 3), (5, 1000), (3, 4097)])
def test_matches_formula(path, rows, classes, dtype):
    check(*make(rows, classes, dtype))


def test_ignored_rows(path):
    x, teacher, target = make(6, 50, ignored=2)
    results = check(x, teacher, target)
    for result in results.values():
        assert torch.equal(result[:2], torch.zeros_like(result[:2]))
    target[3] = 7
    check(x, teacher, target.clamp(min=0), ignore_index=7)


def test_ignored_rows_may_hold_anything(path):
    x, teacher, target = make(4, 30, ignored=2)
    x[0], teacher[1] = torch.nan, torch.inf
    outputs = op(x.requires_grad_(), teacher, target)
    torch.testing.assert_close(
        outputs, tuple(torch.cat([torch.zeros(2), o]) for o in formula()(x[2:], teacher[2:], target[2:]))
    )
    (dx,) = torch.autograd.grad(sum(o.sum() for o in outputs), x)
    assert torch.equal(dx[:2], torch.zeros(2, 30))
    assert not dx.isnan().any()


def test_equal_distributions_and_masked_classes(path):
    """Where p is q the distance has no slope; a class that neither has adds nothing, and gets no gradient."""
    x, _, target = make(4, 50)
    x[:, 10:20] = -torch.inf
    target.clamp_(max=9)
    teacher = x.clone()
    teacher[2:, :5] += 1.0
    x.requires_grad_()
    loss, distance = op(x, teacher, target)
    assert torch.equal(distance[:2], torch.zeros(2))
    assert (distance[2:] > 0.01).all()
    (dx,) = torch.autograd.grad(distance.sum(), x)
    assert torch.equal(dx[:2], torch.zeros(2, 50))
    assert dx[2:, :5].ne(0).all()
    assert torch.equal(dx[:, 10:20], torch.zeros(4, 10))
    assert loss.isfinite().all()


def test_a_sure_target_keeps_its_digits(path):
    """Where logsumexp and the logit, near 1000, differ by 0.002, of which their difference would hold two digits."""
    x = torch.full((1, 50), 1000.0)
    x[0, 3] += 10.0
    loss, _ = op(x, torch.zeros(1, 50), torch.tensor([3]))
    torch.testing.assert_close(loss, (49 * torch.tensor([-10.0]).exp()).log1p(), rtol=1e-4, atol=0)


def test_far_apart(path):
    """Probabilities beyond what exp tells from 0: all of the mass is elsewhere."""
    x, teacher = torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]])
    loss, distance = op(x, teacher, torch.tensor([1]))
    assert (loss.item(), distance.item()) == (400.0, 1.0)


def test_either_result_alone_has_its_gradient(path):
    x, teacher, target = make(5, 50, ignored=1)
    for n in range(2):
        leaf = x.clone().requires_grad_()
        (got,) = torch.autograd.grad(op(leaf, teacher, target)[n].sum(), leaf)
        (want,) = torch.autograd.grad(formula()(leaf, teacher, target)[n].sum(), leaf)
        torch.testing.assert_close(got, want)


def test_a_teacher_of_another_dtype_and_views(path):
    x, teacher, target = make(6, 50)
    wide = torch.randn(6, 60).bfloat16()
    wide[:, 3:53] = teacher
    got = op(x.view(2, 3, 50), wide.view(2, 3, 60)[..., 3:53], target.view(2, 3))
    want = formula()(x, wide[:, 3:53].float(), target)
    torch.testing.assert_close(got, tuple(o.view(2, 3) for o in want))
    leaf = x.bfloat16().requires_grad_()
    outputs = [op(leaf, t, target) for t in (wide[:, 3:53], wide[:, 3:53].contiguous())]
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
        assert a.dtype is torch.float32
    assert torch.equal(*(torch.autograd.grad(sum(o.sum() for o in out), leaf)[0] for out in outputs))


@pytest.mark.parametrize("shape", [(0, 5), (5,)], ids=str)
def test_no_rows_and_one(path, shape):
    x = torch.randn(shape, requires_grad=True)
    loss, distance = op(x, torch.randn(shape), torch.randint(5, shape[:-1]))
    assert loss.shape == distance.shape == shape[:-1]
    (loss + distance).sum().backward()
    assert x.grad.shape == shape


def test_target_out_of_range(interpreted):
    x, teacher, _ = make(3, 8)
    loss, distance = op(x.requires_grad_(), teacher, torch.tensor([0, 8, 7]))
    (loss + distance).sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert x.grad.isnan().all(-1).tolist() == [False, True, False]


def test_is_an_operator():
    x, teacher, target = make(6, 50, ignored=1)
    check_operator(op, (fwd, (x, teacher, target, -100)), x, teacher=teacher, target=target)
    _, _, *rows = fwd(x, teacher, target, -100)
    torch.library.opcheck(bwd, (torch.randn(6), torch.randn(6), x, teacher, target, *rows, -100))


BAD = [
    (lambda x, t, y: op(x.double(), t, y), "input must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, t, y: op(x[0, 0], t[0, 0], y[0]), "input must have shape (..., C), got ()"),
    (lambda x, t, y: op(x, t[1:], y), "teacher must have shape (6, 50), got (5, 50)"),
    (lambda x, t, y: op(x, t.double(), y), "teacher must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, t, y: op(x, t.to("meta"), y), "teacher must be on cpu like the input, got meta; move it with .to()"),
    (
        lambda x, t, y: op(x, t.requires_grad_(), y),
        "teacher must not require a gradient, it gets none; pass teacher.detach()",
    ),
    (lambda x, t, y: op(x, t, y[1:]), "target must have shape (6,), got (5,)"),
    (lambda x, t, y: op(x, t, x), "target must be class indices in int64, got torch.float32"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][:50] for b in BAD])
def test_rejects(call, text):
    with pytest.raises(ValueError, match=re.escape(f"cross_entropy_tvd: {text}")):
        call(*make(6, 50))


def test_rejects_a_target_out_of_range(path, monkeypatch):
    monkeypatch.setattr("liger_aot.ops._check.CHECK", True)
    with pytest.raises(ValueError, match=r"cross_entropy_tvd: target must be in \[0, 50\) or ignore_index -100, got 50"):
        op(*make(6, 50)[:2], torch.full((6,), 50))
