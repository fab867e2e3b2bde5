"""Divergence of a linear head from probabilities:  loss = Σ t · (log t - log p),  p = softmax(logits / temperature).

The Kullback-Leibler divergence KL(t || p) as torch.nn.functional.kl_div has it, of logits student_input · student_weightᵀ +
student_bias, which after Liger-Kernel (arXiv 2410.10989) never exist whole: they are made a chunk of rows at a time, in fp32,
and where the loss is reduced the gradients are made from them on the spot, as in ops.linear_jsd.
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import cdiv
from .._runtime import kernels
from ._check import check_same
from ._check import rows_of
from ._check import wide
from ._divergence import BLOCK
from ._divergence import check_eps
from ._divergence import check_labels
from ._divergence import check_reduction
from ._divergence import divisor
from ._divergence import given
from ._divergence import kept
from ._linear import Gradients
from ._linear import autocast
from ._linear import check_linear
from ._linear import chunks
from ._linear import fake_gradients
from ._linear import logits_of
from ._loss import result_dtype
from .kl_div import reduced
from .linear_jsd import gradients_of


def forward_reference(logits, target, labels, ignore_index, eps, temperature):
    z, t = wide(logits) / temperature, wide(target)
    lse = torch.logsumexp(z, -1)
    losses = torch.where(t == 0, 0.0, t * (t.clamp(min=eps).log() - (z - lse[:, None])))
    rows = losses.sum(-1), lse, t.sum(-1)
    return rows if labels is None else tuple(torch.where(labels != ignore_index, row, 0.0) for row in rows)


def backward_reference(dloss, logits, target, labels, lse, mass, ignore_index, temperature, dtype):
    p = (wide(logits) / temperature - lse[:, None]).exp()
    dz = dloss.view(-1, 1) / temperature * (mass[:, None] * p - wide(target))
    return kept(dz, labels, ignore_index).to(dtype)


@op(cpu=forward_reference)
def softmax_kl_div_fwd(
    logits: Tensor, target: Tensor, labels: Tensor | None, ignore_index: int, eps: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logsumexp, sum of the target) of each row of fp32 logits."""
    logits, stride, rows, n = rows_of(logits)
    target, target_stride, _, _ = rows_of(target)
    results = tuple(logits.new_empty(rows) for _ in range(3))
    labels, has_labels = given(labels, logits)
    kernels.softmax_kl_div_fwd[(rows,)](
        logits, target, labels, *results, stride, target_stride, n, ignore_index, eps, 1.0 / temperature, has_labels,
        BLOCK=BLOCK,
    )  # fmt: skip
    return results


@op(cpu=backward_reference)
def softmax_kl_div_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    labels: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    ignore_index: int,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the logits, rounded to dtype, from that of the rows' losses, (rows,) or one for all."""
    logits, stride, rows, n = rows_of(logits)
    target, target_stride, _, _ = rows_of(target)
    dlogits = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
    labels, has_labels = given(labels, logits)
    kernels.softmax_kl_div_bwd[(rows * cdiv(n, BLOCK),)](
        dloss, logits, target, labels, lse, mass, dlogits, dloss.stride(0) if dloss.dim() else 0, stride, target_stride, n,
        ignore_index, 1.0 / temperature, has_labels, BLOCK=BLOCK,
    )  # fmt: skip
    return dlogits


def fake_fwd(student, weight, target, labels, bias, ignore_index, eps, temperature, *needed):
    results = (student.new_empty(student.shape[0], dtype=torch.float32) for _ in range(3))
    return *results, *fake_gradients(student, weight, bias, *needed)


@op(cpu=None, fake=fake_fwd)
def linear_kl_div_fwd(
    student_input: Tensor,
    student_weight: Tensor,
    target: Tensor,
    labels: Tensor | None,
    student_bias: Tensor | None,
    ignore_index: int,
    eps: float,
    temperature: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What softmax_kl_div_fwd makes of each row, and the needed gradients of the losses' sum; of weight and bias in fp32."""
    results = tuple(student_input.new_empty(student_input.shape[0], dtype=torch.float32) for _ in range(3))
    gradients = Gradients(student_input, student_weight, student_bias, need_input, need_weight, need_bias)
    one = student_input.new_ones((), dtype=torch.float32)
    for rows in chunks(student_input):
        logits = logits_of(student_input[rows], student_weight, student_bias)
        part = None if labels is None else labels[rows]
        made = softmax_kl_div_fwd(logits, target[rows], part, ignore_index, eps, temperature)
        for whole, piece in zip(results, made, strict=True):
            whole[rows] = piece
        if any(gradients.needed):
            arguments = part, *made[1:], ignore_index, temperature, student_weight.dtype
            gradients.add(rows, softmax_kl_div_bwd(one, logits, target[rows], *arguments))
        del logits  # before the next chunk's are made
    return *results, *gradients.results


def fake_bwd(dloss, student, weight, target, labels, bias, lse, mass, ignore_index, temperature, *needed):
    return fake_gradients(student, weight, bias, *needed)


@op(cpu=None, fake=fake_bwd)
def linear_kl_div_bwd(
    dloss: Tensor,
    student_input: Tensor,
    student_weight: Tensor,
    target: Tensor,
    labels: Tensor | None,
    student_bias: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    ignore_index: int,
    temperature: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The needed gradients for those of the rows' losses (rows,), from logits made anew; of weight and bias in fp32."""
    gradients = Gradients(student_input, student_weight, student_bias, need_input, need_weight, need_bias)
    for rows in chunks(student_input):
        logits = logits_of(student_input[rows], student_weight, student_bias)
        part = None if labels is None else labels[rows]
        arguments = part, lse[rows], mass[rows], ignore_index, temperature, student_weight.dtype
        gradients.add(rows, softmax_kl_div_bwd(dloss[rows], logits, target[rows], *arguments))
        del logits
    return gradients.results


class LinearKLDivFunction(Function):
    @staticmethod
    def forward(ctx, student_input, student_weight, student_bias, target, labels, options, over, dtype):
        ignore_index, _, temperature = options
        tensors = student_input, student_weight, target, labels, student_bias
        needed = ctx.needs_input_grad[:3]
        losses, lse, mass, *made = linear_kl_div_fwd(*tensors, *options, *(needed if over else (False,) * 3))
        loss, factor = reduced(losses, labels, ignore_index, over, dtype)
        ctx.options, ctx.needed = (ignore_index, temperature), needed
        ctx.dtypes = [None if t is None else t.dtype for t in (student_input, student_weight, student_bias)]
        if over:
            ctx.save_for_backward(factor, *made)
        else:
            ctx.save_for_backward(None, *tensors, lse, mass)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        Function.once("linear_kl_div")
        return *gradients_of(ctx, dloss, linear_kl_div_bwd), None, None, None, None, None


@public
def linear_kl_div(
    student_input: Tensor,
    student_weight: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    eps: float = 0.0,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """KL(target || softmax of a head's logits over temperature); the logits never exist whole.

    student_input is (..., H), student_weight (V, H), student_bias (V,), of one dtype; under autocast they are cast as F.linear
    casts. target, probabilities (..., V) of any dtype of these, gets no gradient; where it is 0 so is the loss, and eps is what
    a target below is taken for under the logarithm. Labels, reductions, gradients and the loss's dtype are as in linear_jsd.
    Raises ValueError on wrong shapes, devices, dtypes and options.
    """
    name = "linear_kl_div"
    check_linear(name, "student_input", student_input, student_weight, student_bias, "student_")
    shape, classes = student_input.shape[:-1], student_weight.shape[0]
    check_same(name, "target", target, (*shape, classes), student_input)
    if target.requires_grad:
        raise ValueError(f"{name}: target must not require a gradient, it gets none; pass target.detach()")
    check_reduction(name, reduction)
    check_eps(name, eps)
    if not temperature > 0:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}")
    labels = check_labels(name, shift_labels, shape, student_input)
    dtype = result_dtype(student_input, loss_dtype)
    student_input, weight, bias = autocast(student_input, student_weight, student_bias)
    student_input, target = student_input.reshape(-1, student_input.shape[-1]), target.reshape(-1, classes)
    labels = None if labels is None else labels.reshape(-1)
    options, over = (ignore_index, eps, temperature), divisor(reduction, classes, labels)
    if needs_grad(name, student_input, weight, bias):
        loss = LinearKLDivFunction.apply(student_input, weight, bias, target, labels, options, over, dtype)
    else:
        losses, *_ = linear_kl_div_fwd(student_input, weight, target, labels, bias, *options, False, False, False)
        loss, _ = reduced(losses, labels, ignore_index, over, dtype)
    return loss if over else loss.view(shape)
