"""Liger's cross entropy of a head at a temperature, and of a head whose classes are spread over processes."""

import re
import tempfile
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.functional import linear

import liger_aot
import liger_aot.transformers.functional as L  # noqa: N812
from liger_aot import _jit
from liger_aot.ops import _linear

from harness import DTYPES
from harness import check as harness_check
from harness import fixed
from harness import run

WORLD = 2
CLASSES = 100
apply = liger_aot.ops.LigerFusedLinearScaledCrossEntropyFunction.apply
SELECTED = torch.tensor([3, 97, 3, 0])


def formula(temperature=1.0, ignore_index=-100, return_entropy=True, selected=None):
    def call(x, w, target):
        logs, keep = (linear(x, w) / temperature).log_softmax(-1), target != ignore_index
        found = [-logs.gather(-1, torch.where(keep, target, 0)[:, None])[:, 0]]
        found += [-(logs.exp() * logs).sum(-1)] * return_entropy
        found += [] if selected is None else [logs[:, selected]]
        found = [torch.where(keep if f.dim() == 1 else keep[:, None], f, 0.0) for f in found]
        return tuple(found) if len(found) > 1 else found[0]

    return call


def make(rows=6, dtype=torch.float32, ignore_index=-100):
    target = torch.randint(CLASSES, (rows,))
    target[1] = ignore_index
    return torch.randn(rows, 24).to(dtype), (torch.randn(CLASSES, 24) / 24**0.5).to(dtype), target


def check(function, reference, x, w, target, temperature=1.0):
    # As linear_logprob's: a loss carries the rounding of lse, a gradient 1 / temperature times; dlogits are rounded to 16 bits.
    carries = (linear(x.float(), w.float()) / temperature).logsumexp(-1).abs().max().item() * max(1, 1 / temperature)
    slack = 2.0 if x.dtype == torch.float32 else 6.0
    return harness_check(function, reference, x, w, fixed(target), carries=carries, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("selected", [None, SELECTED], ids=["plain", "selected"])
def test_matches_formula(path, selected, entropy, dtype):
    for temperature in (0.5, 2.0):
        options = {"return_entropy": entropy, "temperature": temperature}
        check(
            lambda *a: apply(*a, **options, selected_token_ids=selected),  # noqa: B023 (called at once)
            formula(selected=selected, **options),
            *make(dtype=dtype),
            temperature=temperature,
        )


def test_ignored_rows_may_hold_anything(path):
    x, w, target = make()
    x[1] = torch.nan
    outputs = apply(x.requires_grad_(), w, target, return_entropy=True, selected_token_ids=SELECTED)
    (dx,) = torch.autograd.grad([o.sum() for o in outputs], x)
    assert torch.equal(dx[1], torch.zeros(24))
    assert all(o.isfinite().all() for o in (dx, *outputs))


def test_autocast_does_not_round_logits():
    x, w, target = make()
    with torch.autocast("cpu", torch.bfloat16):
        got = apply(x, w, target, return_entropy=True, selected_token_ids=SELECTED)
    want = formula(selected=SELECTED)(x.bfloat16().float(), w.bfloat16().float(), target)
    torch.testing.assert_close(got, want)


def test_logits_are_never_whole(monkeypatch):
    monkeypatch.setattr(_linear, "CHUNK", 16)
    original, seen = _linear.logits_of, []

    def watched(*args):
        assert all(logits() is None for logits in seen)
        logits = original(*args)
        assert logits.shape == (16, CLASSES)
        seen.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr("liger_aot.ops.linear_logprob.logits_of", watched)
    for function in (apply, lambda x, w, t: L.liger_fused_linear_scaled_cross_entropy_tp(x, w, t, None)):
        x, w, target = make(64)
        function(x.requires_grad_(), w, target).sum().backward()
    assert len(seen) == 2 * 8


# -- several processes


def cases():
    """(hidden, weight of all classes, target, options) and what else is done to them."""
    torch.manual_seed(0)
    options = {"temperature": 0.7, "return_entropy": True}
    found = [(*make(dtype=dtype), options) for dtype in DTYPES]
    found.append((*make(ignore_index=5), {"ignore_index": 5, "return_entropy": False}))
    apart = make()  # logits of one process far above the others', and below
    apart[1][:25] += 2 * apart[0].mean(0)
    apart[1][50:75] -= 2 * apart[0].mean(0)
    return [*found, (*apart, {"return_entropy": True})]


def work(rank, store, folder, kernels):
    """What each process makes of its shard, in all cases."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)

    def call(options):
        group = dist.group.WORLD if kernels else None  # which is the same
        return lambda x, w, target: L.liger_fused_linear_scaled_cross_entropy_tp(x, w, target, group, **options)

    with _jit.interpreted() if kernels else torch.enable_grad():
        made = [run(call(o), [x, w.chunk(WORLD)[rank], fixed(t)]) for x, w, t, o in cases()]
    x, w, target, options = cases()[0]
    leaves = x.requires_grad_(), w.chunk(WORLD)[rank].clone().requires_grad_()
    compiled = [] if kernels else [torch.compile(call(options), fullgraph=True, backend="aot_eager")]
    by = [(*(o.detach() for o in out), *torch.autograd.grad([o.sum() for o in out], leaves))
          for out in (f(*leaves, target) for f in (*compiled, call(options)))]  # fmt: skip
    refused = []
    for bad, given in ((target + CLASSES, {}), (target, {"temperature": 0.0}), (target[1:], {})):
        try:
            call(given)(*leaves, bad)
        except ValueError as error:
            refused.append(str(error))
    torch.save((made, by, refused), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["kernels", "cpu"])
def made(request, tmp_path_factory):
    """[what each process made]."""
    folder = tmp_path_factory.mktemp("processes")
    with tempfile.NamedTemporaryFile() as store:
        torch.multiprocessing.spawn(work, (f"{store.name}.store", folder, request.param == "kernels"), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


class Saved(torch.autograd.Function):
    """What the processes made, for the same upstream gradient, which the harness draws."""

    @staticmethod
    def forward(ctx, x, w, dx, dw, *outputs):
        ctx.gradients, ctx.count = (dx, dw), len(outputs)
        return tuple(o.clone() for o in outputs) if len(outputs) > 1 else outputs[0].clone()

    @staticmethod
    def backward(ctx, *_):
        return *ctx.gradients, None, None, *[None] * ctx.count


@pytest.mark.parametrize("case", range(len(cases())))
def test_is_that_of_all_classes(made, case):
    """The results and the gradient of the input are the same bits everywhere; of the weight each process has its shard."""
    x, w, target, options = cases()[case]
    parts = [results[case] for results, _, _ in made]
    shared = [name for name in parts[0] if name.startswith("output") or name == "gradient 0"]
    for part in parts[1:]:
        assert all(torch.equal(part[name], parts[0][name]) for name in shared)
    dx, dw = parts[0]["gradient 0"], torch.cat([part["gradient 1"] for part in parts])
    outputs = [parts[0][name] for name in shared if name.startswith("output")]
    check(
        lambda x, w, t: Saved.apply(x, w, dx, dw, *outputs),
        formula(**options),
        x,
        w,
        target,
        temperature=options.get("temperature", 1.0),
    )


@pytest.mark.parametrize("made", ["cpu"], indirect=True)
def test_compiles_whole(made):
    for _, (compiled, eager), _ in made:
        for got, want in zip(compiled, eager, strict=True):
            assert torch.equal(got, want)


def test_every_process_refuses_before_anything_is_sent(made):
    name = "LigerFusedLinearScaledCrossEntropyTPFunction"
    for _, _, texts in made:
        out_of_range, temperature, shape = texts
        assert re.fullmatch(rf"{name}: target must be in \[0, 100\) or ignore_index -100, got 1?\d\d?", out_of_range)
        assert temperature == "linear_logprob: temperature must be positive, got 0.0"
        assert shape == f"{name}: target must have shape (6,), got (5,)"


# -- in one process


def test_without_torch_distributed_it_is_this_process_alone(path):
    x, w, target = make()
    got = L.liger_fused_linear_scaled_cross_entropy_tp(x, w, target, None, 0.7, return_entropy=True)
    torch.testing.assert_close(got, apply(x, w, target, 0.7, return_entropy=True))


def test_target_out_of_range(interpreted):
    x, w, _ = make(3)
    target = torch.tensor([0, CLASSES, 7])
    loss = L.liger_fused_linear_scaled_cross_entropy_tp(x.requires_grad_(), w, target, None)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert x.grad.isnan().all(-1).tolist() == [False, True, False]


X, W, Y = torch.randn(4, 24), torch.randn(CLASSES, 24), torch.randint(CLASSES, (4,))
NAME = "LigerFusedLinearScaledCrossEntropyFunction"
BAD = [
    (lambda: apply(X, W, Y, 0.0), "linear_logprob: temperature must be positive, got 0.0"),
    (lambda: apply(X, W[:, 1:], Y), "linear_logprob: hidden (..., H) and weight (V, H) must agree, got (4, 24), (100, 23)"),
    (lambda: apply(X, W, Y, m_tiles_per_cluster=0), f"{NAME}: m_tiles_per_cluster must be a positive integer, got 0"),
    (lambda: apply(X, W, Y, return_entropy=1.5), f"{NAME}: return_entropy must be one of True, False, got 1.5"),
    (
        lambda: apply(X, W, Y, selected_token_ids=SELECTED.int()),
        f"{NAME}: selected_token_ids must be int64 (K,), got torch.int32 (4,)",
    ),
    (lambda: apply(X, W, Y, selected_token_ids=SELECTED + 10), f"{NAME}: selected_token_ids must be in [0, 100), got "),
    (lambda: apply(X, W, Y, selected_token_ids=[1]), f"{NAME}: selected_token_ids must be int64 (K,), got [1]"),
    (
        lambda: L.liger_fused_linear_scaled_cross_entropy_tp(X, W, Y, None, tiles_per_reduce=3),
        "LigerFusedLinearScaledCrossEntropyTPFunction: tiles_per_reduce must be one of 1, 2, 4, got 3",
    ),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][:60] for b in BAD])
def test_rejects(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
