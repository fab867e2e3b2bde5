import re

import pytest
import torch

import formulas
from harness import DTYPES
from harness import check
from harness import check_operator
from harness import run

neighborhood_attention = torch.ops.liger.neighborhood_attention.default
neighborhood_attention_fwd = torch.ops.liger.neighborhood_attention_fwd.default
neighborhood_attention_bwd = torch.ops.liger.neighborhood_attention_bwd.default


def make(shape, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(3)]


def held(tensors, *window):
    check(lambda *t: neighborhood_attention(*t, *window), formulas.neighborhood_attention(*window), *tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 20, 16), (1, 2, 67, 32), (1, 1, 33, 50), (1, 2, 17, 100)], ids=str)
def test_matches_reference(path, shape, dtype):
    """Of one token; of one program's tokens and of more, of each width of a head."""
    held(make(shape, dtype), 5)


@pytest.mark.parametrize("window", [(1,), (3, 2), (7, 5), (5, 100), (2001,), (2001, 3), (7, 1, 0.6)], ids=str)
def test_windows(path, window):
    """Of the token alone, dilated, wider than the sequence, and with a step that is longer."""
    held(make((1, 2, 20, 16)), *window)


def test_a_step_of_the_window_may_be_huge(path):
    held(make((1, 1, 9, 16)), 2**31 - 1, 1)
    held(make((1, 1, 9, 16)), 3, 2**31 - 1)


def test_what_is_outside_a_window_is_never_read(path):
    q, k, v = make((1, 1, 20, 16))
    want = run(lambda *t: neighborhood_attention(*t, 5)[:, :, :10], [q, k, v])
    for t in (q, k, v):
        t[:, :, 12:] = torch.nan
    got = run(lambda *t: neighborhood_attention(*t, 5)[:, :, :10], [q, k, v])
    assert torch.equal(got["output 0"], want["output 0"])
    for n in range(3):
        assert torch.equal(got[f"gradient {n}"][:, :, :8], want[f"gradient {n}"][:, :, :8])


def test_views(path):
    """As models have heads; of a wider tensor; backwards in memory; expanded."""
    fused = torch.randn(2, 9, 3, 2, 20)
    wide = torch.randn(3, 2, 2, 11, 20)[..., 1:10, 3:19]
    for heads in (fused.permute(2, 0, 3, 1, 4), wide, torch.randn(3, 2, 16, 9, 2).transpose(2, 4)):
        held(list(heads), 3)
    q, k, v = make((2, 2, 9, 16))
    held([q, k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 2, -1, -1)], 3)


def test_far_apart_scores(path):
    """Whose exp overflows, and whose difference from the largest does: the largest alone counts."""
    q, k, v = make((1, 1, 9, 16))
    got, want = (run(f, [100 * q, 100 * k, v]) for f in (neighborhood_attention, formulas.neighborhood_attention()))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_scores_far_below_zero(path):
    """Beside a token at an end are none, whose score would be 0, and exp of that less logsumexp an infinity."""
    q, k, v = make((1, 1, 9, 16))
    tensors = [q / 100 + 10, k / 100 - 10, v]
    got, want = (run(f, tensors) for f in (neighborhood_attention, formulas.neighborhood_attention()))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_infinities_are_not_hidden(path):
    q, k, v = make((1, 1, 9, 16))
    v[0, 0, 4, 3] = torch.inf
    got = neighborhood_attention(q, k, v, 3)
    assert got.isfinite().all(-1).flatten().tolist() == [n not in (3, 4, 5) for n in range(9)]
    q[0, 0, 7] = torch.nan
    assert neighborhood_attention(q, k, v, 3).isnan().all(-1).nonzero()[:, 2].tolist() == [7]


@pytest.mark.parametrize("shape", [(0, 2, 9, 16), (2, 0, 9, 16), (2, 2, 0, 16)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    tensors = [t.requires_grad_() for t in make(shape)]
    y = neighborhood_attention(*tensors)
    y.sum().backward()
    assert y.shape == tensors[0].grad.shape == shape


def test_memory_grows_with_the_tokens():
    """Of what is kept for the gradient nothing is larger than the tokens themselves."""
    tensors, kept = [t.requires_grad_() for t in make((1, 2, 500, 8))], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        neighborhood_attention(*tensors, 31)
    assert max(kept) == tensors[0].numel()


def test_is_an_operator():
    inputs = make((2, 2, 6, 16))
    check_operator(
        neighborhood_attention, (neighborhood_attention_fwd, (*inputs, 3, 2, 0.25)), *inputs, kernel_size=3, dilation=2
    )
    y, lse = neighborhood_attention_fwd(*inputs, 3, 1, 0.25)
    torch.library.opcheck(neighborhood_attention_bwd, (torch.randn_like(y), *inputs, lse, 3, 1, 0.25))


BAD = [
    (lambda q, k, v: (q[0], k, v), "query must have shape (batch, heads, tokens, d) with d from 1 to 128, got (2, 9, 8)"),
    (lambda q, k, v: [torch.randn(1, 2, 9, 129)] * 3, "with d from 1 to 128, got (1, 2, 9, 129)"),
    (lambda q, k, v: (q[..., :0], k, v), "with d from 1 to 128, got (1, 2, 9, 0)"),
    (lambda q, k, v: (q.double(), k, v), "query must be float32, float16 or bfloat16, got torch.float64"),
    (lambda q, k, v: (q, k[:, :1], v), "key must have shape (1, 2, 9, 8) like query, got (1, 1, 9, 8)"),
    (lambda q, k, v: (q, k, v[:, :, 1:]), "value must have shape (1, 2, 9, 8) like query, got (1, 2, 8, 8)"),
    (lambda q, k, v: (q, k, v.half()), "value must be torch.float32 like query, got torch.float16; cast it with .to()"),
    (lambda q, k, v: (q, k.to("meta"), v), "key must be on cpu like query, got meta; move it with .to()"),
    (lambda q, k, v: (q, k, v, 4), "kernel_size must be odd and at least 1, got 4"),
    (lambda q, k, v: (q, k, v, -1), "kernel_size must be odd and at least 1, got -1"),
    (lambda q, k, v: (q, k, v, 3, 0), "dilation must be at least 1, got 0"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[:40] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match="neighborhood_attention: .*" + re.escape(text)):
        neighborhood_attention(*bad(*make((1, 2, 9, 8))))
