"""The input of a layer with hyper-connections:  y = Σᵢ preᵢ · xᵢ,  a mixture of a token's streams.

Xie et al., mHC: Manifold-Constrained Hyper-Connections, 2025 (arXiv 2512.24880).
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
from ._check import check_same
from ._check import wide
from ._mhc import BLOCK
from ._mhc import check_streams


def forward_reference(x, h_pre):
    return (h_pre[..., None] * wide(x)).sum(-2).to(x.dtype)


def backward_reference(dy, x, h_pre):
    dys = wide(dy)[..., None, :]
    return (h_pre[..., None] * dys).to(x.dtype), (dys * wide(x)).sum(-1)


@op(cpu=forward_reference)
def mhc_pre_fwd(x: Tensor, h_pre: Tensor) -> Tensor:
    *rest, hc, n = x.shape
    y = x.new_empty((*rest, n))
    kernels.mhc_pre_fwd[(math.prod(rest) * cdiv(n, BLOCK),)](x.contiguous(), h_pre.contiguous(), y, hc, n, BLOCK=BLOCK)
    return y


@op(cpu=backward_reference)
def mhc_pre_bwd(dy: Tensor, x: Tensor, h_pre: Tensor) -> tuple[Tensor, Tensor]:
    hc, n = x.shape[-2:]
    dx, dh = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, h_pre))
    kernels.mhc_pre_bwd[(h_pre.numel(),)](dy.contiguous(), x.contiguous(), h_pre.contiguous(), dx, dh, hc, n, BLOCK=BLOCK)
    return dx, dh


class MHCPreFunction(Function):
    @staticmethod
    def forward(ctx, x, h_pre):
        ctx.save_for_backward(x, h_pre)
        return mhc_pre_fwd(x, h_pre)

    @staticmethod
    def backward(ctx, dy):
        Function.once("mhc_pre")
        return mhc_pre_bwd(dy, *ctx.saved_tensors)


@public
def mhc_pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """Σᵢ h_pre[..., i] · x[..., i, :] (..., n) of the streams x (..., hc, n) with weights h_pre (..., hc), taken in fp32.

    Arithmetic in fp32, rounded once to x's dtype; each gradient has the dtype of its tensor. Raises ValueError on dtypes other
    than fp32, fp16 and bf16, on streams that are not 1 to 16, and where h_pre has another shape or device.
    """
    check_streams("mhc_pre", x)
    check_same("mhc_pre", "h_pre", h_pre, x.shape[:-1], x)
    h_pre = h_pre.float()
    if needs_grad("mhc_pre", x, h_pre):
        return MHCPreFunction.apply(x, h_pre)
    return mhc_pre_fwd(x, h_pre)
