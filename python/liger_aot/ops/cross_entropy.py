"""Cross entropy:  loss = -log softmax(z)[target],  z = softcap · tanh(logits / softcap) or the logits themselves.

In nats, as torch.nn.functional.cross_entropy, whose weights of classes and label smoothing (arXiv 1512.00567, section 7) it
has. The z-loss, lse_square_scale · logsumexp(z)², is PaLM's (arXiv 2204.02311, section 5), the cap Gemma 2's (arXiv
2408.00118). logsumexp is computed online, in one pass (arXiv 1805.02867).
"""

import functools
import math

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import cdiv
from .._runtime import kernels
from ._check import FLOATS
from ._check import rows_of
from ._check import wide
from ._loss import check_class_weights
from ._loss import check_classes
from ._loss import check_options
from ._loss import check_target
from ._loss import check_target_if_asked
from ._loss import result_dtype

SHORT, BLOCK = 1024, 4096  # numbers of a row that a program takes at once: of rows of no more than SHORT, and of others


def capped(logits, softcap, scale=1.0):
    """The logits that the loss is of."""
    z = wide(logits) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def forward_reference(
    logits, target, weight, ignore_index, label_smoothing, softcap, lse_square_scale, scale=1.0, predict=False
):
    n = logits.shape[-1]
    check_target("cross_entropy", target, ignore_index, n)
    z, valid = capped(logits, softcap, scale), target != ignore_index
    if not n:  # and so no target, of no row
        return z.sum(-1), z.sum(-1), target.new_full(target.shape if predict else (0,), -1)
    y = torch.where(valid, target, 0)
    highest = z.amax(-1).detach()
    base = torch.where(highest == -torch.inf, 0.0, highest)
    log_sum = (z - base[:, None]).exp().sum(-1).log()
    lse = base + log_sum
    loss = log_sum + (base - z.gather(-1, y[:, None])[:, 0])
    if weight is not None:
        loss = loss * wide(weight)[y]
    if label_smoothing:
        ws = z.new_ones(n) if weight is None else wide(weight)
        loss = (1 - label_smoothing) * loss + label_smoothing / n * (lse * ws.sum() - z @ ws)
    if lse_square_scale:
        loss = loss + lse_square_scale * lse.square()
    predicted = torch.where(valid, z.argmax(-1), -1) if predict else target.new_empty(0)
    return torch.where(valid, loss, 0.0), torch.where(valid, lse, 0.0), predicted


def reduce_reference(loss, lse, target, weight, predicted, ignore_index, lse_square_scale, mean, classes, dtype):
    valid = target != ignore_index
    loss, lse, ws = torch.where(valid, loss, 0.0), torch.where(valid, lse, 0.0), valid.to(loss.dtype)
    number, factors = ws.sum(), torch.ones(2, dtype=loss.dtype)
    if mean:
        if weight is not None:
            ws = torch.where(valid, wide(weight)[torch.where(valid, target, 0)], 0.0)
        factors = 1 / torch.stack([ws.sum(), number])
    z_loss = lse_square_scale * lse.square().sum() * factors[1] if lse_square_scale else torch.zeros_like(number)
    accuracy = ((predicted == target) & valid).sum() / number if predicted.numel() else torch.full_like(number, torch.nan)
    result = (loss.sum() * factors[0] + z_loss).to(dtype)
    return result, torch.stack([*torch.where(number == 0, 0.0, factors), z_loss, accuracy])


def backward_reference(
    dloss, logits, target, weight, lse, totals, ignore_index, label_smoothing, softcap, lse_square_scale, scale=1.0, dtype=None
):
    n = logits.shape[-1]
    if not n:
        return torch.empty_like(logits, dtype=dtype)
    z, valid = capped(logits, softcap, scale), target != ignore_index
    y = torch.where(valid, target, 0)
    upstream = torch.where(valid, wide(dloss), 0.0)
    loss_factor, z_factor = (1.0, 1.0) if totals is None else (torch.where(valid, totals[i], 1.0) for i in (0, 1))
    ws = z.new_ones(n) if weight is None else wide(weight)
    picked = upstream * loss_factor * (1 - label_smoothing) * ws[y]
    spread = upstream * loss_factor * label_smoothing / n
    share = picked + spread * ws.sum() + 2 * upstream * z_factor * lse_square_scale * lse
    dz = torch.where(valid[:, None], share[:, None] * (z - lse[:, None]).exp(), 0.0)
    dz = dz.scatter_add(1, y[:, None], -picked[:, None])
    if label_smoothing:
        dz = dz - spread[:, None] * ws
    if softcap is not None:
        dz = dz * (1 - (z / softcap).square())
    return (dz * scale).to(dtype or logits.dtype)


@functools.cache
def _constants(block, capped, predict):
    return {"SOFTCAP": capped} | ({} if predict is None else {"PREDICT": predict}) | {"BLOCK": block}


def tile(n, softcap, predict=None):
    """The constants of a kernel for rows of n numbers."""
    short = type(n) is int and n <= SHORT and softcap is None
    return _constants(SHORT if short else BLOCK, softcap is not None, predict)


def class_weights(weight, label_smoothing, absent):
    """(weight, the sum of its numbers, has_weight) as the kernels take them; the sum where it is of use."""
    if weight is None:
        return absent, absent, 0
    return weight.contiguous(), weight.sum() if label_smoothing else weight, 1


@op(cpu=forward_reference)
def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    lse_square_scale: float,
    scale: float = 1.0,
    predict: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logsumexp, where the largest logit is, if `predict`) of each row of scale · logits (rows, classes)."""
    logits, stride, rows, n = rows_of(logits)
    target = target.contiguous()
    check_target_if_asked("cross_entropy", target, ignore_index, n)
    loss, lse = logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.float32)
    ws, total, has_weight = class_weights(weight, label_smoothing, lse)
    predicted = target.new_empty(rows if predict else 0)
    cap = 1.0 if softcap is None else softcap
    kernels.cross_entropy_fwd[(rows,)](
        logits, target, ws, total, loss, lse, predicted, stride, n, ignore_index,
        label_smoothing, cap, scale, lse_square_scale, has_weight, **tile(n, softcap, predict),
    )  # fmt: skip
    return loss, lse, predicted


@op(cpu=reduce_reference)
def cross_entropy_reduce(
    loss: Tensor,
    lse: Tensor,
    target: Tensor,
    weight: Tensor | None,
    predicted: Tensor,
    ignore_index: int,
    lse_square_scale: float,
    mean: bool,
    classes: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The mean or sum of the rows' losses plus the z-loss; and [1 / Σ weights, 1 / rows, z-loss, accuracy].

    The first two, which the gradients are multiplied by, are 1 for a sum, and 0 where there is no row.
    """
    result, totals, rows = loss.new_empty((), dtype=dtype), loss.new_empty(4), target.numel()
    ws, has_weight, has_predicted = (
        (loss, 0, predicted.numel()) if weight is None else (weight.contiguous(), 1, predicted.numel())
    )
    kernels.cross_entropy_reduce[(1,)](
        loss, lse, target.contiguous(), ws, predicted, result, totals,
        rows, classes, ignore_index, lse_square_scale, mean, has_weight, has_predicted, BLOCK=2048,
    )  # fmt: skip
    return result, totals


@op(cpu=backward_reference)
def cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    totals: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    lse_square_scale: float,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The gradient of logits, rounded to dtype, from that of the reduced loss () or of the rows' losses (rows,)."""
    logits, stride, rows, n = rows_of(logits)
    dloss = dloss.float()
    dlogits = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
    ws, total, has_weight = class_weights(weight, label_smoothing, lse)
    factors, has_totals = (lse, 0) if totals is None else (totals, 1)
    constants = tile(n, softcap)
    kernels.cross_entropy_bwd[(rows * cdiv(n, constants["BLOCK"]),)](
        dloss, logits, target.contiguous(), ws, total, lse, factors, dlogits, dloss.stride(0) if dloss.dim() else 0,
        stride, n, ignore_index, label_smoothing, 1.0 if softcap is None else softcap, scale, lse_square_scale, has_weight,
        has_totals, **constants,
    )  # fmt: skip
    return dlogits


class CrossEntropyFunction(Function):
    @staticmethod
    def forward(ctx, logits, target, weight, options, mean, dtype, stats):
        outputs, lse, totals = compute(logits, target, weight, options, mean, dtype, stats)
        ctx.save_for_backward(logits, target, weight, lse, totals)
        ctx.options = options
        if stats:
            ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, dloss, *_):
        Function.once("cross_entropy")
        logits, target, weight, lse, totals = ctx.saved_tensors
        dlogits = cross_entropy_bwd(dloss, logits, target, weight, lse, totals, *ctx.options)
        return dlogits, None, None, None, None, None, None


def compute(logits, target, weight, options, mean, dtype, stats):
    """((the loss, and the other results if `stats`), logsumexp, totals); mean is None where nothing is reduced."""
    ignore_index, label_smoothing, softcap, z_scale = options
    row_z_scale = z_scale if mean is None else 0.0
    loss, lse, predicted = cross_entropy_fwd(
        logits, target, weight, ignore_index, label_smoothing, softcap, row_z_scale, 1.0, stats
    )
    return reduce(loss, lse, predicted, target, weight, logits.shape[-1], ignore_index, z_scale, mean, dtype, stats)


def reduce(loss, lse, predicted, target, weight, classes, ignore_index, z_scale, mean, dtype, stats):
    """What compute returns, from the results for each row."""
    if mean is None:
        outputs, totals = (loss.to(dtype),), None
        if stats:
            valid = target != ignore_index
            z_loss = torch.where(valid, z_scale * lse.square(), 0.0)
            outputs += z_loss, ((predicted == target) & valid).float(), predicted
        return outputs, lse, totals
    loss, totals = cross_entropy_reduce(loss, lse, target, weight, predicted, ignore_index, z_scale, mean, classes, dtype)
    # select, since an index wants CUDA of a fake tensor there, too: programs are exported where there is none.
    return (loss, *(totals.select(0, n).clone() for n in (2, 3)), predicted) if stats else (loss,), lse, totals


def run(name, input, target, weight, options, reduction, dtype, stats):
    if input.dtype not in FLOATS:
        raise ValueError(f"{name}: input must be float32, float16 or bfloat16, got {input.dtype}")
    shape = list(input.shape)
    if not shape:
        raise ValueError(f"{name}: input must have shape (C,) or (N, C, ...), got ()")
    check_options(name, reduction, *options[1:])
    dim = 0 if len(shape) == 1 else 1
    classes, shape = shape.pop(dim), tuple(shape)
    weight, dtype = check_class_weights(name, weight, classes, input), result_dtype(input, dtype)
    if target.is_floating_point():
        if stats:
            raise NotImplementedError(f"{name}: target must be class indices, got {target.dtype}; cross_entropy takes both")
        return (with_probabilities(input, target, weight, options, reduction).to(dtype),)
    target = check_classes(name, target, shape, input)
    flat = len(shape) == dim == 1
    logits = input if flat else input.movedim(dim, -1).reshape(math.prod(shape), classes)
    mean = None if reduction == "none" else reduction == "mean"
    arguments = logits, target if flat else target.reshape(-1), weight, options, mean, dtype, stats
    outputs = CrossEntropyFunction.apply(*arguments) if needs_grad("cross_entropy", input) else compute(*arguments)[0]
    return outputs if flat else tuple(o.view(shape) if o.dim() else o for o in outputs)


def with_probabilities(input, target, weight, options, reduction):
    """The loss for a target of probabilities, differentiable by input and target, in plain torch, with all of log softmax."""
    if target.shape != input.shape:
        raise ValueError(f"cross_entropy: target must have shape {tuple(input.shape)} or be int64, got {tuple(target.shape)}")
    ignore_index, label_smoothing, softcap, z_scale = options
    if target.device != input.device:
        raise ValueError(
            f"cross_entropy: target must be on {input.device} like the input, got {target.device}; move it with .to()"
        )
    if ignore_index >= 0:
        raise ValueError(
            f"cross_entropy: ignore_index must be negative, unused, where targets are probabilities, got {ignore_index}"
        )
    z = capped(input, softcap)
    loss = torch.nn.functional.cross_entropy(z, target.float(), weight, reduction=reduction, label_smoothing=label_smoothing)
    if not z_scale:
        return loss
    squares = torch.logsumexp(z, 0 if z.dim() == 1 else 1).square() * z_scale
    return loss + (squares if reduction == "none" else getattr(squares, reduction)())


@public
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch.nn.functional.cross_entropy of softcap · tanh(input / softcap), plus lse_square_scale · logsumexp².

    input is (C,) or (N, C, ...), target the class indices () or (N, ...), or probabilities of input's shape, for which plain
    torch is used. Arithmetic is fp32; the loss has input's dtype, fp32 under autocast, or loss_dtype. The mean of the z-loss is
    over the targets that are not ignored, without their weights; that of the rest is infinite or NaN where all weights are 0.
    An input of more than two dimensions is copied, unless its classes lie side by side. A target out of range is a ValueError
    on CPU; on CUDA that row's loss and gradient are NaN, unless LIGER_AOT_CHECK=1 was in the environment at import. Raises
    ValueError on wrong shapes, devices, dtypes and options.
    """
    options = ignore_index, label_smoothing, softcap, lse_square_scale
    return run("cross_entropy", input, target, weight, options, reduction, loss_dtype, False)[0]


@public
def cross_entropy_stats(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    loss_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(the loss of cross_entropy, z-loss, accuracy, predicted classes); only the first is differentiable.

    The z-loss is the part of the loss that lse_square_scale adds. The accuracy is the share of targets, those ignored left out,
    that have the largest logit; reduction "none" gives both for each target, fp32, 0 where ignored. The predicted classes are
    int64 of target's shape, -1 where ignored.
    """
    options = ignore_index, label_smoothing, softcap, lse_square_scale
    return run("cross_entropy_stats", input, target, weight, options, reduction, loss_dtype, True)
