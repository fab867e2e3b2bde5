"""GroupNorm:  y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias,  mean and var over one group of channels of one sample.

Wu and He, Group Normalization, 2018 (arXiv 1803.08494). var is the mean of (x - mean(x))²; weight and bias are per channel.
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import kernels
from ._check import FLOATS
from ._check import check_same
from ._check import wide
from ._norm import column_sum

BLOCK, SUMS_BLOCK = 2048, 1024


def per_channel(t, x):
    return wide(t).view(-1, *(1,) * (x.dim() - 2))


def forward_reference(x, num_groups, weight, bias, eps):
    _, count, n, _ = divided(x, num_groups)
    rows = wide(x).reshape(count, n)
    mean = rows.mean(-1, keepdim=True)
    rstd = torch.rsqrt((rows - mean).square().mean(-1, keepdim=True) + eps)
    y = ((rows - mean) * rstd).view(x.shape)
    if weight is not None:
        y = y * per_channel(weight, x)
    if bias is not None:
        y = y + per_channel(bias, x)
    return y.to(x.dtype), mean.flatten(), rstd.flatten()


def backward_reference(dy, x, num_groups, weight, mean, rstd):
    _, count, n, size = divided(x, num_groups)
    dys, scale, channels = wide(dy), rstd.view(-1, 1), (*x.shape[:2], size)
    xhat = (wide(x).reshape(count, n) - mean.view(-1, 1)) * scale
    wdy = (dys if weight is None else dys * per_channel(weight, x)).reshape(count, n)
    dx = (wdy - wdy.mean(-1, keepdim=True) - xhat * (xhat * wdy).mean(-1, keepdim=True)) * scale
    sums = [g.reshape(channels).sum((0, 2)) for g in (dys * xhat.view(x.shape), dys)]
    return dx.view(x.shape).to(x.dtype), torch.stack(sums)


@op(cpu=forward_reference)
def group_norm_fwd(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, rows, n, size = divided(x, num_groups)
    has_weight, has_bias = weight is not None, bias is not None
    # One that is absent is not read, but has the dtype of the other, as the kernel's signature wants.
    scale = weight.contiguous() if has_weight else bias if has_bias else x
    shift = bias.contiguous() if has_bias else scale
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
    kernels.group_norm_fwd[(rows if n else 0,)](
        x, scale, shift, y, mean, rstd, n, size, num_groups, eps, has_weight, has_bias, BLOCK=BLOCK
    )
    return y, mean, rstd


@op(cpu=backward_reference)
def group_norm_bwd(
    dy: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(the gradient of x, the gradients (2, channels), fp32, of weight and of bias)."""
    x, rows, n, size = divided(x, num_groups)
    dy, has_weight, (samples, channels) = dy.contiguous(), weight is not None, x.shape[:2]
    scale = weight.contiguous() if has_weight else x
    dx, partial = torch.empty_like(x), x.new_empty(samples * 2 * channels, dtype=torch.float32)
    kernels.group_norm_sums[(samples * channels,)](dy, x, mean, rstd, partial, size, channels, num_groups, BLOCK=SUMS_BLOCK)
    kernels.group_norm_bwd[(rows if n else 0,)](
        dy, x, scale, mean, rstd, partial, dx, n, size, num_groups, has_weight, BLOCK=BLOCK
    )
    return dx, column_sum(partial, samples, x.new_empty(2, channels, dtype=torch.float32))


def divided(x, num_groups):
    """(x, contiguous, how many rows, numbers in a row, numbers in a channel)."""
    samples, channels, size = x.shape[0], x.shape[1], x.shape[2:].numel()
    return x.contiguous(), samples * num_groups, channels // num_groups * size, size


class GroupNormFunction(Function):
    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, eps):
        y, mean, rstd = group_norm_fwd(x, num_groups, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.num_groups, ctx.dtype = num_groups, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        Function.once("group_norm")
        x, weight, mean, rstd = ctx.saved_tensors
        _, _, need_dw, need_db, _ = ctx.needs_input_grad
        dx, (dw, db) = group_norm_bwd(dy, x, ctx.num_groups, weight, mean, rstd)
        return dx, None, dw.to(weight.dtype) if need_dw else None, db.to(ctx.dtype) if need_db else None, None


@public
def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-05
) -> Tensor:
    """torch.nn.functional.group_norm of x (N, C, ...): C channels in num_groups groups, weight and bias (C,), each optional.

    Arithmetic in fp32, rounded once to x's dtype: fp32, fp16 or bf16. Unless weight and bias both have x's dtype they are
    taken in fp32; each gets its gradient in its own. The result is contiguous; an x that is not is copied. Raises ValueError on
    other dtypes, on fewer than two dimensions, where num_groups does not divide C, and where a parameter has another shape or
    device.
    """
    if x.dtype not in FLOATS:
        raise ValueError(f"group_norm: x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"group_norm: x must have shape (N, C, ...), got {tuple(x.shape)}")
    channels, mixed = x.shape[1], False
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm: num_groups must divide the {channels} channels of x, got {num_groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_same("group_norm", name, parameter, (channels,), x)
            mixed = mixed or parameter.dtype is not x.dtype
    if mixed:
        weight, bias = weight if weight is None else weight.float(), bias if bias is None else bias.float()
    if needs_grad("group_norm", x, weight, bias):
        return GroupNormFunction.apply(x, num_groups, weight, bias, eps)
    return group_norm_fwd(x, num_groups, weight, bias, eps)[0]
