"""Cross entropy of a linear head:  loss = cross_entropy(scale · (input · linear_weightᵀ + linear_bias), target).

The signature is torch.nn.functional.linear_cross_entropy's, the idea Liger-Kernel's (arXiv 2410.10989): the logits are made
a chunk of rows at a time, 1024 or more on a GPU, in fp32, and for a mean or sum the gradients are made from them on the spot.
What is kept is the gradient of the summed loss, of numbers near 1 that 16 bits hold well, or of what `excess` divides it by;
backward multiplies it by what the mean and the upstream gradient ask for.
"""

import math

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from ._linear import Gradients
from ._linear import autocast
from ._linear import check_linear
from ._linear import chunks
from ._linear import fake_gradients
from ._linear import logits_of
from ._loss import check_class_weights
from ._loss import check_classes
from ._loss import check_options
from ._loss import check_target_if_asked
from ._loss import result_dtype
from .cross_entropy import cross_entropy_bwd
from .cross_entropy import cross_entropy_fwd
from .cross_entropy import cross_entropy_reduce
from .cross_entropy import reduce


def fake_rows(
    hidden, weight, target, bias, class_weight, ignore_index, smoothing, softcap, z_scale, scale, predict, mean, *needed
):
    rows = hidden.shape[0]
    losses = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    predicted = target.new_empty(rows if predict else 0)
    return *losses, predicted, *fake_gradients(hidden, weight, bias, *needed)


@op(cpu=None, fake=fake_rows)
def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    lse_square_scale: float,
    scale: float,
    predict: bool,
    mean: bool | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logsumexp, predicted class) of each row of hidden (rows, width), and the needed gradients of the losses' sum.

    mean None: the rows' losses hold the z-loss, and no gradient is computed. For a mean the gradients are those of the weighted
    sum over the mean weight, so that 16 bits hold them whatever the size of the weights. fp16's are divided by `excess`.
    """
    rows_of_hidden, classes = hidden.shape[0], weight.shape[0]
    check_target_if_asked("linear_cross_entropy", target, ignore_index, classes)
    losses, lse = (hidden.new_empty(rows_of_hidden, dtype=torch.float32) for _ in range(2))
    predicted = target.new_empty(rows_of_hidden if predict else 0)
    gradients = Gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)
    one, factors = hidden.new_ones((), dtype=torch.float32), None
    most = excess(weight.dtype, class_weight, lse_square_scale, scale, mean)
    if most is not None and any(gradients.needed):
        one = one / most
    if mean and class_weight is not None:
        zeros = torch.zeros_like(lse)
        arguments = predicted[:0], ignore_index, 0.0, True, classes, torch.float32
        _, totals = cross_entropy_reduce(zeros, zeros, target, class_weight, *arguments)
        factors = totals / totals[1]
    row_z_scale = lse_square_scale if mean is None else 0.0
    options = ignore_index, label_smoothing, softcap
    for rows in chunks(hidden):
        logits, part = logits_of(hidden[rows], weight, bias), target[rows]
        losses[rows], lse[rows], best = cross_entropy_fwd(logits, part, class_weight, *options, row_z_scale, scale, predict)
        if predict:
            predicted[rows] = best
        if any(gradients.needed):
            arguments = class_weight, lse[rows], factors, *options, lse_square_scale, scale, weight.dtype
            gradients.add(rows, cross_entropy_bwd(one, logits, part, *arguments))
        del logits  # before the next chunk's are made
    return losses, lse, predicted, *gradients.results


def excess(dtype, class_weight, lse_square_scale, scale, mean):
    """By what a gradient of the logits may exceed 1024, but for logsumexp, where fp16, up to 65504, holds it; None for 1.

    No more is taken off, because numbers near 1 beside large ones would be lost.
    """
    if dtype is not torch.float16:
        return None
    of_loss, of_logits = max(1.0, 2 * abs(lse_square_scale)), max(1.0, abs(scale)) / 1024
    if class_weight is not None and not mean:
        return (class_weight.abs().amax().clamp(min=of_loss) * of_logits).clamp(min=1)
    return None if of_loss * of_logits <= 1 else of_loss * of_logits


def fake_bwd(dloss, hidden, weight, target, bias, class_weight, lse, ignore_index, smoothing, softcap, z_scale, scale, *needed):
    return fake_gradients(hidden, weight, bias, *needed)


@op(cpu=None, fake=fake_bwd)
def linear_cross_entropy_bwd(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    lse_square_scale: float,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The needed gradients for those of the rows' losses (rows,), from logits made anew; of weight and bias in fp32."""
    gradients = Gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)
    options = ignore_index, label_smoothing, softcap, lse_square_scale, scale
    for rows in chunks(hidden):
        logits = logits_of(hidden[rows], weight, bias)
        arguments = target[rows], class_weight, lse[rows], None, *options, weight.dtype
        gradients.add(rows, cross_entropy_bwd(dloss[rows], logits, *arguments))
        del logits
    return gradients.results


def fake_scale(factor, gradient, dtype):
    return torch.empty_like(gradient, dtype=dtype)


@op(cpu=None, fake=fake_scale)
def linear_cross_entropy_scale(factor: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient times factor (), rounded to dtype in the same pass."""
    # A factor without dimensions would be rounded to gradient's dtype first.
    return torch.mul(gradient, factor.view(1), out=torch.empty_like(gradient, dtype=dtype))


def scaled(factor, gradients, dtypes, needed):
    """The needed gradients times factor, rounded once to the dtypes of their inputs."""
    parts = zip(gradients, dtypes, needed, strict=True)
    return [linear_cross_entropy_scale(factor, g, dtype) if need else None for g, dtype, need in parts]


def rounded(gradients, dtypes, needed):
    return [g.to(dtype) if need else None for g, dtype, need in zip(gradients, dtypes, needed, strict=True)]


class LinearCrossEntropyFunction(Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, bias, class_weight, options, mean, dtype, stats):
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        outputs, lse, totals, gradients = compute(
            hidden, weight, target, bias, class_weight, options, mean, dtype, stats, needed
        )
        ctx.options, ctx.mean, ctx.needed = options, mean, needed
        if mean is None:
            ctx.save_for_backward(hidden, weight, target, bias, class_weight, lse)
        else:
            ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
            factor, most = totals.select(0, 1), excess(weight.dtype, class_weight, *options[3:], mean)
            ctx.save_for_backward(factor if most is None else factor * most, *gradients)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, dloss, *_):
        Function.once("linear_cross_entropy")
        if ctx.mean is None:
            hidden, weight, target, bias, class_weight, lse = ctx.saved_tensors
            arguments = hidden, weight, target, bias, class_weight, lse, *ctx.options, *ctx.needed
            made = linear_cross_entropy_bwd(dloss.float(), *arguments)
            dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
            gradients = rounded(made, dtypes, ctx.needed)
        else:
            factor, *made = ctx.saved_tensors
            gradients = scaled(dloss.float() * factor, made, ctx.dtypes, ctx.needed)
        dhidden, dweight, dbias = gradients
        return dhidden, dweight, None, dbias, None, None, None, None, None


def compute(hidden, weight, target, bias, class_weight, options, mean, dtype, stats, needed=(False, False, False)):
    """((the loss, and the other results if `stats`), logsumexp, totals, gradients of the sum); mean None reduces nothing."""
    if mean is None:
        needed = False, False, False
    losses, lse, predicted, *gradients = linear_cross_entropy_fwd(
        hidden, weight, target, bias, class_weight, *options, stats, mean, *needed
    )
    ignore_index, _, _, z_scale, _ = options
    outputs, lse, totals = reduce(
        losses, lse, predicted, target, class_weight, weight.shape[0], ignore_index, z_scale, mean, dtype, stats
    )
    return outputs, lse, totals, gradients


def run(name, input, linear_weight, target, linear_bias, weight, options, reduction, dtype, stats):
    check_options(name, reduction, *options[1:])
    dtype = result_dtype(input, dtype)
    if linear_weight.dim() > 2 or target.is_floating_point():
        if stats:
            raise NotImplementedError(
                f"{name}: needs linear_weight (V, H) and class indices; linear_cross_entropy takes the rest"
            )
        return (whole(name, input, linear_weight, target, linear_bias, weight, options, reduction, dtype),)
    check_linear(name, "input", input, linear_weight, linear_bias, "linear_")
    weight = check_class_weights(name, weight, linear_weight.shape[0], input)
    shape = input.shape[:-1]
    target = check_classes(name, target, shape, input)
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    mean = None if reduction == "none" else reduction == "mean"
    arguments = (
        input.reshape(math.prod(shape), input.shape[-1]),
        linear_weight,
        target.reshape(-1),
        linear_bias,
        weight,
        options,
        mean,
        dtype,
        stats,
    )
    if needs_grad("linear_cross_entropy", input, linear_weight, linear_bias):
        outputs = LinearCrossEntropyFunction.apply(*arguments)
    else:
        outputs = compute(*arguments)[0]
    return tuple(o.view(shape) if o.dim() else o for o in outputs)


def whole(name, input, linear_weight, target, linear_bias, weight, options, reduction, dtype):
    """The loss for probabilities or a weight (V, d1, ..., H), from logits that exist whole, as torch's own are there."""
    ignore_index, label_smoothing, softcap, z_scale, scale = options
    if input.dim() == 1 and linear_weight.dim() > 2:
        raise ValueError(
            f"{name}: input must be (N, H) where linear_weight has more than two dimensions, got {tuple(input.shape)}; "
            "add a batch of one, input[None] and target[None]"
        )
    if input.dim() > 2:
        raise ValueError(
            f"{name}: input must be (H,) or (N, H) where targets are probabilities or linear_weight has more than two "
            f"dimensions, got {tuple(input.shape)}; flatten it"
        )
    flat, flat_bias = linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten()
    check_linear(name, "input", input, flat, flat_bias, "linear_")
    logits = torch.nn.functional.linear(input, flat, flat_bias)
    logits = logits.view(*input.shape[:-1], *linear_weight.shape[:-1]).float() * scale
    return torch.ops.liger.cross_entropy.default(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        lse_square_scale=z_scale,
        loss_dtype=dtype,
    )


@public
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """cross_entropy of scale · (input · linear_weightᵀ + linear_bias), with its options, a chunk of rows at a time.

    input is (..., H), linear_weight (V, H), linear_bias (V,), of one dtype; under autocast they are cast as F.linear casts.
    target is (...), int64. Logits are fp32, not rounded on the way; the gradient of linear_weight is accumulated in fp32; only
    the gradients that are needed are computed. The loss has input's dtype, fp32 under autocast, or loss_dtype. A target of
    probabilities, or a linear_weight (V, d1, ..., H), takes torch's reference path, whose logits exist whole. Targets out of
    range are as in cross_entropy. Raises ValueError on wrong shapes, devices, dtypes and options.
    """
    options = ignore_index, label_smoothing, softcap, lse_square_scale, scale
    return run(
        "linear_cross_entropy", input, linear_weight, target, linear_bias, weight, options, reduction, loss_dtype, False
    )[0]


@public
def linear_cross_entropy_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    scale: float = 1.0,
    loss_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(the loss of linear_cross_entropy, z-loss, accuracy, predicted classes), as those of cross_entropy_stats."""
    options = ignore_index, label_smoothing, softcap, lse_square_scale, scale
    return run(
        "linear_cross_entropy_stats", input, linear_weight, target, linear_bias, weight, options, reduction, loss_dtype, True
    )
