"""Mixtures of experts, against a plain loop over them."""

import re

import pytest
import torch
from torch.nn import functional

import liger_aot
from liger_aot.functional import moe_route
from liger_aot.ops import packed_glu
from liger_aot.ops.geglu import gelu

from harness import DTYPES
from harness import check
from harness import fixed

moe_experts = liger_aot.moe_experts
EXPERTS, H, F = 4, 16, 24
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: x * gelu(x, tanh=True)[0],  # which loses less in fp32 than torch's; test_geglu.py compares the two
}


class Rounded(torch.autograd.Function):
    """What is fp32, and its gradient, in the numbers of another dtype: as it is between two operators of that."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype) if x.dtype == torch.float32 else x.clone()

    @staticmethod
    def backward(ctx, dy):
        return (dy.to(ctx.dtype).to(dy.dtype) if dy.dtype == torch.float32 else dy), None


def loop(dtype, activation="silu", transposed=False):
    """One expert after another, each with the tokens that it gets; in fp32, rounded to dtype after each step."""

    def linear(x, weight, bias, expert):
        y = Rounded.apply(functional.linear(x, weight[expert].mT if transposed else weight[expert]), dtype)
        return y if bias is None else Rounded.apply(y + bias[expert], dtype)

    def formula(hidden, gate_up_proj, down_proj, index, weights, gate_up_bias=None, down_bias=None):
        y = torch.zeros_like(hidden)
        for expert in range(len(gate_up_proj)):
            token, slot = torch.where(index == expert)
            x = Rounded.apply(hidden[token], dtype)
            gate, up = linear(x, gate_up_proj, gate_up_bias, expert).chunk(2, -1)
            x = linear(Rounded.apply(ACTIVATIONS[activation](gate) * up, dtype), down_proj, down_bias, expert)
            y = y.index_add(0, token, x * weights[token, slot, None])
        return y

    return formula


def make(dtype, index, transposed=False, biases=False):
    shapes = [(len(index), H), (EXPERTS, 2 * F, H), (EXPERTS, H, F)]
    scales = 1.0, H**-0.5, F**-0.5
    hidden, gate_up, down = (scale * torch.randn(shape) for shape, scale in zip(shapes, scales, strict=True))
    if transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    given = [t.to(dtype) for t in (hidden, gate_up, down)]
    given += [fixed(index), torch.rand(index.shape).to(dtype)]
    return given + [torch.randn(EXPERTS, n).to(dtype) for n in (2 * F, H)] * biases


def experts(activation="silu", transposed=False):
    def function(hidden, gate_up, down, index, weights, gate_up_bias=None, down_bias=None):
        options = {"gate_up_bias": gate_up_bias, "down_bias": down_bias, "activation": activation, "transposed": transposed}
        return moe_experts(hidden, gate_up, down, index, weights, **options)

    return function


INDICES = {
    "many": lambda: torch.rand(20, EXPERTS).argsort(-1)[:, :2],
    "an expert without tokens": lambda: torch.rand(9, 3).argsort(-1)[:, :2],
    "one expert for all": lambda: torch.full((6, 1), 2),
    "one token": lambda: torch.tensor([[3, 1, 0]]),
    "the same expert twice": lambda: torch.tensor([[1, 1], [0, 1], [2, 2]]),
    "all experts": lambda: torch.rand(5, EXPERTS).argsort(-1),
    "of no expert": lambda: torch.tensor([[1, EXPERTS], [-1, 0], [EXPERTS, 99], [3, 2]]),
    "int32": lambda: torch.tensor([[1, 0], [0, 2]], dtype=torch.int32),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INDICES)
def test_matches_the_loop(path, name, dtype):
    check(experts(), loop(dtype), *make(dtype, INDICES[name]()))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forms(path, activation, biases, transposed):
    given = make(torch.float32, INDICES["of no expert"](), transposed, biases)
    check(experts(activation, transposed), loop(torch.float32, activation, transposed), *given)


def test_fp32_weights_of_16_bit_rows(path):
    given = make(torch.bfloat16, INDICES["many"]())
    given[4] = given[4].float()
    check(experts(), loop(torch.bfloat16), *given)


def test_a_gate_of_ones_own(path):
    def gate(x):
        return functional.relu(x[:, ::2]) * (x[:, 1::2] + 1)

    def formula(hidden, gate_up, down, index, weights):
        y = torch.zeros_like(hidden)
        for token, slots in enumerate(index.tolist()):
            for place, expert in enumerate(slots):
                x = gate((hidden[token] @ gate_up[expert].mT)[None]) @ down[expert].mT
                y = y.index_add(0, torch.tensor([token]), x * weights[token, place])
        return y

    check(experts(gate), formula, *make(torch.float32, INDICES["many"]()))


def test_no_tokens(path):
    given = [t.tensor if isinstance(t, fixed) else t.requires_grad_() for t in make(torch.float32, torch.empty(0, 2).long())]
    y = moe_experts(*given)
    y.sum().backward()
    assert y.shape == given[0].grad.shape == (0, H)
    assert given[1].grad is None


def test_other_dimensions(path):
    hidden, gate_up, down, index, weights = make(torch.float32, INDICES["many"]())
    want = moe_experts(hidden, gate_up, down, index.tensor, weights)
    many = (t.unflatten(0, (4, 5)) for t in (hidden, index.tensor, weights))
    hidden, index, weights = many
    assert torch.equal(moe_experts(hidden, gate_up, down, index, weights), want.unflatten(0, (4, 5)))


def test_the_same_bits_every_time(path):
    given = [t.tensor if isinstance(t, fixed) else t.requires_grad_() for t in make(torch.bfloat16, INDICES["all experts"]())]
    found = []
    for _ in range(2):
        y = moe_experts(*given)
        found.append([y, *torch.autograd.grad(y.sum(), [t for t in given if t.requires_grad])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast(path):
    hidden, gate_up, down, index, weights = make(torch.float32, INDICES["many"]())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = moe_experts(hidden, gate_up, down, index.tensor, weights)
    assert got.dtype == torch.float32
    halves = [t.bfloat16() for t in (hidden, gate_up, down)]
    assert torch.equal(got, moe_experts(*halves, index.tensor, weights).float())


def test_what_is_launched(interpreted):
    given = [t.tensor if isinstance(t, fixed) else t.requires_grad_() for t in make(torch.float32, INDICES["many"]())]
    moe_experts(*given).sum().backward()
    forward, backward = ["moe_permute_fwd", "swiglu_fwd", "moe_unpermute_fwd"], ["moe_unpermute_bwd", "swiglu_bwd"]
    assert interpreted.launched == [*forward, *backward, "moe_unpermute_fwd"]


def test_gradient_takes_the_place_of_what_the_activation_had(interpreted, monkeypatch):
    given = [t.tensor if isinstance(t, fixed) else t.requires_grad_() for t in make(torch.float32, INDICES["many"]())]
    places, launch = [], packed_glu.backward_into

    def seen(dx, dy, x, activation):
        places.append(dx is x)
        return launch(dx, dy, x, activation)

    monkeypatch.setattr(packed_glu, "backward_into", seen)
    loss = moe_experts(*given).sum()
    want = torch.autograd.grad(loss, given[:3], retain_graph=True)
    for got, expected in zip(torch.autograd.grad(loss, given[:3]), want, strict=True):
        assert torch.equal(got, expected)
    assert places == [False, True]


def test_routing_has_the_shapes_of_its_arguments_alone():
    """On a device nothing is read back: on meta tensors there would be nothing to read."""
    for given in (torch.randint(8, (9, 3)), torch.randint(8, (9, 3)).int()):
        want, got = moe_route(given, 8), moe_route(given.to("meta"), 8)
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]
    order, position, offsets = moe_route(torch.tensor([[2, 0], [5, 2], [-3, 0]]), 3)
    assert order.tolist() == [1, 5, 0, 3, 4, 2]
    assert position.tolist() == [[2, 0], [-1, 3], [-1, 1]]
    assert offsets.tolist() == [2, 2, 4]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(experts(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for index in (INDICES["many"](), torch.rand(11, EXPERTS).argsort(-1)[:, :2]):
        given = make(torch.bfloat16, index, biases=True)
        given = [t.tensor if isinstance(t, fixed) else t.requires_grad_() for t in given]
        got, want = (f(*given) for f in (compiled, experts()))
        wanted = [t for t in given if t.requires_grad]
        assert torch.equal(got, want)
        for a, b in zip(*(torch.autograd.grad(y.sum(), wanted) for y in (got, want)), strict=True):
            assert torch.equal(a, b)
    if dynamic:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Module(torch.nn.Module):
    def forward(self, *given):
        return moe_experts(*given)


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict):
    hidden, gate_up, down, index, weights = make(torch.bfloat16, INDICES["many"]())
    tokens, given = {0: torch.export.Dim.DYNAMIC}, (hidden, gate_up, down, index.tensor, weights)
    shapes = (tokens, None, None, tokens, tokens)
    program = torch.export.export(Module(), given, dynamic_shapes=(shapes,), strict=strict)
    names = [str(node.target) for node in program.graph.nodes]
    for name in ("liger.moe_permute", "aten._grouped_mm", "liger.packed_glu", "liger.moe_unpermute"):
        assert names.count(f"{name}.default") == (2 if "grouped" in name else 1)
    hidden, *_, index, weights = make(torch.bfloat16, torch.rand(7, EXPERTS).argsort(-1)[:, :2])
    given = hidden, gate_up, down, index.tensor, weights
    assert torch.equal(program.module()(*given), moe_experts(*given))


def test_other_dtypes_are_not_traced():
    text = "moe_experts: torch traces its grouped product in torch.bfloat16 alone, got torch.float32; cast with .to()"
    given = [t.tensor if isinstance(t, fixed) else t for t in make(torch.float32, INDICES["many"]())]
    with pytest.raises(NotImplementedError, match=re.escape(text)):
        torch.export.export(Module(), tuple(given), strict=False)


BAD = [
    (0, lambda t: t.double(), "moe_experts: hidden must be float32, float16 or bfloat16, got torch.float64"),
    (0, lambda t: t[:, 8:], "(E, H, 2 F) and (E, F, H), must agree, got (3, 8), (4, 16, 48) and (4, 24, 16)"),
    (0, lambda t: t[0], "must agree, got (16,), (4, 16, 48) and (4, 24, 16)"),
    (1, lambda t: t[1:], "must agree, got (3, 16), (3, 16, 48) and (4, 24, 16)"),
    (1, lambda t: t[:, 2:], "must agree, got (3, 16), (4, 16, 46) and (4, 24, 16)"),
    (
        1,
        lambda t: t.half(),
        "moe_experts: gate_up_proj must be torch.float32 on cpu like hidden, got torch.float16 on cpu",
    ),
    (2, lambda t: t[0], "must agree, got (3, 16), (4, 16, 48) and (24, 16)"),
    (2, lambda t: t.to("meta"), "moe_experts: down_proj must be torch.float32 on cpu like hidden, got torch.float32 on meta"),
    (3, lambda t: t[1:], "moe_experts: top_k_index must have shape (3, 'K'), got (2, 2)"),
    (3, lambda t: t.float(), "moe_experts: top_k_index must be of integers, got torch.float32"),
    (3, lambda t: t.to("meta"), "moe_experts: top_k_index must be on cpu like hidden, got meta; move it with .to()"),
    (4, lambda t: t[:, 1:], "moe_experts: top_k_weights must have shape (3, 'K'), got (3, 1) of (3, 2)"),
    (5, lambda t: t[1:], "moe_experts: gate_up_bias must have shape (4, 48), got (3, 48)"),
    (6, lambda t: t.half(), "moe_experts: down_bias must be torch.float32 on cpu like hidden, got torch.float16 on cpu"),
]


@pytest.mark.parametrize(("place", "bad", "text"), BAD, ids=[text[:70] for *_, text in BAD])
def test_rejects(place, bad, text):
    given = make(torch.float32, torch.tensor([[1, 1], [0, 1], [2, 2]]), biases=True)
    given[3] = given[3].tensor
    given[place] = bad(given[place])
    with pytest.raises(ValueError, match=re.escape(text)):
        experts()(*given)


def test_an_activation_of_another_width():
    given = torch.randn(3, 8), torch.randn(2, 24, 8), torch.randn(2, 8, 16), torch.tensor([[0], [1], [1]]), torch.rand(3, 1)
    with pytest.raises(ValueError, match=re.escape("must give rows of down_proj's width, (3, 16), got (3, 24) of (3, 24)")):
        moe_experts(*given, activation=torch.relu)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32], ids=str)
def test_any_integers_name_experts(dtype):
    order, position, offsets = moe_route(torch.tensor([[100, 3]], dtype=dtype), 300)
    assert (order.tolist(), position.tolist(), offsets[[3, 99, 100]].tolist()) == ([1, 0], [[1, 0]], [1, 1, 2])


@pytest.mark.parametrize(("h", "f", "name"), [(12, 8, "H"), (8, 12, "F")])
def test_rows_that_torchs_product_does_not_take(h, f, name):
    given = torch.randn(3, h), torch.randn(2, 2 * f, h), torch.randn(2, h, f), torch.tensor([[0], [1], [1]]), torch.rand(3, 1)
    text = f"moe_experts: {name} must be a multiple of 8 in torch.bfloat16, for torch's grouped product, got 12; pad"
    with pytest.raises(ValueError, match=re.escape(text)):
        moe_experts(*(t.bfloat16() if t.is_floating_point() else t for t in given))
    assert moe_experts(*given).shape == (3, h)
