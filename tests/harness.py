"""Hold an operator to its reference without choosing a tolerance, and to what PyTorch asks of an operator.

The truth is the reference in float64. The allowance is what the reference loses in float32, rounded once to the operator's
dtype: the least error that a kernel that computes in float32 can make. That is the most that it loses at the inputs and at a
few points beside them: at one point alone, on one CPU, a few roundings may all be lucky.
"""

import functools
import io
import itertools
import math
from contextlib import nullcontext

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BESIDE = 16  # points, of which as many are looked at as it takes
MANY, FEW = 256, 0.1  # numbers whose roundings are counted; the share that may be others than the nearest


def check(function, reference, *inputs, slack=2.0, through=None, carries=0.0, seen=None, arithmetic=lambda n: nullcontext()):
    """Every output and gradient of `function` errs at most `slack` times the allowance, at worst and on average.

    Every floating tensor among the inputs gets a gradient, unless it is `fixed`. `through` is the dtype that intermediate
    results are rounded to by definition, where it is narrower than the result's. `carries` is the size of fp32 numbers whose
    rounding the results carry, where that is more than their own: a difference of two, of which few may be exact by luck.
    `seen` is a list that gets error / allowed of all that was held. `arithmetic(n)` is a context in which float32 errs as
    instructions may that are not the CPU's, by other draws for each n: beside the inputs the reference in float32 runs in it.
    """
    points, found, drawn = itertools.chain([inputs], beside(inputs)), [], functools.cache(upstream)

    def truth(n):
        while len(found) <= n:
            point = next(points)
            float64 = run(reference, point, torch.float64, drawn)
            with arithmetic(len(found)) if found else nullcontext():
                found.append([float64, run(reference, point, torch.float32, drawn)])
        return found[n]

    exact = truth(0)[0]
    for name, got in (results := run(function, inputs, drawn=drawn)).items():
        assert got is not None, f"{name}: missing"
        assert got.shape == exact[name].shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact[name].shape)}"
        # A result that float32 hits exactly leaves no allowance: one unit in the last place of its largest number.
        unit = torch.finfo(through or got.dtype).eps * exact[name].abs().max().item() if got.numel() else 0.0
        for measure in worst, average:
            error, allowed = measure(got, exact[name]), max(unit, slack * carries * torch.finfo(torch.float32).eps)
            for n in range(1 + BESIDE):
                float64, float32 = truth(n)
                rounded = float32[name].to(through or got.dtype).to(got.dtype)
                allowed = max(allowed, slack * measure(rounded, float64[name]))
                if error <= allowed:
                    break
            if seen is not None:
                seen.append(times(error, allowed))
            assert error <= allowed, (
                f"{name}: {measure.__name__} error {error:.2e}, allowed {allowed:.2e}: {times(error, allowed):.3g} times it"
            )
        if slack == 2.0 and not carries and through is None and got.dtype != torch.float32 and got.numel() >= MANY:
            float64, float32 = truth(0)
            share, allowed = misrounded(got, exact[name]), FEW + 4 * misrounded(float32[name].to(got.dtype), float64[name])
            if seen is not None:
                seen.append(times(share, allowed))
            assert share <= allowed, f"{name}: {share:.0%} of the numbers are not the nearest ones, allowed {allowed:.0%}"
    return results


def times(error, allowed):
    """error / allowed; infinite where a number is missing, or where nothing is allowed."""
    if error == 0:
        return 0.0
    return error / allowed if math.isfinite(error) and allowed > 0 else math.inf


def misrounded(got, exact):
    """The share of numbers that are not the nearest to the truth: of what fp32 holds, rounded once, next to none are; of what
    was rounded to 16 bits on the way as well, a third.
    """
    return (got != exact.to(got.dtype)).double().mean().item()


def beside(inputs):
    """Inputs that differ from these by up to 2^-12 of each number: of the same conditions, with other roundings."""
    device = next(i.device for i in inputs if isinstance(i, Tensor))
    generator = torch.Generator(device).manual_seed(1)
    for _ in range(BESIDE):
        yield [
            i * (1 + 2**-12 * (2 * torch.rand(i.shape, generator=generator, device=device) - 1)) if is_float(i) else i
            for i in inputs
        ]


class fixed:  # noqa: N801 (a marker, read like a word)
    """An input that is a constant: it keeps its dtype at least as wide, and gets no gradient."""

    def __init__(self, tensor):
        self.tensor = tensor


def upstream(shapes, dtype, device):
    """Gradients of results: the same numbers each time, drawn where they are used."""
    generator = torch.Generator(device).manual_seed(1)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def run(function, inputs, dtype=None, drawn=upstream):
    """The outputs of function and the gradient of each floating input, computed in dtype (default: as they come)."""
    lowest = next(i.dtype for i in inputs if isinstance(i, Tensor))
    leaves = [leaf(i, dtype) for i in inputs]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    gradients = drawn(tuple(o.shape for o in outs), lowest, outs[0].device)
    pairs = [(o, g.to(o.dtype, copy=True)) for o, g in zip(outs, gradients, strict=True) if o.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    outputs = {f"output {n}": o.detach() for n, o in enumerate(outs)}
    return outputs | {f"gradient {n}": x.grad for n, (i, x) in enumerate(zip(inputs, leaves, strict=True)) if is_float(i)}


def is_float(i):
    return isinstance(i, Tensor) and i.is_floating_point()


def leaf(i, dtype):
    if isinstance(i, fixed):
        return i.tensor.to(dtype) if dtype and i.tensor.is_floating_point() else i.tensor
    if not is_float(i):
        return i
    if dtype is None:  # as it comes: a view stays a view
        return i.detach().requires_grad_()
    return i.detach().to(dtype, copy=True).requires_grad_()


def worst(a, b):
    return (a.double() - b).abs().max().item() if a.numel() else 0.0


def average(a, b):
    return (a.double() - b).square().mean().sqrt().item() if a.numel() else 0.0


def check_operator(public, fwd, *inputs, dims=(0,), **options):
    """opcheck of the public operator and of its _fwd, fullgraph compile static and dynamic, export strict and not.

    inputs are those of the public operator; the floating tensors among them get gradients. fwd is (overload, args).
    Sizes `dims` of the first input are the dynamic ones.
    """
    leaves = [i.detach().requires_grad_() if is_float(i) else i for i in inputs]
    torch.library.opcheck(public, leaves, options)
    flipped = [transposed(i) if is_float(i) else i for i in inputs]
    torch.library.opcheck(public, flipped, options)
    overload, args = fwd
    torch.library.opcheck(overload, args)
    torch.library.opcheck(overload, [transposed(i) if is_float(i) else i for i in args])

    def call(*args):
        return public(*args, **options)

    expected = results(call, leaves)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for got, want in zip(results(compiled, leaves), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)

    class Module(torch.nn.Module):
        def forward(self, *args):
            return call(*args)

    plain = tuple(i.detach() if isinstance(i, Tensor) else i for i in inputs)
    for strict in (False, True):
        program = torch.export.export(Module(), plain, strict=strict)
        names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert public.name().replace("::", ".") + ".default" in names, f"the graph holds {names}"
        lowered = {str(n.target) for n in program.run_decompositions().graph.nodes if n.op == "call_function"}
        assert overload.name().replace("::", ".") + ".default" in lowered, f"the decomposed graph holds {lowered}"
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        got, want = torch.export.load(file).module()(*plain), call(*plain)
        for a, b in zip(flat(got), flat(want), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def flat(out):
    return [o for o in (out if isinstance(out, (tuple, list)) else (out,)) if o is not None]


def results(function, leaves):
    """The outputs of function and the gradients of its leaves, each as new tensors."""
    outs = [o for o in flat(function(*leaves)) if o.requires_grad]
    tensors = [i for i in leaves if is_float(i) and i.requires_grad]
    grads = torch.autograd.grad([o.float().sum() for o in outs], tensors, allow_unused=True)
    return [o.detach() for o in outs] + [g for g in grads if g is not None]


def transposed(i):
    """The same numbers, laid out the other way round."""
    return i.detach().transpose(0, -1).contiguous().transpose(0, -1) if isinstance(i, Tensor) and i.dim() > 1 else i
