"""RMSNorm:  y = x / sqrt(mean(x²) + eps) · (offset + weight)  over the last dimension.

Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv 1910.07467). The models that use it differ in where
they round a 16-bit x: see `casting` in rms_norm.
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

DEFAULT_EPS = torch.finfo(torch.float32).eps  # torch's, whatever the dtype of x
CASTING = {"none": False, "gemma": False, "llama": True}


def forward_reference(x, weight, eps, offset, cast):
    xs = wide(x)
    rstd = torch.rsqrt(xs.square().mean(-1, keepdim=True) + eps)
    y = xs * rstd
    dtype = x.dtype
    if cast:
        y, dtype = wide(y.to(x.dtype)), x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    if weight is not None:
        y = y * (offset + wide(weight))
    return y.to(dtype), rstd.squeeze(-1)


def backward_reference(dy, x, weight, rstd, offset, cast, ds=None, need_dw=True):
    xs, dys, scale = wide(x), wide(dy), rstd.view(*x.shape[:-1], 1)
    xhat = xs * scale
    wdy = dys if weight is None else dys * (offset + wide(weight))
    dx = (wdy - xhat * (xhat * wdy).mean(-1, keepdim=True)) * scale
    if ds is not None:
        dx = dx + ds
    if weight is None or not need_dw:
        return dx.to(x.dtype), x.new_empty(0, dtype=torch.float32)
    dw = (dys * (wide(xhat.to(x.dtype)) if cast else xhat)).sum_to_size(weight.shape)
    return dx.to(x.dtype), dw.to(weight.dtype)


@op(cpu=forward_reference)
def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: bool) -> tuple[Tensor, Tensor]:
    x, stride, rows, n, groups, ROWS, BLOCK, LOOP = layout(x)
    if weight is None:
        scale, offset, has_weight, dtype = x, 1.0, 0, x.dtype
    else:
        scale, has_weight, dtype = weight.contiguous(), 1, weight.dtype if cast else x.dtype
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    rstd = number_each(x, rows)
    kernels.rms_norm_fwd[(groups,)](
        x, scale, y, rstd, stride, rows, n, eps, offset, has_weight, cast, ROWS=ROWS, BLOCK=BLOCK, LOOP=LOOP
    )
    return y, rstd


@op(cpu=backward_reference)
def rms_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    cast: bool,
    ds: Tensor | None = None,
    need_dw: bool = True,
) -> tuple[Tensor, Tensor]:
    # ds, a gradient that reaches x by another way, is added to dx. Without need_dw the second result is empty.
    x, stride, rows, n, groups, ROWS, BLOCK, LOOP = layout(x, backward=True)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    count = programs(x, groups, resident(BLOCK, LOOP))
    dy, rest, has_ds = dy.contiguous(), x if ds is None else ds.contiguous(), ds is not None
    if weight is None:
        scale, offset, has_weight, need_dw = x, 1.0, 0, False
    else:
        scale, has_weight = weight.contiguous(), 1
    partial = x.new_empty(count * n if need_dw else 0, dtype=torch.float32)
    kernels.rms_norm_bwd[(count,)](
        dy, x, scale, rstd, rest, dx, partial, stride, rows, n, offset, has_weight, cast, has_ds, need_dw,
        ROWS=ROWS, BLOCK=BLOCK, LOOP=LOOP,
    )  # fmt: skip
    return dx, column_sum(partial, count, torch.empty_like(scale)) if need_dw else partial


class RMSNormFunction(Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, cast):
        y, rstd = rms_norm_fwd(x, weight, eps, offset, cast)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.cast = offset, cast
        return y

    @staticmethod
    def backward(ctx, dy):
        Function.once("rms_norm")
        x, weight, rstd = ctx.saved_tensors
        need_dw = ctx.needs_input_grad[1]
        dx, dw = rms_norm_bwd(dy, x, weight, rstd, ctx.offset, ctx.cast, None, need_dw)
        return dx, dw if need_dw else None, None, None, None


def check_arguments(op, x, weight, eps, casting):
    """weight in a dtype that kernels take with x's, eps, and whether the normalised x is rounded to x's dtype."""
    dtype = x.dtype
    if dtype not in FLOATS or not x.dim():
        raise unusable(op, x)
    if weight is not None:
        check_same(op, "weight", weight, (x.shape[-1],), x)
        if weight.dtype is not dtype:
            weight = weight.float()
    cast = CASTING.get(casting)
    if cast is None:
        raise ValueError(f"{op}: casting must be one of {', '.join(CASTING)}, got {casting!r}")
    return weight, DEFAULT_EPS if eps is None else eps, cast


@public
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float | None = None, *, offset: float = 0.0, casting: str = "none"
) -> Tensor:
    """x (..., n) over its root mean square, times offset + weight (n,); arithmetic in fp32.

    casting "none" and "gemma" round once, to x's dtype, as torch does. "llama" rounds the normalised x to x's dtype before the
    product, whose dtype is the wider of x and weight. eps None is that of fp32, as in torch. Raises ValueError on a weight of
    another shape or device, on dtypes other than fp32, fp16 and bf16, and on an unknown casting.
    """
    weight, eps, cast = check_arguments("rms_norm", x, weight, eps, casting)
    if needs_grad("rms_norm", x, weight):
        return RMSNormFunction.apply(x, weight, eps, offset, cast)
    return rms_norm_fwd(x, weight, eps, offset, cast)[0]
