"""What may take the place of a module, a function or a loss, held to that: on its device, in its dtypes, with gradients."""

import copy

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from torch.func import functional_call

from ..functional import cross_entropy
from ..functional import linear_cross_entropy
from ..ops._check import FLOATS
from . import _probe as probes


def outcome(function, tensors, fixed):
    """What function makes of tensors, and the gradients of all but the last `fixed`; or what it raises, anything."""
    leaves = [x.detach().clone().requires_grad_(n < len(tensors) - fixed) for n, x in enumerate(tensors)]
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            out = function(*leaves)
            outs = list(out) if isinstance(out, (tuple, list)) else [out]
            # Of what is smooth a norm over few numbers leaves no gradient but its rounding.
            upstream = [torch.arange(o.numel(), device=o.device).cos().view(o.shape).to(o.dtype) for o in outs]
            return [*outs, *torch.autograd.grad(outs, leaves[: len(leaves) - fixed], upstream)]
    except Exception as error:
        return error


def refusal(own, ours, tensors, fixed=0):
    """Why ours may not take own's place, with gradients, held to what own gives in fp32; empty where it may."""
    plain, bound = outcome(own, tensors, fixed), outcome(ours, tensors, fixed)
    exact = outcome(own, [x.float() if x.dtype in FLOATS else x for x in tensors], fixed)
    for results, whose in ((plain, ""), (exact, ""), (bound, "the operator ")):
        if isinstance(results, Exception):
            return f"{whose}raises {type(results).__name__}: {results}"
    equal = all(probes.close(a, b, probes.ROUNDED, truth) for a, b, truth in zip(bound, plain, exact, strict=False))
    return "" if equal else "the operator computes other numbers on this device"


def try_module(module, cls, trial, device):
    """refusal of cls in the place of module's class, on that device and in module's dtypes, with the weights of a probe."""
    probe, method, *xs = trial
    # Quantised weights are integers, and the linear layers' own business.
    known = {name: p.dtype for name, p in module.named_parameters() if p.dtype in FLOATS}
    dtype, weights = next(iter(known.values()), torch.float32), dict(probe.named_parameters())

    def of(kind):
        twin = copy.copy(probe)
        twin.__class__ = kind

        def call(*tensors):
            inputs, given = tensors[: len(xs)], tensors[len(xs) :]
            known = dict(zip(weights, given, strict=True))
            return functional_call(twin, known, inputs) if given else getattr(twin, method)(*inputs)

        return call

    tensors = [*(x.to(device, dtype) for x in xs), *(p.to(device, known.get(name, dtype)) for name, p in weights.items())]
    return refusal(of(type(module)), of(cls), tensors)


def try_rope(module, cls, trial, device):
    """refusal of the rotations that cls calls in the place of those that module's class does; angles have no gradient."""
    for name, count, tensors in trial:
        own, ours = (c.forward.__globals__[name] for c in (type(module), cls))
        if why := refusal(own, ours, [x.to(device) for x in tensors], fixed=len(tensors) - count):
            return f"{name}: {why}"
    return ""


def try_loss(operator, head, device):
    """refusal of what takes the place of the loss of logits, with a small head of the same dtype."""
    dtype, generator = head.weight.dtype if head.weight.dtype in FLOATS else torch.float32, torch.Generator().manual_seed(0)
    tensors = [probes.normal(generator, *shape, dtype=dtype, scale=0.3).to(device) for shape in ((7, 64), (96, 64))]
    target = torch.tensor([-100, 5, 0, 31, 95, 40, 7], device=device)

    ours = {
        "linear_cross_entropy": lambda x, weight: linear_cross_entropy(x, weight, target),
        "cross_entropy": lambda x, weight: cross_entropy(F.linear(x, weight), target),
    }
    return refusal(lambda x, weight: F.cross_entropy(F.linear(x, weight), target), ours[operator], tensors)
