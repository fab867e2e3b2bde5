import contextlib
import re
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import liger_aot
from liger_aot import _jit
from liger_aot.ops.vocab_parallel_cross_entropy import join

from formulas import cross_entropy as formula
from harness import DTYPES
from harness import check as harness_check
from harness import check_operator
from harness import fixed
from harness import run

op = torch.ops.liger.vocab_parallel_cross_entropy.default
fwd = torch.ops.liger.vocab_parallel_cross_entropy_fwd.default
bwd = torch.ops.liger.vocab_parallel_cross_entropy_bwd.default
WORLD = 4
OPTIONS = [
    {},
    {"reduction": "none"},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "softcap": 3.0, "lse_square_scale": 1e-2, "label_smoothing": 0.2},
    {"ignore_index": 5},
]


def check(function, reference, x, *others):
    # A loss is lse - z, and p in a gradient is exp(z - lse): both carry the rounding of lse.
    lse = x.detach().float().logsumexp(-1).nan_to_num(0, 0, 0)
    return harness_check(function, reference, x, *others, carries=lse.abs().max().item())


def make(rows, classes, dtype=torch.float32, ignore_index=-100):
    target = torch.randint(classes, (rows,))
    target[1] = ignore_index
    return (2 * torch.randn(rows, classes)).to(dtype), target


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("classes", [100, 2049])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_one_process_is_cross_entropy(path, classes, options, dtype):
    x, target = make(4, classes, dtype, options.get("ignore_index", -100))
    check(lambda *a: op(*a, **options), formula(**options), x, fixed(target))


# -- several processes


def cases():
    """(logits, target, options) of every process, and what else is done to them."""
    torch.manual_seed(0)
    found = [(*make(6, 4 * 25, dtype), options) for dtype in DTYPES for options in OPTIONS[:4]]
    found.append((*make(6, 4 * 25, ignore_index=5), OPTIONS[4]))
    apart = make(6, 4 * 25)  # logits of one process far above the others', and below
    apart[0][:, :25] += 90
    apart[0][:, 50:75] -= 90
    masked = make(6, 4 * 25)  # a process with only one class that could be
    masked[0][:, 26:50] = -torch.inf
    masked[1].clamp_(max=24)
    sure = make(6, 4 * 25)  # targets all but certain
    sure[0][:] = 0.0
    sure[0].scatter_(1, sure[1].clamp(min=0)[:, None], 24.0)
    return found + [(*tensors, {"reduction": "none"}) for tensors in (apart, masked, sure)]


def work(rank, store, folder):
    """What each process makes of its share of all cases, over the kernels and over the CPU kernels."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)

    def call(options):
        return lambda x, target: liger_aot.vocab_parallel_cross_entropy(x, target, **options)

    made = {}
    for path, context in (("kernels", _jit.interpreted()), ("cpu", contextlib.nullcontext())):
        with context:
            made[path] = [run(call(o), [x.chunk(WORLD, -1)[rank], fixed(t)]) for x, t, o in cases()]
    x, target, _ = cases()[0]
    leaf, made_by = x.chunk(WORLD, -1)[rank].clone().requires_grad_(), {}
    for reduction in ("mean", "none"):
        plain = call({"reduction": reduction, "label_smoothing": 0.1})
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        made_by[reduction] = [
            (f(leaf, target).detach(), *torch.autograd.grad(f(leaf, target).sum(), leaf)) for f in (compiled, plain)
        ]
    group, options = dist.group.WORLD.group_name, {"label_smoothing": 0.1, "smooth_everywhere": False, "reduction": "none"}
    own = op(leaf, target, group, rank, WORLD, **options)
    torch.save((made, made_by, (own.detach(), *torch.autograd.grad(own.sum(), leaf))), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """[what each process made]."""
    folder = tmp_path_factory.mktemp("processes")
    with tempfile.NamedTemporaryFile() as store:
        torch.multiprocessing.spawn(work, (f"{store.name}.store", folder), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


class Saved(torch.autograd.Function):
    """What the processes made, for the same upstream gradient, which the harness draws."""

    @staticmethod
    def forward(ctx, x, loss, gradient):
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx, dloss):
        return ctx.gradient, None, None


@pytest.mark.parametrize("case", range(len(cases())))
@pytest.mark.parametrize("by", ["kernels", "cpu"])
def test_is_cross_entropy_of_all_classes(made, by, case):
    x, target, options = cases()[case]
    parts = [results[by][case] for results, _, _ in made]
    for part in parts[1:]:
        assert torch.equal(part["output 0"], parts[0]["output 0"]), "every process has the same loss"
    gradient = torch.cat([part["gradient 0"] for part in parts], -1)
    check(lambda x, t: Saved.apply(x, parts[0]["output 0"], gradient), formula(**options), x, fixed(target))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole(made, reduction):
    for _, by, _ in made:
        for got, want in zip(*by[reduction], strict=True):
            assert torch.equal(got, want)


def test_smoothing_over_the_classes_of_a_process(made):
    """Megatron-LM's: each process has a loss of its own."""
    x, target, _ = cases()[0]
    valid = (target >= 0)[:, None]
    logs = x.log_softmax(-1)
    nll = -logs.gather(1, target.clamp(min=0)[:, None])[:, 0]
    for rank, (_, _, (loss, gradient)) in enumerate(made):
        here = slice(25 * rank, 25 * rank + 25)
        want = 0.9 * nll - 0.1 * logs[:, here].mean(1)
        torch.testing.assert_close(loss, want * valid[:, 0])
        hit = torch.nn.functional.one_hot(target.clamp(min=0), 100)[:, here]
        torch.testing.assert_close(gradient, (logs.exp()[:, here] - 0.9 * hit - 0.1 / 25) * valid)


# -- in one process


def test_digits_of_sure_targets():
    """Where the owner's loss is 1e-9, it is not lost in logarithms near 20."""
    nlls, lses = torch.tensor([[1e-9], [3.0]]), torch.tensor([[20.0], [0.0]])
    loss, lse = join(nlls, lses, torch.tensor([[0]]))
    torch.testing.assert_close(loss, torch.tensor([1e-9 + torch.tensor(-20.0).exp()]), rtol=1e-6, atol=0)
    assert lse == 20.0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_from(path, reduction):
    x = torch.randn(3, 8, requires_grad=True)
    loss = op(x, torch.full((3,), -100), reduction=reduction)
    torch.testing.assert_close(loss, torch.full_like(loss, torch.nan if reduction == "mean" else 0.0), equal_nan=True)
    loss.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 8))


def test_ignored_rows_may_hold_anything(path):
    x, target = torch.randn(4, 30), torch.tensor([2, -100, -100, 4])
    x[1], x[2] = torch.nan, torch.inf
    x.requires_grad_()
    (got,) = torch.autograd.grad(op(x, target), x)
    (want,) = torch.autograd.grad(formula()(x[::3], target[::3]), x)
    torch.testing.assert_close(got, want.where((target >= 0)[:, None], 0.0))


def test_more_dimensions(path):
    x, target = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    torch.testing.assert_close(
        op(x, target, reduction="none"), formula(reduction="none")(x.view(6, 7), target.view(6)).view(2, 3)
    )


def test_target_out_of_range(interpreted):
    x, target = torch.randn(3, 8, requires_grad=True), torch.tensor([0, 8, 7])
    loss = op(x, target, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert x.grad.isnan().all(-1).tolist() == [False, True, False]


def test_is_an_operator():
    x, target = make(6, 24)
    check_operator(op, (fwd, (x, target, 0, 24, -100, 0.1, 2.0)), x, target, label_smoothing=0.1, softcap=2.0)
    rows = torch.rand(4, 6)
    torch.library.opcheck(bwd, (x, target, *rows, 2.0))
    torch.library.opcheck(bwd, (x, target, *rows, None))


def test_without_torch_distributed_it_is_this_process_alone():
    x, target = make(4, 20)
    assert torch.equal(liger_aot.vocab_parallel_cross_entropy(x, target), op(x, target))


BAD = [
    (lambda x, t: op(x.double(), t), "input must be float32, float16 or bfloat16, got torch.float64"),
    (lambda x, t: op(x[:, :0], t), "input must have shape (..., C) with at least one class, got (2, 0)"),
    (lambda x, t: op(x, t, "", 2, 2), "rank must be at least 0 and below world 2, got 2"),
    (lambda x, t: op(x, t[1:]), "target must have shape (2,), got (1,)"),
    (lambda x, t: op(x, x), "target must be class indices in int64, got torch.float32"),
    (lambda x, t: op(x, t, reduction="avg"), "reduction must be one of none, mean, sum, got 'avg'"),
    (lambda x, t: op(x, t, label_smoothing=1.5), "label_smoothing must be between 0 and 1, got 1.5"),
    (lambda x, t: op(x, t + 8), "target must be in [0, 8) or ignore_index -100, got "),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][:50] for b in BAD])
def test_rejects(call, text):
    with pytest.raises(ValueError, match=re.escape(f"vocab_parallel_cross_entropy: {text}")):
        call(torch.randn(2, 8), torch.randint(8, (2,)))
