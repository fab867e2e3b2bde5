import functools
import importlib
import re

import pytest
import torch

import formulas
from harness import DTYPES
from harness import check
from harness import check_operator

gated_rms_norm = torch.ops.liger.gated_rms_norm.default
gated_rms_norm_fwd = torch.ops.liger.gated_rms_norm_fwd.default
gated_rms_norm_bwd = torch.ops.liger.gated_rms_norm_bwd.default
# (rows, columns), groups: each tile and the loop, ragged; more rows than programs own at once; groups of an odd width
SHAPES = [
    ((1, 2), 1),
    ((2, 40, 100), 1),
    ((5, 390), 3),
    ((3, 2, 1030), 2),
    ((4, 1100), 1),
    ((3, 4096), 1),
    ((4, 8208), 2),
    ((4, 9000), 1),
]
FORMS = [(first, activation) for first in (False, True) for activation in ("silu", "sigmoid")]


def make(shape, dtype, weight_dtype=None):
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(weight_dtype or dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gate_first", "activation"), FORMS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_matches_its_formula(path, shape, groups, gate_first, activation, dtype):
    options = {"groups": groups, "gate_first": gate_first, "activation": activation}
    function = functools.partial(gated_rms_norm, eps=1e-5, **options)
    check(function, formulas.gated_rms_norm(eps=1e-5, **options), *make(shape, dtype))


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("casting", ["none", "gemma", "llama"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_casting_and_mixed_dtypes(path, casting, weight_dtype, gate_first):
    x, gate, weight = make((9, 300), torch.bfloat16, weight_dtype)
    results = check(
        functools.partial(gated_rms_norm, eps=1e-5, gate_first=gate_first, casting=casting),
        formulas.gated_rms_norm(gate_first=gate_first, eps=1e-5),
        x,
        gate,
        weight,
        slack=6.0 if casting == "llama" else 2.0,  # it rounds up to three times, as its models do
        through=torch.bfloat16 if casting == "llama" else None,
    )
    assert results["output 0"].dtype == results["gradient 0"].dtype == results["gradient 1"].dtype == torch.bfloat16
    assert results["gradient 2"].dtype == weight_dtype


# Each gated norm of transformers: the class, what it is built with beside 60 columns, ours
MODELS = {
    "mamba2.MambaRMSNormGated": ({"group_size": 60}, {"gate_first": True, "casting": "llama"}),
    "nemotron_h.NemotronHRMSNormGated": ({"group_size": 20}, {"gate_first": True, "casting": "llama", "groups": 3}),
    "qwen3_next.Qwen3NextRMSNormGated": ({}, {"casting": "llama"}),
    "kimi_linear.KimiLinearRMSNormGated": ({}, {"activation": "sigmoid"}),
    "falcon_h1.FalconH1RMSNormGated": ({"n_groups": 3}, {"groups": 3}),
    "falcon_h1.FalconH1RMSNormGated, first": ({"n_groups": 3, "norm_before_gate": False}, {"groups": 3, "gate_first": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_is_what_the_model_computes(path, name, dtype):
    """Both round a number where fp32 sums in another order decide which way: few do, and those by one unit."""
    given, options = MODELS[name]
    model, _, rest = name.partition(".")
    kind = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), rest.partition(",")[0])
    module = kind(60, eps=1e-5, **given).to(dtype)
    torch.nn.init.normal_(module.weight)
    x, gate, _ = (t.requires_grad_() for t in make((2, 5, 60), dtype))
    got, want = gated_rms_norm(x, gate, module.weight, 1e-5, **options), module(x, gate)
    dy = torch.randn_like(want)
    leaves = x, gate, module.weight
    for a, b in zip((got, *torch.autograd.grad(got, leaves, dy)), (want, *torch.autograd.grad(want, leaves, dy)), strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(dtype).eps * b.abs().max().item())
    if dtype == torch.bfloat16:
        unlike = (got != want).double().mean()
        assert unlike <= 0.02


def test_more_programs_than_are_summed_at_once(interpreted):
    interpreted.count = 20
    function = functools.partial(gated_rms_norm, groups=2)
    check(function, formulas.gated_rms_norm(groups=2, eps=torch.finfo(torch.float32).eps), *make((70, 2200), torch.float32))


def test_gates_far_from_zero(path):
    """exp of a gate overflows, of its negative underflows: neither reaches the result."""
    x, _, weight = make((2, 4), torch.float32)
    gate = torch.tensor([[-200.0, 200.0, -1e4, 1e4]] * 2)
    for options in ({}, {"activation": "sigmoid"}):
        check(
            functools.partial(gated_rms_norm, eps=1e-5, **options),
            formulas.gated_rms_norm(eps=1e-5, **options),
            x,
            gate,
            weight,
        )


def test_views_and_offsets(path):
    base, other = torch.randn(2, 9, 77), torch.randn(2, 9, 154)
    for x, gate in (
        (base[:, 1:, 3:63], other[:, 1:, 77:137]),
        (base[..., :60], other.view(2, 9, 2, 77)[:, :, 1, 17:]),
        (base.transpose(0, 2)[:60].transpose(0, 2), base[..., 1:61]),
        (base[:1, :, 5:65].expand(4, 9, 60), base[:1, :, 6:66].expand(4, 9, 60)),
    ):
        function = functools.partial(gated_rms_norm, eps=1e-5, groups=3)
        check(function, formulas.gated_rms_norm(groups=3, eps=1e-5), x, gate, torch.randn(60))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(path, shape):
    x, gate, weight = (t.requires_grad_() for t in make(shape, torch.float32))
    y = gated_rms_norm(x, gate, weight)
    y.sum().backward()
    assert y.shape == x.grad.shape == gate.grad.shape == shape
    assert not weight.grad.any()


@pytest.mark.parametrize("options", [{}, {"groups": 2, "gate_first": True, "activation": "sigmoid", "casting": "llama"}])
def test_is_an_operator(options):
    x, gate, weight = make((3, 4, 24), torch.float32)
    plain = options.get("groups", 1), 1e-5, "casting" in options, not options, not options
    check_operator(gated_rms_norm, (gated_rms_norm_fwd, (x, gate, weight, *plain)), x, gate, weight, **options)
    _, rstd = gated_rms_norm_fwd(x, gate, weight, *plain)
    torch.library.opcheck(gated_rms_norm_bwd, (torch.randn_like(x), x, gate, weight, rstd, plain[0], *plain[2:]))


BAD = [
    (lambda x, g, w: (x.long(), g, w), {}, "gated_rms_norm: x must be float32, float16 or bfloat16, got torch.int64"),
    (lambda x, g, w: (x[0, 0], g, w), {}, "gated_rms_norm: x must have a last dimension to normalise over, got a scalar"),
    (lambda x, g, w: (x, g[:1], w), {}, "gated_rms_norm: gate must have shape (2, 8), got (1, 8)"),
    (lambda x, g, w: (x, g.half(), w), {}, "gate must be torch.float32 like x, got torch.float16; cast with .to()"),
    (
        lambda x, g, w: (x, g.to("meta"), w),
        {},
        "gated_rms_norm: gate must be on cpu like the input, got meta; move it with .to()",
    ),
    (lambda x, g, w: (x, g, w[:4]), {}, "gated_rms_norm: weight must have shape (8,), got (4,)"),
    (lambda x, g, w: (x, g, w.double()), {}, "gated_rms_norm: weight must be float32, float16 or bfloat16, got torch.float64"),
    (lambda *t: t, {"groups": 3}, "gated_rms_norm: groups must divide the last dimension of x, 8, got 3"),
    (lambda *t: t, {"groups": 0}, "gated_rms_norm: groups must divide the last dimension of x, 8, got 0"),
    (lambda *t: t, {"activation": "gelu"}, "gated_rms_norm: activation must be one of silu, sigmoid, got 'gelu'"),
    (lambda *t: t, {"casting": "llma"}, "gated_rms_norm: casting must be one of none, gemma, llama, got 'llma'"),
]


@pytest.mark.parametrize(("bad", "options", "text"), BAD, ids=[b[2][16:60] for b in BAD])
def test_rejects(bad, options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        gated_rms_norm(*bad(torch.randn(2, 8), torch.randn(2, 8), torch.randn(8)), **options)
