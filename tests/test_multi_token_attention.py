import re

import pytest
import torch

import formulas
from harness import DTYPES
from harness import check
from harness import check_operator

multi_token_attention = torch.ops.liger.multi_token_attention.default
multi_token_attention_fwd = torch.ops.liger.multi_token_attention_fwd.default
multi_token_attention_bwd = torch.ops.liger.multi_token_attention_bwd.default
causal_softmax_fwd = torch.ops.liger.causal_softmax_fwd.default
SAME = {"padding": [1, 1]}
FORMS = [
    {},
    SAME,
    SAME | {"groups": 2},
    {"stride": [2, 1], "padding": [0, 2], "dilation": [1, 2]},
    SAME | {"groups": 2, "sparse": True},
]


def formula(dtype, options):
    return formulas.multi_token_attention(dtype, **options)


def make(tokens, dtype, groups=1, batch=2):
    shapes = (batch, 4, tokens, tokens), (6, 4 // groups, 3, 3), (6,)
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_matches_reference(path, options, dtype):
    inputs = make(7, dtype, options.get("groups", 1), batch=1)
    slack = 4.0 if dtype == torch.float16 else 2.0  # torch's convolutions on the CPU round fp16 more than once
    check(lambda *t: multi_token_attention(*t, **options), formula(dtype, options), *inputs, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 5), (2, 17, 33), (7, 1024), (2, 5, 1030), (3, 2100)], ids=str)
def test_probabilities_match_reference(path, shape, dtype):
    """Of one token, and of rows of whole blocks and ragged ones, or walked in a loop, which are those of the last tokens."""
    x = (3 * torch.randn(shape)).to(dtype)
    got = causal_softmax_fwd(x)
    later = torch.ones(shape[-2:], dtype=torch.bool).triu(1 + shape[-1] - shape[-2])
    exact = x.double().masked_fill(later, -torch.inf).softmax(-1)
    assert not got.masked_select(later).any()
    # The rounding of the result, and that of fp32 arithmetic: of a difference up to 32, whose exp is taken, and of the sum.
    error = (got.double() - exact).abs()
    assert (error <= exact * (torch.finfo(dtype).eps / 2 + 32 * 2**-23) + torch.finfo(dtype).smallest_normal).all()


def test_later_tokens_are_never_read(path):
    """Whatever stands there, also where it is no number."""
    x, *others = make(9, torch.float32)
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    spoilt = x.masked_fill(later, torch.nan).requires_grad_()
    y = multi_token_attention(spoilt, *others, **SAME)
    assert torch.equal(y, multi_token_attention(x, *others, **SAME))
    assert not y.masked_select(later).any()
    y.sum().backward()
    assert not spoilt.grad.masked_select(later).any()


def test_a_token_sees_no_later_one(path):
    x, w, b = make(9, torch.float32)
    changed = x.clone()
    changed[..., 6:, :] = torch.randn(3, 9)
    got, want = (multi_token_attention(t, w[..., :1, :], b, padding=[0, 1]) for t in (changed, x))
    assert torch.equal(got[..., :6, :], want[..., :6, :])


def test_views(path):
    base, w = torch.randn(2, 9, 9, 5), torch.ones(6, 4, 3, 3)
    for x in (base.permute(0, 3, 1, 2)[:, :4], base.transpose(1, 3)[..., :5, :5][:, :4], torch.randn(2, 4, 9, 12)[..., 2:11]):
        check(multi_token_attention, formula(x.dtype, {}), x, w)


def test_nothing_in_nothing_out(path):
    x, w = torch.randn(0, 4, 9, 9, requires_grad=True), torch.randn(6, 4, 1, 1, requires_grad=True)
    y = multi_token_attention(x, w)
    y.sum().backward()
    assert y.shape == (0, 6, 9, 9)
    assert x.grad.shape == (0, 4, 9, 9)
    assert not w.grad.any()


def test_is_an_operator():
    inputs = make(12, torch.float32)
    pairs = [1, 1], [0, 0], [1, 1]
    check_operator(multi_token_attention, (multi_token_attention_fwd, (*inputs, *pairs, 1, False)), *inputs)
    torch.library.opcheck(multi_token_attention, inputs, {"sparse": True})
    y, probabilities = multi_token_attention_fwd(*inputs, *pairs, 1, False)
    for needs in ([True] * 3, [True, False, False], [False, True, True]):
        torch.library.opcheck(
            multi_token_attention_bwd, (torch.randn_like(y), probabilities, inputs[1], *pairs, 1, False, *needs)
        )
    torch.library.opcheck(causal_softmax_fwd, (inputs[0],))


def test_autocast(path):
    """A module's parameters of fp32 meet scores of 16 bits."""
    scores, weight, bias = make(9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = multi_token_attention(scores.bfloat16(), weight, bias)
    assert torch.equal(got, multi_token_attention(scores.bfloat16(), weight.bfloat16(), bias.bfloat16()))


BAD = [
    (lambda x, w, b: (x.long(), w), "scores must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x, w, b: (x[0], w), "scores must have shape (batch, C, L, L), got (4, 9, 9)"),
    (lambda x, w, b: (x[..., 1:], w), "scores must have shape (batch, C, L, L), got (2, 4, 9, 8)"),
    (lambda x, w, b: (x, w[0]), "weight must have shape (C', C / groups, height, width), got (4, 3, 3)"),
    (
        lambda x, w, b: (x, w[:, :2]),
        "weight must have shape (C', C / groups, height, width) with C' divisible by groups, got (6, 2, 3, 3) and 1 groups for",
    ),
    (lambda x, w, b: (x, w.bfloat16()), "weight must be torch.float32 like scores, got torch.bfloat16; cast it with .to()"),
    (lambda x, w, b: (x, w, b[1:]), "bias must have shape (6,), got (5,)"),
    (lambda x, w, b: (x, w, b.half()), "bias must be torch.float32 like scores, got torch.float16; cast it with .to()"),
    (lambda x, w, b: (x, w.to("meta")), "weight must be on cpu like the input, got meta; move it with .to()"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[:40] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(f"multi_token_attention: {text}")):
        multi_token_attention(*bad(*make(9, torch.float32)))
