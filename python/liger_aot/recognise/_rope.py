"""Rotary embeddings: functions of heads and their angles, which an attention's forward finds among its globals.

Each form is a call of the operator, and is recognised by its reference's giving what the function gives.
"""

import functools
import inspect
import itertools
import types

import torch

from ..ops.rope import forward_reference
from . import _probe as probe
from ._probe import BF16
from ._probe import FP16
from ._probe import FP32
from ._probe import Found


def of_pairs(angles, **options):
    """One angle a pair."""
    return angles, {"rotary_dim": 2 * angles[0].shape[-1], **options}


def first_half(angles):
    return [a[..., : a.shape[-1] // 2] for a in angles]


# What the operator is given of the angles and of the positions, and its options.
ROTATIONS = {
    "half": lambda angles, _: (angles, {}),
    "half, other sign": lambda angles, _: (angles, {"reverse": True}),
    "half, one angle a pair": lambda angles, _: of_pairs(angles),
    "half, gathered": lambda angles, positions: ([a[positions] for a in angles], {}),
    "half, in parts": lambda angles, positions: (angles, {"parts": positions.shape[-1]}),
    "interleaved": lambda angles, _: (angles, {"order": "interleaved"}),
    "interleaved, one angle a pair": lambda angles, _: of_pairs(angles, order="interleaved"),
    "interleaved, doubled angles": lambda angles, _: of_pairs(first_half(angles), order="interleaved"),
    "interleaved, last columns": lambda angles, _: of_pairs(angles, order="interleaved", last=True),
    "interleaved to half": lambda angles, _: of_pairs(first_half(angles), order="interleaved_to_half"),
    "interleaved, in a column": lambda angles, _: ([a.squeeze(1) for a in angles], {"order": "interleaved"}),
}
# Shapes of the heads, of the angles without their last dimension, and of the positions, and which dimension counts the heads.
LAYOUTS = [
    ((2, 4, 5, 16), (2, 5), (), 1),
    ((2, 5, 4, 16), (2, 5), (), 2),
    ((2, 4, 5, 16), (5,), (), 1),
    ((5, 4, 16), (5,), (), 1),
    ((2, 5, 4, 16), (5, 1), (), 2),
    ((2, 4, 5, 16), (7,), (2, 5), 1),
    ((2, 5, 4, 16), (2, 5), (2, 5, 2), 2),
]
OPTIONAL = ("position_ids", "unsqueeze_dim")


def rope_functions(forward):
    """{name: function} of the functions that a forward calls to rotate its heads."""
    scope = getattr(inspect.unwrap(forward), "__globals__", {})
    found = {name: scope.get(name) for name in probe.called(forward)}
    like = {name for name, f in found.items() if inspect.isfunction(f) and ("rotary" in name or "rope" in name)}
    return {
        name: f for name, f in found.items() if name in like or (callable(f) and {"cos", "sin"} <= {*probe.parameters_of(f)})
    }


def parts_of(names):
    """Of a function's parameters those of the heads and those of the angles: cos and sin, or one of complex numbers."""
    heads = [*itertools.takewhile(lambda name: name not in ("cos", "sin") and not name.startswith("freqs"), names)]
    return heads, sorted(names[len(heads) : len(heads) + 1 + ("cos" in names)])


def attention_like(module):
    return bool(rope_functions(type(module).forward))


def find_attention(module):
    """What the rotations of one class are, taken together."""
    forward = type(module).forward
    found = {name: find_rope(f) for name, f in rope_functions(forward).items()}
    bound = {name: f for name, f in found.items() if f.operator}
    formula = "; ".join(dict.fromkeys(f.formula for f in (bound or found).values() if f.formula))
    why = "; ".join(f"{name}: {f.why}" for name, f in found.items() if f.why)
    if not bound:
        return Found(None, formula, why)
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return Found("rope", formula, "its forward is decorated: a copy of it would have no decorator")
    args = tuple((name, *f.args) for name, f in sorted(bound.items()))
    return Found("rope", formula, why, (args,), trial=tuple((name, *f.trial) for name, f in bound.items()))


def inputs_of(layout, heads, turns, r, dtype, angle_dtype):
    """Random tensors of that layout, and positions where it has any."""
    shape, angles, positions, dim = layout
    generator = torch.Generator().manual_seed(0)
    xs = [probe.normal(generator, *shape[:dim], n, *shape[dim + 1 :], dtype=dtype) for n in (4, 2, 2)[: len(heads)]]
    given = [probe.normal(generator, *angles, r, dtype=angle_dtype) for _ in range(2)]
    given = given if len(turns) == 2 else [torch.complex(*(a.float() for a in given))]
    return *xs, *given, *([torch.randint(5, positions, generator=generator)] if positions else [])


def find_rope(function):
    names = probe.parameters_of(function)
    heads, turns = parts_of(names)
    if not turns or len(heads) not in (1, 2, 3) or {*names} - {*heads, *turns, *OPTIONAL}:
        return Found(None, "", f"has the arguments {', '.join(names)}")
    needed = {name for name, p in inspect.signature(function).parameters.items() if p.default is p.empty}
    count, angles = len(heads), slice(len(heads), len(heads) + len(turns))

    def compute(*tensors):
        return function(**dict(zip((*heads, *turns, "position_ids"), tensors, strict=False)))

    def fitting(layout, forms, r, *dtypes):
        places = {(len(layout[0]), len(layout[1]) + 1): layout[-1]}

        def call(*tensors, form):
            return rotated(forward_reference, form, places, tensors[:count], tensors[angles], *tensors[angles.stop :])

        every = {form: functools.partial(call, form=form) for form in forms}
        return probe.survivors(compute, every, [inputs_of(layout, heads, turns, r, *each) for each in dtypes])

    layouts = [layout for layout in LAYOUTS if bool(layout[2]) == ("position_ids" in needed)]
    why, plain = "", [(FP32, FP32), (BF16, BF16), (FP16, FP16)]
    for r, layout in itertools.product((16, 8), layouts):
        found, said = fitting(layout, ROTATIONS, r, *plain)
        why = why if why and found is None else said  # a layout that it takes says more than one that it does not
        # Where it takes narrower angles, that tells the first columns from the last.
        narrow, _ = fitting(layout, found, r // 2, *plain) if found else (None, "")
        if forms := found if narrow is None else narrow:
            break
    else:
        return Found(None, "", why)
    form = next(iter(forms))
    mixed = bool(fitting(layout, [form], r, (BF16, FP32), (FP16, FP32))[0])
    marks = ["complex"] * (len(turns) == 1) + ["partial"] * bool(narrow) + ["one tensor"] * (count == 1)
    formula = ", ".join([form, "cast back" if mixed else "promote", *marks])
    fits = [each for each in layouts if fitting(each, [form], r, *plain)[0]]
    places = tuple(((len(shape), len(angles) + 1), dim) for shape, angles, _, dim in fits)
    tensors = inputs_of(layout, heads, turns, r, FP32, FP32)
    return probe.one(formula, "rope", form, places, mixed, trial=(count, tensors))


def rotated(turn, form, places, xs, angles, positions=None, dim=None, mixed=True):
    """What turn, the operator or its reference, makes of heads xs, or None where these are no such as the form was found with.

    places says of the numbers of dimensions of heads and angles which counts the heads, unless dim does.
    """
    x, cos = xs[0], angles[0]
    flat, place = x.dim() == 3, places.get((x.dim(), cos.dim()))
    for angle in angles:
        known = angle.dtype in (x.dtype, torch.complex64) or (mixed and angle.dtype is FP32)
        if place is None or angle.requires_grad or angle.device != x.device or not known:
            return None
    dim = (place if dim is None else dim) + flat
    if dim not in (1, 2):
        return None
    (cos, *sin), options = ROTATIONS[form](angles, positions)

    def turned(x):
        """As the operator takes them, (batch, heads, tokens, columns), or back."""
        return x.transpose(1, 2) if dim == 2 else x

    heads = [turned(x[None] if flat else x) for x in xs]
    for y in heads:
        if y.dtype is not x.dtype or y.shape[2] != cos.shape[-2] or (cos.dim() == 3 and cos.shape[0] not in (1, y.shape[0])):
            return None
    results = []
    for n in range(0, len(heads), 2):
        q, k = heads[n], heads[n + 1] if n + 1 < len(heads) else heads[n][:, :0]  # of no other, no heads
        results += turn(q, k, cos, *(sin or (None,)), **options)
    results = [turned(y)[0] if flat else turned(y) for y in results[: len(xs)]]
    return tuple(results) if len(xs) > 1 else results[0]
