import re

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

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
    dq_out, dk_out = (torch.randn_like(o) for o in outs)
    (got,) = torch.autograd.grad(outs, leaf, (dq_out, dk_out))
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
