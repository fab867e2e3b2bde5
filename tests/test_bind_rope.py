"""Every form of rotary embedding that a model of transformers has: found by its numbers, and the operator's from then on."""

import builtins
import importlib
import inspect
import types

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import liger_aot
from liger_aot import _jit

from binding import row
from tiny import nodes
from tiny import operators
from tiny import recorder

BATCHED, TOKENS_FIRST, FLAT = (2, 4, 5, 16), (2, 5, 4, 16), (5, 4, 16)
# transformers' function: what it is found to be, a shape of its heads, and that of its angles.
FUNCTIONS = {
    "llama": ("half, promote", BATCHED, (2, 5, 16)),
    "olmo2": ("half, cast back", BATCHED, (1, 5, 16)),
    "phi3": ("half, promote, partial", BATCHED, (2, 5, 8)),
    "gemma3n": ("half, promote, one tensor", BATCHED, (2, 5, 16)),
    "nanochat": ("half, other sign, promote", BATCHED, (2, 5, 16)),
    "gpt_oss": ("half, one angle a pair, promote", BATCHED, (2, 5, 8)),
    "qwen2_vl.apply_rotary_pos_emb_vision": ("half, cast back", FLAT, (5, 16)),
    "clvp": ("half, gathered, promote", BATCHED, (7, 16)),
    "gemma4.apply_multidimensional_rope": ("half, in parts, promote, one tensor", TOKENS_FIRST, (2, 5, 16)),
    "blt": ("interleaved, promote", BATCHED, (2, 5, 16)),
    "cohere": ("interleaved, cast back", BATCHED, (2, 5, 16)),
    "ernie4_5_vl_moe": ("interleaved, cast back", BATCHED, (2, 5, 16)),
    "glm4v": ("interleaved, promote, partial", BATCHED, (2, 5, 8)),
    "sam3.apply_rotary_pos_emb_2d": ("interleaved, cast back", BATCHED, (5, 16)),
    "glm": ("interleaved, doubled angles, promote, partial", BATCHED, (2, 5, 8)),
    "helium": ("interleaved, doubled angles, promote", BATCHED, (2, 5, 16)),
    "ernie4_5": ("interleaved, doubled angles, cast back", BATCHED, (2, 5, 16)),
    "pe_audio": ("interleaved, doubled angles, promote", BATCHED, (2, 5, 16)),
    "gptj": ("interleaved, one angle a pair, promote, one tensor", TOKENS_FIRST, (2, 5, 8)),
    "codegen": ("interleaved, one angle a pair, promote, one tensor", TOKENS_FIRST, (2, 5, 8)),
    "openai_privacy_filter": ("interleaved, one angle a pair, promote", BATCHED, (2, 5, 8)),
    "deepseek_v4": ("interleaved, last columns, cast back, partial, one tensor", BATCHED, (2, 5, 4)),
    "deepseek_v3.apply_rotary_pos_emb_interleave": ("interleaved to half, promote", BATCHED, (2, 5, 16)),
    "deepseek_v2.apply_rotary_emb": ("interleaved, cast back, complex", BATCHED, (2, 5, 8)),
    "llama4.apply_rotary_emb": ("interleaved, cast back, complex", TOKENS_FIRST, (2, 5, 8)),
    "llama4.vision_apply_rotary_emb": ("interleaved, in a column, cast back, complex", TOKENS_FIRST, (5, 1, 8)),
}


def function(name):
    family, _, name = name.partition(".")
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name or "apply_rotary_pos_emb")


def host(rotary):
    """A module whose forward calls that function, as attentions do."""

    def forward(self, *args, **kwargs):
        return rotary_function(*args, **kwargs)  # noqa: F821 (of the globals that it is given)

    scope = {"__name__": __name__, "__builtins__": builtins, "rotary_function": rotary}
    return type("Attention", (nn.Module,), {"forward": types.FunctionType(forward.__code__, scope, "forward")})()


def bound(rotary, **flags):
    module = host(rotary)
    model = nn.ModuleDict({"attention": module})
    return module, row(liger_aot.bind(model, **flags), "attention")


def inputs(rotary, shape, angles, dtype=torch.float32, angle_dtype=None):
    """Heads and angles, as many numbers of heads as there are tensors, by the function's own names; and which are heads."""
    given, heads = {}, []
    for name, parameter in inspect.signature(rotary).parameters.items():
        if name in ("cos", "sin"):
            given[name] = torch.randn(angles, dtype=angle_dtype or dtype)
        elif name.startswith("freqs"):
            given[name] = torch.randn(angles, dtype=torch.complex128 if dtype is torch.float64 else torch.complex64)
        elif name == "position_ids" and parameter.default is parameter.empty:
            given[name] = torch.randint(5, (2, 5) if shape == BATCHED else (2, 5, 2))
        elif name not in ("position_ids", "unsqueeze_dim"):
            count = 2 if heads else 4
            given[name] = torch.randn([count if n == 4 else n for n in shape], dtype=dtype, requires_grad=True)
            heads.append(name)
    return given, heads


def results(module, given, heads):
    """What a module makes of them, and the heads' gradients."""
    out = module(**given)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [torch.linspace(-1, 1, o.numel()).view(o.shape).to(o.dtype) for o in out]
    return *out, *torch.autograd.grad(out, [given[name] for name in heads], upstream)


def check_equal(rotary, module, given, heads):
    with operators() as ran:
        got = results(module, given, heads)
    assert set(ran) == {"rope_fwd", "rope_bwd"}
    torch.testing.assert_close(got, results(host(rotary), given, heads), rtol=2**-20, atol=2**-20)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_form_is_found_and_is_the_operators(name):
    formula, shape, angles = FUNCTIONS[name]
    rotary = function(name)
    module, found = bound(rotary)
    assert (found.status, found.operator, found.formula) == ("bound", "rope", formula)
    check_equal(rotary, module, *inputs(rotary, shape, angles))


# One function for each call of the operator.
FORMS = {formula.split(", promote")[0].split(", cast back")[0]: name for name, (formula, *_) in FUNCTIONS.items()}


@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_computes_every_form(form):
    _, shape, angles = FUNCTIONS[FORMS[form]]
    rotary = function(FORMS[form])
    module, _ = bound(rotary)
    with _jit.interpreted() as launcher:
        check_equal(rotary, module, *inputs(rotary, shape, angles))
    assert {str(kernel) for kernel in launcher.launched} == {"rope"}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_compiles_whole_where_the_operators_are_asked_for(form):
    torch._dynamo.reset()
    _, shape, angles = FUNCTIONS[FORMS[form]]
    rotary, graphs = function(FORMS[form]), []
    module, _ = bound(rotary, compile="liger")
    given, heads = inputs(rotary, shape, angles)
    got = results(torch.compile(module, fullgraph=True, backend=recorder(graphs)), given, heads)
    assert nodes(graphs) == {"rope_fwd", "rope_bwd"}
    torch.testing.assert_close(got, results(host(rotary), given, heads), rtol=2**-20, atol=2**-20)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_bfloat16_it_errs_no_more_than_the_models_own(name):
    _, shape, angles = FUNCTIONS[name]
    rotary = function(name)
    module, _ = bound(rotary)
    given, heads = inputs(rotary, shape, angles, torch.bfloat16)
    with operators() as ran:
        got = results(module, given, heads)
    assert ran
    plain = results(host(rotary), given, heads)
    wide = {torch.bfloat16: torch.float64, torch.complex64: torch.complex128}
    exact = {k: x.detach().to(wide.get(x.dtype, x.dtype)).requires_grad_(k in heads) for k, x in given.items()}
    for ours, own, truth in zip(got, plain, results(host(rotary), exact, heads), strict=True):
        assert ours.dtype is own.dtype
        errors = [(x.double() - truth.double()).norm() for x in (ours, own)]
        assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_angles_of_bfloat16_heads(name):
    """Cast back, they are the operator's; where the results are float32 then, they are the model's."""
    formula, shape, angles = FUNCTIONS[name]
    rotary = function(name)
    module, _ = bound(rotary)
    given, heads = inputs(rotary, shape, angles, torch.bfloat16, torch.float32)
    with operators() as ran:
        got = results(module, given, heads)
    want = results(host(rotary), given, heads)
    assert bool(ran) is ("cast back" in formula)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    if ran:
        assert got[0].dtype is torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7)


IMPOSTORS = {
    "k as it is": lambda q, k, cos, sin: (apply_rotary_pos_emb(q, k, cos, sin)[0], k),
    "k turned back": lambda q, k, cos, sin: (
        apply_rotary_pos_emb(q, k, cos, sin)[0],
        apply_rotary_pos_emb(q, k, cos, -sin)[1],
    ),
    "q and k exchanged": lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos, sin)[::-1],
    "sine and cosine exchanged": lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, sin, cos),
    "scaled": lambda q, k, cos, sin: tuple(1.01 * x for x in apply_rotary_pos_emb(q, k, cos, sin)),
    "tokens backwards": lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos.flip(-2), sin.flip(-2)),
    "the first of the batch": lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos[:1], sin[:1]),
    "in bfloat16 otherwise": lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos, -sin if q.dtype is torch.bfloat16 else sin),
    "in float16 otherwise": lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos, -sin if q.dtype is torch.float16 else sin),
    "narrow angles turn the last columns": lambda q, k, cos, sin: tuple(
        torch.cat([x[..., : -cos.shape[-1]], y], -1)
        for x, y in zip((q, k), apply_rotary_pos_emb(q[..., -cos.shape[-1] :], k[..., -cos.shape[-1] :], cos, sin), strict=True)
    ),
}


@pytest.mark.parametrize("impostor", IMPOSTORS.values(), ids=IMPOSTORS)
def test_a_rotation_that_is_another_anywhere_is_left(impostor):
    def rotary(q, k, cos, sin):
        return impostor(q, k, cos, sin)

    module, found = bound(rotary)
    assert (found.status, found.operator) == ("left", None)
    assert "equals no known formula" in found.why
    assert type(module).__name__ == "Attention"
    assert not hasattr(type(module), "_liger")


@pytest.mark.parametrize("name", ["dinov3_vit", "sam2_video.apply_rotary_pos_emb_2d"])
def test_other_arguments_are_said(name):
    _, found = bound(function(name))
    assert (found.status, found.operator) == ("left", None)
    assert "has the arguments" in found.why


def with_or_without_k(q, k, cos, sin):
    """As Mistral Large 4 has it, of which older versions of transformers have none."""
    turned = apply_rotary_pos_emb(q, q if k is None else k, cos, sin)
    return turned[0], None if k is None else turned[1]


OTHERWISE = {
    "no k": (with_or_without_k, {"k": lambda k: None}),
    "more tokens of k than of q": ("muse_glimmer_assistant", {"q": lambda q: q[:, :, 2:]}),
    "angles that want a gradient": ("llama", {"cos": lambda cos: cos.requires_grad_()}),
    "one token's angles for all": ("llama", {"cos": lambda cos: cos[:, :1], "sin": lambda sin: sin[:, :1]}),
    "angles of four dimensions": (
        "sam3.apply_rotary_pos_emb_2d",
        {"cos": lambda cos: cos[:, None], "sin": lambda sin: sin[:, None]},
    ),
    "float64": ("llama", dict.fromkeys(("q", "k", "cos", "sin"), lambda x: x.double())),
}


@pytest.mark.parametrize(("name", "change"), OTHERWISE.values(), ids=OTHERWISE)
def test_what_the_operator_does_not_take_is_the_models_own(name, change):
    rotary = function(name) if isinstance(name, str) else name
    module, found = bound(rotary)
    assert found.status == "bound"
    given = inputs(rotary, BATCHED, (2, 5, 16))[0]
    given.update({name: make(given[name]) for name, make in change.items()})
    with operators() as ran:
        got = module(**given)
    want = host(rotary)(**given)
    assert not ran
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_angles_on_another_device_are_the_models_own_business():
    """DeepSeek-V2's function moves them to the heads' device, which says of a meta tensor that it cannot."""
    rotary = function("deepseek_v2.apply_rotary_emb")
    module, _ = bound(rotary)
    given = inputs(rotary, BATCHED, (2, 5, 8))[0]
    given["freqs_cis"] = given["freqs_cis"].to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        module(**given)


def test_heads_after_tokens_where_the_caller_says_so():
    rotary = function("llama")
    module, _ = bound(rotary)
    given, heads = inputs(rotary, TOKENS_FIRST, (2, 5, 16))
    check_equal(rotary, module, {**given, "unsqueeze_dim": 2}, heads)
