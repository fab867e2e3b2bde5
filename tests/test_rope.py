import functools
import importlib
import re

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import liger_aot
from liger_aot.ops.rope import forward_reference

from harness import DTYPES
from harness import check
from harness import check_operator
from harness import fixed

rope = torch.ops.liger.rope.default
rope_fwd = torch.ops.liger.rope_fwd.default
rope_bwd = torch.ops.liger.rope_bwd.default
# (batch, heads of q, heads of k, tokens, width, rotated columns): one head and one token; several blocks of heads, a ragged
# one; grouped queries; each HALF; halves of an odd width; a half that is walked in a loop; partial rotation, also past a block.
SHAPES = [
    (1, 1, 1, 1, 2, 2),
    (2, 9, 3, 5, 64, 64),
    (1, 2, 17, 2, 16, 16),
    (2, 4, 2, 3, 128, 128),
    (1, 3, 1, 2, 256, 256),
    (1, 2, 1, 2, 600, 600),
    (2, 3, 3, 3, 22, 10),
    (1, 2, 1, 3, 200, 64),
    (1, 2, 1, 2, 700, 300),
    (1, 2, 2, 3, 8, 0),
]


def make(shape, dtype, angle_dtype=None, batch=None):
    """q and k as a model has them, transposed, and angles whose halves differ."""
    b, hq, hk, s, d, r = shape
    q, k = (torch.randn(b, s, h, d).to(dtype).transpose(1, 2) for h in (hq, hk))
    angles = 3 * torch.randn(b if batch is None else batch, s, r)
    return q, k, fixed(angles.cos().to(angle_dtype or dtype)), fixed(angles.sin().to(angle_dtype or dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(path, shape, dtype):
    results = check(rope, forward_reference, *make(shape, dtype))
    assert all(r.dtype == dtype for r in results.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("angle_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_dtype_and_batch_of_angles(path, dtype, angle_dtype, batch):
    q, k, cos, sin = make((2, 3, 1, 4, 32, 32), dtype, angle_dtype, batch)
    check(rope, forward_reference, q, k, cos, sin)
    if batch == 1:
        flat = rope(q, k, cos.tensor[0], sin.tensor[0])
        assert all(torch.equal(a, b) for a, b in zip(flat, rope(q, k, cos.tensor, sin.tensor), strict=True))


@pytest.mark.parametrize("layout", ["transposed", "contiguous"])
def test_is_bit_equal_to_transformers(path, layout):
    q, k, cos, sin = make((2, 4, 2, 5, 64, 64), torch.float32)
    if layout == "contiguous":
        q, k = q.contiguous(), k.contiguous()
    q, k = q.requires_grad_(), k.requires_grad_()
    ours, theirs = rope(q, k, cos.tensor, sin.tensor), apply_rotary_pos_emb(q, k, cos.tensor, sin.tensor)
    dy = [torch.randn_like(o) for o in theirs]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    got, want = (torch.autograd.grad(outs, (q, k), dy) for outs in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def half(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def beside(x, cos, sin):
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


def twice(angles):
    return torch.cat((angles, angles), -1)


def doubled(angles):
    return angles.repeat_interleave(2, -1)


def to_half(x):
    return torch.cat((x[..., ::2], x[..., 1::2]), -1)


def in_parts(x, cos, sin):
    return torch.cat([half(*t) for t in zip(*(t.chunk(2, -1) for t in (x, cos, sin)), strict=True)], -1)


def of_sections(angles, sizes):
    """Wang et al., Qwen2-VL, 2024 (arXiv 2409.12191): each pair has the angles of time, of height or of width."""
    return torch.cat([t[n % 3] for n, t in enumerate(angles.split(sizes, -1))], -1)


def by_time_height_width(rotation, sizes, x, cos, sin):
    return rotation(x, *(of_sections(angles, sizes) for angles in (cos, sin)))


def sections(r):
    return [r // 8, r // 2 - 2 * (r // 8), r // 8]


# What is rotated, r columns -> (the operator's options, columns of cos and sin, the rotation of those columns by them)
FORMS = {
    "interleaved": lambda r: ({"order": "interleaved"}, r, beside),
    "interleaved, an angle a pair": lambda r: (
        {"order": "interleaved", "rotary_dim": r},
        r // 2,
        lambda x, c, s: beside(x, doubled(c), doubled(s)),
    ),
    "interleaved to half": lambda r: ({"order": "interleaved_to_half"}, r, lambda x, c, s: half(to_half(x), c, s)),
    "interleaved to half, an angle a pair": lambda r: (
        {"order": "interleaved_to_half", "rotary_dim": r},
        r // 2,
        lambda x, c, s: half(to_half(x), twice(c), twice(s)),
    ),
    "half, an angle a pair": lambda r: ({"rotary_dim": r}, r // 2, lambda x, c, s: half(x, twice(c), twice(s))),
    "other sign": lambda r: ({"reverse": True}, r, lambda x, c, s: half(x, c, -s)),
    "other sign, interleaved": lambda r: ({"reverse": True, "order": "interleaved"}, r, lambda x, c, s: beside(x, c, -s)),
    "parts": lambda r: ({"parts": 2}, r, in_parts),
    "sections": lambda r: (
        {"sections": sections(r)},
        r,
        functools.partial(by_time_height_width, half, sections(r) * 2),
    ),
    "sections, interleaved": lambda r: (
        {"sections": sections(r), "order": "interleaved"},
        r,
        functools.partial(by_time_height_width, beside, [2 * n for n in sections(r)]),
    ),
}


def formula(rotation, r, last):
    """The rotation of the first or of the last r columns of q and of k, by angles without heads."""

    def whole(x, cos, sin):
        begin = x.shape[-1] - r if last else 0
        y = rotation(x[..., begin : begin + r], cos.unsqueeze(-3), sin.unsqueeze(-3))
        return torch.cat((x[..., :begin], y, x[..., begin + r :]), -1)

    return lambda q, k, cos, sin: (whole(q, cos, sin), whole(k, cos, sin))


# (heads of q, heads of k, tokens, width, rotated columns): each tile and the loop; ragged; columns beside what is rotated, more
# than a block of them
WIDTHS = [(9, 1, 2, 16, 16), (1, 2, 3, 84, 60), (2, 1, 2, 136, 136), (1, 1, 2, 240, 88)]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_match_their_formulas(path, form, last):
    """Each width in another dtype, and others for the first columns than for the last."""
    for n, (hq, hk, s, d, r) in enumerate(WIDTHS):
        dtype = DTYPES[(n + last) % 3]
        options, width, rotation = FORMS[form](r)
        axes = [3] if "sections" in options else []
        q, k = (torch.randn(2, s, h, d).to(dtype).transpose(1, 2) for h in (hq, hk))
        angles = 3 * torch.randn(*axes, 1 + n % 2, s, width)
        cos, sin = (fixed(t.to(dtype if n % 2 else torch.float32)) for t in (angles.cos(), angles.sin()))
        function = functools.partial(rope, last=last, **options)
        results = check(function, formula(rotation, r, last), q, k, cos, sin)
        assert all(t.dtype == dtype for t in results.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["interleaved", "half"])
def test_complex_angles(path, order, dtype):
    rotation = {"interleaved": FORMS["interleaved, an angle a pair"], "half": FORMS["half, an angle a pair"]}[order]
    for b, s, d, r in ((2, 3, 84, 60), (1, 2, 136, 136)):
        q, k = (torch.randn(2, s, h, d).to(dtype).transpose(1, 2) for h in (3, 1))
        cos, sin = torch.randn(b, s, r // 2), torch.randn(b, s, r // 2)
        function = lambda q, k, cos, sin: rope(q, k, torch.complex(cos, sin), order=order)  # noqa: E731
        check(function, formula(rotation(r)[2], r, False), q, k, fixed(cos), fixed(sin))
        angles = torch.complex(cos, -sin)
        expected = rope(q, k, angles, order=order)
        apart = torch.stack([angles, angles], -1)[..., 0]
        for same in (torch.complex(cos, sin).conj(), apart, angles.mT.contiguous().mT):
            assert all(torch.equal(a, b) for a, b in zip(rope(q, k, same, order=order), expected, strict=True))


def of(model, name="apply_rotary_pos_emb"):
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


def first_half(t):
    return t[..., : t.shape[-1] // 2]


def vision(model):
    """q and k (tokens, heads, width)."""

    def theirs(q, k, cos, sin):
        out = of(model, "apply_rotary_pos_emb_vision")(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
        return tuple(t.transpose(0, 1)[None] for t in out)

    return theirs


def both(function):
    """Of a function of one tensor."""
    return lambda q, k, *angles: tuple(function(x, *angles) for x in (q, k))


def tokens_first(function):
    return lambda q, k, *angles: tuple(t.transpose(1, 2) for t in function(q.transpose(1, 2), k.transpose(1, 2), *angles))


def complex_of(cos, sin):
    return torch.complex(*(first_half(t).float().contiguous() for t in (cos, sin)))


def gemma4(x, cos, sin):
    positions = torch.zeros(*x.shape[:2], 2)
    return of("gemma4", "apply_multidimensional_rope")(x, cos, sin, positions)


def clvp(q, k, cos, sin):
    ids = torch.arange(q.shape[2])[None]
    return of("clvp")(q, k, q, cos[0], sin[0], ids)[:2]


RUN = functools.partial(liger_aot.rope, order="interleaved")
ONE = {"rotary_dim": 16}  # angles of half the width
# Every function of transformers that rotates otherwise than Llama's, of q and k (1, heads, 5, 16) and cos and sin (1, 5, 16),
# as one of its models has it: (the function, ours in its place, whether it computes 16-bit heads in fp32 and rounds them once)
MODELS = {
    "qwen2_vl, vision": (vision("qwen2_vl"), liger_aot.rope, True),
    "hunyuan_vl": (lambda *t: of("hunyuan_vl")(*t), liger_aot.rope, True),
    "modernbert": (lambda *t: of("modernbert")(*t), liger_aot.rope, True),
    "olmo2": (lambda *t: of("olmo2")(*t), liger_aot.rope, True),
    "gemma3n": (both(lambda *t: of("gemma3n")(*t)), liger_aot.rope, False),
    "gpt_neox, partial": (
        lambda q, k, c, s: of("gpt_neox")(q, k, c[..., :8], s[..., :8]),
        lambda q, k, c, s: liger_aot.rope(q, k, c[..., :8], s[..., :8]),
        False,
    ),
    "nanochat": (lambda *t: of("nanochat")(*t), functools.partial(liger_aot.rope, reverse=True), False),
    "cohere": (lambda *t: of("cohere")(*t), RUN, True),
    "ernie4_5_vl_moe": (lambda *t: of("ernie4_5_vl_moe")(*t), RUN, True),
    "inkling2, vision": (vision("inkling2"), RUN, True),
    "glm4v, partial": (
        lambda q, k, c, s: of("glm4v")(q, k, c[..., :8], s[..., :8]),
        lambda q, k, c, s: RUN(q, k, c[..., :8], s[..., :8]),
        False,
    ),
    "glm, partial": (
        lambda q, k, c, s: of("glm")(q, k, c[..., :8], s[..., :8]),
        lambda q, k, c, s: RUN(q, k, c[..., :4], s[..., :4], rotary_dim=8),
        False,
    ),
    "helium": (lambda *t: of("helium")(*t), lambda q, k, c, s: RUN(q, k, first_half(c), first_half(s), **ONE), False),
    "ernie4_5": (lambda *t: of("ernie4_5")(*t), lambda q, k, c, s: RUN(q, k, first_half(c), first_half(s), **ONE), True),
    "openai_privacy_filter": (
        lambda q, k, c, s: of("openai_privacy_filter")(q, k, first_half(c), first_half(s)),
        lambda q, k, c, s: RUN(q, k, first_half(c), first_half(s), **ONE),
        False,
    ),
    "gptj": (
        tokens_first(both(lambda x, c, s: of("gptj")(x, first_half(s), first_half(c)))),
        lambda q, k, c, s: RUN(q, k, first_half(c), first_half(s), **ONE),
        False,
    ),
    "gpt_oss": (
        lambda q, k, c, s: of("gpt_oss")(q, k, first_half(c), first_half(s)),
        lambda q, k, c, s: liger_aot.rope(q, k, first_half(c), first_half(s), **ONE),
        False,
    ),
    "deepseek_v3": (
        lambda *t: of("deepseek_v3", "apply_rotary_pos_emb_interleave")(*t),
        lambda q, k, c, s: liger_aot.rope(q, k, first_half(c), first_half(s), **ONE, order="interleaved_to_half"),
        False,
    ),
    "deepseek_v4": (
        both(lambda x, c, s: of("deepseek_v4")(x, c[..., :4], s[..., :4])),
        lambda q, k, c, s: RUN(q, k, c[..., :4], s[..., :4], rotary_dim=8, last=True),
        True,
    ),
    "deepseek_v2": (
        lambda q, k, c, s: of("deepseek_v2", "apply_rotary_emb")(q, k, complex_of(c, s)),
        lambda q, k, c, s: RUN(q, k, complex_of(c, s)),
        True,
    ),
    "llama4": (
        tokens_first(lambda q, k, c, s: of("llama4", "apply_rotary_emb")(q, k, complex_of(c, s))),
        lambda q, k, c, s: RUN(q, k, complex_of(c, s)),
        True,
    ),
    "llama4, vision": (
        tokens_first(lambda q, k, c, s: of("llama4", "vision_apply_rotary_emb")(q, k, complex_of(c, s)[0])),
        lambda q, k, c, s: RUN(q, k, complex_of(c, s)[0]),
        True,
    ),
    "gemma4, of two dimensions": (
        tokens_first(both(gemma4)),
        functools.partial(liger_aot.rope, parts=2),
        False,
    ),
    "clvp": (clvp, liger_aot.rope, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_is_what_the_model_computes(path, model, dtype):
    """Bit by bit where the model computes in fp32. Otherwise, as in some of their gradients, it rounds three times."""
    theirs, ours, in_fp32 = MODELS[model]
    q, k = (torch.randn(1, 5, h, 16).to(dtype).transpose(1, 2).requires_grad_() for h in (4, 2))
    angles = 3 * torch.randn(1, 5, 16)
    cos, sin = (t.float() if in_fp32 else t.to(dtype) for t in (angles.cos(), angles.sin()))
    got, want = ours(q, k, cos, sin), theirs(q, k, cos, sin)
    upstream = [torch.randn_like(t) for t in want]
    gradients = [torch.autograd.grad(outs, (q, k), upstream) for outs in (got, want)]
    for a, b in zip((*got, *gradients[0]), (*want, *gradients[1]), strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=3 * torch.finfo(dtype).eps * b.abs().max().item())
    if "deepseek_v2" not in model and "llama4" not in model:  # complex products may be fused multiply-adds
        assert not in_fp32 or all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert dtype != torch.float32 or all(
            torch.equal(a, b) for a, b in zip((*got, *gradients[0]), (*want, *gradients[1]), strict=True)
        )


def test_one_tensor(path):
    q, k, cos, sin = make((2, 4, 2, 5, 16, 16), torch.float32)
    alone, none = liger_aot.rope(q, None, cos.tensor, sin.tensor)
    assert none is None
    assert torch.equal(alone, liger_aot.rope(q, k, cos.tensor, sin.tensor)[0])
    turned = q.transpose(1, 2)
    alone, _ = liger_aot.rope(turned, None, cos.tensor, sin.tensor, unsqueeze_dim=2)
    assert torch.equal(alone, liger_aot.rope(turned, turned, cos.tensor, sin.tensor, unsqueeze_dim=2)[0])


# (batch, heads, tokens, width), as views of other tensors
LAYOUTS = {
    "contiguous": lambda: torch.randn(3, 6, 7, 40),
    "transposed": lambda: torch.randn(3, 7, 6, 40).transpose(1, 2),
    "chunk of a fused projection": lambda: torch.randn(2, 5, 192)[..., 64:128].unflatten(-1, (4, 16)).transpose(1, 2),
    "odd offset": lambda: torch.randn(3, 6, 7, 40)[:, 1:, :, 1:17],
    "every other column": lambda: torch.randn(2, 3, 4, 40)[..., ::2],
    "columns outermost": lambda: torch.randn(20, 2, 3, 4).permute(1, 2, 3, 0),
    "tokens outermost": lambda: torch.randn(7, 2, 3, 20).permute(1, 2, 0, 3),
    "one batch for all": lambda: torch.randn(1, 3, 4, 20)[..., :16].expand(2, 3, 4, 16),
    "one head for all": lambda: torch.randn(2, 1, 4, 16).expand(2, 3, 4, 16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(path, layout):
    x = LAYOUTS[layout]()
    b, _, s, d = x.shape
    angles = torch.randn(b, s, d)
    check(rope, forward_reference, x, x[:, :1], fixed(angles.cos()), fixed(angles.sin()))
    out, _ = rope(x, x[:, :1], angles.cos(), angles.sin())
    assert out.stride() == torch.empty_like(x if x.stride(-1) == 1 else x.contiguous()).stride()


def test_angles_of_any_layout(path):
    q, k, cos, sin = make((2, 2, 1, 6, 16, 16), torch.float32)
    cos, sin = cos.tensor, sin.tensor
    expected = rope(q, k, cos, sin)
    wide = torch.stack([cos, sin], -1)
    tall = torch.cat([torch.zeros(2, 1, 16), cos], 1)[:, 1:], torch.cat([torch.zeros(2, 1, 16), sin], 1)[:, 1:]
    for angles in ((wide[..., 0], wide[..., 1]), (cos.mT.contiguous().mT, sin), tall, (cos, tall[1])):
        assert all(torch.equal(a, b) for a, b in zip(rope(q, k, *angles), expected, strict=True))


def test_makes_no_copies(interpreted, monkeypatch):
    copies = []
    original = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: copies.append(t.shape) or original(t))
    q, k, cos, sin = make((2, 4, 2, 5, 64, 32), torch.bfloat16, torch.float32, batch=1)
    outs = rope(q.requires_grad_(), k.requires_grad_(), cos.tensor, sin.tensor)
    torch.autograd.backward(outs, [torch.randn_like(o) for o in outs])
    assert interpreted.launched == ["rope", "rope"]
    assert not copies
    assert q.grad.stride() == outs[0].stride() == q.stride()


def test_gradient_of_any_layout(path):
    q, k, cos, sin = make((2, 3, 3, 5, 16, 12), torch.float32)
    outs = rope(q.requires_grad_(), k.requires_grad_(), cos.tensor, sin.tensor)
    dense = torch.randn(2, 3, 5, 16)
    for dy in (torch.ones(()).expand(2, 3, 5, 16), dense.mT.contiguous().mT, dense[:, :1].expand(2, 3, 5, 16)):
        got = torch.autograd.grad(outs, (q, k), (dy, dy), retain_graph=True)
        want = torch.autograd.grad(outs, (q, k), (dy.contiguous(), dy.contiguous()), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("frozen", [0, 1])
def test_no_gradient_of_what_is_frozen(path, monkeypatch, frozen):
    q, k, cos, sin = make((2, 9, 3, 5, 16, 12), torch.float32)
    leaf = (k, q)[frozen].requires_grad_()
    heads, original = [], rope_bwd
    monkeypatch.setattr(
        "liger_aot.ops.rope.rope_bwd", lambda *args: heads.append([t.shape[1] for t in args[:2]]) or original(*args)
    )
    outs = rope(q, k, cos.tensor, sin.tensor)
    assert [o.requires_grad for o in outs] == [q.requires_grad, k.requires_grad]
    dq_out, dk_out = (torch.randn_like(o) for o in outs)
    (got,) = torch.autograd.grad(outs[1 - frozen], leaf, (dq_out, dk_out)[1 - frozen])
    assert heads == [[0, 3], [9, 0]][frozen : frozen + 1]
    assert torch.equal(got, original(dq_out, dk_out, cos.tensor, sin.tensor)[1 - frozen])


@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 3, 8, 8), (2, 0, 1, 3, 8, 8), (2, 2, 0, 3, 8, 8), (2, 2, 1, 0, 8, 8), (2, 2, 1, 3, 0, 0)], ids=str
)
def test_nothing_in_nothing_out(path, shape):
    check(rope, forward_reference, *make(shape, torch.float32))


@pytest.mark.parametrize("width", [16, 12])
def test_is_an_operator(width):
    q, k, cos, sin = make((2, 4, 2, 3, 16, width), torch.float32)
    cos, sin = cos.tensor, sin.tensor
    check_operator(rope, (rope_fwd, (q, k, cos, sin)), q, k, cos=cos, sin=sin)


@pytest.mark.parametrize("form", ["interleaved to half, an angle a pair", "sections", "parts"])
def test_forms_are_operators(form):
    options, width, _ = FORMS[form](16)
    axes = [3] if "sections" in options else []
    q, k, cos, sin = torch.randn(2, 4, 3, 20), torch.randn(2, 2, 3, 20), *torch.randn(2, *axes, 2, 3, width).unbind()
    names = "rotary_dim", "order", "sections", "parts"
    args = [{"rotary_dim": None, "order": "half", "sections": None, "parts": 1, **options}[name] for name in names]
    check_operator(rope, (rope_fwd, (q, k, cos, sin, *args)), q, k, cos=cos, sin=sin, **options)


def test_the_complex_form_is_an_operator():
    q, k, angles = torch.randn(2, 4, 3, 20), torch.randn(2, 2, 3, 20), torch.randn(3, 8, dtype=torch.complex64)
    options = {"order": "interleaved"}
    check_operator(rope, (rope_fwd, (q, k, angles, None, None, "interleaved")), q, k, cos=angles, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_has_the_strides(layout):
    x = LAYOUTS[layout]()
    angles = torch.randn(x.shape[2], x.shape[3])
    torch.library.opcheck(rope_fwd, (x, x[:, :1], angles, angles))
    torch.library.opcheck(rope_bwd, (x[:, :1], x, angles, angles))


def bad(change):
    b, hq, hk, s, d = 2, 4, 2, 5, 16
    tensors = {
        "q": torch.randn(b, hq, s, d),
        "k": torch.randn(b, hk, s, d),
        "cos": torch.randn(b, s, d),
        "sin": torch.randn(b, s, d),
    }
    return tensors | {name: f(tensors[name]) for name, f in change.items()}


BAD = [
    ({"q": lambda t: t[0]}, "rope: q must have shape (batch, heads, tokens, head width), got (4, 5, 16)"),
    ({"k": lambda t: t[:1]}, "rope: k must have shape (2, any heads, 5, 16) like q, got (1, 2, 5, 16)"),
    ({"k": lambda t: t[:, :, 1:]}, "rope: k must have shape (2, any heads, 5, 16) like q, got (2, 2, 4, 16)"),
    ({"k": lambda t: t[0]}, "rope: k must have shape (2, any heads, 5, 16) like q, got (2, 5, 16)"),
    (
        {"k": torch.Tensor.bfloat16},
        "rope: q and k must have one dtype of float32, float16 and bfloat16, got torch.float32 and torch.bfloat16; cast with",
    ),
    (
        {"q": torch.Tensor.long, "k": torch.Tensor.long},
        "rope: q and k must have one dtype of float32, float16 and bfloat16, got torch.int64 and torch.int64; cast with .to()",
    ),
    *(
        (
            {"cos": f},
            "rope: cos must have shape (5, r), (1, 5, r) or (2, 5, r) with r even, at most 16, got " + shape,
        )
        for f, shape in (
            (lambda t: t[:, 1:], "(2, 4, 16)"),
            (lambda t: t[..., :7], "(2, 5, 7)"),
            (lambda t: torch.cat([t, t], -1), "(2, 5, 32)"),
            (lambda t: t[:, None], "(2, 1, 5, 16)"),
            (lambda t: torch.cat([t, t]), "(4, 5, 16)"),
            (lambda t: t[0, 0, 0], "()"),
        )
    ),
    ({"sin": lambda t: t[0]}, "rope: sin must have shape (2, 5, 16) like cos, got (5, 16)"),
    (
        {"sin": torch.Tensor.bfloat16},
        "rope: cos and sin must both be torch.float32, got torch.float32 and torch.bfloat16; cast with .to()",
    ),
    (
        {"q": torch.Tensor.half, "k": torch.Tensor.half, "cos": torch.Tensor.bfloat16, "sin": torch.Tensor.bfloat16},
        "rope: cos and sin must both be torch.float16 or torch.float32, got torch.bfloat16 and torch.bfloat16; cast with .to()",
    ),
    ({"k": lambda t: t.to("meta")}, "rope: k must be on cpu like q, got meta; move it with .to()"),
    ({"sin": lambda t: t.to("meta")}, "rope: sin must be on cpu like q, got meta; move it with .to()"),
    (
        {"cos": torch.Tensor.requires_grad_},
        "rope: cos and sin must not require gradients, which are not computed; got one that does; detach() it",
    ),
]


@pytest.mark.parametrize(("change", "text"), BAD, ids=[f"{n}-{b[1][:40]}" for n, b in enumerate(BAD)])
def test_rejects(change, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        rope(**bad(change))


WIDE, AXES = torch.randn(2, 5, 16), torch.randn(3, 2, 5, 16)
FREQUENCIES = torch.randn(5, 8, dtype=torch.complex64)
BAD_FORMS = [
    ([WIDE, WIDE], {"order": "pairs"}, "order must be one of half, interleaved, interleaved_to_half, got 'pairs'"),
    ([WIDE, WIDE], {"parts": 0}, "parts must be at least 1, got 0"),
    ([WIDE], {}, "cos must be complex64 where there is no sin, got torch.float32; pass sin too"),
    ([WIDE, WIDE], {"rotary_dim": 8}, "rotary_dim must be 16 or 32, as cos is 16 wide, got 8"),
    ([FREQUENCIES], {"rotary_dim": 8}, "rotary_dim must be 16, as cos is 8 wide, got 8"),
    ([WIDE, WIDE], {"rotary_dim": 32}, "cos must have shape (5, r), (1, 5, r) or (2, 5, r) with r at most 8, got (2, 5, 16)"),
    ([FREQUENCIES[:, :7]], {"parts": 2}, "with r even, at most 8, got (5, 7)"),
    ([WIDE[..., :14]] * 2, {"parts": 2}, "with r divisible by 4, at most 16, got (2, 5, 14)"),
    ([torch.cat([FREQUENCIES] * 2, -1)], {}, "with r at most 8, got (5, 16)"),
    ([AXES, AXES], {"sections": [2, 3, 3], "parts": 2}, "parts must be 1 where there are sections, got 2"),
    ([AXES, AXES], {"sections": [4, 4]}, "sections must be 3 numbers of pairs of columns, 8 in all, got [4, 4]"),
    ([AXES, AXES], {"sections": [2, 2, 3]}, "sections must be 3 numbers of pairs of columns, 8 in all, got [2, 2, 3]"),
    ([AXES, AXES], {"sections": [-1, 8, 1]}, "sections must be 3 numbers of pairs of columns, 8 in all, got [-1, 8, 1]"),
    ([WIDE, WIDE], {"sections": [2, 3, 3]}, "cos must have 3 axes in front where there are sections, got (2, 5, 16)"),
    ([AXES[:, :, 1:]] * 2, {"sections": [2, 3, 3]}, "cos must have shape (3, 5, r), (3, 1, 5, r) or (3, 2, 5, r) with r even"),
    ([AXES, AXES[0]], {"sections": [2, 3, 3]}, "sin must have shape (3, 2, 5, 16) like cos, got (2, 5, 16)"),
    ([FREQUENCIES.to("meta")], {}, "cos must be on cpu like q, got meta; move it with .to()"),
    ([FREQUENCIES, FREQUENCIES], {}, "cos and sin must both be torch.float32, got torch.complex64 and torch.complex64; cast"),
]


@pytest.mark.parametrize(("angles", "options", "text"), BAD_FORMS, ids=[f"{n}-{b[2][:40]}" for n, b in enumerate(BAD_FORMS)])
def test_rejects_of_forms(angles, options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        rope(torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), *angles, **options)


def test_complex_angles_get_no_gradient():
    with pytest.raises(ValueError, match="rope: cos and sin must not require gradients, which are not computed"):
        rope(torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), FREQUENCIES.clone().requires_grad_(), order="interleaved")
