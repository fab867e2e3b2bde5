"""torch.nn's modules: torch's constructors, state dicts, reprs and numbers."""

import copy
import inspect

import pytest
import torch
from torch import nn

import liger_aot
from liger_aot.functional import CrossEntropyOutput
from liger_aot.nn import _LinearCrossEntropyLoss

from harness import fixed
from harness import run

torch.manual_seed(0)  # every process that collects the tests must see the same ones
LOGITS, CLASSES = torch.randn(6, 5), torch.randint(5, (6,))
WEIGHT = torch.rand(5)
CASES = [
    ("RMSNorm", ((4, 6),), {}, [torch.randn(3, 4, 6)]),
    ("RMSNorm", (6,), {"eps": 1e-3, "elementwise_affine": False}, [torch.randn(3, 4, 6)]),
    ("LayerNorm", ((4, 6),), {}, [torch.randn(3, 4, 6)]),
    ("LayerNorm", (6, 1e-3), {"bias": False}, [torch.randn(3, 6)]),
    ("LayerNorm", (6,), {"elementwise_affine": False}, [torch.randn(3, 6)]),
    ("GroupNorm", (2, 6), {}, [torch.randn(3, 6, 4)]),
    ("GroupNorm", (3, 6, 1e-3), {"affine": False}, [torch.randn(3, 6, 4)]),
    ("Softmax", (), {"dim": 1}, [torch.randn(3, 6, 4)]),
    ("CrossEntropyLoss", (), {}, [LOGITS, CLASSES]),
    ("CrossEntropyLoss", (WEIGHT,), {"ignore_index": 2, "reduction": "sum"}, [LOGITS, CLASSES]),
    ("CrossEntropyLoss", (), {"label_smoothing": 0.1, "reduction": "none"}, [LOGITS, CLASSES]),
    ("KLDivLoss", (), {"reduction": "batchmean"}, [LOGITS, LOGITS.softmax(-1)]),
    ("KLDivLoss", (), {"reduction": "none", "log_target": True}, [LOGITS, LOGITS.log_softmax(-1)]),
    ("LinearCrossEntropyLoss", (5, 7), {}, [LOGITS, CLASSES]),
    ("LinearCrossEntropyLoss", (5, 7), {"bias": True, "weight": torch.rand(7), "ignore_index": 1}, [LOGITS, CLASSES]),
    ("LinearCrossEntropyLoss", (5, 7), {"bias": True, "out_features": (3,)}, [LOGITS, torch.randint(7, (6, 3))]),
]
IDS = [f"{n}-{name}-{','.join(options)}" for n, (name, _, options, _) in enumerate(CASES)]


def pair(name, args, options):
    """Ours and torch's, with the same numbers in their state."""
    if not hasattr(nn, name):
        pytest.skip(f"this torch has no {name} to compare with; it came with 2.13")
    ours, theirs = getattr(liger_aot.nn, name)(*args, **options), getattr(nn, name)(*args, **options)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(("name", "args", "options", "inputs"), CASES, ids=IDS)
def test_is_torchs_module(name, args, options, inputs):
    ours, theirs = pair(name, args, options)
    assert isinstance(ours, type(theirs))
    assert ours.extra_repr().startswith(theirs.extra_repr())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(copy.deepcopy(ours)(*inputs), ours(*inputs))
    for part, want in everything(theirs, inputs).items():
        torch.testing.assert_close(everything(ours, inputs)[part], want)


def everything(module, inputs):
    """The output and every gradient."""
    module.zero_grad()
    return run(module, inputs) | {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm", "CrossEntropyLoss", "KLDivLoss"])
def test_constructor_takes_torchs_arguments_by_position(name):
    given = {
        "RMSNorm": (6, 1e-3, False),
        "LayerNorm": (6, 1e-3, True, False),
        "CrossEntropyLoss": (WEIGHT, None, 3, None, "sum", 0.1),
        "KLDivLoss": (None, None, "sum", True),
    }
    ours, theirs = pair(name, given[name], {})
    plain = (int, float, str, tuple, bool)
    assert {k: v for k, v in vars(theirs).items() if isinstance(v, plain)}.items() <= vars(ours).items()


def test_dyt_and_relu_squared():
    x, module = torch.randn(3, 6), liger_aot.nn.DyT(6, init_alpha=0.8)
    assert {name: p.tolist() for name, p in module.named_parameters()} == {
        "alpha": [pytest.approx(0.8)],
        "gamma": [1.0] * 6,
        "beta": [0.0] * 6,
    }
    torch.testing.assert_close(module(x), torch.tanh(0.8 * x))
    assert str(liger_aot.nn.DyT(6, bias=False, dtype=torch.bfloat16)) == "DyT(6, init_alpha=0.5, bias=False)"
    torch.testing.assert_close(liger_aot.nn.ReLUSquared()(x), nn.functional.relu(x).square())


def test_own_options():
    x, target = torch.randn(6, 5), torch.randint(5, (6,))
    assert liger_aot.nn.RMSNorm(5, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    norm = liger_aot.nn.RMSNorm(5, 1e-5, offset=1.0, casting="llama")
    half = x.bfloat16()
    assert torch.equal(norm(half), liger_aot.rms_norm(half, (5,), norm.weight, 1e-5, offset=1.0, casting="llama"))
    loss = liger_aot.nn.CrossEntropyLoss(softcap=2.0, lse_square_scale=0.1, return_token_accuracy=True)
    assert isinstance(loss(x, target), CrossEntropyOutput)
    assert "softcap=2.0, lse_square_scale=0.1, return_token_accuracy=True" in repr(loss)
    assert torch.equal(loss(x, target).loss, liger_aot.cross_entropy(x, target, softcap=2.0, lse_square_scale=0.1))
    linear = liger_aot.nn.LinearCrossEntropyLoss(5, 5, scale=0.5, softcap=2.0)
    want = liger_aot.linear_cross_entropy(x, linear.linear.weight, target, scale=0.5, softcap=2.0)
    assert torch.equal(linear(x, target), want)
    logs = x.log_softmax(-1)
    loss = liger_aot.nn.KLDivLoss(reduction="sum", ignore_index=1, eps=0.2)
    want = liger_aot.kl_div(logs, x.softmax(-1), reduction="sum", shift_labels=target, ignore_index=1, eps=0.2)
    assert torch.equal(loss(logs, x.softmax(-1), target), want)


TWO = torch.randn(2, 3, 6)
NORM = {"offset": 1.0, "casting": "llama"}
GLU = {"gate_multiplier": 2.0, "down_multiplier": 4.0}
Q, K, ANGLES = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), fixed(torch.randn(5, 4))
FORM = {"rotary_dim": 8, "order": "interleaved", "sections": None, "parts": 1, "last": True, "reverse": True}
HEAD = {"temperature": 0.5, "ignore_index": 2}
# name, arguments, ours of the module's parameters and the inputs, those inputs, the module's repr
OF_OURS = [
    (
        "FusedAddRMSNorm",
        ((6, 1e-3), NORM),
        lambda x, residual, weight: liger_aot.fused_add_rms_norm(x, residual, weight, 1e-3, **NORM),
        list(TWO),
        "FusedAddRMSNorm((6,), eps=0.001, elementwise_affine=True, offset=1.0, casting=llama)",
    ),
    (
        "SwiGLU",
        ((), GLU),
        lambda *i: liger_aot.swiglu(*i, **GLU),
        list(TWO),
        "SwiGLU(gate_multiplier=2.0, down_multiplier=4.0)",
    ),
    ("GEGLU", (("none",), {}), lambda *i: liger_aot.geglu(*i, approximate="none"), list(TWO), "GEGLU(approximate=none)"),
    (
        "Rope",
        ((2,), FORM),
        lambda *i: liger_aot.rope(*i, unsqueeze_dim=2, **FORM),
        [Q, K, ANGLES, ANGLES],
        "Rope(unsqueeze_dim=2, rotary_dim=8, order=interleaved, sections=None, parts=1, last=True, reverse=True)",
    ),
    (
        "LinearLogprob",
        ((5, 7), HEAD | {"bias": True}),
        lambda x, target, weight, bias: liger_aot.linear_logprob(x, weight, target, bias=bias, **HEAD),
        [LOGITS, CLASSES],
        "LinearLogprob(\n  temperature=0.5, ignore_index=2\n  (linear): Linear(in_features=5, out_features=7, bias=True)\n)",
    ),
]


@pytest.mark.parametrize(("name", "made", "function", "inputs", "text"), OF_OURS, ids=[case[0] for case in OF_OURS])
def test_what_torch_has_no_module_for(name, made, function, inputs, text):
    args, options = made
    module = getattr(liger_aot.nn, name)(*args, **options)
    for p in module.parameters():
        nn.init.normal_(p)
    parameters = [p.detach() for p in module.parameters()]
    want = list(run(function, [*inputs, *parameters]).values())
    got = list(everything(module, inputs).values())
    assert len(got) == len(want) > 2
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    assert repr(module) == text
    assert torch.equal(everything(copy.deepcopy(module), inputs)["output 0"], got[0])
    torch._dynamo.reset()
    plain = [i.tensor if isinstance(i, fixed) else i for i in inputs]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*plain)
    torch.testing.assert_close(compiled, module(*plain), rtol=0, atol=0)


def test_modules_of_one_dtype():
    assert liger_aot.nn.FusedAddRMSNorm(6, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert list(liger_aot.nn.LinearLogprob(5, 7, dtype=torch.bfloat16).state_dict()) == ["linear.weight"]
    assert liger_aot.nn.LinearLogprob(5, 7, dtype=torch.bfloat16).linear.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["FusedAddRMSNorm", "ModulatedRMSNorm"])
def test_norms_of_the_last_dimension_take_no_other(name):
    with pytest.raises(ValueError, match=rf"{name}: hidden_size must be the size of the last dimension, got \(2, 6\)"):
        getattr(liger_aot.nn, name)((2, 6))


def test_unknown_option_is_an_error():
    for name, args in ("RMSNorm", (4,)), ("CrossEntropyLoss", ()), ("LinearCrossEntropyLoss", (4, 5)), ("Rope", ()):
        with pytest.raises(TypeError, match="sofcap"):
            getattr(liger_aot.nn, name)(*args, sofcap=2.0)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has LinearCrossEntropyLoss since 2.13")
def test_the_class_for_older_torch_is_the_same():
    """What LinearCrossEntropyLoss is built on where torch has none."""

    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(_LinearCrossEntropyLoss) == parameters(nn.LinearCrossEntropyLoss)
    made = []
    for cls in _LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss:
        torch.manual_seed(0)
        made.append(cls(5, 7, out_features=(3,), bias=True, weight=torch.ones(7), label_smoothing=0.1))
    ours, theirs = made
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert {k: v for k, v in vars(theirs).items() if not k.startswith("_")} == {
        k: v for k, v in vars(ours).items() if not k.startswith("_")
    }


@pytest.mark.parametrize(
    ("name", "args", "options", "inputs"), [CASES[0], CASES[6], CASES[11]], ids=["RMSNorm", "CrossEntropy", "Linear"]
)
def test_traces_whole(name, args, options, inputs):
    ours = getattr(liger_aot.nn, name)(*args, **options)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(*inputs), ours(*inputs))
