"""What the divergences of two distributions share: their reductions, and how the kernels walk over the rows of two tensors."""

import torch

from .._runtime import cdiv
from .._runtime import kernels
from ._check import FLOATS
from ._check import check_same
from ._check import rows_of
from ._check import wide
from ._loss import check_classes
from ._loss import result_dtype

REDUCTIONS = "none", "mean", "sum", "batchmean"
BLOCK = 2048


def given(labels, x):
    """(labels, has_labels) as the kernels take them."""
    return (x.new_empty(0, dtype=torch.int64), 0) if labels is None else (labels.contiguous(), 1)


def launch_fwd(kind, x, y, labels, ignore_index, each, beta=0.0, rest=1.0, eps=0.0):
    """The divergence of each number of x and y, or the sum over each row, fp32; 0 where the label is ignore_index."""
    x, x_stride, rows, n = rows_of(x)
    y, y_stride, _, _ = rows_of(y)
    labels, has_labels = given(labels, x)
    arguments = x_stride, y_stride, n, ignore_index, beta, rest, eps, has_labels
    if each:
        loss = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernels.divergence_each[(rows * cdiv(n, BLOCK),)](x, y, labels, loss, *arguments, KIND=kind, BLOCK=BLOCK)
    else:
        loss = x.new_empty(x.shape[:-1], dtype=torch.float32)
        kernels.divergence_fwd[(rows,)](x, y, labels, loss, *arguments, KIND=kind, BLOCK=BLOCK)
    return loss


def launch_bwd(kind, dloss, x, y, labels, factor, ignore_index, beta=0.0, rest=1.0, eps=0.0):
    """The gradient of x, from that of each number's loss, or with a factor of the reduced loss."""
    x, x_stride, rows, n = rows_of(x)
    y, y_stride, _, _ = rows_of(y)
    each, dloss_stride = factor is None, 0
    if each:
        dloss, dloss_stride, _, _ = rows_of(dloss.to(x.dtype))
        factor = x.new_empty(0, dtype=torch.float32)
    else:
        dloss = dloss.float()
    labels, has_labels = given(labels, x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels.divergence_bwd[(rows * cdiv(n, BLOCK),)](
        dloss, x, y, labels, factor, dx, dloss_stride, x_stride, y_stride, n, ignore_index, beta, rest, eps, has_labels,
        KIND=kind, EACH=each, BLOCK=BLOCK,
    )  # fmt: skip
    return dx


def reference_fwd(losses, x, labels, ignore_index, each):
    """What launch_fwd returns, of the fp32 losses of each number."""
    losses = kept(losses, labels, ignore_index)
    return losses.to(x.dtype) if each else losses.sum(-1)


def reference_bwd(slope, dloss, x, labels, factor, ignore_index):
    """What launch_bwd returns, of the derivative."""
    upstream = wide(dloss) if factor is None else wide(dloss) * factor
    return kept(upstream * slope, labels, ignore_index).to(x.dtype)


def kept(losses, labels, ignore_index):
    return losses if labels is None else torch.where((labels != ignore_index)[..., None], losses, 0.0)


def jsd_terms(log_q, log_p, beta, rest):
    """(q, p, q's term of the divergence, p's) as the kernels compute them."""
    x, y = wide(log_q), wide(log_p)
    top = torch.maximum(x, y)
    less = torch.where(top == -torch.inf, 0.0, y - x)
    e, most = (-less.abs()).exp(), top.exp()
    q, p = torch.where(x < y, most * e, most), torch.where(y < x, most * e, most)
    log_m = torch.where(x < y, beta + rest * e, beta * e + rest).log()
    q_log = -less if rest == 0 else (-less).clamp(max=0) - log_m
    p_log = less if beta == 0 else less.clamp(max=0) - log_m
    a, b = (1.0, 0.0) if beta == 0 else (0.0, 1.0) if rest == 0 else (beta, rest)
    return q, p, torch.where(q == 0, 0.0, b * (q * q_log)), torch.where(p == 0, 0.0, a * (p * p_log))


def jsd_slope(q, p, q_term, beta, rest):
    """The derivative of the divergence by log q."""
    return q_term + q if rest == 0 else q_term - p if beta == 0 else q_term


def check_beta(op, beta):
    if not 0 <= beta <= 1:
        raise ValueError(f"{op}: beta must be between 0 and 1, got {beta}")


def check_eps(op, eps):
    if not 0 <= eps < 1:
        raise ValueError(f"{op}: eps must be at least 0 and below 1, got {eps}")


def check_reduction(op, reduction):
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_labels(op, shift_labels, shape, x):
    return None if shift_labels is None else check_classes(op, shift_labels, shape, x, "shift_labels")


def divisor(reduction, width, labels, batch=0):
    """(batch, width) as divergence_reduce takes them; None where nothing is reduced."""
    if reduction == "none":
        return None
    if reduction == "sum":
        return 1, 1
    return (0, width) if reduction == "mean" else (batch if labels is None else 0, 1)


def prepare(op, input, target, shift_labels, reduction, dtype, batch=0):
    """(input, target, labels, what divisor returns, the loss's dtype), checked.

    Where the dtypes differ both are widened to fp32, and where the loss of each number shall have another dtype: it is rounded
    from fp32 then.
    """
    if input.dtype not in FLOATS:
        raise ValueError(f"{op}: input must be float32, float16 or bfloat16, got {input.dtype}")
    if not input.dim():
        raise ValueError(f"{op}: input must have shape (..., C), got ()")
    check_same(op, "target", target, input.shape, input)
    check_reduction(op, reduction)
    labels = check_labels(op, shift_labels, input.shape[:-1], input)
    if target.dtype is not input.dtype:
        input, target = input.float(), target.float()
    dtype = result_dtype(input, dtype)
    over = divisor(reduction, input.shape[-1], labels, batch)
    if over is None and dtype is not input.dtype:
        input, target = input.float(), target.float()
    return input, target, labels, over, dtype
