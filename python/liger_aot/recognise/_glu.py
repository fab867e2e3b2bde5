"""MLPs of two or three linear layers, gated or not, and the gates of experts."""

import functools
import itertools

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from torch import nn

from ..ops.geglu import geglu
from ..ops.packed_glu import packed_glu
from ..ops.relu_squared import relu_squared
from ..ops.swiglu import swiglu
from . import _probe as probe
from ._probe import BF16
from ._probe import FP16
from ._probe import FP32
from ._probe import Found

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "identity": lambda x: x,
}
# What a gate makes of one input, its two halves; others are given gate and up, or without a gate one input.
HALVES = {
    "gate_up": lambda h: h.chunk(2, -1),
    "up_gate": lambda h: h.chunk(2, -1)[::-1],
}
KINDS = {2: ("2 linears", *HALVES), 3: ("3 linears",)}
# What is ours of them, without a gate and with one: the operator's name, and the operator.
OPERATORS = {
    (False, "relu squared"): ("relu_squared", relu_squared),
    (True, "silu"): ("swiglu", swiglu),
    (True, "gelu_tanh"): ("geglu", geglu),
    (True, "gelu"): ("geglu", functools.partial(geglu, approximate="none")),
}


def operator_of(kind, act):
    """The operator's name, which is None where there is none, and what it makes of that which the first layers give."""
    name, operator = OPERATORS.get((kind != "2 linears", act), (None, None))
    return name, (lambda h: packed_glu(h, act)) if kind == "gate_up" else of_halves(kind, operator)


def of_halves(kind, function):
    """function, of what the first layers give."""
    split = HALVES.get(kind)
    return function if split is None else lambda h: function(*split(h))


def gated(kind, act):
    """The same in torch, for every activation."""
    f = ACTIVATIONS[act]
    return f if kind == "2 linears" else of_halves(kind, lambda gate, up: f(gate) * up)


def inputs_of(*shape):
    """A clamp shows where x is large."""
    generator, sizes = torch.Generator().manual_seed(0), ((FP32, 1.0), (FP32, 1e3), (BF16, 1.0), (FP16, 1.0))
    return [(probe.normal(generator, *shape, dtype=dtype, scale=scale),) for dtype, scale in sizes]


def parts_of(module, layers=()):
    """Names and classes of the children that are none of the layers."""
    return tuple((name, type(child)) for name, child in module.named_children() if name not in layers)


# What the classes of linear layers, quantised ones among them, and transformers' Conv1D call their sizes.
SIZES = [("in_features", "out_features"), ("nx", "nf")]


def linears(module):
    """{name: (in, out)} of the children that are linear layers of any class, or adapters on them."""
    based = {name: vars(getattr(child, "base_layer", child)) for name, child in module.named_children()}
    return {name: (own[i], own[o]) for name, own in based.items() for i, o in SIZES if {i, o} <= own.keys()}


def small(sizes):
    """Small sizes, as different and as often twice another as those given."""
    pool, chosen = iter((32, 48, 80, 112, 144, 176)), {}
    for size in sorted(sizes):
        chosen[size] = 2 * chosen[size // 2] if size % 2 == 0 and size // 2 in chosen else next(pool)
    return chosen


def glu_like(module):
    return len(linears(module)) in KINDS and probe.takes_one(module)


def mlp(layers, kind, act, names):
    """What these layers, called by names, compute with that gate."""
    *first, down = (layers[name] for name in names)
    gate = gated(kind, act)
    return lambda x: down(gate(*(layer(x) for layer in first)))


def find_glu(module):
    layers, generator = linears(module), torch.Generator().manual_seed(0)
    parts = parts_of(module, layers)
    if probe.weights_of(module) or any(True for name, _ in parts for _ in module.get_submodule(name).parameters()):
        return Found(None, "", "has other weights than those of linear layers")
    sizes = small({size for pair in layers.values() for size in pair})
    made = {name: nn.Linear(sizes[i], sizes[o], device="meta") for name, (i, o) in layers.items()}
    for layer in made.values():
        for key, p in probe.weights_of(layer).items():
            layer._parameters[key] = nn.Parameter(probe.normal(generator, *p.shape, scale=0.3))
    # Those whose sizes do not fit raise, and are none.
    every = itertools.product(KINDS[len(layers)], ACTIVATIONS, itertools.permutations(made))
    copy, formulas, reasons = probe.shell(module, sizes, **made), {key: mlp(made, *key) for key in every}, []
    for n in dict.fromkeys(layer.in_features for layer in made.values()):
        inputs = inputs_of(3, 5, n)
        left, why = probe.survivors(lambda x: probe.steady(copy.to(x.dtype), x), formulas, inputs)
        if left:
            kind, act, names = next(iter(left))
            operator, _ = operator_of(kind, act)
            args = kind, act, names, parts
            return probe.one(f"{kind}, {act}", operator, *args, parts=parts, trial=(copy, "forward", *inputs[0]))
        # A width that it takes says more than one that it does not.
        reasons = [why, *reasons] if left is not None else [*reasons, why]
    return Found(None, "", reasons[0])


def experts_like(module):
    return hasattr(type(module), "_apply_gate") or module._parameters.get("gate_up_proj") is not None


def find_experts(module):
    if not hasattr(type(module), "_apply_gate") or not getattr(module, "has_gate", False):
        return Found(None, "experts", "no gate of its own that could be fused: no _apply_gate")
    copy, inputs, parts = probe.shell(module), inputs_of(6, 64), parts_of(module)
    formulas = {key: gated(*key) for key in itertools.product(HALVES, ACTIVATIONS)}
    left, why = probe.survivors(copy._apply_gate, formulas, inputs)
    if not left:
        return Found(None, "", why)
    kind, act = next(iter(left))
    operator, _ = operator_of(kind, act)
    trial = copy, "_apply_gate", *inputs[0]
    found = probe.one(f"experts {kind}, {act}", operator, kind, act, parts, parts=parts, trial=trial)
    if getattr(module.config, "_experts_implementation", None) == "eager":
        return found._replace(args=None, why="eager experts call no _apply_gate: set_experts_implementation('grouped_mm')")
    return found
