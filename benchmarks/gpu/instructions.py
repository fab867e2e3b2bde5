"""What float32 loses on a GPU, where exp, division and roots are instructions that need not round to the nearest.

Triton 3.7 makes of tl.exp a multiplication by log2(e) and ex2.approx, of `/` div.full, of tl.rsqrt rsqrt.approx.ftz (formulas
that divide by a square root stand for it); tl.log and tl.erf are libdevice's. Under Instructions torch's operations in float32
err as far as these may, forward and backward: what a formula makes of such errors is found by running it.
"""

import random

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ULP = 2.0**-23  # a unit in the last place of float32, relative to its number: at most
# PTX ISA, "Floating-Point Instructions": div, sqrt, rsqrt and ex2, in their "Notes".
DIV_FULL = 2 * ULP  # "The maximum ulp error is 2 across the full range of inputs."
SQRT_APPROX = 2.0**-23  # "maximum relative error over the entire positive finite floating-point range"
RSQRT_APPROX = 2.0**-22.9  # the same
EX2_APPROX = 2 * ULP  # "2 ulp from correctly rounded result across the full range of inputs"
# CUDA C++ Programming Guide, "Mathematical Functions", table of single precision: maximum ulp errors.
LOGF = 1 * ULP
ERFF = 2 * ULP
LOG2E = 1.4426950408889634


def exp(x):
    """The rounding of the product is multiplied by the size of x."""
    return torch.exp2(x * LOG2E)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def tanh(x):
    """As csrc_triton/_math.py has it: what is small, without instructions of these."""
    e = torch.exp(-2 * x.abs())
    return torch.where(x.abs() < 0.625, torch.tanh(x.double()).float(), torch.sign(x) * ((1 - e) / (1 + e)))


def silu(x):
    return x * torch.sigmoid(x)


def silu_backward(dy, x):
    s = torch.sigmoid(x)
    return dy * (s + x * s * (1 - s))


def gelu_parts(x, approximate):
    """(the share of x that is kept, its derivative)."""
    if approximate == "tanh":
        p = torch.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        return p, 1.5957691216057308 * (1 + 0.134145 * x * x) * p * (1 - p)
    return 0.5 * (1 + torch.erf(x * 0.7071067811865476)), 0.3989422804014327 * torch.exp(-0.5 * x * x)


def gelu(x, *, approximate="none"):
    return x * gelu_parts(x, approximate)[0]


def gelu_backward(dy, x, *, approximate="none"):
    p, q = gelu_parts(x, approximate)
    return dy * (p + x * q)


def logsumexp(x, dim, keepdim=False):
    top = x.amax(dim, keepdim=True)
    lse = top + torch.log(torch.exp(x - top).sum(dim, keepdim=True))
    return lse if keepdim else lse.squeeze(dim)


def log_softmax(x, dim, _):
    return x - torch.logsumexp(x, dim, keepdim=True)


def log_softmax_backward(dy, y, dim, _):
    return dy - torch.exp(y) * dy.sum(dim, keepdim=True)


def softmax(x, dim, _):
    """Of its logsumexp, whose rounding it carries: so the attentions have it in backward."""
    return torch.exp(x - torch.logsumexp(x, dim, keepdim=True))


def xlogy(x, y):
    return torch.where(x == 0, 0, x * torch.log(y))


# What is made of several instructions, as the kernels make it.
FORMULAS = {
    aten.exp.default: exp,
    aten.sigmoid.default: sigmoid,
    aten.tanh.default: tanh,
    aten.silu.default: silu,
    aten.silu_backward.default: silu_backward,
    aten.gelu.default: gelu,
    aten.gelu_backward.default: gelu_backward,
    aten.logsumexp.default: logsumexp,
    aten._log_softmax.default: log_softmax,
    aten._log_softmax_backward_data.default: log_softmax_backward,
    aten._softmax.default: softmax,
    aten.xlogy.Tensor: xlogy,
}
# How far each result may be off, relative to itself. A mean ends in a division.
BOUNDS = {
    aten.exp2.default: EX2_APPROX,
    aten.log.default: LOGF,
    aten.erf.default: ERFF,
    aten.sqrt.default: SQRT_APPROX,
    aten.rsqrt.default: RSQRT_APPROX,
    aten.reciprocal.default: DIV_FULL,
    aten.div.Tensor: DIV_FULL,
    aten.div.Scalar: DIV_FULL,
    aten.mean.dim: DIV_FULL,
    aten.nll_loss_forward.default: DIV_FULL,
    aten.nll_loss_backward.default: DIV_FULL,
}


# Additions that a number goes through in a kernel, one after another, at most: 12 in a block of 4096, as many again in a
# program's rows and in the sums of programs, 32 of which column_sum adds at once.
ADDITIONS = 32
SUMS = aten.sum.default, aten.sum.dim_IntList


def rounding(x, result, norm):
    """The standard deviation of a sum's rounding, in whatever order. An addition rounds what was added up so far by up to
    2^-24 of it, which for numbers of either sign is as large as the root of their squares' sum: every number's square counts
    once for each addition that it goes through."""
    additions = min(ADDITIONS, x.numel() // max(result.numel(), 1) - 1)
    return norm * (ULP / 2 * (additions / 3) ** 0.5)


class Instructions(TorchDispatchMode):
    """Every result is off by the whole of its bound: each number upwards or downwards by chance, or all of a tensor one way, as
    an instruction's errors may cancel or add up. `seed` says which."""

    def __init__(self, seed):
        super().__init__()
        self.draws = random.Random(seed)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in FORMULAS and args[0].dtype == torch.float32:
            with self:
                return FORMULAS[function](*args, **kwargs)
        result = function(*args, **kwargs)
        first, *rest = result if isinstance(result, tuple) else (result,)
        if (function not in SUMS and function not in BOUNDS) or first.dtype != torch.float32:
            return result
        if function in SUMS:
            norm = function(args[0].square(), *args[1:], **kwargs).sqrt()
            return first + self.drawn(torch.randn, first) * rounding(args[0], first, norm)
        way = self.draws.choice((-1, 1, None)) or self.drawn(torch.rand, first).sub(0.5).sign()
        first = (first.double() * (1 + BOUNDS[function] * way)).float()
        return (first, *rest) if rest else first

    def drawn(self, distribution, like):
        generator = torch.Generator(like.device).manual_seed(self.draws.getrandbits(32))
        return distribution(like.shape, generator=generator, device=like.device)
