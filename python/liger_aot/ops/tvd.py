"""Total variation distance:  loss = Σ |p - q| / 2  of two distributions p and q.

Half of torch.nn.functional.l1_loss(p, q, reduction="sum"); Levin and Peres, Markov Chains and Mixing Times, proposition 4.2.
"""

import torch
from torch import Tensor

from .._op import Function
from .._op import needs_grad
from .._op import op
from .._op import public
from ._check import wide
from ._divergence import launch_bwd
from ._divergence import launch_fwd
from ._divergence import prepare
from ._divergence import reference_bwd
from ._divergence import reference_fwd
from .kl_div import reduced


def forward_reference(p, q, labels, ignore_index, each):
    return reference_fwd(0.5 * (wide(p) - wide(q)).abs(), p, labels, ignore_index, each)


def backward_reference(dloss, p, q, labels, factor, ignore_index, need_p, need_q):
    slope = 0.5 * (wide(p) - wide(q)).sign()
    return tuple(
        reference_bwd(s, dloss, x, labels, factor, ignore_index) if needed else x.new_empty(0)
        for needed, s, x in ((need_p, slope, p), (need_q, -slope, q))
    )


@op(cpu=forward_reference)
def tvd_fwd(p: Tensor, q: Tensor, labels: Tensor | None, ignore_index: int, each: bool) -> Tensor:
    """The distance of each number, in p's dtype, or the sum over each row, fp32; 0 where the label is ignore_index."""
    return launch_fwd("tvd", p, q, labels, ignore_index, each)


@op(cpu=backward_reference)
def tvd_bwd(
    dloss: Tensor,
    p: Tensor,
    q: Tensor,
    labels: Tensor | None,
    factor: Tensor | None,
    ignore_index: int,
    need_p: bool,
    need_q: bool,
) -> tuple[Tensor, Tensor]:
    """The needed gradients, from that of each number's distance, or with a factor of the reduced loss."""
    options = labels, factor, ignore_index
    dp = launch_bwd("tvd", dloss, p, q, *options) if need_p else p.new_empty(0)
    dq = launch_bwd("tvd", dloss, q, p, *options) if need_q else q.new_empty(0)
    return dp, dq


class TVDFunction(Function):
    @staticmethod
    def forward(ctx, p, q, labels, ignore_index, over, dtype):
        losses = tvd_fwd(p, q, labels, ignore_index, over is None)
        loss, factor = reduced(losses, labels, ignore_index, over, dtype)
        ctx.save_for_backward(p, q, labels, factor)
        ctx.ignore_index = ignore_index
        return loss

    @staticmethod
    def backward(ctx, dloss):
        Function.once("tvd")
        needed = ctx.needs_input_grad[:2]
        gradients = tvd_bwd(dloss, *ctx.saved_tensors, ctx.ignore_index, *needed)
        return *(g if n else None for g, n in zip(gradients, needed, strict=True)), None, None, None, None


@public
def tvd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    loss_dtype: torch.dtype | None = None,
) -> Tensor:
    """Half the sum of |input - target|, of probabilities (..., C).

    The two are of one device; where their dtypes differ they are widened to fp32. shift_labels, (...) and int64, says by
    ignore_index which rows count for nothing, whatever they hold. reduction "batchmean" divides the sum by the number of the
    other rows, "mean" that by C too, "none" gives the loss of each number. Both get gradients, 0 where they are equal.
    Arithmetic is fp32; the loss has input's dtype, fp32 under autocast, or loss_dtype. Raises ValueError on wrong shapes,
    devices, dtypes and options.
    """
    input, target, labels, over, dtype = prepare("tvd", input, target, shift_labels, reduction, loss_dtype)
    if needs_grad("tvd", input, target):
        return TVDFunction.apply(input, target, labels, ignore_index, over, dtype)
    losses = tvd_fwd(input, target, labels, ignore_index, over is None)
    return reduced(losses, labels, ignore_index, over, dtype)[0]
