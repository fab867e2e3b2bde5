"""Losses between the distributions of a student and a teacher: over all classes, so made from a chunk of logits at a time.

The operator gives the gradients of the summed loss with it. Backward multiplies them by what the mean and the upstream gradient
ask for.
"""

from .._op import Function
from .._op import needs_grad
from ..ops._linear import autocast
from ..ops._linear import check_linear
from ..ops._loss import check_classes
from ..ops.linear_cross_entropy import scaled
from ..ops.linear_distillation import linear_distillation_fwd
from ._base import Loss
from ._base import check_positive


def compute(*arguments):
    """((loss, soft loss, hard loss), the number of rows that they are means over, the gradients of the loss's sum)."""
    target, _, _, _, ignore_index, hard_weight, soft_weight = arguments[6:13]
    sums, *gradients = linear_distillation_fwd(*arguments)
    count = (target != ignore_index).sum().clamp(min=1)
    hard, soft = (sums / count).unbind()
    return (hard_weight * hard + soft_weight * soft, soft, hard), count, gradients


class DistillationFunction(Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.needed, ctx.dtypes = ctx.needs_input_grad[:3], [None if t is None else t.dtype for t in arguments[:3]]
        losses, count, gradients = compute(*arguments, *ctx.needed)
        ctx.save_for_backward(count, *gradients)
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx, dloss, *_):
        Function.once("distillation")
        count, *made = ctx.saved_tensors
        return *scaled(dloss / count, made, ctx.dtypes, ctx.needed), *[None] * 13


def check_options(op, beta, temperature, chunk_size):
    if not 0 <= beta <= 1:
        raise ValueError(f"{op}: beta must be between 0 and 1, got {beta}")
    check_positive(op, temperature=temperature, chunk_size=chunk_size)


def distillation_loss(
    op,
    soft,
    beta,
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
    """hard_weight · cross entropy + soft_weight · soft, one of ops.linear_distillation's, means over valid rows.

    Also the soft and the hard loss, which have no gradient, if return_soft_hard_loss.
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
    # A part of no weight is not made, be it infinite; where both have none, the gradients are those of the soft part.
    need_hard = hard_weight != 0 or return_soft_hard_loss
    need_soft = soft_weight != 0 or not need_hard or return_soft_hard_loss
    options = soft, beta, temperature, ignore_index, hard_weight, soft_weight, chunk_size, need_hard, need_soft
    arguments = *student, *teacher, target.flatten(), *options
    if needs_grad(op, *student):
        results = DistillationFunction.apply(*arguments)
    else:
        results, _, _ = compute(*arguments, False, False, False)
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
