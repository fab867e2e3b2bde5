"""What a module computes, found by running it on random numbers and not by its name.

A probe is a shell of the module: its class and attributes with small weights of the probe's own, without hooks and without a
forward of the instance. It runs over dtypes and sizes of input in which the formulas differ, and in training as in evaluation,
so that a dropout shows. What equals a formula that an operator of ours computes can be bound; another known one is named where
it is left.
"""

import functools
import inspect
import itertools
import types
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from torch import nn

from ..ops.geglu import geglu
from ..ops.relu_squared import relu_squared
from ..ops.swiglu import swiglu

FP32, BF16 = torch.float32, torch.bfloat16


class Found(NamedTuple):
    """The operator that computes it, or None; the formula's name; why it is left, or a remark; the arguments of the class to
    swap in (_swap), or None where it is left; and what to try that class with (_verify)."""

    operator: str | None
    formula: str = ""
    why: str = ""
    args: tuple | None = None
    trial: tuple = ()


def parameters_of(function):
    """The names of a function's parameters; none where they are not all plain ones."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters] if all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters) else []


def called(function):
    """The names that a function's code reads; of a decorated one's, that which it wraps."""
    return getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ())


def takes_one(module):
    """Whether a module's forward takes one argument, or does not say what, as where a decorator hides it."""
    forward = type(module).forward
    return len(parameters_of(forward)) == 2 or str(inspect.signature(forward)).removeprefix("(self, ") in UNTOLD


UNTOLD = ("(*args, **kwargs)", "*args, **kwargs)")


def weights_of(module):
    return dict(module.named_parameters(recurse=False))


def identity(module):
    """What tells modules of one class apart: attributes, buffers, the parameters' dtypes, and the same of the children."""
    values, machinery = (int, float, str, torch.dtype, types.NoneType, list, tuple, dict, set), vars(nn.Module())
    own = {k: v for k, v in vars(module).items() if k not in machinery} | module._buffers
    attributes = [(k, repr(v) if isinstance(v, values) else id(v)) for k, v in sorted(own.items())]
    weights = [(name, p.dtype, tuple(p.shape)) for name, p in weights_of(module).items()]
    return type(module), *attributes, *weights, *((name, identity(child)) for name, child in module.named_children())


def shell(module, sizes=None, **children):
    """A module of the same class and attributes without hooks, a forward of its own, or weights.

    Integers that are keys of `sizes`, and the children given, take the place of its own. What it appends to is a copy.
    """
    copy = type(module).__new__(type(module))
    nn.Module.__init__(copy)
    skipped = {*vars(copy), "forward", "_old_forward", "_hf_hook"}
    own = {name: value for name, value in vars(module).items() if name not in skipped}
    own = {name: v.copy() if isinstance(v, (list, dict, set)) else v for name, v in own.items()}
    vars(copy).update({name: sizes.get(v, v) if sizes and type(v) is int else v for name, v in own.items()})
    copy._parameters.update(dict.fromkeys(module._parameters))
    copy._modules.update({name: children.get(name) or shell(child) for name, child in module.named_children()})
    return copy


def normal(generator, *shape, dtype=FP32, scale=1.0, shift=0.0):
    return ((torch.randn(shape, generator=generator, device="cpu", dtype=FP32) + shift) * scale).to(dtype)


def run(function, *args):
    """What function returns, or the exception that it raises; modules that are not ours may raise any."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return function(*args)
    except Exception as error:
        return error


def steady(module, x):
    """What a module computes, if that is the same in training and in evaluation; a dropout is not."""
    trained, evaluated = module.train()(x.clone()), module.eval()(x)
    return trained if same(trained, evaluated) else None


def alike(a, b):
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype is b.dtype and a.shape == b.shape


def same(a, b):
    """Whether a and b are one formula's: apart at most as two ways to sum in fp32 are, and in 16 bits seldom for that."""
    if not alike(a, b):
        return False
    allowed, size = 2.0**-17 if a.dtype is FP32 else 4 * torch.finfo(a.dtype).eps, b.double().abs()
    near = ((a.double() - b.double()).abs() <= allowed * (size + 0.05 * size.mean())).all()
    return bool(near) and (a.dtype is FP32 or (a != b).float().mean().item() < 0.004)


def close(a, b, truth=None):
    """Whether a errs no more than b does, or than a few roundings of their dtype and long sums in fp32 make, all in all."""
    if not alike(a, b):
        return False
    exact = (b if truth is None else truth).double()
    allowed = max(4 * torch.finfo(a.dtype).eps, 1e-5) * exact.norm()
    return bool((a.double() - exact).norm() <= torch.maximum((b.double() - exact).norm(), allowed))


def rounded(a, b):
    """16 bits may be rounded at other places than the operators', which round once, in the end."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(rounded, a, b))
    return close(a, b) if alike(a, b) and a.dtype is BF16 else same(a, b)


def survivors(compute, formulas, inputs, equal=same):
    """Those of the formulas that give what compute gives, for all inputs, and why there are none; None where it raises."""
    for given in inputs:
        got = run(compute, *(x if x is None else x.clone() for x in given))
        if isinstance(got, Exception):
            return None, f"raises {type(got).__name__}: {got}"
        formulas = {key: f for key, f in formulas.items() if equal(got, run(f, *given))}
        if not formulas:
            return {}, "equals no known formula"
    return formulas, ""


def one(formula, ours, *trial):
    """A formula, with the operator and its arguments if there is one for it."""
    return Found(ours[0], formula, "", ours[1:], trial) if ours else Found(None, formula, "no operator computes it")


# Norms: formulas of x, weight, bias and eps; for ours the operator, and offset and casting of rms_norm.


def rsqrt(x, eps):
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def unit(x, eps):
    return x.float() * rsqrt(x, eps)


def layer_norm(x, w, b, eps):
    w, b = (p if p is None else p.float() for p in (w, b))
    return F.layer_norm(x.float(), x.shape[-1:], w, b, eps).to(x.dtype)


WEIGHTED = {
    "llama": (lambda x, w, b, eps: w * unit(x, eps).to(x.dtype), ("rms_norm", 0.0, "llama")),
    "fp32 weight": (lambda x, w, b, eps: (w.float() * unit(x, eps)).to(x.dtype), ("rms_norm", 0.0, "gemma")),
    "gemma": (lambda x, w, b, eps: ((1.0 + w.float()) * unit(x, eps)).to(x.dtype), ("rms_norm", 1.0, "gemma")),
    "layer norm": (layer_norm, ("layer_norm",)),
    "gemma, 1 + weight rounded": (lambda x, w, b, eps: ((1.0 + w).float() * unit(x, eps)).to(x.dtype), None),
    "no upcast": (lambda x, w, b, eps: w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), None),
    "layer norm, 1 + weight": (lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w + 1, b, eps), None),
}
UNWEIGHTED = {
    "no weight": (lambda x, w, b, eps: unit(x, eps).to(x.dtype), ("rms_norm", 0.0, "gemma")),
    "layer norm": (layer_norm, ("layer_norm",)),
    "no weight, rounded rsqrt": (lambda x, w, b, eps: x * rsqrt(x, eps).to(x.dtype), None),
}
# dtypes of x and weight, and the size of x: eps shows where x is small. Then a mixture of dtypes.
NORM_INPUTS = [(FP32, FP32, 1.0), (FP32, FP32, 1e-3), (FP32, FP32, 1e-6), (BF16, BF16, 1.0), (BF16, BF16, 1e-3)]
MIXED = (BF16, FP32, 1.0)


def norm_like(module):
    """One input; a weight and bias of one dimension, or none and "norm" in the name. Names only spare probes here."""
    weights = weights_of(module)
    if any(True for _ in module.children()) or not takes_one(module):
        return False
    flat = all(name in ("weight", "bias") and p.dim() == 1 for name, p in weights.items())
    return flat and (bool(weights) or "norm" in type(module).__name__.lower())


def find_norm(module):
    weights, copy, generator = weights_of(module), shell(module), torch.Generator().manual_seed(0)
    formulas = WEIGHTED if "weight" in weights else UNWEIGHTED
    n = next((p.shape[0] for p in weights.values()), (getattr(module, "normalized_shape", None) or [96])[-1])
    places = {k: v for k, v in vars(module).items() if "eps" in k.lower() and isinstance(v, (float, int, types.NoneType))}
    places = places or {eps: eps for eps in (1e-6, 1e-5, 1e-8, 1e-12)}
    every = {}
    for (name, (formula, _)), (place, value) in itertools.product(formulas.items(), places.items()):
        every[name, place] = lambda x, w, b, f=formula, e=value: f(x, w, b, torch.finfo(FP32).eps if e is None else e)

    def inputs(x_dtype, w_dtype, scale, dim=3):
        given = [
            normal(generator, n, dtype=w_dtype, scale=0.5, shift=1.2) if k in weights else None for k in ("weight", "bias")
        ]
        shape = (5, 7, n) if dim == 3 else (*[2] * (dim - 1), n)
        return normal(generator, *shape, dtype=x_dtype, scale=scale, shift=0.1), *given

    def compute(x, *given):
        for name, tensor in zip(("weight", "bias"), given, strict=True):
            if tensor is not None:
                copy._parameters[name] = nn.Parameter(tensor)  # others patch register_parameter
        return steady(copy, x)

    left, why = survivors(compute, every, [inputs(*each) for each in NORM_INPUTS])
    if not left:
        return Found(None, "", why)
    mixed, _ = survivors(compute, left, [inputs(*MIXED)])
    name, place = next(iter(mixed or left))
    found = one(name, formulas[name][1], copy, "forward", inputs(*NORM_INPUTS[0])[0])
    if found.args is None:
        return found
    formula = {0: every[name, place]}
    dims = tuple(d for d in range(1, 6) if d == 3 or survivors(compute, formula, [inputs(FP32, FP32, 1.0, d)])[0])
    # Where only a mixture of dtypes, or inputs of other dimensions, are computed otherwise, those are left to the module.
    return found._replace(
        args=(found.operator, place, not mixed, dims, tuple(weights), *found.args),
        why="" if mixed else "where x has the weight's dtype",
    )


# MLPs of two or three linear layers, and the gate of experts.

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "identity": lambda x: x,
}
# What is ours of them, without a gate and with one: the operator's name, the bound class's, and the operator.
UNITS = {
    (False, "relu squared"): ("relu_squared", "LigerReLUSquared", relu_squared),
    (True, "silu"): ("swiglu", "LigerSwiGLU", swiglu),
    (True, "gelu_tanh"): ("geglu", "LigerGEGLU", geglu),
    (True, "gelu"): ("geglu", "LigerGEGLU", functools.partial(geglu, approximate="none")),
}
HALVES = {
    "gate_up": lambda h: h.chunk(2, -1),
    "up_gate": lambda h: h.chunk(2, -1)[::-1],
}


def glu_inputs(*shape):
    """A clamp shows where x is large."""
    generator = torch.Generator().manual_seed(0)
    return [(normal(generator, *shape, dtype=dtype, scale=scale),) for dtype, scale in ((FP32, 1.0), (FP32, 30.0), (BF16, 1.0))]


def unit_of(kind, act):
    """Of UNITS, or None."""
    return UNITS.get((kind != "2 linears", act))


def ours(kind, act, *names):
    """The operator, and the arguments of the class to swap in, or None."""
    found = unit_of(kind, act)
    return found and (found[0], kind, act, *names)


def kinds(module, layers):
    """Names and classes of the children that are none of the layers."""
    return tuple((name, type(child)) for name, child in module.named_children() if name not in layers)


# What the classes of linear layers, quantised ones among them, and transformers' Conv1D call their sizes.
SIZES = [("in_features", "out_features"), ("nx", "nf")]


def linears(module):
    """{name: (in, out)} of the children that are linear layers of any class, or adapters on them."""
    based = {name: vars(getattr(child, "base_layer", child)) for name, child in module.named_children()}
    return {name: (own[i], own[o]) for name, own in based.items() for i, o in SIZES if {i, o} <= own.keys()}


def glu_like(module):
    return len(linears(module)) in (2, 3) and takes_one(module)


def small(sizes):
    """Small sizes, as different and as often twice another as those given."""
    pool, chosen = iter((32, 48, 80, 112, 144, 176)), {}
    for size in sorted(sizes):
        chosen[size] = 2 * chosen[size // 2] if size % 2 == 0 and size // 2 in chosen else next(pool)
    return chosen


def find_glu(module):
    layers, generator = linears(module), torch.Generator().manual_seed(0)
    others = [child for name, child in module.named_children() if name not in layers]
    if weights_of(module) or any(True for child in others for _ in child.parameters()):
        return Found(None, "", "has other weights than those of linear layers")
    sizes = small({size for pair in layers.values() for size in pair})
    made = {name: nn.Linear(sizes[i], sizes[o], device="meta") for name, (i, o) in layers.items()}
    for layer in made.values():
        for key, p in weights_of(layer).items():
            layer._parameters[key] = nn.Parameter(normal(generator, *p.shape, scale=0.3))
    copy, formulas, why = shell(module, sizes, **made), dict(glu_formulas(made)), "equals no known formula"
    for n in {made[names[0]].in_features for _, _, names in formulas}:
        inputs = glu_inputs(3, 5, n)
        left, why = survivors(lambda x: steady(copy.to(x.dtype), x), formulas, inputs, rounded)
        if left:
            kind, act, names = next(iter(left))
            return one(f"{kind}, {act}", ours(kind, act, names, kinds(module, layers)), copy, "forward", *inputs[0])
    return Found(None, "", why)


def glu_formulas(layers):
    """((kind, activation, names of the layers), what they compute) of everything that these layers can be."""
    for names, (act, f) in itertools.product(itertools.permutations(layers), ACTIVATIONS.items()):
        *first, down = (layers[name] for name in names)
        if len(first) == 2 and first[0].weight.shape == first[1].weight.shape and first[0].out_features == down.in_features:
            yield ("3 linears", act, names), lambda x, g=first[0], u=first[1], d=down, f=f: d(f(g(x)) * u(x))
        elif len(first) == 1 and first[0].out_features == 2 * down.in_features:
            for kind, split in HALVES.items():
                yield (kind, act, names), lambda x, h=first[0], d=down, f=f, s=split: d(product(f, *s(h(x))))
        elif len(first) == 1 and first[0].out_features == down.in_features:
            yield ("2 linears", act, names), lambda x, up=first[0], d=down, f=f: d(f(up(x)))


def product(f, gate, up):
    return f(gate) * up


def experts_like(module):
    return hasattr(type(module), "_apply_gate") or module._parameters.get("gate_up_proj") is not None


def find_experts(module):
    if not hasattr(type(module), "_apply_gate") or not getattr(module, "has_gate", False):
        return Found(None, "experts", "no gate of its own that could be fused: no _apply_gate")
    copy, inputs = shell(module), glu_inputs(6, 64)
    formulas = {(k, a): lambda x, f=f, s=s: product(f, *s(x)) for k, s in HALVES.items() for a, f in ACTIVATIONS.items()}
    left, why = survivors(copy._apply_gate, formulas, inputs, rounded)
    if not left:
        return Found(None, "", why)
    kind, act = next(iter(left))
    found = one(f"experts {kind}, {act}", ours(kind, act, kinds(module, ())), copy, "_apply_gate", *inputs[0])
    if getattr(module.config, "_experts_implementation", None) == "eager":
        return found._replace(args=None, why="eager experts call no _apply_gate: set_experts_implementation('grouped_mm')")
    return found
