"""The output of a layer with hyper-connections:  yₒ = Σᵢ resₒᵢ · xᵢ + postₒ · f,  of a token's streams and the layer's output.

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
from .._runtime import fit
from .._runtime import kernels
from ._check import check_same
from ._check import wide
from ._mhc import BLOCK
from ._mhc import LANES
from ._mhc import check_streams


def forward_reference(x, f_out, h_post, h_res):
    return (h_res @ wide(x) + h_post[..., None] * wide(f_out)[..., None, :]).to(x.dtype)


def backward_reference(dy, x, f_out, h_post, h_res):
    dys, xs, fs = wide(dy), wide(x), wide(f_out)
    df = (h_post[..., None] * dys).sum(-2).to(f_out.dtype)
    return (h_res.mT @ dys).to(x.dtype), df, (dys * fs[..., None, :]).sum(-1), dys @ xs.mT


@op(cpu=forward_reference)
def mhc_post_res_fwd(x: Tensor, f_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    *rest, hc, n = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    inputs = (t.contiguous() for t in (x, f_out, h_post, h_res))
    kernels.mhc_post_res_fwd[(math.prod(rest) * cdiv(n, BLOCK),)](*inputs, y, hc, n, P=fit(hc, LANES), BLOCK=BLOCK)
    return y


@op(cpu=backward_reference)
def mhc_post_res_bwd(
    dy: Tensor, x: Tensor, f_out: Tensor, h_post: Tensor, h_res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, hc, n = x.shape
    inputs = [t.contiguous() for t in (x, f_out, h_post, h_res)]
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
    kernels.mhc_post_res_bwd[(math.prod(rest),)](dy.contiguous(), *inputs, *gradients, hc, n, P=fit(hc, LANES), BLOCK=BLOCK)
    return tuple(gradients)


class MHCPostResFunction(Function):
    @staticmethod
    def forward(ctx, x, f_out, h_post, h_res):
        ctx.save_for_backward(x, f_out, h_post, h_res)
        return mhc_post_res_fwd(x, f_out, h_post, h_res)

    @staticmethod
    def backward(ctx, dy):
        Function.once("mhc_post_res")
        return mhc_post_res_bwd(dy, *ctx.saved_tensors)


@public
def mhc_post_res(x: Tensor, f_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """h_res · x + h_post · f_out (..., hc, n): the streams x (..., hc, n) mixed by h_res (..., hc, hc), row by row those that
    come out, and the layer's output f_out (..., n), by h_post (..., hc) to each.

    Coefficients are taken in fp32, and so is f_out unless it has x's dtype. Arithmetic in fp32, rounded once to x's dtype; each
    gradient has the dtype of its tensor. Raises ValueError on dtypes other than fp32, fp16 and bf16, on streams that are not 1
    to 16, and where another has another shape or device.
    """
    hc, n = check_streams("mhc_post_res", x)
    shape = x.shape[:-2]
    check_same("mhc_post_res", "f_out", f_out, (*shape, n), x)
    check_same("mhc_post_res", "h_post", h_post, (*shape, hc), x)
    check_same("mhc_post_res", "h_res", h_res, (*shape, hc, hc), x)
    tensors = x, f_out if f_out.dtype is x.dtype else f_out.float(), h_post.float(), h_res.float()
    if needs_grad("mhc_post_res", *tensors):
        return MHCPostResFunction.apply(*tensors)
    return mhc_post_res_fwd(*tensors)
