"""Coefficients of hyper-connections:  pre = σ(z₁) + ε,  post = c·σ(z₂),  res = sinkhorn(z₃);  z = α · (x/rms(x) · φ) + b.

x is all streams of a token in a row. Sinkhorn-Knopp makes res nearly doubly stochastic: softmax of its rows, then columns and
rows divided by their sums in turns. Xie et al., mHC: Manifold-Constrained Hyper-Connections, 2025 (arXiv 2512.24880), after
Zhu et al., Hyper-Connections, 2024 (arXiv 2409.19606), with the constants of Liger-Kernel.
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
from .._runtime import programs
from ._check import check_same
from ._check import wide
from ._linear import accumulate
from ._linear import logits_of
from ._mhc import check_streams
from ._norm import column_sum

STREAMS = 2, 4, 8, 16
TILE = 256  # numbers of matrices of a program's tokens
RESIDENT = 8  # a backward's programs on one multiprocessor, of one warp each
DX_TOKENS, DX_BLOCK = 8, 1024


def normalised(dots, norm, width, rms_eps):
    rstd = torch.rsqrt(norm.square() / width + rms_eps)[..., None]
    return dots * rstd, rstd


def parts(z, hc):
    """What belongs to pre, to post, and to res as matrices."""
    pre, post, res = z.split([hc, hc, hc * hc], -1)
    return pre, post, res.unflatten(-1, (hc, hc))


def spread(alphas, hc):
    return torch.cat([a.expand(size) for a, size in zip(alphas, (hc, hc, hc * hc), strict=True)])


def sinkhorn(logits, tmax, eps):
    """The softmax of the rows, and every matrix whose columns have just been divided, the last of which is the result."""
    start = logits.softmax(-1)
    found = [(start + eps) / ((start + eps).sum(-2, keepdim=True) + eps)]
    for _ in range(1, tmax):
        by_row = found[-1] / (found[-1].sum(-1, keepdim=True) + eps)
        found.append(by_row / (by_row.sum(-2, keepdim=True) + eps))
    return start, found


def divided_back(d, matrix, eps, dim):
    """The gradient of matrix from d, that of matrix / (matrix.sum(dim) + eps)."""
    sums = matrix.sum(dim, keepdim=True) + eps
    return (d - (d * matrix / sums).sum(dim, keepdim=True)) / sums


def forward_reference(x, phi, b, alpha_pre, alpha_post, alpha_res, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult):
    hc, xs = x.shape[-2], wide(x).flatten(-2)
    dots, norm = xs @ wide(phi), torch.linalg.vector_norm(xs, dim=-1)
    mix, _ = normalised(dots, norm, xs.shape[-1], rms_eps)
    pre, post, res = parts(mix * spread((alpha_pre, alpha_post, alpha_res), hc) + b, hc)
    return pre.sigmoid() + pre_eps, post_mult * post.sigmoid(), sinkhorn(res, tmax, sinkhorn_eps)[1][-1], dots, norm


def backward_reference(
    dpre, dpost, dres, x, phi, b, alpha_pre, alpha_post, alpha_res, dots, norm, tmax, rms_eps, sinkhorn_eps, post_mult,
    need_x, need_phi,
):  # fmt: skip
    hc, (width, heads), rows = x.shape[-2], phi.shape, norm.numel()
    xs = wide(x).reshape(rows, width)
    mix, rstd = normalised(dots.reshape(rows, heads), norm.reshape(rows), width, rms_eps)
    alpha = spread((alpha_pre, alpha_post, alpha_res), hc)
    pre, post, res = parts(mix * alpha + b, hc)
    start, found = sinkhorn(res, tmax, sinkhorn_eps)
    d = dres.reshape(res.shape)
    for matrix in reversed(found[:-1]):
        by_row = matrix / (matrix.sum(-1, keepdim=True) + sinkhorn_eps)
        d = divided_back(divided_back(d, by_row, sinkhorn_eps, -2), matrix, sinkhorn_eps, -1)
    d = divided_back(d, start + sinkhorn_eps, sinkhorn_eps, -2)
    d = start * (d - (d * start).sum(-1, keepdim=True))
    dpre = dpre.reshape(pre.shape) * pre.sigmoid() * (1 - pre.sigmoid())
    dpost = dpost.reshape(post.shape) * post_mult * post.sigmoid() * (1 - post.sigmoid())
    dz = torch.cat([dpre, dpost, d.flatten(-2)], -1)
    ddots = dz * alpha * rstd
    dscale = -(dz * alpha * mix).sum(-1, keepdim=True) * rstd.square() / width
    dx = (ddots @ wide(phi).t() + dscale * xs).view(x.shape).to(x.dtype) if need_x else x.new_empty((*x.shape[:-1], 0))
    dphi = ddots.t() @ xs if need_phi else xs.new_empty(0)
    return dx, dphi, torch.cat([dz.sum(0), *(p.sum().view(1) for p in (dz * mix).split([hc, hc, hc * hc], -1))])


def coefficients(x, heads):
    """Room for pre, post, res, dots and norm."""
    *rest, hc, _ = x.shape
    shapes = (*rest, hc), (*rest, hc), (*rest, hc, hc), (*rest, heads), tuple(rest)
    return tuple(x.new_empty(s, dtype=torch.float32) for s in shapes)


def factors(xs, phi):
    """What is multiplied: the two as they are, of one dtype, or in fp32."""
    return (xs, phi) if xs.dtype is phi.dtype else (xs.float(), phi.float())


def fake_fwd(x, phi, *_):
    return coefficients(x, phi.shape[1])


@op(cpu=forward_reference, fake=fake_fwd)
def mhc_coeffs_fwd(
    x: Tensor,
    phi: Tensor,
    b: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    tmax: int,
    rms_eps: float,
    pre_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(pre, post, res; of each token the products with φ, and the norm of all its streams), fp32."""
    hc, (width, heads) = x.shape[-2], phi.shape
    pre, post, res, *_ = coefficients(x, heads)
    rows = math.prod(x.shape[:-2])
    xs = x.reshape(rows, width)
    norm = torch.linalg.vector_norm(xs, dim=-1, dtype=torch.float32)
    xs, phi = factors(xs, phi)
    dots = logits_of(xs, phi.t(), None)
    kernels.mhc_heads_fwd[(cdiv(rows, TILE // hc**2),)](
        dots, norm, b.contiguous(), alpha_pre, alpha_post, alpha_res, pre, post, res,
        rows, width, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult, HC=hc,
    )  # fmt: skip
    return pre, post, res, dots.view(*x.shape[:-2], heads), norm.view(x.shape[:-2])


def fake_bwd(dpre, dpost, dres, x, phi, *rest):
    need_x, need_phi = rest[-2:]
    dx = torch.empty_like(x if need_x else x[..., :0], memory_format=torch.contiguous_format)
    width, heads = phi.shape
    dphi = x.new_empty((heads, width) if need_phi else 0, dtype=torch.float32)
    return dx, dphi, x.new_empty(heads + 3, dtype=torch.float32)


@op(cpu=backward_reference, fake=fake_bwd)
def mhc_coeffs_bwd(
    dpre: Tensor,
    dpost: Tensor,
    dres: Tensor,
    x: Tensor,
    phi: Tensor,
    b: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    dots: Tensor,
    norm: Tensor,
    tmax: int,
    rms_eps: float,
    sinkhorn_eps: float,
    post_mult: float,
    need_x: bool,
    need_phi: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (its dtype) and φᵀ (fp32), empty where not needed, and those of b and the three alphas in one."""
    hc, (width, heads) = x.shape[-2], phi.shape
    rows = math.prod(x.shape[:-2])
    xs = x.contiguous().view(rows, width)
    dx, dphi, parameters = fake_bwd(dpre, dpost, dres, x, phi, need_x, need_phi)
    ddots, dscale = torch.empty_like(dots, memory_format=torch.contiguous_format).view(-1, heads), torch.empty_like(norm)
    count = programs(x, cdiv(rows, TILE // hc**2), RESIDENT)
    history = x.new_empty(count * (tmax - 1) * TILE, dtype=torch.float32)
    partial = x.new_empty(count * (heads + 3), dtype=torch.float32)
    kernels.mhc_heads_bwd[(count,)](
        dpre.contiguous(), dpost.contiguous(), dres.contiguous(), dots, norm, b.contiguous(),
        alpha_pre, alpha_post, alpha_res, ddots, dscale, history, partial,
        rows, width, tmax, rms_eps, sinkhorn_eps, post_mult, HC=hc,
    )  # fmt: skip
    if need_x:
        grid = (cdiv(rows, DX_TOKENS) * cdiv(width, DX_BLOCK),)
        by_head = phi.t().contiguous().float()
        kernels.mhc_coeffs_dx[grid](ddots, dscale, by_head, xs, dx, rows, heads, width, TOKENS=DX_TOKENS, BLOCK=DX_BLOCK)
    if need_phi:
        xs, _ = factors(xs, phi)
        if xs.dtype is torch.float16:
            xs = xs.float()  # its range has no room for ddots, of which 1 / rms(x) is a factor
        accumulate(dphi, ddots.to(xs.dtype), xs, 0)
    return dx, dphi, column_sum(partial, count, parameters)


class MHCCoeffsFunction(Function):
    @staticmethod
    def forward(ctx, x, phi, b, alpha_pre, alpha_post, alpha_res, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult):
        tensors, options = (x, phi, b, alpha_pre, alpha_post, alpha_res), (tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult)
        pre, post, res, *rest = mhc_coeffs_fwd(*tensors, *options)
        ctx.save_for_backward(*tensors, *rest)
        ctx.options = tmax, rms_eps, sinkhorn_eps, post_mult
        return pre, post, res

    @staticmethod
    def backward(ctx, dpre, dpost, dres):
        Function.once("mhc_coeffs")
        saved, (need_x, need_phi) = ctx.saved_tensors, ctx.needs_input_grad[:2]
        dx, dphi, parameters = mhc_coeffs_bwd(dpre, dpost, dres, *saved, *ctx.options, need_x, need_phi)
        return (
            dx if need_x else None,
            dphi.t().to(saved[1].dtype) if need_phi else None,
            parameters[:-3],
            *parameters[-3:].unbind(),
            *(None,) * 5,
        )


@public
def mhc_coeffs(
    x: Tensor,
    phi: Tensor,
    b: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    *,
    tmax: int = 20,
    rms_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 1e-6,
    post_mult: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(pre (..., hc), post (..., hc), res (..., hc, hc)) of the streams x (..., hc, n), fp32; σ is the sigmoid.

    phi is (hc·n, hc² + 2·hc), its columns, and b's numbers, those of pre, post and res, row by row; the alphas are scalars. x
    and phi of one dtype are multiplied as they are, of two in fp32. tmax counts the times that columns are divided. Gradients
    have their tensors' dtypes, sums in one order; that of phi is multiplied in what the products were, but in fp32 if that was
    fp16. Raises ValueError on dtypes other than fp32, fp16 and bf16, streams that are not 2, 4, 8 or 16, wrong shapes or
    devices, tmax < 1.
    """
    hc, n = check_streams("mhc_coeffs", x)
    if hc not in STREAMS:
        raise ValueError(f"mhc_coeffs: x must have 2, 4, 8 or 16 streams, got {hc}")
    heads = hc * (hc + 2)
    check_same("mhc_coeffs", "phi", phi, (hc * n, heads), x)
    check_same("mhc_coeffs", "b", b, (heads,), x)
    for name, alpha in (("alpha_pre", alpha_pre), ("alpha_post", alpha_post), ("alpha_res", alpha_res)):
        check_same("mhc_coeffs", name, alpha, (), x)
    if tmax < 1:
        raise ValueError(f"mhc_coeffs: tmax must be 1 or more, got {tmax}")
    tensors = x, phi, b.float(), alpha_pre.float(), alpha_post.float(), alpha_res.float()
    options = tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult
    if needs_grad("mhc_coeffs", *tensors):
        return MHCCoeffsFunction.apply(*tensors, *options)
    return mhc_coeffs_fwd(*tensors, *options)[:3]
