"""Kullback-Leibler divergence:  loss = target · (log target - input),  or  exp(target) · (target - input)  if log_target.

The signature is torch.nn.functional.kl_div's: input is the logarithm of the distribution that is fitted, target the other one.
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from .._runtime import kernels
from ._check import wide
from ._divergence import BLOCK
from ._divergence import check_eps
from ._divergence import given
from ._divergence import jsd_slope
from ._divergence import jsd_terms
from ._divergence import launch_bwd
from ._divergence import launch_fwd
from ._divergence import prepare
from ._divergence import reference_bwd
from ._divergence import reference_fwd

# (beta, 1 - beta): of log-probabilities it is the Jensen-Shannon divergence with beta 0, and where the two change places, for
# the gradient of the target, that with beta 1.
FIRST, SECOND = (0.0, 1.0), (1.0, 0.0)


def reduce_reference(losses, labels, ignore_index, batch, width, dtype):
    count = losses.numel() if labels is None else (labels != ignore_index).sum()
    number = torch.as_tensor((batch or count) * width, dtype=losses.dtype)
    return (losses.sum() / number).to(dtype), torch.where(number == 0, 0.0, 1 / number)


@op(cpu=reduce_reference)
def divergence_reduce(
    losses: Tensor, labels: Tensor | None, ignore_index: int, batch: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(the sum of the rows' losses over batch · width, what that multiplies the gradients by, 0 where nothing is counted).

    With batch 0 that many as there are rows whose label is not ignore_index.
    """
    result, factor = losses.new_empty((), dtype=dtype), losses.new_empty(())
    labels, has_labels = given(labels, losses)
    kernels.divergence_reduce[(1,)](
        losses, labels, result, factor, losses.numel(), batch, width, ignore_index, has_labels, BLOCK=BLOCK
    )
    return result, factor


def forward_reference(input, target, labels, ignore_index, log_target, eps, each):
    if log_target:
        _, _, _, losses = jsd_terms(input, target, *FIRST)
    else:
        t = wide(target)
        losses = torch.where(t == 0, 0.0, t * (t.clamp(min=eps).log() - wide(input)))
    return reference_fwd(losses, input, labels, ignore_index, each)


def backward_reference(dloss, input, target, labels, factor, ignore_index, log_target, eps, need_input, need_target):
    t = wide(target)
    if log_target:
        q, p, q_term, _ = jsd_terms(target, input, *SECOND)
        slopes = -t.exp(), jsd_slope(q, p, q_term, *SECOND)
    else:
        slopes = -t, t.clamp(min=eps).log() - wide(input) + (t > eps)
    return tuple(
        reference_bwd(slope, dloss, x, labels, factor, ignore_index) if needed else x.new_empty(0)
        for needed, slope, x in zip((need_input, need_target), slopes, (input, target), strict=True)
    )


@op(cpu=forward_reference)
def kl_div_fwd(
    input: Tensor, target: Tensor, labels: Tensor | None, ignore_index: int, log_target: bool, eps: float, each: bool
) -> Tensor:
    """The divergence of each number, in input's dtype, or the sum over each row, fp32; 0 where the label is ignore_index."""
    kind = "jsd" if log_target else "kl"
    return launch_fwd(kind, input, target, labels, ignore_index, each, *FIRST, eps)


@op(cpu=backward_reference)
def kl_div_bwd(
    dloss: Tensor,
    input: Tensor,
    target: Tensor,
    labels: Tensor | None,
    factor: Tensor | None,
    ignore_index: int,
    log_target: bool,
    eps: float,
    need_input: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """The needed gradients, from that of each number's divergence, or with a factor of the reduced loss."""
    kinds = ("jsd", "jsd") if log_target else ("kl", "kl_target")
    pairs = (input, target), (target, input) if log_target else (input, target)
    options = labels, factor, ignore_index
    dinput = launch_bwd(kinds[0], dloss, *pairs[0], *options, *FIRST) if need_input else input.new_empty(0)
    dtarget = launch_bwd(kinds[1], dloss, *pairs[1], *options, *SECOND, eps) if need_target else target.new_empty(0)
    return dinput, dtarget


def reduced(losses, labels, ignore_index, over, dtype):
    """(the loss, the factor of divergence_reduce) of the losses of the rows; with over None, those of each number."""
    if over is None:
        return losses.to(dtype), None
    return divergence_reduce(losses, labels, ignore_index, *over, dtype)


class KLDivFunction(Function):
    @staticmethod
    def forward(ctx, input, target, labels, ignore_index, log_target, eps, over, dtype):
        losses = kl_div_fwd(input, target, labels, ignore_index, log_target, eps, over is None)
        loss, factor = reduced(losses, labels, ignore_index, over, dtype)
        ctx.save_for_backward(input, target, labels, factor)
        ctx.options = ignore_index, log_target, eps
        return loss

    @staticmethod
    def backward(ctx, dloss):
        Function.once("kl_div")
        needed = ctx.needs_input_grad[:2]
        gradients = kl_div_bwd(dloss, *ctx.saved_tensors, *ctx.options, *needed)
        return *(g if n else None for g, n in zip(gradients, needed, strict=True)), None, None, None, None, None, None


@public
def kl_div(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    *,
    reduction: str = "mean",
    log_target: bool = False,
    ignore_index: int = -100,
    eps: float = 0.0,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch.nn.functional.kl_div of input, log-probabilities (..., C), and target, probabilities or with log_target their logs.

    The reductions are torch's: "mean" is over all numbers, "batchmean" divides the sum by input.shape[0]. With shift_labels
    (...), int64, the rows of label ignore_index count for nothing, whatever they hold, and "batchmean" divides by the number of
    the others. Where the target is 0 so is the loss; torch has NaN there where input is -inf. eps, as Liger has it, is what a
    target below is taken for under the logarithm. Both get gradients. Dtypes are as in jsd. Raises ValueError on wrong shapes,
    devices, dtypes and options.
    """
    batch = input.shape[0] if input.dim() else 0
    input, target, labels, over, dtype = prepare("kl_div", input, target, shift_labels, reduction, loss_dtype, batch)
    check_eps("kl_div", eps)
    options = ignore_index, log_target, eps
    if needs_grad("kl_div", input, target):
        return KLDivFunction.apply(input, target, labels, *options, over, dtype)
    losses = kl_div_fwd(input, target, labels, *options, over is None)
    return reduced(losses, labels, ignore_index, over, dtype)[0]
