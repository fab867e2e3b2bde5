"""LayerNorm:  y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias  over the last dimension.

Ba, Kiros and Hinton, Layer Normalization, 2016 (arXiv 1607.06450). var is the mean of (x - mean(x))².
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
from ._check import wide
from ._norm import column_sum
from ._norm import layout
from ._norm import number_each
from ._norm import resident
from ._norm import unusable

LEAST_BLOCK = 1024


def forward_reference(x, weight, bias, eps):
    xs = wide(x)
    mean = xs.mean(-1, keepdim=True)
    rstd = torch.rsqrt((xs - mean).square().mean(-1, keepdim=True) + eps)
    y = (xs - mean) * rstd
    if weight is not None:
        y = y * wide(weight)
    if bias is not None:
        y = y + wide(bias)
    return y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def backward_reference(dy, x, weight, bias, mean, rstd, need_dw, need_db):
    row = *x.shape[:-1], 1
    dys, scale = wide(dy), rstd.view(row)
    xhat = (wide(x) - mean.view(row)) * scale
    wdy = dys if weight is None else dys * wide(weight)
    dx = (wdy - wdy.mean(-1, keepdim=True) - xhat * (xhat * wdy).mean(-1, keepdim=True)) * scale
    sums = [g.sum_to_size(x.shape[-1:]) for g, needed in ((dys * xhat, need_dw), (dys, need_db)) if needed]
    if not sums:
        return dx.to(x.dtype), x.new_empty(0)
    return dx.to(x.dtype), torch.stack(sums).to((bias if weight is None else weight).dtype)


@op(cpu=forward_reference)
def layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, stride, rows, n, groups, ROWS, BLOCK, LOOP = layout(x, LEAST_BLOCK)
    has_weight, has_bias = weight is not None, bias is not None
    # One that is absent is not read, but has the dtype of the other, as the kernel's signature wants.
    scale = weight.contiguous() if has_weight else bias if has_bias else x
    shift = bias.contiguous() if has_bias else scale
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = number_each(x, rows)
    rstd = torch.empty_like(mean)
    kernels.layer_norm_fwd[(groups,)](
        x, scale, shift, y, mean, rstd, stride, rows, n, eps, has_weight, has_bias, ROWS=ROWS, BLOCK=BLOCK, LOOP=LOOP
    )
    return y, mean, rstd


@op(cpu=backward_reference)
def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor]:
    # The second result has a row for dw and a row for db, as far as needed: one column_sum serves both.
    x, stride, rows, n, groups, ROWS, BLOCK, LOOP = layout(x, LEAST_BLOCK, backward=True)
    dy, has_weight, needed = dy.contiguous(), weight is not None, need_dw + need_db
    scale = weight.contiguous() if has_weight else x
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    count = programs(x, groups, resident(BLOCK, LOOP))
    partial = x.new_empty(count * needed * n, dtype=torch.float32)
    kernels.layer_norm_bwd[(count,)](
        dy, x, scale, mean, rstd, dx, partial, stride, rows, n, has_weight, need_dw, need_db,
        ROWS=ROWS, BLOCK=BLOCK, LOOP=LOOP,
    )  # fmt: skip
    if not needed:
        return dx, x.new_empty(0)
    return dx, column_sum(partial, count, (weight if has_weight else bias).new_empty(needed, n))


class LayerNormFunction(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rstd = layer_norm_fwd(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        Function.once("layer_norm")
        _, need_dw, need_db, _ = ctx.needs_input_grad
        dx, sums = layer_norm_bwd(dy, *ctx.saved_tensors, need_dw, need_db)
        return dx, sums[0] if need_dw else None, sums[-1] if need_db else None, None


@public
def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-05) -> Tensor:
    """x (..., n) less its mean, over its standard deviation, times weight (n,), plus bias (n,); in fp32, rounded to x's dtype.

    weight and bias may each be left out. Unless both have x's dtype they are taken in fp32. Raises ValueError where one has
    another shape or device, and on dtypes other than fp32, fp16 and bf16.
    """
    dtype, mixed = x.dtype, False
    if dtype not in FLOATS or not x.dim():
        raise unusable("layer_norm", x)
    if weight is not None:
        check_same("layer_norm", "weight", weight, (x.shape[-1],), x)
        mixed = weight.dtype is not dtype
    if bias is not None:
        check_same("layer_norm", "bias", bias, (x.shape[-1],), x)
        mixed = mixed or bias.dtype is not dtype
    if mixed:
        weight, bias = weight if weight is None else weight.float(), bias if bias is None else bias.float()
    if needs_grad("layer_norm", x, weight, bias):
        return LayerNormFunction.apply(x, weight, bias, eps)
    return layer_norm_fwd(x, weight, bias, eps)[0]
