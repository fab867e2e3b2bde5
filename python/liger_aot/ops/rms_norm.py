"""RMSNorm:  y = x / sqrt(mean(x²) + eps) · (offset + weight)  over the last dimension.

Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv 1910.07467). The models that use it differ in where
they round a 16-bit x: see `casting` in rms_norm.
"""

import functools

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import cdiv
from .._runtime import fit
from .._runtime import kernels
from .._runtime import programs
from ._check import FLOATS
from ._check import check_same
from ._check import rows_of
from ._check import wide

BLOCKS = 128, 1024, 2048, 4096, 8192
ROWS = {128: 16, 1024: 2}
LOOP_BLOCK = 4096
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
    return y.to(dtype), rstd.flatten()


def backward_reference(dy, x, weight, rstd, offset, cast, ds=None):
    xs, dys, scale = wide(x), wide(dy), rstd.view(*x.shape[:-1], 1)
    xhat = xs * scale
    wdy = dys if weight is None else dys * (offset + wide(weight))
    dx = (wdy - xhat * (xhat * wdy).mean(-1, keepdim=True)) * scale
    if ds is not None:
        dx = dx + ds
    if weight is None:
        return dx.to(x.dtype), x.new_empty(0)
    dw = (dys * (wide(xhat.to(x.dtype)) if cast else xhat)).flatten(0, -2).sum(0)
    return dx.to(x.dtype), dw.to(weight.dtype)


@functools.cache
def _tile(n):
    if n > BLOCKS[-1]:
        return {"ROWS": 1, "BLOCK": LOOP_BLOCK, "LOOP": True}
    block = fit(n, BLOCKS)
    return {"ROWS": ROWS.get(block, 1), "BLOCK": block, "LOOP": False}


def tile(n):
    """The constants of a kernel for rows of n numbers; under tracing any will do."""
    return _tile(n if type(n) is int else 1)


@op(cpu=forward_reference)
def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: bool) -> tuple[Tensor, Tensor]:
    x, stride, rows, n = rows_of(x)
    if weight is None:
        scale, offset, has_weight, dtype = x, 1.0, 0, x.dtype
    else:
        scale, has_weight, dtype = weight, 1, weight.dtype if cast else x.dtype
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    rstd = x.new_empty(rows, dtype=torch.float32)
    constants = tile(n)
    grid = (cdiv(rows, constants["ROWS"]),)
    kernels.rms_norm_fwd[grid](x, scale, y, rstd, stride, rows, n, eps, offset, has_weight, cast, **constants)
    return y, rstd


@op(cpu=backward_reference)
def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, cast: bool, ds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x, stride, rows, n = rows_of(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    constants = tile(n)
    count = programs(x, cdiv(rows, constants["ROWS"]))
    dy, rest, has_ds = dy.contiguous(), x if ds is None else ds.contiguous(), ds is not None
    if weight is None:
        scale, offset, has_weight, partial = x, 1.0, 0, x.new_empty(0, dtype=torch.float32)
    else:
        scale, has_weight, partial = weight, 1, x.new_empty(count * n, dtype=torch.float32)
    kernels.rms_norm_bwd[(count,)](
        dy, x, scale, rstd, rest, dx, partial, stride, rows, n, offset, has_weight, cast, has_ds, **constants
    )
    return dx, partial if weight is None else column_sum(partial, count, weight)


def column_sum(partial, count, weight):
    """The gradient of weight (n,) from `count` programs' shares of it."""
    dw, n = torch.empty_like(weight, memory_format=torch.contiguous_format), weight.numel()
    kernels.column_sum[(cdiv(n, 128),)](partial, dw, count, n, ROWS=32, BLOCK=128)
    return dw


class RMSNormFunction(Function):
    name = "rms_norm"

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
        dx, dw = rms_norm_bwd(dy, x, weight, rstd, ctx.offset, ctx.cast)
        return dx, dw if weight is not None else None, None, None, None


@public
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float | None = None, *, offset: float = 0.0, casting: str = "none"
) -> Tensor:
    """x (..., n) over its root mean square, times offset + weight (n,); arithmetic in fp32.

    casting "none" and "gemma" round once, to x's dtype, as torch does. "llama" rounds the normalised x to x's dtype before the
    product, whose dtype is the wider of x and weight. eps None is torch.finfo(x.dtype).eps. Raises ValueError on a weight of
    another shape or device, on dtypes other than fp32, fp16 and bf16, and on an unknown casting.
    """
    if weight is not None:
        check_same("rms_norm", "weight", weight, x.shape[-1:], x)
        if weight.dtype is not x.dtype:
            weight = weight.float()
    cast = CASTING.get(casting)
    if cast is None:
        raise ValueError(f"rms_norm: casting must be one of {', '.join(CASTING)}, got {casting!r}")
    if x.dtype not in FLOATS:
        raise ValueError(f"rms_norm: x must be float32, float16 or bfloat16, got {x.dtype}")
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    if needs_grad(x, weight):
        return RMSNormFunction.apply(x, weight, eps, offset, cast)
    return rms_norm_fwd(x, weight, eps, offset, cast)[0]
