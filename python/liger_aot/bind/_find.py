"""What a module computes, found by running it on random numbers and not by its name.

A probe is a shell of the module: its class and attributes with small weights of the probe's own, without hooks and without a
forward of the instance. It runs over dtypes and sizes of input in which the formulas differ, in training, so that a dropout
shows. What equals a formula that an operator of ours computes can be bound; another known one is named where it is left.
"""

import inspect
import itertools
import types
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from torch import nn

FP32, BF16 = torch.float32, torch.bfloat16
UNKNOWN = "equals no known formula"


class Found(NamedTuple):
    """The operator, or None; the formula's name; the arguments of the class to swap in (_swap); a remark; and a probe's
    module, method and input."""

    operator: str | None
    formula: str = ""
    args: tuple = ()
    why: str = ""
    trial: tuple = ()


def parameters_of(function):
    """The names of a function's parameters; none where they are not all plain ones."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters] if all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters) else []


def own(module):
    return dict(module.named_parameters(recurse=False))


def identity(module):
    """What tells modules of one class apart: plain attributes, the parameters' dtypes, and the same of the children."""
    plain = (bool, int, float, str, torch.dtype, types.NoneType)
    scalars = [(k, v) for k, v in sorted(vars(module).items()) if isinstance(v, plain) and k not in ("training", "layer_idx")]
    parameters = [(name, p.dtype, tuple(p.shape)) for name, p in own(module).items()]
    return type(module), *scalars, *parameters, *((name, identity(child)) for name, child in module.named_children())


def shell(module, sizes=None, **children):
    """A module of the same class and attributes without hooks, a forward of its own, or weights.

    Integers that are keys of `sizes`, and the children given, take the place of its own.
    """
    copy = type(module).__new__(type(module))
    nn.Module.__init__(copy)
    skipped = {*vars(copy), "forward", "_old_forward", "_hf_hook"}
    for name, value in vars(module).items():
        if name not in skipped:
            vars(copy)[name] = sizes.get(value, value) if sizes and type(value) is int else value
    for name, child in module.named_children():
        copy.register_module(name, children[name] if name in children else shell(child))
    return copy


def normal(generator, *shape, dtype=FP32, scale=1.0, shift=0.0):
    return (torch.randn(shape, generator=generator, device="cpu", dtype=FP32) * scale + shift * scale).to(dtype)


def run(function, *args):
    """What function returns, or the exception that it raises; modules that are not ours may raise any."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return function(*args)
    except Exception as error:
        return error


def same(a, b):
    """Whether a and b are one formula's: apart at most as two ways to sum in fp32 are, and in 16 bits seldom for that."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype is b.dtype and a.shape == b.shape):
        return False
    allowed = 2.0**-17 if a.dtype is FP32 else 4 * torch.finfo(a.dtype).eps
    size = b.double().abs()
    near = (a.double() - b.double()).abs() <= allowed * (size + 0.05 * size.mean())
    return bool(near.all()) and (a.dtype is FP32 or (a != b).float().mean().item() < 0.004)


# Norms. A formula's operator is followed by what its bound class passes: offset and casting of rms_norm.


def rsqrt(x, eps):
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def unit(x, eps):
    return x.float() * rsqrt(x, eps)


def layer_norm(x, w, b, eps):
    w, b = w if w is None else w.float(), b if b is None else b.float()
    return F.layer_norm(x.float(), x.shape[-1:], w, b, eps).to(x.dtype)


WEIGHTED = {
    "llama": (lambda x, w, b, eps: w * unit(x, eps).to(x.dtype), ("rms_norm", 0.0, "llama")),
    "fp32 weight": (lambda x, w, b, eps: (w.float() * unit(x, eps)).to(x.dtype), ("rms_norm", 0.0, "gemma")),
    "gemma": (lambda x, w, b, eps: ((1.0 + w.float()) * unit(x, eps)).to(x.dtype), ("rms_norm", 1.0, "gemma")),
    "layer norm": (layer_norm, ("layer_norm",)),
    "gemma, 1 + weight rounded": (lambda x, w, b, eps: ((1.0 + w).float() * unit(x, eps)).to(x.dtype), None),
    "rounded rsqrt": (lambda x, w, b, eps: w * (x * rsqrt(x, eps).to(x.dtype)), None),
    "no upcast": (lambda x, w, b, eps: w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), None),
    "layer norm, 1 + weight": (lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w + 1, b, eps), None),
}
UNWEIGHTED = {
    "no weight": (lambda x, w, b, eps: unit(x, eps).to(x.dtype), ("rms_norm", 0.0, "gemma")),
    "layer norm": (layer_norm, ("layer_norm",)),
    "no weight, rounded rsqrt": (lambda x, w, b, eps: x * rsqrt(x, eps).to(x.dtype), None),
}
# dtypes of x and weight, size of x: eps shows where x is small.
NORM_INPUTS = [
    (FP32, FP32, 1.0),
    (FP32, FP32, 1e-3),
    (FP32, FP32, 1e-6),
    (BF16, BF16, 1.0),
    (BF16, BF16, 1e-3),
    (BF16, FP32, 1.0),
]


def norm_like(module):
    """One input; a weight and bias of one dimension, or none and "norm" in the name. Names only spare probes here."""
    if any(module.children()) or len(parameters_of(type(module).forward)) != 2:
        return False
    weights = own(module)
    return (weights or "norm" in type(module).__name__.lower()) and all(
        name in ("weight", "bias") and p.dim() == 1 for name, p in weights.items()
    )


def find_norm(module):
    weights, copy, generator = own(module), shell(module).train(), torch.Generator().manual_seed(0)
    formulas = WEIGHTED if "weight" in weights else UNWEIGHTED
    n = next((p.shape[0] for p in weights.values()), (getattr(module, "normalized_shape", None) or [96])[-1])
    attributes = {k: v for k, v in vars(module).items() if "eps" in k.lower() and isinstance(v, (float, int, types.NoneType))}
    places = attributes or {eps: eps for eps in (1e-6, 1e-5, 1e-8, 1e-12)}
    misses = {(formula, place): [] for formula in formulas for place in places}
    for name in module._parameters.keys() - weights.keys():
        copy.register_parameter(name, None)
    for x_dtype, w_dtype, scale in NORM_INPUTS:
        x = normal(generator, 5, 7, n, dtype=x_dtype, scale=scale, shift=0.1)
        given = {name: normal(generator, n, dtype=w_dtype, scale=0.5, shift=0.6) for name in weights}
        for name, tensor in given.items():
            copy.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        got = run(copy, x.clone())
        if isinstance(got, Exception):
            if x_dtype is w_dtype:
                return Found(None, "", (), f"raises {type(got).__name__}: {got}")
            continue
        for (formula, place), missed in misses.items():
            eps = torch.finfo(x_dtype).eps if places[place] is None else places[place]
            if not same(got, run(formulas[formula][0], x, given.get("weight"), given.get("bias"), eps)):
                missed.append(x_dtype is w_dtype)
    for (formula, place), missed in misses.items():
        if any(missed):
            continue
        if formulas[formula][1] is None:
            return Found(None, formula, (), "no operator computes it")
        operator, *options = formulas[formula][1]
        # Where only a mixture of dtypes is computed otherwise, that is left to the module.
        args, why = (place, bool(missed), formula, *options), "one dtype" if missed else ""
        return Found(operator, formula, args, why, (copy, "forward", x.float()))
    return Found(None, "", (), UNKNOWN)


# Gated units: MLPs of two or three linear layers, and the gate of experts.

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}
GATED = {"silu": "swiglu", "gelu_tanh": "geglu", "gelu": "geglu"}
HALVES = {
    "gate_up": lambda h: h.chunk(2, -1),
    "up_gate": lambda h: h.chunk(2, -1)[::-1],
    "gate_up interleaved": lambda h: (h[..., ::2], h[..., 1::2]),
    "up_gate interleaved": lambda h: (h[..., 1::2], h[..., ::2]),
}
GLU_INPUTS = [(FP32, 1.0), (FP32, 30.0), (BF16, 1.0)]  # a clamp shows where x is large


def linears(module):
    """The children that are linear layers, or adapters on them."""
    based = {name: getattr(child, "base_layer", child) for name, child in module.named_children()}
    return {name: child for name, child in based.items() if isinstance(child, nn.Linear)}


def glu_like(module):
    layers = linears(module)
    others = [child for name, child in module.named_children() if name not in layers]
    if len(layers) not in (2, 3) or own(module) or any(True for child in others for _ in child.parameters()):
        return False
    return len(parameters_of(type(module).forward)) == 2


def small(sizes):
    """Small sizes, as different and as often twice another as those given."""
    pool, chosen = iter((32, 48, 80, 112, 144, 176)), {}
    for size in sorted(sizes):
        chosen[size] = 2 * chosen[size // 2] if size % 2 == 0 and size // 2 in chosen else next(pool)
    return chosen


def find_glu(module):
    layers, generator = linears(module), torch.Generator().manual_seed(0)
    sizes = small({size for layer in layers.values() for size in (layer.in_features, layer.out_features)})
    made = {}
    for name, layer in layers.items():
        made[name] = nn.utils.skip_init(
            nn.Linear,
            sizes[layer.in_features],
            sizes[layer.out_features],
            bias=layer.bias is not None,
            device="cpu",
            dtype=FP32,
        )
        for p in made[name].parameters():
            p.data = normal(generator, *p.shape, scale=0.3)
    copy = shell(module, sizes, **made).train()
    candidates, raised = dict(glu_formulas(made)), None
    for dtype, scale in GLU_INPUTS:
        copy.to(dtype)
        outputs = {}
        for formula, (names, compute) in list(candidates.items()):
            n = made[names[0]].in_features
            if n not in outputs:
                x = normal(torch.Generator().manual_seed(n), 3, 5, n, dtype=dtype, scale=scale)
                outputs[n] = x, run(copy, x.clone())
            x, got = outputs[n]
            raised = got if isinstance(got, Exception) else raised
            # 16 bits may be rounded at other places: the operators round once, in the end.
            alike = same if dtype is FP32 else close
            if not alike(got, run(compute, x)):
                del candidates[formula]
    for (kind, act, *_), (names, _) in candidates.items():
        operator = GATED.get(act) if kind in ("3 linears", "gate_up", "up_gate") else None
        why = "" if operator else "no operator computes it"
        args, x = (kind, act, names) if operator else (), outputs[made[names[0]].in_features][0]
        return Found(operator, f"{kind}, {act}", args, why, (copy, "forward", x))
    return Found(None, "", (), UNKNOWN if raised is None else f"raises {type(raised).__name__}: {raised}")


def glu_formulas(layers):
    for names in itertools.permutations(layers):
        *first, down = (layers[name] for name in names)
        for act, f in ACTIVATIONS.items():
            if len(first) == 2:
                gate, up = first
                if gate.in_features == up.in_features and gate.out_features == up.out_features == down.in_features:
                    yield ("3 linears", act, names), (names, lambda x, g=gate, u=up, d=down, f=f: d(f(g(x)) * u(x)))
            elif first[0].out_features == 2 * down.in_features:
                for kind, split in HALVES.items():

                    def compute(x, both=first[0], d=down, f=f, split=split):
                        gate, up = split(both(x))
                        return d(f(gate) * up)

                    yield (kind, act, names), (names, compute)
            elif first[0].out_features == down.in_features:
                yield ("2 linears", act, names), (names, lambda x, up=first[0], d=down, f=f: d(f(up(x))))


def close(a, b, roundings=4):
    """Whether a and b differ no more than by a few roundings of their dtype, taken together."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype is b.dtype and a.shape == b.shape):
        return False
    allowed = max(roundings * torch.finfo(a.dtype).eps, 1e-5) * b.double().norm()
    return bool((a.double() - b.double()).norm() <= allowed)


def experts_like(module):
    return callable(getattr(module, "_apply_gate", None)) and isinstance(getattr(module, "has_gate", None), bool)


def find_experts(module):
    if not module.has_gate:
        return Found(None, "no gate", (), "nothing to fuse")
    copy, generator = shell(module).train(), torch.Generator().manual_seed(0)
    formulas = {(kind, act): (split, f) for kind, split in HALVES.items() for act, f in ACTIVATIONS.items()}
    for dtype, scale in GLU_INPUTS:
        x = normal(generator, 6, 64, dtype=dtype, scale=scale)
        got = run(copy._apply_gate, x.clone())
        if isinstance(got, Exception):
            return Found(None, "", (), f"raises {type(got).__name__}: {got}")
        for key, (split, f) in list(formulas.items()):
            gate, up = split(x)
            if not (same if dtype is FP32 else close)(got, f(gate) * up):
                del formulas[key]
    for kind, act in formulas:
        formula, operator = f"experts {kind}, {act}", GATED.get(act) if kind in ("gate_up", "up_gate") else None
        if operator and getattr(module.config, "_experts_implementation", None) == "eager":
            return Found(
                None, formula, (), "eager experts do not call _apply_gate; model.set_experts_implementation('grouped_mm')"
            )
        why = "" if operator else "no operator computes it"
        return Found(operator, formula, (kind, act) if operator else (), why, (copy, "_apply_gate", x))
    return Found(None, "", (), UNKNOWN)


# Rotary embeddings: functions (q, k, cos, sin) that an attention's forward finds among its globals.


def half(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def doubled(angles):
    return angles.chunk(2, -1)[0].repeat_interleave(2, -1)


def halves_of_pairs(x, cos, sin):
    return half(torch.cat((x[..., ::2], x[..., 1::2]), -1), cos, sin)


ROTATIONS = {
    "half": half,
    "half, other sign": lambda x, cos, sin: half(x, cos, -sin),
    "interleaved": lambda x, cos, sin: x * cos + pairs(x) * sin,
    "interleaved, doubled angles": lambda x, cos, sin: x * doubled(cos) + pairs(x) * doubled(sin),
    "interleaved to half": halves_of_pairs,
}
# Shapes of q, k, and of cos and sin without their last dimension.
LAYOUTS = {
    "(batch, heads, tokens, d)": ((2, 4, 5, 16), (2, 2, 5, 16), (2, 5)),
    "(tokens, heads, d)": ((5, 4, 16), (5, 2, 16), (5,)),
}
ROPE_INPUTS = [(FP32, FP32), (BF16, BF16), (BF16, FP32)]


def rotated(rotation, rule, x, cos, sin):
    """x rotated: "promote" as dtypes are, "cast back" rounded to x's in the end, "fp32" computed in that and cast back."""
    dtype, r = x.dtype, cos.shape[-1]
    if rule == "fp32":
        x, cos, sin = x.float(), cos.float(), sin.float()
    y = ROTATIONS[rotation](x[..., :r], cos, sin)
    y, rest = y if rule == "promote" else y.to(dtype), x[..., r:]
    return torch.cat((y, rest.to(dtype)), -1) if rest.shape[-1] else y


def rope_functions(forward):
    """{name: function} of what a forward calls with cos and sin."""
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    found = {name: forward.__globals__.get(name) for name in names}
    return {name: f for name, f in found.items() if callable(f) and {"cos", "sin"} <= set(parameters_of(f))}


def find_rope(function):
    names = parameters_of(function)
    count = names.index("cos")
    if count not in (1, 2) or names[count + 1] != "sin":
        return Found(None, "", (), f"has the arguments {', '.join(names)}")
    error = None
    for layout in LAYOUTS:
        rules = {(rotation, rule) for rotation in ROTATIONS for rule in ("promote", "cast back", "fp32")}
        results = [rope_survivors(function, layout, count, dtypes, 16, rules) for dtypes in ROPE_INPUTS]
        if isinstance(results[0], Exception):
            error = error or results[0]
            continue
        for left in results:
            rules = rules if isinstance(left, Exception) else rules & left
        for rotation, rule in sorted(rules):
            partial = rope_survivors(function, layout, count, ROPE_INPUTS[0], 8, {(rotation, rule)})
            parts = [
                rotation,
                rule,
                *(["partial"] if partial == {(rotation, rule)} else []),
                *(["one tensor"] if count == 1 else []),
            ]
            if rotation != "half":
                return Found(None, ", ".join(parts), (), "no operator computes it")
            return Found(
                "rope", ", ".join(parts), (layout, rule == "promote", count), "", rope_inputs(layout, count, (FP32, FP32), 16)
            )
        return Found(None, "", (), UNKNOWN)
    return Found(None, "", (), f"raises {type(error).__name__}: {error}")


def rope_inputs(layout, count, dtypes, r):
    generator = torch.Generator().manual_seed(0)
    *shapes, angles = LAYOUTS[layout]
    heads = [normal(generator, *shape, dtype=dtypes[0]) for shape in shapes[:count]]
    return *heads, *(normal(generator, *angles, r, dtype=dtypes[1]) for _ in range(2))


def rope_survivors(function, layout, count, dtypes, r, rules):
    """Which of the rules give what function gives, or what it raises."""
    *heads, cos, sin = rope_inputs(layout, count, dtypes, r)
    got = run(function, *(x.clone() for x in heads), cos.clone(), sin.clone())
    if isinstance(got, Exception):
        return got
    got, angles = got if isinstance(got, (tuple, list)) else (got,), (cos.unsqueeze(1), sin.unsqueeze(1))
    if len(got) != count:
        return set()

    def equal(rule):
        return all(same(y, run(rotated, *rule, x, *angles)) for y, x in zip(got, heads, strict=True))

    return {rule for rule in rules if equal(rule)}
