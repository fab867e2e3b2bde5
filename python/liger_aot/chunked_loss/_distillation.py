"""Losses between the distributions of a student and a teacher: over all classes, so made from a chunk of logits at a time.

The gradients are made with the losses, from the same logits: those of the summed loss, of numbers near 1 that 16 bits hold
well. Backward multiplies them by what the mean and the upstream gradient ask for.
"""

import torch

from .._op import Function
from .._op import needs_grad
from ..ops._linear import Gradients
from ..ops._linear import autocast
from ..ops._linear import check_linear
from ..ops._linear import logits_of
from ..ops._loss import check_classes
from ..ops.linear_cross_entropy import scaled
from ..ops.linear_logprob import logprob_bwd
from ..ops.linear_logprob import logprob_fwd
from ._base import Loss
from ._base import check_positive


def losses_of(logits, teacher, target, soft, options, need_hard, dtype):
    """((soft, hard), summed over a chunk's rows that are not ignored, the gradient of their weighted sum in dtype or None).

    The logits of both are overwritten.
    """
    ignore_index, temperature, hard_weight, soft_weight = options
    valid, hard, more = target != ignore_index, logits.new_zeros(()), 0.0
    if need_hard:
        logp, entropy, lse = logprob_fwd(logits, target, ignore_index, 1.0)
        hard, none = -logp.sum(), torch.zeros_like(lse)
    if need_hard and dtype:
        upstream = torch.full_like(lse, -hard_weight), none, none
        more = logprob_bwd(*upstream, logits, target, lse, entropy, ignore_index, 1.0, torch.float32)
    each, gradient = soft(logits.div_(temperature), teacher.div_(temperature))
    sums = torch.stack((torch.where(valid, each, 0.0).sum(), hard))
    if not dtype:
        return sums, None
    return sums, gradient.mul_((soft_weight / temperature * valid)[:, None]).add_(more).to(dtype)


def compute(student, weight, bias, teacher, teacher_weight, teacher_bias, target, soft, chunk_size, options, need_hard, needed):
    """((loss, soft loss, hard loss), the number of rows that they are means over, the gradients of the loss's sum)."""
    gradients = Gradients(student, weight, bias, *needed)
    sums = student.new_zeros(2, dtype=torch.float32)
    for start in range(0, student.shape[0], chunk_size):
        rows = slice(start, min(start + chunk_size, student.shape[0]))
        logits = logits_of(student[rows], weight, bias)
        others = logits_of(teacher[rows], teacher_weight, teacher_bias)
        both, gradient = losses_of(
            logits, others, target[rows], soft, options, need_hard, weight.dtype if any(needed) else None
        )
        sums += both
        if any(needed):
            gradients.add(rows, gradient)
        del logits, others, gradient  # before the next chunk's are made
    ignore_index, _, hard_weight, soft_weight = options
    count = (target != ignore_index).sum().clamp(min=1)
    soft_loss, hard_loss = (sums / count).unbind()
    return (hard_weight * hard_loss + soft_weight * soft_loss, soft_loss, hard_loss), count, gradients.results


class DistillationFunction(Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.needed, ctx.dtypes = ctx.needs_input_grad[:3], [None if t is None else t.dtype for t in arguments[:3]]
        losses, count, gradients = compute(*arguments, ctx.needed)
        ctx.save_for_backward(count, *gradients)
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx, dloss, *_):
        Function.once("distillation")
        count, *made = ctx.saved_tensors
        return *scaled(dloss / count, made, ctx.dtypes, ctx.needed), *[None] * 8


def check_options(op, beta, temperature, chunk_size):
    if not 0 <= beta <= 1:
        raise ValueError(f"{op}: beta must be between 0 and 1, got {beta}")
    check_positive(op, temperature=temperature, chunk_size=chunk_size)


def distillation_loss(
    op,
    soft,
    student_input,
    student_weight,
    teacher_input,
    teacher_weight,
    target,
    student_bias,
    teacher_bias,
    hard_weight,
    soft_weight,
    ignore_index,
    temperature,
    chunk_size,
    return_soft_hard_loss,
):
    """hard_weight · cross entropy + soft_weight · soft(student's logits / temperature, teacher's), means over valid rows.

    soft gives the losses of the rows and the gradient of each with respect to its first argument. Also the soft and the hard
    loss, which have no gradient, if return_soft_hard_loss.
    """
    check_linear(op, "student_input", student_input, student_weight, student_bias, "student_")
    check_linear(op, "teacher_input", teacher_input, teacher_weight, teacher_bias, "teacher_")
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"{op}: student_weight and teacher_weight must have one vocabulary, got {student_weight.shape[0]} and "
            f"{teacher_weight.shape[0]}; where the larger is padded, leave its last rows out"
        )
    if student_input.shape[:-1] != teacher_input.shape[:-1]:
        raise ValueError(
            f"{op}: student_input and teacher_input must have the same tokens, got {tuple(student_input.shape)} and "
            f"{tuple(teacher_input.shape)}"
        )
    target = check_classes(f"{op}, true_labels", target, student_input.shape[:-1], student_input)
    student = autocast(student_input.flatten(0, -2), student_weight, student_bias)
    teacher = autocast(*(t if t is None else t.detach() for t in (teacher_input.flatten(0, -2), teacher_weight, teacher_bias)))
    options = ignore_index, temperature, hard_weight, soft_weight
    arguments = *student, *teacher, target.flatten(), soft, chunk_size, options, hard_weight != 0 or return_soft_hard_loss
    if needs_grad(op, *student):
        results = DistillationFunction.apply(*arguments)
    else:
        results, _, _ = compute(*arguments, (False, False, False))
    return results if return_soft_hard_loss else results[0]


class DistillationLoss(Loss):
    """A function of student and teacher as a module; the two differ only in what they compute."""

    function = None

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        check_options(type(self).__name__, beta, temperature, chunk_size)
        super().__init__(
            weight_hard_loss=weight_hard_loss,
            weight_soft_loss=weight_soft_loss,
            beta=beta,
            ignore_index=ignore_index,
            temperature=temperature,
            compiled=compiled,
            chunk_size=chunk_size,
            return_soft_hard_loss=return_soft_hard_loss,
        )

    def forward(
        self,
        student_input,
        student_weight,
        teacher_input,
        teacher_weight,
        true_labels,
        student_bias=None,
        teacher_bias=None,
    ):
        arguments = student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias
        return type(self).function(*arguments, **self.options)
