"""PolyNorm:  y = w₀ · n(x³) + w₁ · n(x²) + w₂ · n(x) + b,  n(u) = u / sqrt(mean(u²) + eps)  over the last dimension.

Zhuo, Wang, Zeng, Li, Zhou and Ma, Polynomial Composition Activations, 2024 (arXiv 2411.03884).
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import kernels
from .._runtime import programs
from ._check import FLOATS
from ._check import check_same
from ._check import rows_of
from ._check import wide
from ._norm import column_sum
from ._norm import unusable

BLOCK = 2048
RESIDENT = 4  # a backward's programs on one multiprocessor: 32 warps together


def powers(x):
    xs = wide(x)
    return torch.stack([xs * xs * xs, xs * xs, xs])


def forward_reference(x, weight, bias, eps):
    us = powers(x)
    rstd = torch.rsqrt(us.square().mean(-1, keepdim=True) + eps)
    scale = rstd * wide(weight).view(3, *[1] * x.dim())
    return ((us * scale).sum(0) + wide(bias).view(())).to(x.dtype), rstd.squeeze(-1).movedim(0, -1)


def backward_reference(dy, x, weight, rstd):
    us, dys, scale = powers(x), wide(dy), rstd.movedim(-1, 0).unsqueeze(-1)
    us = us * scale
    along = us * dys
    left = (dys - us * along.mean(-1, keepdim=True)) * scale * wide(weight).view(3, *[1] * x.dim())
    xs = wide(x)
    dx = 3 * xs * xs * left[0] + 2 * xs * left[1] + left[2]
    return dx.to(x.dtype), torch.cat([along.flatten(1).sum(1), dys.sum().view(1)])


@op(cpu=forward_reference)
def poly_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, stride, rows, n = rows_of(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty((*x.shape[:-1], 3), dtype=torch.float32)
    kernels.poly_norm_fwd[(rows,)](x, weight.contiguous(), bias, y, rstd, stride, n, eps, BLOCK=BLOCK)
    return y, rstd


@op(cpu=backward_reference)
def poly_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(the gradient of x, the gradients (4,), fp32, of the three weights and of bias)."""
    x, stride, rows, n = rows_of(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    count = programs(x, rows if n else 0, RESIDENT)  # rows of nothing have no mean
    partial = x.new_empty(count * 4, dtype=torch.float32)
    kernels.poly_norm_bwd[(count,)](dy.contiguous(), x, weight.contiguous(), rstd, dx, partial, stride, rows, n, BLOCK=BLOCK)
    return dx, column_sum(partial, count, x.new_empty(4, dtype=torch.float32))


class PolyNormFunction(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, rstd = poly_norm_fwd(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.shape = bias.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        Function.once("poly_norm")
        x, weight, rstd = ctx.saved_tensors
        dx, sums = poly_norm_bwd(dy, x, weight, rstd)
        _, need_dw, need_db, _ = ctx.needs_input_grad
        dw, db = sums[:3].to(weight.dtype), sums[3].to(weight.dtype).view(ctx.shape)
        return dx, dw if need_dw else None, db if need_db else None, None


@public
def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """weight[0] · n(x³) + weight[1] · n(x²) + weight[2] · n(x) + bias for x (..., n), weight (3,) and bias of one number.

    n divides by the root mean square. Arithmetic in fp32, rounded once to x's dtype: fp32, fp16 or bf16. Unless weight and bias
    both have x's dtype they are taken in fp32; each gets its gradient in its own. Rows are read where they lie. The sixth
    powers of a row must have a sum in fp32, which all have of numbers up to 5e5 in rows of up to 16384; beyond 2.6e6 none has,
    and n(x³) is 0, as the formula's in fp32. Raises ValueError on other dtypes, and where a parameter has another shape or
    device.
    """
    dtype = x.dtype
    if dtype not in FLOATS or not x.dim():
        raise unusable("poly_norm", x)
    check_same("poly_norm", "weight", weight, (3,), x)
    if bias.numel() != 1:
        raise ValueError(f"poly_norm: bias must be one number, got shape {tuple(bias.shape)}")
    check_same("poly_norm", "bias", bias, bias.shape, x)
    if weight.dtype is not dtype or bias.dtype is not dtype:
        weight, bias = weight.float(), bias.float()
    if needs_grad("poly_norm", x, weight, bias):
        return PolyNormFunction.apply(x, weight, bias, eps)
    return poly_norm_fwd(x, weight, bias, eps)[0]
