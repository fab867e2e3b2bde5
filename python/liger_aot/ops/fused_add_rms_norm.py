"""Residual addition, then RMSNorm:  s = x + residual,  y = s / sqrt(mean(s²) + eps) · (offset + weight).

The two lines between the blocks of a transformer, in one pass over memory. The norm is that of rms_norm (arXiv 1910.07467);
torch has it as input + residual, then torch.nn.functional.rms_norm.
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import kernels
from ._check import check_same
from ._check import rows_of
from ._norm import layout
from ._norm import number_each
from .rms_norm import check_arguments
from .rms_norm import forward_reference as rms_norm_reference
from .rms_norm import rms_norm_bwd

LEAST_BLOCK = 1024


def forward_reference(x, residual, weight, eps, offset, cast):
    s = x + residual
    y, rstd = rms_norm_reference(s, weight, eps, offset, cast)
    return y, s, rstd


@op(cpu=forward_reference)
def fused_add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, cast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, x_stride, rows, n, groups, ROWS, BLOCK, LOOP = layout(x, LEAST_BLOCK)
    residual_stride = n
    if not residual.is_contiguous():
        residual, residual_stride, _, _ = rows_of(residual)
    if weight is None:
        scale, offset, has_weight, dtype = x, 1.0, 0, x.dtype
    else:
        scale, has_weight, dtype = weight.contiguous(), 1, weight.dtype if cast else x.dtype
    s = torch.empty_like(x, memory_format=torch.contiguous_format)
    y = torch.empty_like(s) if dtype is s.dtype else torch.empty_like(s, dtype=dtype)
    rstd = number_each(x, rows)
    kernels.fused_add_rms_norm_fwd[(groups,)](
        x, residual, scale, s, y, rstd, x_stride, residual_stride, rows, n, eps, offset, has_weight, cast,
        ROWS=ROWS, BLOCK=BLOCK, LOOP=LOOP,
    )  # fmt: skip
    return y, s, rstd


class FusedAddRMSNormFunction(Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, cast):
        ctx.set_materialize_grads(False)
        y, s, rstd = fused_add_rms_norm_fwd(x, residual, weight, eps, offset, cast)
        ctx.save_for_backward(s, weight, rstd)
        ctx.offset, ctx.cast = offset, cast
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            ctx.mark_non_differentiable(s)
        return y, s

    @staticmethod
    def backward(ctx, dy, ds):
        Function.once("fused_add_rms_norm")
        if dy is None:  # the loss saw the sum alone
            return ds, ds, None, None, None, None
        s, weight, rstd = ctx.saved_tensors
        need_dw = ctx.needs_input_grad[2]
        dx, dw = rms_norm_bwd(dy, s, weight, rstd, ctx.offset, ctx.cast, ds, need_dw)
        return dx, dx, dw if need_dw else None, None, None, None


@public
def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    casting: str = "none",
) -> tuple[Tensor, Tensor]:
    """(y, s): s is x + residual (..., n) in their dtype, y is rms_norm(s, weight, eps, offset=offset, casting=casting).

    Raises ValueError on a residual of another shape, dtype or device than x, and on what rms_norm refuses.
    """
    weight, eps, cast = check_arguments("fused_add_rms_norm", x, weight, eps, casting)
    check_same("fused_add_rms_norm", "residual", residual, x.shape, x)
    if residual.dtype is not x.dtype:
        raise ValueError(f"fused_add_rms_norm: residual must be {x.dtype} like x, got {residual.dtype}; cast one with .to()")
    if needs_grad("fused_add_rms_norm", x, residual, weight):
        return FusedAddRMSNormFunction.apply(x, residual, weight, eps, offset, cast)
    y, s, _ = fused_add_rms_norm_fwd(x, residual, weight, eps, offset, cast)
    return y, s
