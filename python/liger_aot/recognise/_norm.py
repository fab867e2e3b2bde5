"""Norms: what one computes of x, weight, bias, eps and a gate. Those that an operator computes are held to its reference."""

import functools
import itertools
import types

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from torch import nn

from ..ops import gated_rms_norm
from ..ops import group_norm
from ..ops import layer_norm
from ..ops import rms_norm
from . import _probe as probe
from ._probe import BF16
from ._probe import FP16
from ._probe import FP32
from ._probe import Found

# The operator and its options.
WEIGHTED = {
    "llama": ("rms_norm", {"offset": 0.0, "casting": "llama"}),
    "fp32 weight": ("rms_norm", {"offset": 0.0, "casting": "gemma"}),
    "gemma": ("rms_norm", {"offset": 1.0, "casting": "gemma"}),
    "layer norm": ("layer_norm", {}),
}
UNWEIGHTED = {"no weight": WEIGHTED["fp32 weight"], "layer norm": WEIGHTED["layer norm"]}


def reference(operator, options):
    def of_operator(x, w, b, *gate, eps):
        if operator == "group_norm":
            return group_norm.forward_reference(x, options["num_groups"], w, b, eps)[0]
        if operator == "layer_norm":
            return layer_norm.forward_reference(x, w, b, eps)[0]
        cast = rms_norm.CASTING[options["casting"]]
        if operator == "rms_norm":
            return rms_norm.forward_reference(x, w, eps, options["offset"], cast)[0]
        last, silu = not options["gate_first"], gated_rms_norm.ACTIVATIONS[options["activation"]]
        return gated_rms_norm.forward_reference(x, *gate, w, options["groups"], eps, cast, last, silu)[0]

    return of_operator


def gated(module, n):
    """The same of gated norms, whose groups of columns, or the columns of one, are an attribute."""
    sizes = [v for v in vars(module).values() if type(v) is int and v > 0 and n % v == 0]
    counts = sorted({1, *sizes, *(n // v for v in sizes)})
    found = {}
    for groups, first, activation, casting in itertools.product(counts, (True, False), ("silu", "sigmoid"), ("llama", "none")):
        name = f"gate {'first' if first else 'last'}, {activation}, {casting}" + (f", {groups} groups" if groups > 1 else "")
        options = {"groups": groups, "gate_first": first, "activation": activation, "casting": casting}
        found[name] = "gated_rms_norm", options
    return found


def rsqrt(x, eps):
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


# Known ones that no operator computes.
OTHERS = {
    "gemma, 1 + weight rounded": lambda x, w, b, eps: reference(*WEIGHTED["fp32 weight"])(x, 1.0 + w, b, eps=eps),
    "no upcast": lambda x, w, b, eps: w * x * rsqrt(x, eps),
    "layer norm, 1 + weight": lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w + 1, b, eps),
    "no weight, rounded rsqrt": lambda x, w, b, eps: None if w is not None else x * rsqrt(x.float(), eps).to(x.dtype),
}
# dtypes of x and weight, and the size of x: eps shows where x is small, a clamp where it is large. Then mixtures of dtypes.
INPUTS = [
    *((FP32, FP32, scale) for scale in (1.0, 1e-3, 1e-6, 1e4)),
    *((BF16, BF16, scale) for scale in (1.0, 1e-3, 1e4)),
    *((FP16, FP16, scale) for scale in (1.0, 1e3)),
]
MIXED = [(BF16, FP32, 1.0), (FP16, FP32, 1.0)]


def norm_like(module):
    """One input, or one and a gate; a weight and bias of one dimension, or none and "norm" in the name.

    Names only spare probes here.
    """
    weights = probe.weights_of(module)
    if any(True for _ in module.children()) or not (probe.takes_one(module) or takes_gate(module)):
        return False
    flat = all(name in ("weight", "bias") and p.dim() == 1 for name, p in weights.items())
    return len(shape_of(module)) > 1 or (flat and (bool(weights) or "norm" in type(module).__name__.lower()))


def shape_of(module):
    """The last dimensions that a norm says to be over, as torch's do."""
    shape = getattr(module, "normalized_shape", ())
    return (shape,) if isinstance(shape, int) else tuple(shape) if isinstance(shape, (list, tuple)) else ()


def takes_gate(module):
    return probe.parameters_of(type(module).forward)[2:] == ["gate"]


def find_norm(module):
    if len(shape_of(module)) > 1:
        return Found(None, "", f"is over {len(shape_of(module))} dimensions")
    weights, copy, generator = probe.weights_of(module), probe.shell(module), torch.Generator().manual_seed(0)
    has_gate = takes_gate(module)
    groups = 0 if has_gate else getattr(module, "num_groups", 0)  # of channels, the second dimension of what it takes
    width = getattr(module, "num_channels", 96) if groups else (*shape_of(module), 96)[0]
    n = next((p.shape[0] for p in weights.values()), width)
    ours = gated(module, n) if has_gate else WEIGHTED if "weight" in weights else UNWEIGHTED
    ours = {"group norm": ("group_norm", {"num_groups": groups})} if groups else ours
    places = {k: v for k, v in vars(module).items() if "eps" in k.lower() and isinstance(v, (float, int, types.NoneType))}
    places = places or {eps: eps for eps in (1e-6, 1e-5, 1e-8, 1e-12)}
    formulas = {name: reference(*each) for name, each in ours.items()} | OTHERS
    every = {
        (name, place): functools.partial(formulas[name], eps=rms_norm.DEFAULT_EPS if eps is None else eps)
        for name, (place, eps) in itertools.product(formulas, places.items())
    }

    def inputs(x_dtype, w_dtype, scale, dim=3, n=n):
        shape = (3, n, 16, 3, 2)[:dim] if groups else (*[3] * (dim - 1), n)
        x = probe.normal(generator, *shape, dtype=x_dtype, scale=scale, shift=0.1)
        given = (probe.normal(generator, n, dtype=w_dtype, scale=0.5, shift=1.2) for _ in range(2))
        given = [p if name in weights else None for name, p in zip(("weight", "bias"), given, strict=True)]
        return x, *given, *([probe.normal(generator, *shape, dtype=x_dtype)] if has_gate else [])

    def compute(x, weight, bias, *gate):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                copy._parameters[name] = nn.Parameter(tensor)  # others patch register_parameter
        return probe.steady(copy, x, *gate)

    left, why = probe.survivors(compute, every, [inputs(*each) for each in INPUTS], probe.SAME)
    buffers = [name for name, _ in module.named_buffers(recurse=False)]
    if not left:
        return Found(None, "", f"has buffers: {', '.join(buffers)}" if left is None and buffers else why)
    mixed, _ = probe.survivors(compute, left, [inputs(*each) for each in MIXED], probe.SAME)
    name, place = key = next(iter(mixed or left))
    if name in OTHERS:
        return probe.one(name, None)
    # Where only a mixture of dtypes, or inputs of other dimensions, are computed otherwise, those are left to the module.
    found = {key: every[key]}
    dims = tuple(d for d in range(1, 6) if probe.survivors(compute, found, [inputs(FP32, FP32, 1.0, d)], probe.SAME)[0])
    operator, options = ours[name]
    # Of what has weights the operator takes no other width, either.
    wide = groups or weights or probe.survivors(compute, found, [inputs(FP32, FP32, 1.0, n=n + 1)], probe.SAME)[0]
    args = operator, place, not mixed, dims, None if wide else n, tuple(weights), tuple(options.items())
    x, _, _, *gate = inputs(*INPUTS[0])
    trial = copy, "forward", x, *gate
    return probe.one(name, operator, *args, trial=trial)._replace(why="" if mixed else "where x has the weight's dtype")
