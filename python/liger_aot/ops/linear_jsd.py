"""Jensen-Shannon divergence of two linear heads:  loss = jsd(log q, log p),  q and p = softmax(logits / temperature).

The student's logits are student_input · student_weightᵀ + student_bias, the teacher's likewise. The divergence is ops.jsd's
(arXiv 2306.13649), the way Liger-Kernel's (arXiv 2410.10989): neither's logits ever exist whole. They are made a chunk of rows
at a time, in fp32, and where the loss is reduced the gradients are made from them on the spot, of the sum of the rows' losses;
backward multiplies them by what the reduction and the upstream gradient ask for.
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import cdiv
from .._runtime import kernels
from ._check import rows_of
from ._check import wide
from ._divergence import BLOCK
from ._divergence import check_beta
from ._divergence import check_labels
from ._divergence import check_reduction
from ._divergence import divisor
from ._divergence import given
from ._divergence import jsd_slope
from ._divergence import jsd_terms
from ._divergence import kept
from ._linear import Gradients
from ._linear import autocast
from ._linear import check_linear
from ._linear import chunks
from ._linear import fake_gradients
from ._linear import logits_of
from ._loss import result_dtype
from .kl_div import reduced
from .linear_cross_entropy import rounded
from .linear_cross_entropy import scaled


def forward_reference(student, teacher, labels, ignore_index, beta, temperature):
    weights = beta, 1 - beta
    logs = [torch.log_softmax(wide(logits) / temperature, -1) for logits in (student, teacher)]
    lses = [torch.logsumexp(wide(logits) / temperature, -1) for logits in (student, teacher)]
    q, p, q_term, p_term = jsd_terms(*logs, *weights)
    shares = jsd_slope(q, p, q_term, *weights), jsd_slope(p, q, p_term, *weights[::-1])
    rows = (q_term + p_term).sum(-1), *lses, *(share.sum(-1) for share in shares)
    return rows if labels is None else tuple(torch.where(labels != ignore_index, row, 0.0) for row in rows)


def backward_reference(dloss, logits, others, labels, lse, others_lse, share, ignore_index, beta, rest, temperature, dtype):
    x, y = wide(logits) / temperature - lse[:, None], wide(others) / temperature - others_lse[:, None]
    q, p, q_term, _ = jsd_terms(x, y, beta, rest)
    dx = dloss.view(-1, 1) / temperature * (jsd_slope(q, p, q_term, beta, rest) - q * share[:, None])
    return kept(dx, labels, ignore_index).to(dtype)


@op(cpu=forward_reference)
def softmax_jsd_fwd(
    student: Tensor, teacher: Tensor, labels: Tensor | None, ignore_index: int, beta: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logsumexp of student and teacher, sums of the derivatives by their log softmax) of each row of fp32 logits."""
    student, student_stride, rows, n = rows_of(student)
    teacher, teacher_stride, _, _ = rows_of(teacher)
    results = tuple(student.new_empty(rows) for _ in range(5))
    labels, has_labels = given(labels, student)
    kernels.softmax_jsd_fwd[(rows,)](
        student, teacher, labels, *results, student_stride, teacher_stride, n, ignore_index, beta, 1 - beta, 1.0 / temperature,
        has_labels, BLOCK=BLOCK,
    )  # fmt: skip
    return results


@op(cpu=backward_reference)
def softmax_jsd_bwd(
    dloss: Tensor,
    logits: Tensor,
    others: Tensor,
    labels: Tensor | None,
    lse: Tensor,
    others_lse: Tensor,
    share: Tensor,
    ignore_index: int,
    beta: float,
    rest: float,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the student's logits, rounded to dtype, from that of the rows' losses, (rows,) or one for all.

    That of the teacher's has the student's as others, and beta and rest, 1 - beta, in each other's place.
    """
    logits, stride, rows, n = rows_of(logits)
    others, others_stride, _, _ = rows_of(others)
    dlogits = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
    labels, has_labels = given(labels, logits)
    kernels.softmax_jsd_bwd[(rows * cdiv(n, BLOCK),)](
        dloss, logits, others, labels, lse, others_lse, share, dlogits, dloss.stride(0) if dloss.dim() else 0, stride,
        others_stride, n, ignore_index, beta, rest, 1.0 / temperature, has_labels, BLOCK=BLOCK,
    )  # fmt: skip
    return dlogits


def add(gradients, rows, dloss, logits, labels, made, ignore_index, beta, temperature):
    """The gradients' part of a chunk, from those of its rows' losses and what softmax_jsd_fwd made of its logits."""
    (student, teacher), (x, y), (x_lse, y_lse, x_share, y_share) = gradients, logits, made
    if any(student.needed):
        arguments = x, y, labels, x_lse, y_lse, x_share, ignore_index, beta, 1 - beta, temperature, student.weight.dtype
        student.add(rows, softmax_jsd_bwd(dloss, *arguments))
    if any(teacher.needed):
        arguments = y, x, labels, y_lse, x_lse, y_share, ignore_index, 1 - beta, beta, temperature, teacher.weight.dtype
        teacher.add(rows, softmax_jsd_bwd(dloss, *arguments))


def fake_fwd(student, student_weight, teacher, teacher_weight, labels, student_bias, teacher_bias, index, beta, by, *needed):
    results = (student.new_empty(student.shape[0], dtype=torch.float32) for _ in range(5))
    ours = fake_gradients(student, student_weight, student_bias, *needed[:3])
    return *results, *ours, *fake_gradients(teacher, teacher_weight, teacher_bias, *needed[3:])


@op(cpu=None, fake=fake_fwd)
def linear_jsd_fwd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    ignore_index: int,
    beta: float,
    temperature: float,
    need_student_input: bool,
    need_student_weight: bool,
    need_student_bias: bool,
    need_teacher_input: bool,
    need_teacher_weight: bool,
    need_teacher_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What softmax_jsd_fwd makes of each row, and the needed gradients of the losses' sum; of weights and biases in fp32."""
    results = tuple(student_input.new_empty(student_input.shape[0], dtype=torch.float32) for _ in range(5))
    gradients = (
        Gradients(student_input, student_weight, student_bias, need_student_input, need_student_weight, need_student_bias),
        Gradients(teacher_input, teacher_weight, teacher_bias, need_teacher_input, need_teacher_weight, need_teacher_bias),
    )
    one, options = student_input.new_ones((), dtype=torch.float32), (ignore_index, beta, temperature)
    for rows in chunks(student_input):
        student = logits_of(student_input[rows], student_weight, student_bias)
        teacher = logits_of(teacher_input[rows], teacher_weight, teacher_bias)
        part = None if labels is None else labels[rows]
        made = softmax_jsd_fwd(student, teacher, part, *options)
        for whole, piece in zip(results, made, strict=True):
            whole[rows] = piece
        add(gradients, rows, one, (student, teacher), part, made[1:], *options)
        del student, teacher  # before the next chunk's are made
    return *results, *gradients[0].results, *gradients[1].results


def fake_bwd(dloss, student, student_weight, teacher, teacher_weight, labels, student_bias, teacher_bias, *rest):
    needed = rest[-6:]
    ours = fake_gradients(student, student_weight, student_bias, *needed[:3])
    return *ours, *fake_gradients(teacher, teacher_weight, teacher_bias, *needed[3:])


@op(cpu=None, fake=fake_bwd)
def linear_jsd_bwd(
    dloss: Tensor,
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    student_lse: Tensor,
    teacher_lse: Tensor,
    student_share: Tensor,
    teacher_share: Tensor,
    ignore_index: int,
    beta: float,
    temperature: float,
    need_student_input: bool,
    need_student_weight: bool,
    need_student_bias: bool,
    need_teacher_input: bool,
    need_teacher_weight: bool,
    need_teacher_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The needed gradients for those of the rows' losses (rows,), from logits made anew; of weights and biases in fp32."""
    gradients = (
        Gradients(student_input, student_weight, student_bias, need_student_input, need_student_weight, need_student_bias),
        Gradients(teacher_input, teacher_weight, teacher_bias, need_teacher_input, need_teacher_weight, need_teacher_bias),
    )
    saved = student_lse, teacher_lse, student_share, teacher_share
    for rows in chunks(student_input):
        student = logits_of(student_input[rows], student_weight, student_bias)
        teacher = logits_of(teacher_input[rows], teacher_weight, teacher_bias)
        part, made = None if labels is None else labels[rows], [s[rows] for s in saved]
        add(gradients, rows, dloss[rows], (student, teacher), part, made, ignore_index, beta, temperature)
        del student, teacher
    return *gradients[0].results, *gradients[1].results


def gradients_of(ctx, dloss, rows_bwd):
    """The needed gradients: those that forward made, of the sum, times the reduction's factor, or those for each row's loss."""
    factor, *saved = ctx.saved_tensors
    if factor is None:
        return rounded(rows_bwd(dloss.float(), *saved, *ctx.options, *ctx.needed), ctx.dtypes, ctx.needed)
    return scaled(dloss.float() * factor, saved, ctx.dtypes, ctx.needed)


class LinearJSDFunction(Function):
    @staticmethod
    def forward(ctx, student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias, *rest):
        labels, options, over, dtype = rest
        tensors = student_input, student_weight, teacher_input, teacher_weight, labels, student_bias, teacher_bias
        needed = ctx.needs_input_grad[:6]
        losses, *made = linear_jsd_fwd(*tensors, *options, *(needed if over else (False,) * 6))
        loss, factor = reduced(losses, labels, options[0], over, dtype)
        ctx.options, ctx.needed = options, needed
        parts = student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias
        ctx.dtypes = [None if t is None else t.dtype for t in parts]
        if over:
            ctx.save_for_backward(factor, *made[4:])
        else:
            ctx.save_for_backward(None, *tensors, *made[:4])
        return loss

    @staticmethod
    def backward(ctx, dloss):
        Function.once("linear_jsd")
        return *gradients_of(ctx, dloss, linear_jsd_bwd), None, None, None, None


@public
def linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """jsd of the softmax of two heads' logits over temperature, the student's first; neither's logits exist whole.

    student_input is (..., H), student_weight (V, H), student_bias (V,), of one dtype; the teacher's likewise, of a width and a
    dtype of their own; under autocast they are cast as F.linear casts. shift_labels is (...), int64: rows of ignore_index count
    for nothing. reduction "batchmean" divides the sum by the number of the other rows, "mean" that by V too, "none" gives the
    loss of each row. Whatever of the six requires a gradient gets one, and nothing is computed for the others; those of the
    weights are accumulated in fp32. The loss has student_input's dtype, fp32 under autocast, or loss_dtype. Raises ValueError
    on wrong shapes, devices, dtypes and options.
    """
    name = "linear_jsd"
    check_linear(name, "student_input", student_input, student_weight, student_bias, "student_")
    check_linear(name, "teacher_input", teacher_input, teacher_weight, teacher_bias, "teacher_")
    shape, classes = student_input.shape[:-1], student_weight.shape[0]
    if teacher_input.shape[:-1] != shape or teacher_weight.shape[0] != classes:
        raise ValueError(
            f"{name}: teacher_input and teacher_weight must have the student's rows {tuple(shape)} and its {classes} classes, "
            f"got {tuple(teacher_input.shape)} and {tuple(teacher_weight.shape)}"
        )
    if teacher_input.device != student_input.device:
        raise ValueError(
            f"{name}: teacher_input must be on {student_input.device} like student_input, got {teacher_input.device}; "
            "move it with .to()"
        )
    check_reduction(name, reduction)
    check_beta(name, beta)
    if not temperature > 0:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}")
    labels = check_labels(name, shift_labels, shape, student_input)
    dtype = result_dtype(student_input, loss_dtype)
    student = autocast(student_input, student_weight, student_bias)
    teacher = autocast(teacher_input, teacher_weight, teacher_bias)
    student_input, teacher_input = (t.reshape(-1, t.shape[-1]) for t in (student[0], teacher[0]))
    labels = None if labels is None else labels.reshape(-1)
    options, over = (ignore_index, beta, temperature), divisor(reduction, classes, labels)
    if needs_grad(name, *student, *teacher):
        loss = LinearJSDFunction.apply(student_input, *student[1:], teacher_input, *teacher[1:], labels, options, over, dtype)
    else:
        tensors = student_input, student[1], teacher_input, teacher[1], labels, student[2], teacher[2]
        losses = linear_jsd_fwd(*tensors, *options, False, False, False, False, False, False)[0]
        loss, _ = reduced(losses, labels, ignore_index, over, dtype)
    return loss if over else loss.view(shape)
