"""Sparsemax:  y = max(x - t, 0)  over one dimension, t such that  Σ y = 1:  the distribution nearest to x, most of it zero.

Martins and Astudillo, From Softmax to Sparsemax, 2016 (arXiv 1602.02068).
"""

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
    return {"BLOCK": BLOCKS[0] if short else BLOCKS[1], "LOOP": not short}


def forward_reference(x):
    if not x.numel():
        return torch.empty_like(x)
    z = wide(x) - wide(x).amax(-1, keepdim=True)
    ordered, count = z.sort(-1, descending=True).values, torch.arange(1, x.shape[-1] + 1, device=x.device)
    kept = ~(1 + count * ordered <= ordered.cumsum(-1))
    threshold = (torch.where(kept, ordered, 0).sum(-1, keepdim=True) - 1) / kept.sum(-1, keepdim=True)
    return torch.where(z <= threshold, 0, z - threshold).to(x.dtype)


def backward_reference(dy, y):
    positive, dys = y > 0, wide(dy)
    mean = torch.where(positive, dys, 0).sum(-1, keepdim=True) / positive.sum(-1, keepdim=True)
    return torch.where(positive, dys - mean, 0).to(y.dtype)


@op(cpu=forward_reference)
def sparsemax_fwd(x: Tensor) -> Tensor:
    """The sparsemax over the last dimension."""
    x, stride, rows, n = rows_of(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels.sparsemax_fwd[(rows if n else 0,)](x, y, stride, n, **tile(n))
    return y


@op(cpu=backward_reference)
def sparsemax_bwd(dy: Tensor, y: Tensor) -> Tensor:
    dy, stride, rows, n = rows_of(dy)
    y, dx = y.contiguous(), torch.empty_like(dy, memory_format=torch.contiguous_format)
    kernels.sparsemax_bwd[(rows if n else 0,)](dy, y, dx, stride, n, **tile(n))
    return dx


class SparsemaxFunction(Function):
    @staticmethod
    def forward(ctx, x):
        y = sparsemax_fwd(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        Function.once("sparsemax")
        return sparsemax_bwd(dy, *ctx.saved_tensors)


@public
def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """The sparsemax of x (..., n), or along another dimension dim, in fp32, fp16 or bf16, whose dtype the result has.

    Arithmetic in fp32, rounded once; nothing is sorted. The gradient is that of what is not zero in the rounded result. Rows
    along the last dimension are read where they lie; any other dimension is copied to be the last. A row with a NaN or +inf,
    or of -inf alone, is NaN. Raises ValueError on other dtypes and where x has no such dimension.
    """
    rows, back = along("sparsemax", x, dim)
    return back(SparsemaxFunction.apply(rows) if needs_grad("sparsemax", x) else sparsemax_fwd(rows))
