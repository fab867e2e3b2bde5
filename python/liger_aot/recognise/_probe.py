"""Running a module on random numbers, to see what it computes; neither its hooks nor the caller's random state notice.

A probe is a shell of the module: its class and attributes with small weights of the probe's own, without hooks and without a
forward of the instance. It runs over dtypes and sizes of input in which the formulas differ, and in training as in evaluation,
so that a dropout shows.
"""

import inspect
import types
from typing import NamedTuple

import torch
from torch import nn

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Found(NamedTuple):
    """The operator that computes it, or None; the formula's name; why it is left, or a remark; what a class that calls the
    operator is made with, or None where it is left; the children that the operator replaces; and what to try that with."""

    operator: str | None
    formula: str = ""
    why: str = ""
    args: tuple | None = None
    parts: tuple = ()
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
    return len(parameters_of(forward)) == 2 or untold(forward)


def untold(forward):
    return str(inspect.signature(forward)).removeprefix("(self, ") in ("(*args, **kwargs)", "*args, **kwargs)")


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
    """A module of the same class and attributes without hooks, a forward of its own, weights or buffers.

    Integers that are keys of `sizes`, and the children given, take the place of its own. What it appends to is a copy.
    """
    empty = type(module).__new__(type(module))
    nn.Module.__init__(empty)
    skipped = {*vars(empty), "forward", "_old_forward", "_hf_hook"}
    own = {name: value for name, value in vars(module).items() if name not in skipped}
    own = {name: v.copy() if isinstance(v, (list, dict, set)) else v for name, v in own.items()}
    vars(empty).update({name: sizes.get(v, v) if sizes and type(v) is int else v for name, v in own.items()})
    empty._parameters.update(dict.fromkeys(module._parameters))
    empty._buffers.update((name, None) for name, buffer in module._buffers.items() if buffer is None)
    empty._modules.update({name: children.get(name) or shell(child) for name, child in module.named_children()})
    return empty


def normal(generator, *shape, dtype=FP32, scale=1.0, shift=0.0):
    return ((torch.randn(shape, generator=generator, device="cpu", dtype=FP32) + shift) * scale).to(dtype)


def run(function, *args):
    """What function returns, or the exception that it raises; modules that are not ours may raise any."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return function(*args)
    except Exception as error:
        return error


def steady(module, *xs):
    """What a module computes, if that is the same in training and in evaluation; a dropout is not."""
    trained, evaluated = module.train()(*(x.clone() for x in xs)), module.eval()(*xs)
    return trained if close(trained, evaluated, SAME) else None


# How far apart two ways to compute one formula are, as a share of its norm. In fp32 by the order of their sums; in 16 bits
# where they round at the same places by an element in a hundred, elsewhere, as the operators round once in the end, by more.
SAME = {FP32: 2.0**-17, FP16: 2.0**-14, BF16: 2.0**-11}
ROUNDED = {FP32: 1e-5, FP16: 2.0**-8, BF16: 2.0**-5}


def close(a, b, allowed, truth=None):
    """Whether a errs no more than b does, or than allowed for their dtype; by the truth, which is b where none is given."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(close(x, y, allowed) for x, y in zip(a, b, strict=True))
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype is b.dtype and a.shape == b.shape):
        return False
    exact = (b if truth is None else truth).double()
    most = torch.maximum((b.double() - exact).norm(), allowed.get(a.dtype, 0.0) * exact.norm())
    return bool((a.double() - exact).norm() <= most)


def survivors(compute, formulas, inputs, allowed=ROUNDED):
    """Those of the formulas that give what compute gives, for all inputs, and why there are none; None where it raises."""
    for given in inputs:
        got = run(compute, *(x if x is None else x.clone() for x in given))
        if isinstance(got, Exception):
            return None, f"raises {type(got).__name__}: {got}"
        formulas = {key: f for key, f in formulas.items() if close(got, run(f, *given), allowed)}
        if not formulas:
            return {}, "equals no known formula"
    return formulas, ""


def one(formula, operator, *args, parts=(), trial=()):
    """A formula, with the arguments of the operator if there is one for it."""
    return Found(operator, formula, "", args, parts, trial) if operator else Found(None, formula, "no operator computes it")
