"""Cross entropy and distance from a teacher:  loss = -log p[target],  distance = Σ |p - q| / 2.

p is softmax(input), q softmax(teacher): torch.nn.functional.cross_entropy with reduction "none", and half the l1_loss of two
softmaxes, the hard and the soft part of a distillation, in one as Liger-Kernel (arXiv 2410.10989) has them. What backward needs
of a row beside the logits are three numbers; neither softmax is ever in memory.
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
from . import cross_entropy
from ._check import FLOATS
from ._check import check_same
from ._check import rows_of
from ._check import wide
from ._divergence import BLOCK
from ._divergence import kept
from ._loss import check_classes
from ._loss import check_target
from ._loss import check_target_if_asked


def forward_reference(logits, teacher, target, ignore_index):
    check_target("cross_entropy_tvd", target, ignore_index, logits.shape[-1])
    loss, _, _ = cross_entropy.forward_reference(logits, target, None, ignore_index, 0.0, None, 0.0)
    lses = [torch.logsumexp(wide(x), -1) for x in (logits, teacher)]
    p, q = ((wide(x) - lse[:, None]).exp() for x, lse in zip((logits, teacher), lses, strict=True))
    rows = 0.5 * (p - q).abs().sum(-1), *lses, (p * (p - q).sign()).sum(-1)
    return loss, *(torch.where(target != ignore_index, row, 0.0) for row in rows)


def backward_reference(dloss, ddistance, logits, teacher, target, lse, teacher_lse, share, ignore_index):
    p, q = (wide(logits) - lse[:, None]).exp(), (wide(teacher) - teacher_lse[:, None]).exp()
    picked = torch.arange(logits.shape[-1]) == target[:, None]
    dx = dloss[:, None] * (p - picked.to(p.dtype)) + 0.5 * ddistance[:, None] * p * ((p - q).sign() - share[:, None])
    return kept(dx, target, ignore_index).to(logits.dtype)


@op(cpu=forward_reference)
def cross_entropy_tvd_fwd(
    logits: Tensor, teacher: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, distance, logsumexp of both, Σ p · sign(p - q)) of each row of logits (rows, classes)."""
    logits, stride, rows, n = rows_of(logits)
    teacher, teacher_stride, _, _ = rows_of(teacher)
    check_target_if_asked("cross_entropy_tvd", target, ignore_index, n)
    results = tuple(logits.new_empty(rows, dtype=torch.float32) for _ in range(5))
    kernels.cross_entropy_tvd_fwd[(rows,)](
        logits, teacher, target.contiguous(), *results, stride, teacher_stride, n, ignore_index, BLOCK=BLOCK
    )
    return results


@op(cpu=backward_reference)
def cross_entropy_tvd_bwd(
    dloss: Tensor,
    ddistance: Tensor,
    logits: Tensor,
    teacher: Tensor,
    target: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
    share: Tensor,
    ignore_index: int,
) -> Tensor:
    """The gradient of the logits from those of the rows' losses and distances."""
    logits, stride, rows, n = rows_of(logits)
    teacher, teacher_stride, _, _ = rows_of(teacher)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    kernels.cross_entropy_tvd_bwd[(rows * cdiv(n, BLOCK),)](
        dloss.contiguous(), ddistance.contiguous(), logits, teacher, target.contiguous(), lse, teacher_lse, share, dlogits,
        stride, teacher_stride, n, ignore_index, BLOCK=BLOCK,
    )  # fmt: skip
    return dlogits


class CrossEntropyTVDFunction(Function):
    @staticmethod
    def forward(ctx, logits, teacher, target, ignore_index):
        loss, distance, *rows = cross_entropy_tvd_fwd(logits, teacher, target, ignore_index)
        ctx.save_for_backward(logits, teacher, target, *rows)
        ctx.ignore_index = ignore_index
        return loss, distance

    @staticmethod
    def backward(ctx, dloss, ddistance):
        Function.once("cross_entropy_tvd")
        return cross_entropy_tvd_bwd(dloss, ddistance, *ctx.saved_tensors, ctx.ignore_index), None, None, None


@public
def cross_entropy_tvd(input: Tensor, teacher: Tensor, target: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """(cross entropy of input, total variation distance of the softmaxes of input and teacher) of each row, fp32.

    input and teacher are logits (..., C), target (...), int64. Where it is ignore_index both results are 0, and so is the
    gradient, which only input gets. Where the dtypes of the two differ they are widened to fp32. A target out of range is a
    ValueError on CPU; on CUDA its loss and gradient are NaN, unless LIGER_AOT_CHECK=1. Raises ValueError on wrong shapes,
    devices and dtypes.
    """
    name = "cross_entropy_tvd"
    if input.dtype not in FLOATS:
        raise ValueError(f"{name}: input must be float32, float16 or bfloat16, got {input.dtype}")
    if not input.dim():
        raise ValueError(f"{name}: input must have shape (..., C), got ()")
    check_same(name, "teacher", teacher, input.shape, input)
    if teacher.requires_grad:
        raise ValueError(f"{name}: teacher must not require a gradient, it gets none; pass teacher.detach()")
    shape, n = input.shape[:-1], input.shape[-1]
    target = check_classes(name, target, shape, input)
    if teacher.dtype is not input.dtype:
        input, teacher = input.float(), teacher.float()
    rows = math.prod(shape)
    arguments = input.reshape(rows, n), teacher.reshape(rows, n), target.reshape(-1), ignore_index
    run = CrossEntropyTVDFunction.apply if needs_grad(name, input) else cross_entropy_tvd_fwd
    return tuple(out.view(shape) for out in run(*arguments)[:2])
