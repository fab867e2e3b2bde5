import itertools
import math
import re

import pytest
import torch
from torch.nn import functional

from liger_aot.ops import _check
from liger_aot.ops import cross_entropy as registered  # noqa: F401

from formulas import cross_entropy as by_torch
from harness import DTYPES
from harness import check as harness_check
from harness import check_operator
from harness import fixed

cross_entropy = torch.ops.liger.cross_entropy.default
cross_entropy_stats = torch.ops.liger.cross_entropy_stats.default
cross_entropy_fwd = torch.ops.liger.cross_entropy_fwd.default
cross_entropy_reduce = torch.ops.liger.cross_entropy_reduce.default
cross_entropy_bwd = torch.ops.liger.cross_entropy_bwd.default
# One row, a ragged tail, both BLOCKs, several turns of the loop.
SHAPES = [(1, 3), (3, 100), (6, 1024), (4, 1025), (2, 9001)]


def check(function, reference, x, *others):
    # A loss is lse - z, and p in a gradient is exp(z - lse): both carry the rounding of lse, here 5 to 15.
    lse = x.detach().float().logsumexp(-1).nan_to_num(0, 0, 0)
    return harness_check(function, reference, x, *others, carries=lse.abs().max().item())


def make(rows, classes, dtype=torch.float32, ignored=1, ignore_index=-100):
    target = torch.randint(classes, (rows,))
    target[torch.randperm(rows)[:ignored]] = ignore_index
    return (2 * torch.randn(rows, classes)).to(dtype), target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(path, shape, dtype):
    check(cross_entropy, by_torch(), *make(*shape, dtype, ignored=shape[0] > 1))


def test_vocabulary_of_gpt2(path):
    check(cross_entropy, by_torch(), *make(2, 50257, torch.bfloat16))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_every_combination_of_options(path, reduction, softcap):
    for weighted, smoothing, ignore_index, scale in itertools.product((False, True), (0.0, 0.2), (-100, 3), (0.0, 1e-2)):
        x, target = make(3, 50, ignored=1, ignore_index=ignore_index)
        options = {"label_smoothing": smoothing, "ignore_index": ignore_index, "lse_square_scale": scale}
        options |= {"softcap": softcap, "reduction": reduction}
        weight = [fixed(torch.rand(50))] if weighted else []
        check(lambda *a, o=options: cross_entropy(*a, **o), by_torch(**options), x, target, *weight)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_over_several_blocks(path, softcap, dtype):
    x, target = make(3, 4097, dtype)
    options = {"label_smoothing": 0.1, "lse_square_scale": 1e-3, "softcap": softcap}
    check(lambda *a: cross_entropy(*a, **options), by_torch(**options), x, target, fixed(torch.rand(4097).to(dtype)))


@pytest.mark.parametrize("mean", [False, True])
def test_reduction_of_many_rows(path, mean):
    rows, weight = 5000, torch.rand(9)
    loss, lse, target, predicted = torch.rand(rows), torch.rand(rows), *torch.randint(9, (2, rows))
    target[torch.rand(rows) < 0.3] = -100
    got, totals = cross_entropy_reduce(loss, lse, target, weight, predicted, -100, 0.1, mean, 9, torch.float32)
    valid = target != -100
    weights, number = weight[target[valid]].double().sum() if mean else 1, valid.sum() if mean else 1
    z_loss, accuracy = 0.1 * lse[valid].double().square().sum() / number, (predicted == target).sum() / valid.sum()
    want = torch.tensor([1 / weights, 1 / number, z_loss, accuracy], dtype=torch.float32)
    torch.testing.assert_close(totals, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, (loss[valid].double().sum() / weights + z_loss).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_stats(path, reduction):
    x, target = make(7, 5000, ignored=2)
    x[0, [7, 1031, 4103]] = x[0].max() + 1  # of equals the first
    target[1] = x[1].argmax()
    options = {"lse_square_scale": 1e-2, "reduction": reduction}
    loss, z_loss, accuracy, predicted = cross_entropy_stats(x, target, **options)
    valid = target != -100
    best = torch.where(valid, x.argmax(-1), -1)
    hits = (best == target).float()
    squares = 1e-2 * torch.where(valid, torch.logsumexp(x, -1), 0).square()
    assert torch.equal(loss, cross_entropy(x, target, **options))
    assert torch.equal(predicted, best)
    assert predicted.dtype == torch.int64
    number = valid.sum() if reduction == "mean" else 1
    torch.testing.assert_close(z_loss, squares if reduction == "none" else squares.sum() / number)
    torch.testing.assert_close(accuracy, hits if reduction == "none" else hits.sum() / valid.sum())
    loss, *others = cross_entropy_stats(x.requires_grad_(), target, **options)
    assert loss.requires_grad
    assert not any(o.requires_grad for o in others)
    got, want = (torch.autograd.grad(f.sum(), x)[0] for f in (loss, by_torch(**options)(x, target)))
    torch.testing.assert_close(got, want)


def test_an_ignored_target_is_never_a_hit(path):
    x = torch.randn(4, 20)
    target = torch.where(torch.arange(4) == 2, x.argmax(-1), -1)  # -1 is what is predicted there, too
    _, _, accuracy, predicted = cross_entropy_stats(x, target, ignore_index=-1, reduction="none")
    assert predicted.tolist() == target.tolist()
    assert accuracy.tolist() == [0, 0, 1, 0]
    assert cross_entropy_stats(x, target, ignore_index=-1)[2] == 1


@pytest.mark.parametrize("shape", [(7,), (2, 7, 3), (2, 7, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_any_number_of_dimensions(path, shape, reduction):
    target = torch.randint(7, shape[:0] if len(shape) == 1 else (shape[0], *shape[2:]))
    x = torch.randn(shape)
    check(
        lambda x, t: cross_entropy(x, t, reduction=reduction),
        lambda x, t: functional.cross_entropy(x, t, reduction=reduction),
        x,
        target,
    )
    for got in cross_entropy_stats(x, target, reduction="none"):
        assert got.shape == target.shape


def test_views_and_offsets(interpreted):
    base, target = torch.randn(8, 77), torch.arange(16)[::2]
    formula = by_torch(reduction="none")
    for x in (base[:, 3:60], base[:, ::2], torch.randn(70, 8).t(), torch.randn(1, 40).expand(8, 40)):
        check(lambda x, t: cross_entropy(x, t, reduction="none"), formula, x, target)
    x = base.clone().requires_grad_()
    cross_entropy(x, target, reduction="none").sum().backward()  # the upstream gradient has stride 0
    torch.testing.assert_close(x.grad, torch.autograd.grad(formula(x, target).sum(), x)[0])
    assert "cross_entropy_bwd" in interpreted.launched


def test_of_equal_logits_the_first_is_predicted(path):
    x = torch.randn(4, 9001)
    places = [[7, 1100], [7 + 1024, 7 + 4096], [5000, 5000 + 1024, 5000 + 4096 - 1024], [9000, 8999]]
    for row, at in zip(x, places, strict=True):
        row[at] = 9.0
    predicted = cross_entropy_stats(x, torch.zeros(4, dtype=torch.int64))[3]
    assert predicted.tolist() == [min(at) for at in places]


def test_more_rows_than_are_summed_at_once(path):
    rows, weight = 4500, torch.rand(5)
    loss, lse, target = torch.rand(rows), torch.rand(rows), torch.randint(5, (rows,))
    loss[::7], lse[::7], target[::7] = 0, 0, -100
    predicted = torch.where(target < 2, target, -1)
    result, totals = cross_entropy_reduce(loss, lse, target, weight, predicted, -100, 1e-2, True, 5, torch.float32)
    valid = target >= 0
    weights, number = weight[target[valid]].double().sum(), valid.sum()
    z_loss = 1e-2 * lse[valid].double().square().sum() / number
    hits = (valid & (target < 2)).sum()
    torch.testing.assert_close(totals, torch.stack([1 / weights, 1 / number, z_loss, hits / number]).float())
    torch.testing.assert_close(result, (loss[valid].double().sum() / weights + z_loss).float())


def test_targets_in_bytes(path):
    x, target = make(4, 20, ignored=0)
    assert torch.equal(cross_entropy(x, target.byte()), cross_entropy(x, target))


def test_result_dtypes(path):
    x, target = make(4, 20, torch.bfloat16)
    weight = torch.rand(20)
    for dtype in DTYPES:
        for reduction in "none", "mean":
            loss = cross_entropy(x.requires_grad_(), target, weight, reduction=reduction, loss_dtype=dtype)
            assert loss.dtype == dtype
            assert torch.autograd.grad(loss.sum(), x)[0].dtype == torch.bfloat16
    exact = functional.cross_entropy(x.double(), target, weight.double())
    torch.testing.assert_close(cross_entropy(x, target, weight, loss_dtype=torch.float32).double(), exact, rtol=1e-6, atol=0)


def test_large_and_infinite_logits(path):
    x = torch.tensor([[1e4, 9999.0, -torch.inf], [-torch.inf, -3e4, -torch.inf], [5.0, -torch.inf, 4.0]]).repeat(1, 700)
    target = torch.tensor([1, 1, 1])
    want = functional.cross_entropy(x.double(), target, reduction="none").float()
    torch.testing.assert_close(cross_entropy(x, target, reduction="none"), want)
    rows = torch.full((2, 2000), -torch.inf)
    rows[0, :1030] = torch.nan
    assert cross_entropy(rows, torch.zeros(2, dtype=torch.int64), reduction="none").isnan().all()
    assert cross_entropy(torch.tensor([[3e19, 0.0, -3e19]]), torch.tensor([0])) == 0  # whose square is inf


def test_confident_rows_keep_their_digits(path):
    x = torch.zeros(3, 2000)
    x[:, 5] = torch.tensor([30.0, 24.0, 20.0])
    target = torch.full((3,), 5)
    check(lambda x, t: cross_entropy(x, t, reduction="none"), by_torch(reduction="none"), x, target)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nothing_to_learn_from(path, reduction):
    for x, target in ((torch.randn(3, 8), torch.full((3,), -100)), (torch.randn(0, 8), torch.zeros(0, dtype=torch.int64))):
        x = x.requires_grad_()
        got, want = (f(x, target, reduction=reduction) for f in (cross_entropy, functional.cross_entropy))
        torch.testing.assert_close(got, want, equal_nan=True)
        got.sum().backward()
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (0,), (0, 5, 3)], ids=str)
def test_nothing_to_choose_from(path, shape, reduction):
    x = torch.zeros(shape, requires_grad=True)
    target = torch.full(shape[:1] * (len(shape) > 1) + shape[2:], -100)
    got, want = (f(x, target, reduction=reduction) for f in (cross_entropy, functional.cross_entropy))
    torch.testing.assert_close(got, want, equal_nan=True)
    got.sum().backward()
    assert x.grad.shape == shape
    _, _, _, predicted = cross_entropy_stats(x, target, label_smoothing=0.1, lse_square_scale=0.1)
    assert torch.equal(predicted, torch.full_like(target, -1))


def test_ignored_rows_may_hold_anything(path):
    x, target = torch.randn(4, 30), torch.tensor([2, -100, -100, 4])
    x[1], x[2] = torch.nan, torch.inf
    check(lambda x, t: cross_entropy(x, t)[None], lambda x, t: by_torch()(x[::3], t[::3])[None], x, target)


@pytest.mark.parametrize("wrong", [-1, 8])
def test_target_out_of_range_poisons_its_row(interpreted, wrong):
    x, target = torch.randn(3, 8, requires_grad=True), torch.tensor([0, wrong, 7])
    loss = cross_entropy(x, target, torch.rand(8), reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert x.grad.isnan().all(-1).tolist() == [False, True, False]
    assert cross_entropy(x, target).isnan()


@pytest.mark.parametrize("wrong", [-1, 8])
def test_target_out_of_range_is_an_error_where_that_costs_nothing(path, wrong, monkeypatch):
    monkeypatch.setattr(_check, "CHECK", path is not None)
    text = re.escape(f"cross_entropy: target must be in [0, 8) or ignore_index -100, got {wrong}")
    with pytest.raises(ValueError, match=text):
        cross_entropy(torch.randn(2, 8), torch.tensor([-100, wrong]))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3)], ids=str)
def test_probabilities(reduction, shape):
    x, target, weight = torch.randn(shape), torch.rand(shape), fixed(torch.rand(5))
    options = {"reduction": reduction, "label_smoothing": 0.1}
    check(lambda *a: cross_entropy(*a, **options), lambda *a: functional.cross_entropy(*a, **options), x, target, weight)
    got = cross_entropy(x.bfloat16(), target, softcap=3.0, lse_square_scale=1e-2, reduction=reduction)
    z = 3 * torch.tanh(x.bfloat16().float() / 3)
    want = (
        functional.cross_entropy(z, target, reduction="none") + 1e-2 * torch.logsumexp(z, 0 if len(shape) == 1 else 1).square()
    )
    torch.testing.assert_close(got, (want if reduction == "none" else getattr(want, reduction)()).bfloat16())


def test_rows_of_a_16_bit_matmul(path):
    x, target = make(4, 300)
    for dtype in (torch.float16, torch.bfloat16):
        _, lse, _ = cross_entropy_fwd(x, target, None, -100, 0.1, None, 0.0, 0.5)
        torch.testing.assert_close(lse, torch.where(target == -100, 0, (x * 0.5).logsumexp(-1)))
        got = cross_entropy_bwd(torch.ones(()), x, target, None, lse, None, -100, 0.1, None, 0.0, 0.5, dtype)
        leaf = x.double().requires_grad_()
        functional.cross_entropy(leaf * 0.5, target, label_smoothing=0.1, reduction="sum").backward()
        torch.testing.assert_close(got, leaf.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_backward_twice(path):
    x, target = make(4, 30)
    loss = cross_entropy(x.requires_grad_(), target)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_loss_can_be_scaled_in_place(path):
    x, target = make(4, 30)
    loss, z_loss, accuracy, _ = cross_entropy_stats(x.requires_grad_(), target, lse_square_scale=1e-3)
    for o in (loss, z_loss, accuracy):
        o /= 4
    loss.backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(by_torch(lse_square_scale=1e-3)(x, target) / 4, x)[0])


def test_is_an_operator():
    x, target = make(6, 24)
    weight = torch.rand(24)
    fixed_arguments = (weight, -100, 0.1, 2.0, 1e-3, 1.0, True)
    options = {"label_smoothing": 0.1, "lse_square_scale": 1e-3, "softcap": 2.0}
    check_operator(cross_entropy, (cross_entropy_fwd, (x, target, *fixed_arguments)), x, target, **options)
    check_operator(cross_entropy_stats, (cross_entropy_fwd, (x, target, *fixed_arguments)), x, target, reduction="none")
    loss, lse, predicted = cross_entropy_fwd(x, target, *fixed_arguments)
    arguments = loss, lse, target, weight, predicted, -100, 1e-3, True, 24, torch.bfloat16
    torch.library.opcheck(cross_entropy_reduce, arguments)
    totals = cross_entropy_reduce(*arguments)[1]
    for dloss, factors in ((torch.randn(6), None), (torch.randn(()), totals)):
        torch.library.opcheck(
            cross_entropy_bwd, (dloss, x, target, weight, lse, factors, -100, 0.1, 2.0, 1e-3, 1.0, torch.bfloat16)
        )


BAD = [
    (lambda x, t: cross_entropy(x.double(), t), "input must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, t: cross_entropy(x, t, lse_square_scale=torch.nan), "lse_square_scale must be a finite number, got nan"),
    (lambda x, t: cross_entropy(x, t, lse_square_scale=-torch.inf), "lse_square_scale must be a finite number, got -inf"),
    (lambda x, t: cross_entropy(x[0, 0], t), "input must have shape (C,) or (N, C, ...), got ()"),
    (lambda x, t: cross_entropy(x, t.int()), "target must be class indices in int64, got torch.int32; convert it with .long()"),
    (lambda x, t: cross_entropy(x, t[1:]), "target must have shape (2,), got (1,)"),
    (lambda x, t: cross_entropy(x, t.to("meta")), "target must be on cpu like the input, got meta; move it with .to()"),
    (lambda x, t: cross_entropy(x, x[:1]), "target must have shape (2, 8) or be int64, got (1, 8)"),
    (lambda x, t: cross_entropy(x, t, x[0, 1:]), "weight must have shape (8,), got (7,)"),
    (lambda x, t: cross_entropy(x, t, t.repeat(4)), "weight must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x, t: cross_entropy(x, t, x[0].to("meta")), "weight must be on cpu like the input, got meta; move it with .to()"),
    (
        lambda x, t: cross_entropy(x, t, x[0].clone().requires_grad_()),
        "weight must not require a gradient, it gets none, as in torch; pass weight.detach()",
    ),
    (lambda x, t: cross_entropy(x, t, reduction="avg"), "reduction must be one of none, mean, sum, got 'avg'"),
    (lambda x, t: cross_entropy(x, t, label_smoothing=1.5), "label_smoothing must be between 0 and 1, got 1.5"),
    (lambda x, t: cross_entropy(x, t, softcap=0.0), "softcap must be positive and finite, or None for none, got 0.0"),
    (lambda x, t: cross_entropy(x, t, softcap=math.inf), "softcap must be positive and finite, or None for none, got inf"),
    (
        lambda x, t: cross_entropy(x, torch.rand(x.shape, device="meta")),
        "target must be on cpu like the input, got meta; move it with .to()",
    ),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][:50] for b in BAD])
def test_rejects(call, text):
    with pytest.raises(ValueError, match=re.escape(f"cross_entropy: {text}")):
        call(torch.randn(2, 8), torch.randint(8, (2,)))


def test_stats_need_classes():
    text = "cross_entropy_stats: target must be class indices, got torch.float32; cross_entropy takes both"
    with pytest.raises(NotImplementedError, match=re.escape(text)):
        cross_entropy_stats(torch.randn(2, 8), torch.rand(2, 8))
