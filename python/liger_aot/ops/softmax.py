"""Softmax:  y = exp(x - max(x)) / Σ exp(x - max(x))  over one dimension, its sum computed online (arXiv 1805.02867)."""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import kernels
from ._check import along
from ._check import rows_of
from ._check import wide

BLOCKS = 1024, 4096


def tile(n):
    """BLOCK and LOOP for rows of n numbers; under tracing any will do."""
    short = type(n) is int and n <= BLOCKS[0]
    return {"BLOCK": BLOCKS[0] if short else BLOCKS[1], "LOOP": type(n) is int and n > BLOCKS[1]}


def forward_reference(x):
    return wide(x).softmax(-1).to(x.dtype)


def backward_reference(dy, y):
    dys, ys = wide(dy), wide(y)
    return (ys * (dys - (dys * ys).sum(-1, keepdim=True))).to(y.dtype)


@op(cpu=forward_reference)
def softmax_fwd(x: Tensor) -> Tensor:
    """The softmax over the last dimension."""
    x, stride, rows, n = rows_of(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels.softmax_fwd[(rows if n else 0,)](x, y, stride, n, **tile(n))
    return y


@op(cpu=backward_reference)
def softmax_bwd(dy: Tensor, y: Tensor) -> Tensor:
    dy, stride, rows, n = rows_of(dy)
    y, dx = y.contiguous(), torch.empty_like(dy, memory_format=torch.contiguous_format)
    kernels.softmax_bwd[(rows if n else 0,)](dy, y, dx, stride, n, **tile(n))
    return dx


class SoftmaxFunction(Function):
    @staticmethod
    def forward(ctx, x):
        y = softmax_fwd(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        Function.once("softmax")
        return softmax_bwd(dy, *ctx.saved_tensors)


@public
def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """torch.softmax(x, dim) of x in fp32, fp16 or bf16, whose dtype the result has.

    Arithmetic in fp32, rounded once; the gradient is that of the rounded result, which is what is kept for it, as in torch.
    Rows along the last dimension are read where they lie; any other dimension is copied to be the last. A row of -inf alone
    is NaN, as in torch. Raises ValueError on other dtypes and where x has no such dimension.
    """
    rows, back = along("softmax", x, dim)
    return back(SoftmaxFunction.apply(rows) if needs_grad("softmax", x) else softmax_fwd(rows))
