"""torch's functions: same names, order and defaults, and the same numbers."""

import inspect
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)

import liger_aot
from liger_aot.functional import CrossEntropyOutput

import formulas
from harness import DTYPES
from harness import fixed
from harness import run

SHARED = ["rms_norm", "layer_norm", "group_norm", "cross_entropy", "linear_cross_entropy", "kl_div"]


def same(ours, theirs, *inputs):
    """The same outputs and gradients, by torch's own tolerance: what operators lose is measured in their own tests."""
    torch.testing.assert_close(run(ours, inputs), run(theirs, inputs))


def test_all_is_tested():
    """Every name of the package is called here, or has a test file of its own."""
    text = "".join(p.read_text() for p in __import__("pathlib").Path(__file__).parent.glob("test_*.py"))
    for name in liger_aot.__all__:
        assert re.search(rf"\bliger_aot\.{name}\b|import {name}\b", text), name


@pytest.mark.parametrize("name", [n for n in SHARED if hasattr(F, n)])
def test_signature_begins_with_torchs(name):
    ours = list(inspect.signature(getattr(liger_aot, name)).parameters.values())
    theirs = list(inspect.signature(getattr(F, name)).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in ours[len(theirs) :])


@pytest.mark.parametrize("shape", [(24,), (4, 6), (3, 4, 6)], ids=str)
@pytest.mark.parametrize("given", ["x", "xw", "xwb"])
def test_norms_over_several_dimensions(shape, given):
    parameters = [torch.randn(shape) for _ in given[1:]]
    x = torch.randn(2, 3, 4, 6) if len(shape) > 1 else torch.randn(2, 3, 24)
    same(
        lambda x, *p: liger_aot.layer_norm(x, shape, *p, eps=1e-3),
        lambda x, *p: F.layer_norm(x, shape, *p, eps=1e-3),
        x,
        *parameters,
    )
    if given != "xwb":
        same(lambda x, *p: liger_aot.rms_norm(x, shape, *p), lambda x, *p: F.rms_norm(x, shape, *p), x, *parameters)


def test_norm_of_a_transposed_input():
    x = torch.randn(6, 4, 5).transpose(0, 2)
    same(lambda x, w: liger_aot.rms_norm(x, (4, 6), w), lambda x, w: F.rms_norm(x, (4, 6), w), x, torch.randn(4, 6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_without_eps_has_torchs(dtype):
    x = (torch.randn(3, 24) * 1e-3).to(dtype)  # so small that eps tells
    torch.testing.assert_close(liger_aot.rms_norm(x, [24]), F.rms_norm(x, [24]))


def test_rms_norm_options():
    x, w = torch.randn(4, 24).bfloat16(), torch.randn(24)
    got = liger_aot.rms_norm(x, [24], w, 1e-6, offset=1.0, casting="llama")
    assert got.dtype == torch.float32  # the weight's: other castings give x's
    assert torch.equal(got, torch.ops.liger.rms_norm(x, w, 1e-6, offset=1.0, casting="llama"))


def test_fused_add_rms_norm():
    x, residual, w = torch.randn(4, 24), torch.randn(4, 24), torch.randn(24)

    def reference(x, residual, w):
        return F.rms_norm(x + residual, (24,), w, 1e-5), x + residual

    same(lambda x, r, w: liger_aot.fused_add_rms_norm(x, r, w, 1e-5), reference, x, residual, w)


def rotate(q, k, cos, sin, unsqueeze_dim=1):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_rope(unsqueeze_dim):
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    cos, sin = torch.randn(2, 5, 8).repeat(1, 1, 2), torch.randn(2, 5, 8).repeat(1, 1, 2)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()
    same(
        lambda q, k, cos, sin: liger_aot.rope(q, k, cos, sin, torch.arange(5)[None], unsqueeze_dim),
        lambda q, k, cos, sin: rotate(q, k, cos, sin, unsqueeze_dim),
        q,
        k,
        fixed(cos),
        fixed(sin),
    )


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gates(approximate):
    gate, up = torch.randn(4, 24), torch.randn(4, 24)
    same(
        lambda g, u: liger_aot.geglu(g, u, approximate=approximate),
        lambda g, u: F.gelu(g, approximate=approximate) * u,
        gate,
        up,
    )
    same(
        lambda g, u: liger_aot.swiglu(g, u, gate_multiplier=0.5, down_multiplier=2.0),
        lambda g, u: F.silu(g * 0.5) * u * 2.0,
        gate,
        up,
    )


def test_group_norm():
    same(
        lambda x, w, b: liger_aot.group_norm(x, 3, w, b, 1e-3),
        lambda x, w, b: F.group_norm(x, 3, w, b, 1e-3),
        torch.randn(2, 6, 5),
        torch.randn(6),
        torch.randn(6),
    )


def test_softmax():
    x = torch.randn(2, 6, 5)
    same(lambda x: liger_aot.softmax(x, 1), lambda x: torch.softmax(x, 1), x)
    wide = liger_aot.softmax(x.bfloat16(), -1, dtype=torch.float32)
    torch.testing.assert_close(wide, torch.softmax(x.bfloat16(), -1, dtype=torch.float32))


def test_packed_glu():
    x = torch.randn(2, 6, 10)
    same(liger_aot.packed_glu, formulas.packed_glu(), x)
    same(lambda x: liger_aot.packed_glu(x, "gelu"), formulas.packed_glu("gelu"), x)


def test_moe_permute_and_unpermute():
    order, position, _ = liger_aot.functional.moe_route(torch.tensor([[2, 0], [1, 2], [0, 9]]), 3)
    x, weight = torch.randn(3, 8), torch.rand(3, 2)
    same(lambda x: liger_aot.moe_permute(x, order, position)[:5], lambda x: x[order // 2][:5], x)
    same(
        lambda x, w: liger_aot.moe_unpermute(x, w, order, position),
        lambda x, w: formulas.moe_unpermute(x, w, order, position),
        torch.randn(6, 8),
        weight,
    )


def test_sparsemax():
    same(liger_aot.sparsemax, formulas.sparsemax, torch.randn(2, 6, 5))
    same(lambda x: liger_aot.sparsemax(x, 1), lambda x: formulas.sparsemax(x.mT).mT, torch.randn(2, 6, 5))


@pytest.mark.parametrize("gate_first", [False, True])
def test_gated_rms_norm(gate_first):
    options = {"groups": 2, "gate_first": gate_first, "activation": "sigmoid", "eps": 1e-5}
    function, x, gate = formulas.gated_rms_norm(**options), torch.randn(2, 6), torch.randn(2, 6)
    same(lambda x, g, w: liger_aot.gated_rms_norm(x, g, w, **options), function, x, gate, torch.randn(6))
    module = liger_aot.nn.GatedRMSNorm(6, 1e-5, 2, gate_first, "sigmoid")
    torch.nn.init.normal_(module.weight)
    torch.testing.assert_close(module(x, gate), function(x, gate, module.weight))
    assert repr(module) == (f"GatedRMSNorm(6, eps=1e-05, groups=2, gate_first={gate_first}, activation=sigmoid, casting=none)")


def test_poly_norm():
    x, weight, bias = torch.randn(2, 6), torch.randn(3), torch.randn(1)
    same(lambda *t: liger_aot.poly_norm(*t, eps=1e-3), formulas.poly_norm(1e-3), x, weight, bias)
    module = liger_aot.nn.PolyNorm(1e-3)
    torch.testing.assert_close(module(x), formulas.poly_norm(1e-3)(x, torch.full((3,), 1 / 3), torch.ones(1)))
    assert repr(module) == "PolyNorm(eps=0.001)"


def test_modulated_rms_norm():
    x, scale, shift, weight = torch.randn(2, 3, 6), torch.randn(2, 6), torch.randn(2, 6), torch.randn(6)
    formula = formulas.modulated_rms_norm(1e-3, 1.0)
    same(lambda *t: liger_aot.modulated_rms_norm(*t, 1e-3, offset=1.0), formula, x, scale, shift, weight)
    module = liger_aot.nn.ModulatedRMSNorm(6, 1e-3, offset=1.0)
    torch.testing.assert_close(module(x, scale, shift), formula(x, scale, shift, torch.ones(6)))
    assert repr(module) == "ModulatedRMSNorm((6,), eps=0.001, elementwise_affine=True, offset=1.0, casting=none)"


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": (1, 0), "dilation": (1, 2)}], ids=str)
def test_multi_token_attention(options):
    x, w, b = torch.randn(2, 4, 9, 9), torch.randn(4, 4, 2, 2), torch.randn(4)
    same(partial(liger_aot.multi_token_attention, **options), formulas.multi_token_attention(x.dtype, **options), x, w, b)


def test_neighborhood_attention():
    heads = torch.randn(3, 2, 3, 9, 4).unbind()
    same(liger_aot.neighborhood_attention, formulas.neighborhood_attention(), *heads)
    same(partial(liger_aot.neighborhood_attention, dilation=2, scale=0.3), formulas.neighborhood_attention(7, 2, 0.3), *heads)


def test_attn_res():
    v, query, weight = torch.randn(4, 2, 6), torch.randn(6), torch.randn(6)
    same(lambda *t: liger_aot.attn_res(*t, eps=1e-3), formulas.attn_res(1e-3), v, query, weight)


def test_mhc():
    options = {"tmax": 4, "rms_eps": 1e-2, "pre_eps": 0.5, "sinkhorn_eps": 1e-2, "post_mult": 3.0}
    inputs = torch.randn(5, 2, 6), torch.randn(12, 8), torch.randn(8), *torch.rand(3).unbind()
    same(partial(liger_aot.mhc_coeffs, **options), formulas.mhc_coeffs(**options), *inputs)
    x, f_out, h_post, h_res = torch.randn(5, 3, 4), torch.randn(5, 4), torch.randn(5, 3), torch.randn(5, 3, 3)
    same(liger_aot.mhc_pre, formulas.mhc_pre, x, h_post)
    same(liger_aot.mhc_post_res, formulas.mhc_post_res, x, f_out, h_post, h_res)


@pytest.mark.parametrize("padding_idx", [None, -3])
def test_embedding(padding_idx):
    indices, weight = torch.randint(9, (3, 20)), torch.randn(9, 6)
    same(lambda w: liger_aot.embedding(indices, w, padding_idx), lambda w: F.embedding(indices, w, padding_idx), weight)
    module, theirs = liger_aot.nn.Embedding(9, 6, padding_idx), torch.nn.Embedding(9, 6, padding_idx)
    module.load_state_dict(theirs.state_dict())
    assert torch.equal(module(indices), theirs(indices))
    assert repr(module) == repr(theirs)
    with pytest.raises(NotImplementedError, match="Embedding: sparse must be False, got True; torch"):
        liger_aot.nn.Embedding(9, 6, sparse=True)


def test_dyt_and_relu_squared():
    x, alpha, gamma, beta = torch.randn(2, 6), torch.randn(1), torch.randn(6), torch.randn(6)
    same(liger_aot.dyt, lambda x, a, g, b: torch.tanh(a * x) * g + b, x, alpha, gamma, beta)
    same(liger_aot.relu_squared, lambda x: F.relu(x).square(), x)


LEGACY = [(a, r) for a in (None, True, False) for r in (None, True, False)]


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize(("size_average", "reduce"), LEGACY, ids=str)
def test_legacy_reductions(size_average, reduce):
    x, target = torch.randn(5, 9).log_softmax(-1), torch.rand(5, 9)
    got = liger_aot.kl_div(x, target, size_average, reduce, "sum")
    torch.testing.assert_close(got, F.kl_div(x, target, size_average, reduce, "sum"))
    x, target = torch.randn(5, 9), torch.randint(9, (5,))
    got = liger_aot.cross_entropy(x, target, None, size_average, -100, reduce, "sum")
    want = F.cross_entropy(x, target, None, size_average, -100, reduce, "sum")
    torch.testing.assert_close(got, want)


TARGETS = {
    "indices": lambda: torch.randint(9, (5, 3)),
    "probabilities": lambda: torch.randn(5, 9, 3).softmax(1),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(target, reduction):
    target, options = target(), {"reduction": reduction, "label_smoothing": 0.1}
    weight = torch.rand(9)
    same(
        lambda x, y, w: liger_aot.cross_entropy(x, y, w, **options),
        lambda x, y, w: F.cross_entropy(x, y, w, **options),
        torch.randn(5, 9, 3),
        fixed(target),
        fixed(weight),
    )


def soft(z, softcap):
    return softcap * torch.tanh(z / softcap)


def test_cross_entropy_options_and_stats():
    x, target = torch.randn(7, 9), torch.randint(9, (7,))
    target[2] = -100
    options = {"softcap": 2.0, "lse_square_scale": 0.1}
    out = liger_aot.cross_entropy(x, target, **options, return_z_loss=True, return_predicted_tokens=True)
    assert isinstance(out, CrossEntropyOutput)
    assert out.token_accuracy is None
    z, keep = soft(x, 2.0), target != -100
    z_loss = (0.1 * torch.logsumexp(z, 1).square())[keep].mean()
    torch.testing.assert_close(out.z_loss, z_loss)
    torch.testing.assert_close(out.loss, F.cross_entropy(z, target) + z_loss)
    assert torch.equal(out.loss, liger_aot.cross_entropy(x, target, **options))
    assert torch.equal(out.predicted_tokens, z.argmax(1).where(keep, -1))
    _, z_loss, accuracy, predicted = liger_aot.cross_entropy(x, target, return_token_accuracy=True)
    torch.testing.assert_close(accuracy, (z.argmax(1) == target)[keep].float().mean())
    assert z_loss is None
    assert predicted is None


def linear_reference(x, w, target, b=None, scale=1.0, **options):
    return F.cross_entropy(F.linear(x, w, b) * scale, target, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy(reduction):
    x, w, b, target = torch.randn(7, 6), torch.randn(9, 6), torch.randn(9), torch.randint(9, (7,))
    options = {"reduction": reduction, "label_smoothing": 0.1, "ignore_index": 3}
    same(
        lambda x, w, b: liger_aot.linear_cross_entropy(x, w, target, linear_bias=b, scale=0.5, **options),
        lambda x, w, b: linear_reference(x, w, target, b, 0.5, **options),
        x,
        w,
        b,
    )


needs_torchs = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has linear_cross_entropy since 2.13")


@needs_torchs
@pytest.mark.parametrize("given", ["None", "LinearCrossEntropyOptions()", "LinearCrossEntropyOptions(batch_chunk_size=2)"])
def test_linear_cross_entropy_takes_torchs_options(given):
    options = eval(given, vars(torch.nn))
    x, w, target = torch.randn(7, 6), torch.randn(9, 6), torch.randint(9, (7,))
    same(
        lambda x, w: liger_aot.linear_cross_entropy(x, w, target, options=options),
        lambda x, w: F.linear_cross_entropy(x, w, target),
        x,
        w,
    )


@needs_torchs
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("out_features", [(), (4, 3)], ids=str)
def test_linear_cross_entropy_of_every_shape(kind, out_features):
    x, w, b = torch.randn(5, 6), torch.randn(9, *out_features, 6), torch.randn(9, *out_features)
    target = torch.randint(9, (5, *out_features))
    if kind == "probabilities":
        target = torch.randn(5, 9, *out_features).softmax(1)
    same(
        lambda x, w, b, y: liger_aot.linear_cross_entropy(x, w, y, linear_bias=b),
        lambda x, w, b, y: F.linear_cross_entropy(x, w, y, linear_bias=b),
        x,
        w,
        b,
        fixed(target),
    )


def test_linear_cross_entropy_stats():
    x, w, target = torch.randn(7, 6), torch.randn(9, 6), torch.randint(9, (7,))
    options = {"lse_square_scale": 0.1, "softcap": 3.0}
    flags = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
    got = liger_aot.linear_cross_entropy(x, w, target, **options, **flags)
    want = liger_aot.cross_entropy(x @ w.t(), target, **options, **flags)
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e)


def test_linear_logprob():
    x, w, b, target = torch.randn(7, 6), torch.randn(9, 6), torch.randn(9), torch.randint(9, (7,))

    def reference(x, w, b):
        logp = torch.log_softmax(F.linear(x, w, b) / 0.7, -1)
        lse = torch.logsumexp(F.linear(x, w, b) / 0.7, -1)
        return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1), lse

    same(lambda x, w, b: liger_aot.linear_logprob(x, w, target, bias=b, temperature=0.7), reference, x, w, b)


def everything(x, w, target):
    h = liger_aot.rms_norm(x, (4, 6), w.view(4, 6))
    h = liger_aot.layer_norm(h.flatten(1), (24,), w)
    h, s = liger_aot.fused_add_rms_norm(h, x.flatten(1), w)
    h = liger_aot.swiglu(h, s) + liger_aot.geglu(h, s)
    q = h.view(1, 2, -1, 12)
    q, k = liger_aot.rope(q, q, torch.ones(q.shape[2], 12), torch.ones(q.shape[2], 12), unsqueeze_dim=1)
    h = (q + k).view_as(h)
    out = liger_aot.cross_entropy(h, target, return_z_loss=True, lse_square_scale=0.1)
    linear = liger_aot.linear_cross_entropy(h, w.view(2, 12).repeat(12, 2), target)
    logp, entropy, lse = liger_aot.linear_logprob(h, w.view(2, 12).repeat(12, 2), target)
    return out, linear + logp.sum() + entropy.sum() + lse.sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_trace_whole(dynamic):
    x, w, target = torch.randn(6, 4, 6, requires_grad=True), torch.randn(24, requires_grad=True), torch.randint(24, (6,))
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    (out, other), (want, wanted) = compiled(x, w, target), everything(x, w, target)
    torch.testing.assert_close([out.loss, out.z_loss, other], [want.loss, want.z_loss, wanted])
    (out.loss + other).backward()


X, W, Y = torch.randn(4, 8), torch.randn(8), torch.randint(8, (4,))
BAD = [
    (
        lambda: liger_aot.rms_norm(X, (4, 7), W),
        "rms_norm: normalized_shape must be the last dimensions of the input, (4, 8), got (4, 7)",
    ),
    (
        lambda: liger_aot.layer_norm(X, (), W),
        "layer_norm: normalized_shape must be the last dimensions of the input, (4, 8), got ()",
    ),
    (
        lambda: liger_aot.rms_norm(X, 8),
        "rms_norm: normalized_shape must be a tuple or a list of sizes, got 8; pass (8,)",
    ),
    (lambda: liger_aot.layer_norm(X, (4, 8), X, W), "layer_norm: bias must have shape (4, 8), got (8,)"),
    (lambda: liger_aot.rms_norm(X, (4, 8), W), "rms_norm: weight must have shape (4, 8), got (8,)"),
    (lambda: liger_aot.rope(X, X, X, X, None, 3), "rope: unsqueeze_dim must be 1 or 2, got 3"),
    (
        lambda: liger_aot.linear_cross_entropy(X, X, Y, options={}),
        "linear_cross_entropy: options must be a torch.nn.LinearCrossEntropyOptions or None, got {}",
    ),
    (
        lambda: liger_aot.linear_cross_entropy(X, X, X, ignore_index=1),
        "linear_cross_entropy: ignore_index must be None where targets are probabilities, got 1",
    ),
    (
        lambda: liger_aot.cross_entropy(X, Y, reduction="avg"),
        "cross_entropy: reduction must be one of none, mean, sum, got 'avg'",
    ),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[b[1][:60] for b in BAD])
def test_rejects(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_divergences():
    """Every option reaches the operator."""
    x, y, labels = torch.randn(5, 9).log_softmax(-1), torch.randn(5, 9).log_softmax(-1), torch.tensor([1, 2, 3, 2, 4])
    options = {"ignore_index": 2, "loss_dtype": torch.float16}
    for given in ({"log_target": True}, {"eps": 1e-2}):
        got = liger_aot.kl_div(x, y.exp(), reduction="sum", shift_labels=labels, **given, **options)
        assert torch.equal(got, torch.ops.liger.kl_div(x, y.exp(), labels, reduction="sum", **given, **options))
    got = liger_aot.jsd(x, y, labels, beta=0.1, reduction="mean", **options)
    assert torch.equal(got, torch.ops.liger.jsd(x, y, labels, beta=0.1, reduction="mean", **options))
    heads, given = [torch.randn(size) for size in ((5, 4), (9, 4), (5, 3), (9, 3))], {"beta": 0.1, "temperature": 2.0}
    given |= options | {"student_bias": x[0], "teacher_bias": y[0], "reduction": "mean"}
    assert torch.equal(liger_aot.linear_jsd(*heads, labels, **given), torch.ops.liger.linear_jsd(*heads, labels, **given))
    given = {"temperature": 2.0, "eps": 1e-2, "student_bias": x[0], "reduction": "mean"} | options
    got = liger_aot.linear_kl_div(*heads[:2], y.exp(), labels, **given)
    assert torch.equal(got, torch.ops.liger.linear_kl_div(*heads[:2], y.exp(), labels, **given))
    for got, want in zip(
        liger_aot.cross_entropy_tvd(x, y, labels, ignore_index=2),
        torch.ops.liger.cross_entropy_tvd(x, y, labels, ignore_index=2),
        strict=True,
    ):
        assert torch.equal(got, want)
    got = liger_aot.tvd(x.exp(), y.exp(), labels, reduction="sum", **options)
    assert torch.equal(got, torch.ops.liger.tvd(x.exp(), y.exp(), labels, reduction="sum", **options))
