import functools
import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)

import formulas
from harness import DTYPES
from harness import check
from harness import check_operator

modulated_rms_norm = torch.ops.liger.modulated_rms_norm.default
modulated_rms_norm_fwd = torch.ops.liger.modulated_rms_norm_fwd.default
modulated_rms_norm_bwd = torch.ops.liger.modulated_rms_norm_bwd.default
# x, and scale: one for all rows, for each batch, for each row; one number; whole blocks of either size, ragged, and the loop.
SHAPES = [
    ((1,), (1,)),
    ((2, 7, 100), (100,)),
    ((2, 7, 100), (2, 100)),
    ((2, 7, 100), (2, 7, 100)),
    ((2, 2, 2, 2048), (2, 2, 2048)),
    ((2, 3, 2500), (2, 1, 2500)),
    ((3, 4096), (3, 4096)),
    ((2, 2, 4500), (2, 4500)),
    ((3, 4500), (3, 4500)),
]


def make(shape, scale, dtype, others=None):
    shapes = shape, scale, scale, shape[-1:]
    return [torch.randn(s).to(t) for s, t in zip(shapes, (dtype, *[others or dtype] * 3), strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "scale"), SHAPES, ids=str)
def test_matches_its_formula(path, shape, scale, dtype):
    check(functools.partial(modulated_rms_norm, eps=1e-5), formulas.modulated_rms_norm(1e-5), *make(shape, scale, dtype))


@pytest.mark.parametrize("multiprocessors", [1, 3, 50])
@pytest.mark.parametrize(("shape", "scale"), [SHAPES[n] for n in (1, 2, 3, 7)], ids=str)
def test_groups_are_divided_among_programs(interpreted, shape, scale, multiprocessors):
    """Few programs own several groups, many share each."""
    interpreted.count = multiprocessors
    # What is summed in shares rounds otherwise than in the formula's order, neither worse nor better.
    check(modulated_rms_norm, formulas.modulated_rms_norm(), *make(shape, scale, torch.float32), slack=3.0)


@pytest.mark.parametrize("n", [100, 4500])
@pytest.mark.parametrize("given", [(), ("shift",), ("weight",)], ids=str)
def test_what_is_left_out(path, given, n):
    x, scale, shift, weight = make((2, 5, n), (2, n), torch.float32)
    several = {"shift": shift, "weight": weight}
    names = list(given)

    def call(function):
        return lambda x, scale, *rest: function(x, scale, **dict(zip(names, rest, strict=True)))

    formula = formulas.modulated_rms_norm()
    check(call(modulated_rms_norm), call(formula), x, scale, *(several[name] for name in names))


@pytest.mark.parametrize("casting", ["none", "gemma", "llama"])
@pytest.mark.parametrize("others", DTYPES, ids=str)
def test_casting_and_mixed_dtypes(path, casting, others):
    results = check(
        functools.partial(modulated_rms_norm, eps=1e-5, casting=casting, offset=1.0),
        formulas.modulated_rms_norm(1e-5, offset=1.0),
        *make((2, 5, 300), (2, 300), torch.bfloat16, others),
        slack=4.0 if casting == "llama" else 2.0,  # which rounds twice
        through=torch.bfloat16 if casting == "llama" else None,
    )
    assert results["output 0"].dtype == results["gradient 0"].dtype == torch.bfloat16
    assert all(results[f"gradient {n}"].dtype == others for n in (1, 2, 3))


def test_a_scale_of_either_dimension_is_of_the_first(path):
    x, scale, shift, _ = make((3, 3, 40), (3, 40), torch.float32)
    for weight in (None, torch.randn(40)):
        want = modulated_rms_norm(x, *(t[:, None].expand(3, 3, 40) for t in (scale, shift)), weight)
        assert torch.equal(modulated_rms_norm(x, scale, shift, weight), want)


def test_casting_rounds_the_normalised_value(path):
    x, scale, shift, weight = make((3, 9, 300), (3, 300), torch.bfloat16)
    normal = F.rms_norm(x.float(), (300,), eps=1e-5)
    for casting, value in (("llama", normal.bfloat16().float()), ("none", normal), ("gemma", normal)):
        want = value * weight.float() * (1 + scale.float()[:, None]) + shift.float()[:, None]
        got = modulated_rms_norm(x, scale, shift, weight, 1e-5, casting=casting)
        assert (got != want.bfloat16()).double().mean() < 0.001  # fp32 sums in another order


def test_without_eps_it_is_torchs(path):
    x, scale, shift, weight = make((2, 5, 100), (2, 100), torch.float32)
    want = F.rms_norm(1e-4 * x, (100,), weight) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(modulated_rms_norm(1e-4 * x, scale, shift, weight), want)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("n", [100, 4500])
def test_gradients_of_some(path, wanted, n):
    inputs, dy = make((2, 3, n), (2, n), torch.float32), torch.randn(2, 3, n)
    leaves = [i.clone().requires_grad_() for i in inputs]
    some = [i.clone().requires_grad_(n in wanted) for n, i in enumerate(inputs)]
    for each in (leaves, some):
        modulated_rms_norm(*each).backward(dy)
    for n, (got, want) in enumerate(zip(some, leaves, strict=True)):
        assert torch.equal(got.grad, want.grad) if n in wanted else got.grad is None


def test_views_and_offsets(path):
    base, both = torch.randn(2, 4, 77), torch.randn(2, 6 * 57)
    function, formula = functools.partial(modulated_rms_norm, eps=1e-5), formulas.modulated_rms_norm(1e-5)
    scale, shift = both.chunk(6, -1)[1:3]  # as models have them: parts of one projection
    check(function, formula, base[:, 1:, 3:60], scale, shift, torch.randn(58)[1:])
    check(function, formula, base[:, 1:, 3:60], scale[:, None], shift[:, None], torch.randn(57))
    check(function, formula, base[..., :57].transpose(0, 1), base[..., 8:65].transpose(0, 1), base[..., 9:66].transpose(0, 1))
    check(function, formula, base[:1, :, 5:62].expand(2, 4, 57), scale[:1], shift[1:])
    check(function, formula, base[0, :, 9:66], scale[0], shift[1], torch.randn(57))
    check(function, formula, base[..., ::2], torch.randn(39, 2).t()[:1], torch.randn(2, 39)[1:])


@pytest.mark.parametrize(
    ("shape", "scale"), [((0, 8), (8,)), ((3, 0), (3, 0)), ((2, 0, 8), (2, 8)), ((0, 2, 8), (0, 8))], ids=str
)
def test_nothing_in_nothing_out(path, shape, scale):
    inputs = [t.requires_grad_() for t in make(shape, scale, torch.float32)]
    y = modulated_rms_norm(*inputs)
    y.sum().backward()
    assert y.shape == inputs[0].grad.shape == shape
    for i in inputs[1:]:
        assert torch.equal(i.grad, torch.zeros(i.shape))


@pytest.mark.parametrize(("scale", "shift"), [((24,), False), ((3, 24), True)], ids=str)
def test_is_an_operator(scale, shift):
    x, scale, shifts, weight = make((3, 4, 24), scale, torch.float32)
    shifts = shifts if shift else None
    plain = x, scale, shifts, weight, 1e-5, 0.0, False
    check_operator(modulated_rms_norm, (modulated_rms_norm_fwd, plain), x, scale, shifts, weight, 1e-5)
    _, rstd = modulated_rms_norm_fwd(*plain)
    for each in (scale, torch.randn_like(x)):
        given = torch.randn_like(x), x, each, weight, rstd, 0.0, False, True, True, shift
        torch.library.opcheck(modulated_rms_norm_bwd, given)


COLUMNS = "must have as many columns as x, of shape (2, 3, 8), and in front x's dimensions or the first of them, got shape"
BAD = [
    (lambda x, s: (x.long(), s), "modulated_rms_norm: x must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x, s: (x[0, 0, 0], s), "modulated_rms_norm: x must have a last dimension to normalise over, got a scalar"),
    (lambda x, s: (x, s[:, :4]), f"modulated_rms_norm: scale {COLUMNS} (2, 4)"),
    (lambda x, s: (x, s[:, 0]), f"modulated_rms_norm: scale {COLUMNS} (2,)"),
    (lambda x, s: (x, s[0, 0]), f"modulated_rms_norm: scale {COLUMNS} ()"),
    (lambda x, s: (x, s.new_ones(3, 8)), f"modulated_rms_norm: scale {COLUMNS} (3, 8)"),
    (lambda x, s: (x, s.new_ones(6, 8)), f"modulated_rms_norm: scale {COLUMNS} (6, 8)"),
    (lambda x, s: (x, s.new_ones(1, 3, 8)), f"modulated_rms_norm: scale {COLUMNS} (1, 3, 8)"),
    (lambda x, s: (x, s, s[:, :4]), f"modulated_rms_norm: shift {COLUMNS} (2, 4)"),
    (lambda x, s: (x, s, s[0]), "modulated_rms_norm: shift must be of as many rows as scale, (2, 8), got (8,)"),
    (lambda x, s: (x, s.double()), "modulated_rms_norm: scale must be float32, float16 or bfloat16, got torch.float64"),
    (
        lambda x, s: (x, s, s.to("meta")),
        "modulated_rms_norm: shift must be on cpu like the input, got meta; move it with .to()",
    ),
    (lambda x, s: (x, s, s, s[0, :4]), "modulated_rms_norm: weight must have shape (8,), got (4,)"),
]


@pytest.mark.parametrize(("bad", "text"), BAD, ids=[text[20:70] for _, text in BAD])
def test_rejects(bad, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        modulated_rms_norm(*bad(torch.randn(2, 3, 8), torch.randn(2, 8)))


def test_rejects_an_unknown_casting():
    with pytest.raises(ValueError, match="modulated_rms_norm: casting must be one of none, gemma, llama, got 'lama'"):
        modulated_rms_norm(torch.randn(2, 8), torch.randn(8), casting="lama")
