"""Dynamic Tanh:  y = tanh(alpha · x) · gamma + beta  over the last dimension, alpha one number.

Zhu, Chen, He, LeCun and Liu, Transformers without Normalization, 2025 (arXiv 2503.10622).
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import cdiv
from .._runtime import kernels
from .._runtime import programs
from ._check import FLOATS
from ._check import check_same
from ._check import rows_of
from ._check import wide
from ._norm import column_sum

BLOCK = 1024
RESIDENT = 8  # a backward's programs on one multiprocessor: 32 warps together


def forward_reference(x, alpha, gamma, beta):
    y = torch.tanh(wide(alpha) * wide(x)) * wide(gamma)
    return (y if beta is None else y + wide(beta)).to(x.dtype)


def backward_reference(dy, x, alpha, gamma):
    dys, xs, a = wide(dy), wide(x), wide(alpha)
    t = torch.tanh(a * xs)
    inner = dys * wide(gamma) * (1.0 - t * t)
    sums = [g.sum_to_size(x.shape[-1:]) for g in (dys * t, dys, inner * xs)]
    return (inner * a).to(x.dtype), torch.stack(sums)


@op(cpu=forward_reference)
def dyt_fwd(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
    x, stride, rows, n = rows_of(x)
    gamma, y = gamma.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    shift, has_beta = (gamma, 0) if beta is None else (beta.contiguous(), 1)
    kernels.dyt_fwd[(rows * cdiv(n, BLOCK),)](x, alpha, gamma, shift, y, stride, n, has_beta, BLOCK=BLOCK)
    return y


@op(cpu=backward_reference)
def dyt_bwd(dy: Tensor, x: Tensor, alpha: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """(the gradient of x, the sums over rows (3, n), fp32, of the gradients of gamma, of beta, and of alpha in each column)."""
    x, stride, rows, n = rows_of(x)
    dx, blocks = torch.empty_like(x, memory_format=torch.contiguous_format), cdiv(n, BLOCK)
    count = programs(x, rows, RESIDENT)
    partial = x.new_empty(count * 3 * n, dtype=torch.float32)
    kernels.dyt_bwd[(count, blocks)](dy.contiguous(), x, alpha, gamma.contiguous(), dx, partial, stride, rows, n, BLOCK=BLOCK)
    return dx, column_sum(partial, count, x.new_empty(3, n, dtype=torch.float32))


class DyTFunction(Function):
    @staticmethod
    def forward(ctx, x, alpha, gamma, beta):
        ctx.save_for_backward(x, alpha, gamma)
        return dyt_fwd(x, alpha, gamma, beta)

    @staticmethod
    def backward(ctx, dy):
        Function.once("dyt")
        x, alpha, gamma = ctx.saved_tensors
        dx, (dgamma, dbeta, dalpha) = dyt_bwd(dy, x, alpha, gamma)
        _, need_dalpha, need_dgamma, need_dbeta = ctx.needs_input_grad
        return (
            dx,
            dalpha.sum().to(alpha.dtype).view(alpha.shape) if need_dalpha else None,
            dgamma.to(gamma.dtype) if need_dgamma else None,
            dbeta.to(gamma.dtype) if need_dbeta else None,
        )


@public
def dyt(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor | None = None) -> Tensor:
    """tanh(alpha · x) · gamma + beta for x (..., n), alpha of one number, gamma and beta (n,); beta may be left out.

    Arithmetic in fp32, rounded once to x's dtype: fp32, fp16 or bf16. Unless alpha, gamma and beta all have x's dtype they are
    taken in fp32; each gets its gradient in its own. Rows are read where they lie. Raises ValueError on other dtypes, and where
    a parameter has another shape or device.
    """
    if x.dtype not in FLOATS or not x.dim():
        got = x.dtype if x.dim() else "a scalar"
        raise ValueError(f"dyt: x must be float32, float16 or bfloat16 with a last dimension, got {got}")
    if alpha.numel() != 1:
        raise ValueError(f"dyt: alpha must be one number, got shape {tuple(alpha.shape)}")
    check_same("dyt", "alpha", alpha, alpha.shape, x)
    given = [alpha, gamma] if beta is None else [alpha, gamma, beta]
    for name, parameter in zip(("gamma", "beta"), given[1:], strict=False):
        check_same("dyt", name, parameter, (x.shape[-1],), x)
    if any(parameter.dtype is not x.dtype for parameter in given):
        alpha, gamma, beta = alpha.float(), gamma.float(), None if beta is None else beta.float()
    if needs_grad("dyt", x, alpha, gamma, beta):
        return DyTFunction.apply(x, alpha, gamma, beta)
    return dyt_fwd(x, alpha, gamma, beta)
