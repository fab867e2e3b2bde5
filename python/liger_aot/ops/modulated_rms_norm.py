"""Modulated RMSNorm:  y = (1 + scale) · norm(x) · (offset + weight) + shift,  norm(x) = x / sqrt(mean(x²) + eps).

scale and shift are those of a row, or of a group of rows: of an image, of a batch. Peebles and Xie, Scalable Diffusion Models
with Transformers, 2022 (arXiv 2212.09748), on a LayerNorm.
"""

import math

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import kernels
from .._runtime import programs
from ._check import check_same
from ._check import rows_of
from ._check import wide
from ._norm import column_sum
from ._norm import number_each
from .rms_norm import check_arguments

FORWARD_BLOCK, BLOCKS = 2048, (2048, 4096)
RESIDENT = {2048: 2, 4096: 1}  # a backward's programs on one multiprocessor, at 128 registers a thread and twice that


def tile(n):
    """BLOCK and LOOP of the backward; under tracing any will do."""
    wider = type(n) is int and n > BLOCKS[0]
    return {"BLOCK": BLOCKS[wider], "LOOP": wider and n > BLOCKS[1]}


def spread(scale, x):
    """scale, or shift, as it meets x."""
    return wide(scale).view(*scale.shape[:-1], *[1] * (x.dim() - scale.dim()), x.shape[-1])


def forward_reference(x, scale, shift, weight, eps, offset, cast):
    xs = wide(x)
    rstd = torch.rsqrt(xs.square().mean(-1, keepdim=True) + eps)
    y = xs * rstd
    if cast:
        y = wide(y.to(x.dtype))
    if weight is not None:
        y = y * (offset + wide(weight))
    y = y * (1 + spread(scale, x))
    if shift is not None:
        y = y + spread(shift, x)
    return y.to(x.dtype), rstd.squeeze(-1)


def backward_reference(dy, x, scale, weight, rstd, offset, cast, need_dw, need_dscale, need_dshift):
    dys, r, by = wide(dy), rstd.unsqueeze(-1), spread(scale, x)
    w = 1.0 if weight is None else offset + wide(weight)
    xhat = wide(x) * r
    wdy = dys * (1 + by) * w
    dx = (wdy - xhat * (xhat * wdy).mean(-1, keepdim=True)) * r
    if cast:
        xhat = wide(xhat.to(x.dtype))
    none = scale.new_empty(0)
    dw = (dys * (1 + by) * xhat).sum_to_size(weight.shape).to(weight.dtype) if need_dw else none.clone()
    dscale, dshift = (
        g.sum_to_size(by.shape).view(scale.shape).to(scale.dtype, copy=True) if needed else none.clone()
        for g, needed in ((dys * xhat * w, need_dscale), (dys, need_dshift))
    )
    return dx.to(x.dtype), dw, dscale, dshift


@op(cpu=forward_reference)
def modulated_rms_norm_fwd(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor | None, eps: float, offset: float, cast: bool
) -> tuple[Tensor, Tensor]:
    each = math.prod(x.shape[scale.dim() - 1 : -1])
    x, stride, rows, n = rows_of(x)
    scale, scale_stride, _, _ = rows_of(scale)
    shifts, shift_stride, _, _ = (scale, scale_stride, 0, 0) if shift is None else rows_of(shift)
    has_weight, offset = weight is not None, 1.0 if weight is None else offset
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = number_each(x, rows)
    kernels.modulated_rms_norm_fwd[(rows,)](
        x, weight.contiguous() if has_weight else scale, scale, shifts, y, rstd, stride, scale_stride, shift_stride, each, n,
        eps, offset, has_weight, shift is not None, cast, BLOCK=FORWARD_BLOCK,
    )  # fmt: skip
    return y, rstd


@op(cpu=backward_reference)
def modulated_rms_norm_bwd(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    cast: bool,
    need_dw: bool,
    need_dscale: bool,
    need_dshift: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(the gradients of x, of weight, of scale, of shift); what is not needed is empty."""
    each = math.prod(x.shape[scale.dim() - 1 : -1])
    x, stride, rows, n = rows_of(x)
    scale, scale_stride, groups, _ = rows_of(scale)
    has_weight, offset = weight is not None, 1.0 if weight is None else offset
    how = tile(n)
    # As many programs for the groups as fit on the device, and if those are few, several for each.
    count, of_groups = (programs(x, r, RESIDENT[how["BLOCK"]]) for r in (rows, groups))
    parts = count // max(of_groups, 1)
    whole = parts == 1 and not how["LOOP"]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dscale, dshift = (scale.new_empty(scale.shape if needed else 0) for needed in (need_dscale, need_dshift))
    shares = [x.new_empty(parts * d.numel() * (not whole), dtype=torch.float32) for d in (dscale, dshift)]
    partial = x.new_empty(parts * of_groups * n * need_dw, dtype=torch.float32)
    weights = weight.contiguous() if has_weight else scale
    # One kernel alone writes a tensor: export.lower stands on that.
    wholes = (dscale, dshift) if whole else (scale, scale)
    kernels.modulated_rms_norm_bwd[(parts, of_groups)](
        dy.contiguous(), x, weights, scale, rstd, dx, *wholes, *shares, partial, stride, scale_stride, groups, each, n,
        offset, has_weight, cast, need_dw, need_dscale, need_dshift, whole, **how,
    )  # fmt: skip
    if not whole and parts == 1:  # the groups are many, their numbers perhaps more than a kernel's int32
        dscale, dshift = (share.view(d.shape).to(d.dtype) for share, d in zip(shares, (dscale, dshift), strict=True))
    elif not whole:
        for share, gradient in zip(shares, (dscale, dshift), strict=True):
            if gradient.numel():
                column_sum(share, parts, gradient)
    dw = column_sum(partial, parts * of_groups, torch.empty_like(weights)) if need_dw else scale.new_empty(0)
    return dx, dw, dscale, dshift


class ModulatedRMSNormFunction(Function):
    @staticmethod
    def forward(ctx, x, scale, shift, weight, eps, offset, cast):
        y, rstd = modulated_rms_norm_fwd(x, scale, shift, weight, eps, offset, cast)
        ctx.save_for_backward(x, scale, weight, rstd)
        ctx.options = offset, cast
        return y

    @staticmethod
    def backward(ctx, dy):
        Function.once("modulated_rms_norm")
        _, need_dscale, need_dshift, need_dw, *_ = ctx.needs_input_grad
        gradients = modulated_rms_norm_bwd(dy, *ctx.saved_tensors, *ctx.options, need_dw, need_dscale, need_dshift)
        dx, dw, dscale, dshift = gradients
        return dx, dscale if need_dscale else None, dshift if need_dshift else None, dw if need_dw else None, None, None, None


def by_groups(name, tensor, x):
    """tensor, which is scale or shift, with as many dimensions in front as x has of groups."""
    shape = tensor.shape[:-1]
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    if tensor.shape[-1:] != x.shape[-1:] or shape != x.shape[: len(shape)] or len(shape) >= x.dim():
        raise ValueError(
            f"modulated_rms_norm: {name} must have as many columns as x, of shape {tuple(x.shape)}, and in front x's "
            f"dimensions or the first of them, got shape {tuple(tensor.shape)}"
        )
    check_same("modulated_rms_norm", name, tensor, tensor.shape, x)
    return tensor if len(shape) == tensor.dim() - 1 else tensor.reshape(*shape, x.shape[-1])


@public
def modulated_rms_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    casting: str = "none",
) -> Tensor:
    """(1 + scale) · rms_norm(x) + shift for x (..., n); rms_norm divides by the root mean square and multiplies by weight (n,).

    scale and shift have x's shape, or the first dimensions of it and n: (b, n) or (b, 1, n) for x (b, t, n), (n,) for all rows.
    Of b = t, too, (b, n) is by the first dimension, where torch would broadcast by the second. shift and weight may be left
    out; offset is added to weight. casting "llama" rounds the normalised x to x's dtype; else arithmetic is fp32, rounded once
    to x's dtype. Unless scale, shift and weight all have x's dtype all are fp32; each has its gradient in its own: sums in
    fp32, in one order, rounded once. eps None is that of fp32, as in torch. Raises ValueError on other shapes, devices and
    castings, and on dtypes other than fp32, fp16 and bf16.
    """
    weight, eps, cast = check_arguments("modulated_rms_norm", x, weight, eps, casting)
    scale = by_groups("scale", scale, x)
    if shift is not None:
        shift = by_groups("shift", shift, x)
        if shift.shape != scale.shape:
            raise ValueError(
                f"modulated_rms_norm: shift must be of as many rows as scale, {tuple(scale.shape)}, got {tuple(shift.shape)}"
            )
    others = [t for t in (scale, shift, weight) if t is not None]
    if any(t.dtype is not x.dtype for t in others):
        scale, shift, weight = (None if t is None else t.float() for t in (scale, shift, weight))
    if needs_grad("modulated_rms_norm", x, scale, shift, weight):
        return ModulatedRMSNormFunction.apply(x, scale, shift, weight, eps, offset, cast)
    return modulated_rms_norm_fwd(x, scale, shift, weight, eps, offset, cast)[0]
