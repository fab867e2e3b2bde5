"""Any shape, any strides, any dtype: the kernels and the CPU kernels give the same results and gradients."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from liger_aot import _jit

from calls import LAYOUTS
from calls import laid_out
from examples import call
from harness import DTYPES

SETTINGS = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
dtypes = st.sampled_from(DTYPES)
widths = st.sampled_from([1, 2, 3, 15, 16, 31, 64, 127, 128, 129, 255, 256, 1000, 1025])
shapes = st.tuples(st.lists(st.integers(0, 4), max_size=2), widths).map(lambda t: (*t[0], t[1]))
layouts = st.sampled_from(["contiguous", *LAYOUTS])


def outcome(name, arguments, options):
    arguments = [a.detach().requires_grad_(a.is_floating_point()) if torch.is_tensor(a) else a for a in arguments]
    constants = {"rope": 2}.get(name, len(arguments))
    arguments = [a.detach() if torch.is_tensor(a) and n >= constants else a for n, a in enumerate(arguments)]
    outputs = call(name, arguments, options)
    wanted = [a for a in arguments if torch.is_tensor(a) and a.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, upstream)]


def layout_of(t):
    """The strides that matter: those of dimensions with more than one entry, where there is any entry at all."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and t.numel()]


def agree(name, arguments, options, steps=4):
    """Each result is within a few units in the last place, of its own dtype, of the largest number."""
    expected = outcome(name, arguments, options)
    with _jit.interpreted():
        got = outcome(name, arguments, options)
    for g, e in zip(got, expected, strict=True):
        assert (g.shape, g.dtype, layout_of(g)) == (e.shape, e.dtype, layout_of(e))
        unit = torch.finfo(e.dtype).eps * (e.nan_to_num().abs().max().item() if e.numel() else 0.0)
        torch.testing.assert_close(g, e, rtol=0, atol=steps * unit, equal_nan=True)


@SETTINGS
@hypothesis.given(shapes, dtypes, layouts, st.booleans(), st.sampled_from(["none", "llama"]))
def test_rms_norm(shape, dtype, layout, wide_weight, casting):
    weight = torch.randn(shape[-1], dtype=torch.float32 if wide_weight else dtype)
    # A row of one number is its own norm: what is left of its gradient is all rounding.
    hypothesis.assume(shape[-1] > 2)
    agree("rms_norm", [laid_out(shape, dtype, layout), weight, 1e-5], {"casting": casting})


@SETTINGS
@hypothesis.given(shapes, dtypes, layouts, layouts)
def test_fused_add_rms_norm(shape, dtype, layout, other):
    hypothesis.assume(shape[-1] > 2)
    x, residual = laid_out(shape, dtype, layout), laid_out(shape, dtype, other)
    agree("fused_add_rms_norm", [x, residual, torch.randn(shape[-1], dtype=dtype), 1e-5], {})


@SETTINGS
@hypothesis.given(shapes, dtypes, layouts, st.booleans())
def test_layer_norm(shape, dtype, layout, bias):
    hypothesis.assume(shape[-1] > 3)
    weight = torch.randn(shape[-1], dtype=dtype)
    agree("layer_norm", [laid_out(shape, dtype, layout), weight, weight.clone() if bias else None, 1e-5], {})


@SETTINGS
@hypothesis.given(shapes, dtypes, layouts, layouts, st.sampled_from(["swiglu", "geglu"]))
def test_gates(shape, dtype, layout, other, name):
    agree(name, [laid_out(shape, dtype, layout), laid_out(shape, dtype, other)], {})


@SETTINGS
@hypothesis.given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.sampled_from([2, 6, 16, 34, 70]),
    st.integers(0, 4), dtypes, st.booleans(), st.booleans(),
)  # fmt: skip
def test_rope(batch, heads, kv_heads, tokens, rotated, rest, dtype, fp32_angles, one_angle):
    q, k = (torch.randn(batch, tokens, h, rotated + rest).to(dtype).transpose(1, 2) for h in (heads, kv_heads))
    angles = torch.randn(2, 1 if one_angle else batch, tokens, rotated).to(torch.float32 if fp32_angles else dtype)
    agree("rope", [q, k, *angles], {})


@SETTINGS
@hypothesis.given(
    st.integers(1, 9), st.sampled_from([4, 8, 20, 36, 64, 132]), st.integers(0, 4), dtypes, layouts, st.booleans(),
    st.sampled_from(["half", "interleaved", "interleaved_to_half"]), st.sampled_from(["", "sections", "parts"]),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_forms_of_rope(heads, rotated, rest, dtype, layout, complex_angles, order, how, last, reverse):
    q, k = laid_out((2, heads, 2, rotated + rest), dtype, layout), torch.randn(2, 2, 2, rotated + rest).to(dtype)
    options = {"order": order, "last": last, "reverse": reverse}
    options |= {"sections": {"sections": [1, rotated // 2 - 1, 0]}, "parts": {"parts": 2}}.get(how, {})
    angles = [torch.randn(*[3] * (how == "sections"), 1, 2, rotated // 2) for _ in range(2)]
    angles = [torch.complex(*angles)] if complex_angles else [torch.cat((t, t.flip(-1)), -1) for t in angles]
    agree("rope", [q, k, *angles], options)


@SETTINGS
@hypothesis.given(
    st.integers(0, 5), widths, dtypes, layouts, st.sampled_from(["none", "mean", "sum"]), st.booleans(), st.floats(0, 1),
    st.sampled_from([None, 5.0]), st.sampled_from([0.0, 1e-3]),
)  # fmt: skip
def test_cross_entropy(rows, classes, dtype, layout, reduction, weighted, smoothing, softcap, z_scale):
    logits, target = laid_out((rows, classes), dtype, layout), torch.randint(classes, (rows,))
    target[::3] = -100
    options = {"reduction": reduction, "label_smoothing": smoothing, "softcap": softcap, "lse_square_scale": z_scale}
    weight = torch.rand(classes) if weighted else None
    expected, got = [], []
    for results, context in ((expected, None), (got, _jit.interpreted())):
        leaf = logits.detach().requires_grad_()
        with context or torch.enable_grad():
            loss = torch.ops.liger.cross_entropy(leaf, target, weight, **options)
            loss.float().sum().backward()
        results += [loss.detach(), leaf.grad]
    for g, e in zip(got, expected, strict=True):
        size = e.nan_to_num().abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(g, e, rtol=0, atol=8 * torch.finfo(dtype).eps * max(size, 1.0), equal_nan=True)


@SETTINGS
@hypothesis.given(
    shapes, dtypes, layouts, layouts, st.sampled_from(["kl_div", "jsd", "tvd"]),
    st.sampled_from(["none", "mean", "sum", "batchmean"]), st.booleans(), st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)  # fmt: skip
def test_divergences(shape, dtype, layout, other, name, reduction, labelled, beta):
    pair = [logs.log_softmax(-1).to(dtype) if name != "tvd" else logs.softmax(-1).to(dtype) for logs in torch.randn(2, *shape)]
    for n, how in enumerate((layout, other)):
        pair[n] = laid_out(shape, dtype, how).copy_(pair[n]) if how != "expanded" else pair[n]
    labels = torch.randint(3, shape[:-1]) if labelled else None
    options = {"jsd": {"beta": beta}, "kl_div": {"log_target": beta < 0.5}}.get(name, {})
    if name == "kl_div" and beta >= 0.5:
        pair[1] = pair[1].exp()
    # Near each other's, p and q make logarithms of numbers near 1, which carry an ulp of that.
    agree(name, [*pair, labels], {"reduction": reduction, "ignore_index": 1} | options, steps=8)


@SETTINGS
@hypothesis.given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 300), dtypes, st.booleans(), st.floats(0.5, 2.0))
def test_linear_logprob(rows, width, classes, dtype, bias, temperature):
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(classes, width) / width**0.5).to(dtype)
    options = {"temperature": temperature, "bias": torch.randn(classes).to(dtype) if bias else None}
    hypothesis.assume(classes > 1)
    agree("linear_logprob", [hidden, weight, torch.randint(classes, (rows,))], options, steps=16)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_one_number_wide(path, name):
    x, weight = torch.randn(5, 1, requires_grad=True), torch.randn(1, requires_grad=True)
    outputs = call(name, [x, weight] + ([1e-5] if name == "rms_norm" else []), {})
    outputs[0].sum().backward()
    expected = weight * x.sign() if name == "rms_norm" else torch.zeros(5, 1)
    torch.testing.assert_close(outputs[0], expected.detach(), atol=1e-4, rtol=1e-4)
