import math
import re
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from liger_aot.ops import _linear

from formulas import linear_logprob as formula
from harness import DTYPES
from harness import check as harness_check
from harness import check_operator
from harness import fixed

linear_logprob = torch.ops.liger.linear_logprob.default
linear_logprob_fwd = torch.ops.liger.linear_logprob_fwd.default


def make(rows, width, classes, dtype, bias=False):
    # Weights as a head has them: larger ones would make every distribution all but certain.
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(classes, width) / width**0.5).to(dtype)
    inputs = [hidden, weight, fixed(torch.randint(classes, (rows,)))]
    return [*inputs, torch.randn(classes).to(dtype)] if bias else inputs


def ours(temperature=1.0, ignore_index=-100):
    return lambda h, w, t, b=None: linear_logprob(h, w, t, bias=b, temperature=temperature, ignore_index=ignore_index)


def check(function, reference, hidden, weight, target, *bias, temperature=1.0, **options):
    # A log-probability is z - lse, and p in a gradient is exp(z - lse): both carry the rounding of lse, the gradients
    # 1 / temperature times.
    z = torch.nn.functional.linear(hidden.float(), weight.float(), *(b.float() for b in bias)) / temperature
    carries = z.logsumexp(-1).abs().max().item() * max(1, 1 / temperature)
    return harness_check(function, reference, hidden, weight, target, *bias, carries=carries, **options)


# dlogits are rounded to 16 bits before the matmuls that make the gradients, as any tensor core wants them: one rounding more.
def slack(dtype):
    return 2.0 if dtype == torch.float32 else 6.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "classes"), [(1, 8, 3), (5, 24, 1000), (7, 16, 1025), (3, 8, 9001)])
def test_matches_formula(path, rows, width, classes, dtype):
    check(ours(), formula(), *make(rows, width, classes, dtype), slack=slack(dtype))


@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_temperature(path, temperature, dtype):
    inputs = make(6, 24, 50, dtype, bias=True)
    check(ours(temperature), formula(temperature), *inputs, temperature=temperature, slack=slack(dtype))


def test_odd_vocabulary(interpreted):
    check(ours(), formula(), *make(1, 4, 50257, torch.float32))
    assert {"logprob_fwd", "logprob_bwd"} <= set(interpreted.launched)


def test_ignored_targets(path):
    hidden, weight, target = make(6, 24, 50, torch.float32)
    target.tensor[[0, 3]] = -100
    results = check(ours(), formula(), hidden, weight, target)
    for n in range(3):
        assert torch.equal(results[f"output {n}"][[0, 3]], torch.zeros(2))
    assert torch.equal(results["gradient 0"][[0, 3]], torch.zeros(2, 24))


def test_more_dimensions(path):
    hidden, weight, _ = make(6, 24, 50, torch.float32)
    target = fixed(torch.randint(50, (2, 3)))
    check(ours(), formula(), hidden.view(2, 3, 24), weight, target)
    check(ours(), formula(), hidden.view(3, 2, 24).transpose(0, 1), weight, target)


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
def test_chunks_join(path, monkeypatch, rows):
    monkeypatch.setattr(_linear, "CHUNK", 4)
    check(ours(0.7), formula(0.7), *make(rows, 24, 50, torch.float32, bias=True), temperature=0.7)


def test_certain_and_even_rows(path):
    """A distribution that is all but certain has an entropy of all but 0, one that is even has log V."""
    weight = torch.cat([torch.full((1, 4), 50.0), torch.zeros(63, 4)])
    logp, entropy, lse = linear_logprob(torch.tensor([[1.0] * 4, [0.0] * 4]), weight, torch.tensor([0, 5]))
    even = torch.log(torch.tensor(64.0))
    torch.testing.assert_close(logp, torch.stack([torch.tensor(0.0), -even]))
    torch.testing.assert_close(entropy, torch.stack([torch.tensor(0.0), even]))
    torch.testing.assert_close(lse, torch.stack([torch.tensor(200.0), even]))


def test_masked_classes(path):
    """A class of logit -inf has probability 0: no NaN in the entropy or in any gradient of the others."""
    bias = torch.zeros(50)
    bias[10:20] = -torch.inf
    hidden, weight, target = make(6, 24, 50, torch.float32)
    hidden.requires_grad_(True)
    logp, entropy, lse = linear_logprob(hidden, weight, target.tensor % 10, bias=bias)
    keep = [*range(10), *range(20, 50)]
    expected = formula()(hidden, weight[keep], target.tensor % 10)
    for got, want in zip((logp, entropy, lse), expected, strict=True):
        torch.testing.assert_close(got, want)
    (got,) = torch.autograd.grad((logp + entropy).sum(), hidden)
    (want,) = torch.autograd.grad((expected[0] + expected[1]).sum(), hidden)
    torch.testing.assert_close(got, want)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for o in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(o, torch.Tensor):
                self.numel = max(self.numel, o.numel())
        return out


def test_logits_are_never_whole(monkeypatch):
    """The Python bodies of the operators run under the mode with what they call inside, so the largest logits show."""
    monkeypatch.setattr(_linear, "CHUNK", 16)
    hidden, weight, target = make(64, 8, 500, torch.float32)
    with Largest() as largest:
        linear_logprob_fwd(hidden, weight, target.tensor, None, 1.0, -100)
    chunks = []
    original = _linear.logits_of
    monkeypatch.setattr("liger_aot.ops.linear_logprob.logits_of", lambda *a: chunks.append(a[0].shape[0]) or original(*a))
    hidden.requires_grad_()
    sum(o.sum() for o in linear_logprob(hidden, weight, target.tensor)).backward()
    assert chunks == [16] * 8
    assert largest.numel < 64 * 500


@pytest.mark.parametrize("rows", [1025, 4096, 4097, 32768])
@pytest.mark.parametrize(("width", "itemsize"), [(4096, 2), (1024, 4), (64, 2), (16384, 2)])
@pytest.mark.parametrize("least", [128, 1024])
def test_memory_is_bounded_by_the_weight_gradient(rows, width, itemsize, least):
    """fp32 logits and their gradient take no more than the gradient of weight in its dtype, if `least` rows or more do so."""
    chunk = _linear.chunk_rows(rows, width, itemsize, least)
    assert chunk < rows
    assert chunk <= least or chunk * (4 + itemsize) <= itemsize * width
    assert least // 2 <= chunk <= 2048


def test_a_cpu_takes_smaller_chunks():
    assert [rows.stop for rows in _linear.chunks(torch.empty(500, 64))] == [128, 256, 384, 500]
    with FakeTensorMode():
        assert [rows.stop for rows in _linear.chunks(torch.empty(2048, 64, device="cuda"))] == [1024, 2048]


def test_one_chunk_of_logits_at_a_time(monkeypatch):
    """The logits of a chunk are gone when those of the next are made."""
    monkeypatch.setattr(_linear, "CHUNK", 16)
    original, before = _linear.logits_of, []

    def watched(*args):
        assert not before or before[-1]() is None
        logits = original(*args)
        before.append(weakref.ref(logits))
        return logits

    for op in linear_logprob, torch.ops.liger.linear_cross_entropy.default:
        monkeypatch.setattr(f"liger_aot.ops.{op.name().removeprefix('liger::')}.logits_of", watched)
        for options in ({}, {"reduction": "none"}) if op is not linear_logprob else ({},):
            hidden, weight, target = make(64, 8, 500, torch.float32)
            before.clear()
            out = op(hidden.requires_grad_(), weight, target.tensor, **options)
            (out[0] if op is linear_logprob else out).sum().backward()
            assert len(before) == (4 if op is not linear_logprob and not options else 8)


@pytest.mark.parametrize("shape", [(0,), (0, 3)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    hidden = torch.ones(*shape, 8, requires_grad=True)
    weight = torch.ones(5, 8, requires_grad=True)
    outputs = linear_logprob(hidden, weight, torch.zeros(shape, dtype=torch.int64))
    sum(o.sum() for o in outputs).backward()
    assert all(o.shape == shape for o in outputs)
    assert torch.equal(weight.grad, torch.zeros(5, 8))


def test_no_width(path):
    """The logits are zero: every class is as likely."""
    outputs = linear_logprob(torch.ones(3, 0), torch.ones(5, 0), torch.zeros(3, dtype=torch.int64))
    for got, want in zip(outputs, (-math.log(5), math.log(5), math.log(5)), strict=True):
        torch.testing.assert_close(got, torch.full((3,), want))


def test_is_an_operator():
    hidden, weight, target = make(6, 24, 50, torch.float32)
    args = hidden, weight, target.tensor
    check_operator(linear_logprob, (linear_logprob_fwd, (*args, None, 0.7, -100)), *args, temperature=0.7)


BAD = [
    (
        lambda h, w, t: linear_logprob(h, w[:, 1:], t),
        "linear_logprob: hidden (..., H) and weight (V, H) must agree, got (6, 24), (50, 23)",
    ),
    (
        lambda h, w, t: linear_logprob(h.double(), w, t),
        "linear_logprob: hidden must be float32, float16 or bfloat16, got torch.float64",
    ),
    (
        lambda h, w, t: linear_logprob(h, w.half(), t),
        "linear_logprob: weight must be torch.float32 like hidden, got torch.float16",
    ),
    (lambda h, w, t: linear_logprob(h, w, t, bias=w[0]), "linear_logprob: bias must have shape (50,), got (24,)"),
    (lambda h, w, t: linear_logprob(h, w, t[1:]), "linear_logprob: target must have shape (6,), got (5,)"),
    (lambda h, w, t: linear_logprob(h, w, t.int()), "linear_logprob: target must be class indices in int64, got torch.int32"),
    (lambda h, w, t: linear_logprob(h, w, t, temperature=0.0), "linear_logprob: temperature must be positive, got 0.0"),
    (lambda h, w, t: linear_logprob(h, w, t + 50), "linear_logprob: target must be in [0, 50) or ignore_index -100, got "),
    (lambda h, w, t: linear_logprob(h, w.to("meta"), t), "linear_logprob: weight must be on cpu like hidden, got meta"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][16:60] for b in BAD])
def test_rejects(call, text):
    hidden, weight, target = make(6, 24, 50, torch.float32)
    with pytest.raises(ValueError, match=re.escape(text)):
        call(hidden, weight, target.tensor)


def test_target_out_of_range_on_a_device_is_nan(interpreted):
    hidden, weight, target = make(3, 24, 50, torch.float32)
    target.tensor[1] = 50
    hidden.requires_grad_()
    logp, _, _ = linear_logprob(hidden, weight, target.tensor)
    logp.sum().backward()
    assert logp.isnan().tolist() == [False, True, False]
    assert hidden.grad.isnan().any(1).tolist() == [False, True, False]
