"""Log-probabilities of a linear head:  logp = z[target] - lse,  entropy = lse - Σ softmax(z) · z,  lse = logsumexp(z).

z = (hidden · weightᵀ + bias) / temperature; all three in nats. As torch.log_softmax and torch.logsumexp of z: what supervised
and preference losses and policy gradients need of the logits, which after Liger-Kernel (arXiv 2410.10989)
are made a chunk of rows at a time, 1024 or more on a GPU, in fp32, and made again in backward.
"""

import math

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import cdiv
from .._runtime import kernels
from ._check import rows_of
from ._check import wide
from ._linear import Gradients
from ._linear import autocast
from ._linear import check_linear
from ._linear import chunks
from ._linear import fake_gradients
from ._linear import logits_of
from ._loss import check_classes
from ._loss import check_target
from ._loss import check_target_if_asked


def forward_reference(logits, target, ignore_index, temperature):
    check_target("linear_logprob", target, ignore_index, logits.shape[-1])
    z, valid = wide(logits) / temperature, target != ignore_index
    logps = torch.log_softmax(z, -1)
    logp = logps.gather(-1, torch.where(valid, target, 0)[:, None])[:, 0]
    entropy = -torch.where(logps == -torch.inf, 0.0, logps.exp() * logps).sum(-1)
    return tuple(torch.where(valid, out, 0.0) for out in (logp, entropy, torch.logsumexp(z, -1)))


def backward_reference(dlogp, dentropy, dlse, logits, target, lse, entropy, ignore_index, temperature, dtype):
    z, valid = wide(logits) / temperature, target != ignore_index
    less = z - lse[:, None]
    p = less.exp()
    dz = p * (dlse - dlogp)[:, None] - dentropy[:, None] * torch.where(p == 0, 0.0, p * (less + entropy[:, None]))
    dz = dz.scatter_add(1, torch.where(valid, target, 0)[:, None], dlogp[:, None])
    return torch.where(valid[:, None], dz / temperature, 0.0).to(dtype)


def block(n):
    return 1024 if type(n) is int and n <= 1024 else 4096


@op(cpu=forward_reference)
def logprob_fwd(logits: Tensor, target: Tensor, ignore_index: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse) of each row of logits (rows, classes), fp32."""
    logits, stride, rows, n = rows_of(logits)
    check_target_if_asked("linear_logprob", target, ignore_index, n)
    logp, entropy, lse = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    kernels.logprob_fwd[(rows,)](
        logits, target.contiguous(), logp, entropy, lse, stride, n, ignore_index, 1.0 / temperature, BLOCK=block(n)
    )
    return logp, entropy, lse


@op(cpu=backward_reference)
def logprob_bwd(
    dlogp: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    ignore_index: int,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of logits (rows, classes), rounded to dtype, from those of logprob_fwd's results."""
    logits, stride, rows, n = rows_of(logits)
    dlogits = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
    size = block(n)
    kernels.logprob_bwd[(rows * cdiv(n, size),)](
        logits, target.contiguous(), lse, entropy, dlogp.contiguous(), dentropy.contiguous(), dlse.contiguous(), dlogits,
        stride, n, ignore_index, 1.0 / temperature, BLOCK=size,
    )  # fmt: skip
    return dlogits


def fake_fwd(hidden, weight, target, bias, temperature, ignore_index):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))


@op(cpu=None, fake=fake_fwd)
def linear_logprob_fwd(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse) of hidden (rows, width), fp32."""
    results = tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(3))
    for rows in chunks(hidden):
        logits = logits_of(hidden[rows], weight, bias)
        for whole, part in zip(results, logprob_fwd(logits, target[rows], ignore_index, temperature), strict=True):
            whole[rows] = part
        del logits  # before the next chunk's are made
    return results


def fake_bwd(dlogp, dentropy, dlse, hidden, weight, target, bias, lse, entropy, temperature, ignore_index, *needed):
    return fake_gradients(hidden, weight, bias, *needed)


@op(cpu=None, fake=fake_bwd)
def linear_logprob_bwd(
    dlogp: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden (its dtype), weight and bias (fp32); empty where not needed."""
    gradients = Gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)
    for rows in chunks(hidden):
        logits = logits_of(hidden[rows], weight, bias)
        upstream = dlogp[rows], dentropy[rows], dlse[rows]
        gradients.add(
            rows,
            logprob_bwd(*upstream, logits, target[rows], lse[rows], entropy[rows], ignore_index, temperature, weight.dtype),
        )
        del logits
    return gradients.results


class LinearLogprobFunction(Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, bias, temperature, ignore_index):
        logp, entropy, lse = linear_logprob_fwd(hidden, weight, target, bias, temperature, ignore_index)
        ctx.save_for_backward(hidden, weight, target, bias, lse, entropy)
        ctx.temperature, ctx.ignore_index = temperature, ignore_index
        return logp, entropy, lse

    @staticmethod
    def backward(ctx, dlogp, dentropy, dlse):
        Function.once("linear_logprob")
        hidden, weight, target, bias, lse, entropy = ctx.saved_tensors
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        dhidden, dweight, dbias = linear_logprob_bwd(
            dlogp, dentropy, dlse, hidden, weight, target, bias, lse, entropy, ctx.temperature, ctx.ignore_index, *needed
        )
        return (
            dhidden if needed[0] else None,
            dweight.to(weight.dtype) if needed[1] else None,
            None,
            dbias.to(bias.dtype) if needed[2] else None,
            None,
            None,
        )


@public
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse) of z = (hidden · weightᵀ + bias) / temperature, each of target's shape, fp32, differentiable.

    hidden is (..., H), weight (V, H), bias (V,), of one dtype; under autocast they are cast as F.linear casts. target is (...),
    int64. Where it is ignore_index all three are 0 and so are their gradients. A target out of range is a ValueError on CPU; on
    CUDA its logp and gradient are NaN, unless LIGER_AOT_CHECK=1. Raises ValueError on wrong shapes, devices and dtypes.
    """
    check_linear("linear_logprob", "hidden", hidden, weight, bias)
    if not temperature > 0:
        raise ValueError(f"linear_logprob: temperature must be positive, got {temperature}")
    shape = hidden.shape[:-1]
    target = check_classes("linear_logprob", target, shape, hidden)
    hidden, weight, bias = autocast(hidden, weight, bias)
    arguments = hidden.reshape(math.prod(shape), hidden.shape[-1]), weight, target.reshape(-1), bias, temperature, ignore_index
    run = LinearLogprobFunction.apply if needs_grad("linear_logprob", hidden, weight, bias) else linear_logprob_fwd
    return tuple(out.view(shape) for out in run(*arguments))
